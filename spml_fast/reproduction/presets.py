"""Which runs a comparison has, with which options, and what the papers say of them.

Where a paper searched for a value and does not name the one it took, the entry's note says so.

Source: docs/sources.md#published-results (test mAP), docs/sources.md#cole, #em, #large-loss and #boostlu
(hyper-parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spml_fast.core.errors import UserError
from spml_fast.reproduction.entries import PLAIN, STATEMENTS, Entry, Preset
from spml_fast.reproduction.photos import PHOTOS

DIGITS = (
    Entry("full", "full", "digits.yaml", PLAIN, note="every label known"),
    Entry("an", "an", "digits.yaml", PLAIN),
    Entry("an_boost", "an", "digits.yaml", ("--model.alpha_train", "5"), note="BoostLU in training too"),
    Entry("em", "em", "digits.yaml", PLAIN),
    Entry("ll_r", "ll_r", "digits.yaml", (*PLAIN, "--method.delta_rel", "2"), note="delta_rel 2"),
    Entry(
        "ll_r_boost",
        "ll_r",
        "digits.yaml",
        ("--method.delta_rel", "2"),
        note="delta_rel 2, BoostLU in training too",
    ),
    Entry("ignore", "ignore", "digits_ignore.yaml", note="see the recipe digits_ignore"),
)


def _digits(name: str, *options: str, note: str = "") -> Entry:
    return Entry(name, name, "digits.yaml", (*PLAIN, *options), note=note)


# Mean number of digits in a training scene, which EPR and ROLE are given as k (a statistic of the full labels).
_DIGITS_POSITIVES = ("--method.expected_positives", "2.65")

# The other methods, run on request.
MORE_DIGITS = (
    _digits("full_ls"),
    _digits("an_ls"),
    _digits("wan"),
    _digits("epr", *_DIGITS_POSITIVES, note="k 2.65"),
    _digits("role", *_DIGITS_POSITIVES, note="k 2.65"),
    _digits("em_apl"),
    _digits("asl"),
    _digits("splc"),
    _digits("hill"),
    _digits("gr"),
    _digits("iun", note="oracle: all true negatives known"),
    _digits("ll_ct", "--method.delta_rel", "2", note="delta_rel 2"),
    _digits("ll_cp", "--method.delta_rel", "1", note="delta_rel 1"),
    Entry(
        "ignore_every_2", "ignore", "digits_ignore.yaml", ("--method.masked_every", "2"), note="masked every 2nd step"
    ),
    Entry("ignore_half", "ignore", "digits_ignore.yaml", ("--method.masked_scale", "0.5"), note="masked at half size"),
    Entry("ignore_off", "ignore", "digits_ignore.yaml", ("--method.ignore", "false"), note="rejects nothing"),
    Entry("q2l_full", "full", "digits_q2l.yaml", note="Query2Label head, every label known", alphas=(1,)),
    Entry("q2l_an", "an", "digits_q2l.yaml", note="Query2Label head", alphas=(1,)),
    Entry("q2l_ignore", "ignore", "digits_q2l.yaml", note="Query2Label head, warm-up 6", alphas=(1,)),
)


@dataclass(frozen=True)
class _Paper:
    """One real data set: hyper-parameters that differ between data sets, and published test mAP.

    Attributes:
        name: of the preset, and how its recipes begin.
        positives: k of EPR and ROLE.
        entropy: alpha of EM.
        apl: (warm_up, beta) of APL.
        em: (learning rate, batch size) of EM and EM+APL.
        linear_batch: batch size of ROLE's linear-init phase.
        delta: per cent an epoch of LL-R, LL-Ct, LL-Cp in the Large Loss paper.
        boostlu: numbers of BoostLU's main table, by entry.
        boosted_an: assumed negative with alpha 5 at inference only, from BoostLU's poster.
        scenario: assumed negative with alpha 5 in training too, from the same.
        large_loss: numbers of the Large Loss paper, end to end and after linear-init, by entry.
        query2label: numbers of CALR's table, by entry.
    """

    name: str
    positives: str
    entropy: str
    apl: tuple[str, str]
    em: tuple[str, str]
    linear_batch: str
    delta: tuple[str, str, str]
    boostlu: dict[str, float]
    large_loss: dict[str, tuple[float, float]]
    query2label: dict[str, float]
    boosted_an: float | None = None
    scenario: float | None = None

    def preset(self) -> Preset:
        """Entries in the order of the papers' tables."""
        boost, released = f"{self.name}_boostlu.yaml", f"{self.name}_large_loss.yaml"
        ignore, query = f"{self.name}_ignore.yaml", f"{self.name}_ignore_q2l.yaml"
        expected = ("--method.expected_positives", self.positives)
        # One learning rate for all parameters; stops at the first epoch without a better validation mAP.
        em: tuple[str, ...] = (
            "--method.alpha",
            self.entropy,
            "--train.lr",
            self.em[0],
            "--train.batch_size",
            self.em[1],
        )
        em += ("--train.head_lr_multiplier", "1", "--train.stop_after_drop", "1e-9")
        apl = ("--method.warm_up", self.apl[0], "--method.beta", self.apl[1])
        linear = ("--train.linear_epochs", "25")
        role_linear = (*linear, "--train.linear_lr", "1e-3", "--train.batch_size", self.linear_batch)
        searched = "learning rate searched by its authors; 1e-5 here"
        number = self.boostlu

        def plain(name: str, method: str, *options: str, note: str = "") -> Entry:
            published = {"1": number[name]} if name in number else {}
            if name == "an" and self.boosted_an is not None:
                published["5"] = self.boosted_an
            return Entry(name, method, boost, (*PLAIN, *options), published, note)

        entries = [
            plain("full", "full", note="every label known"),
            plain("an", "an"),
            Entry(
                "an_boost", "an", boost, (), {} if self.scenario is None else {"5": self.scenario}, "from the poster"
            ),
            plain("an_ls", "an_ls"),
            plain("asl", "asl", note="training recipe not published for this comparison; AN's here"),
            plain("role", "role", *expected, "--train.head_lr_multiplier", "1", note=searched),
            plain("role_li", "role", *expected, "--train.head_lr_multiplier", "1", *role_linear, note="linear-init"),
            plain("em", "em", *em),
            plain("em_apl", "em_apl", *em, *apl),
        ]
        for scheme in ("ll_r", "ll_ct", "ll_cp"):
            shared = ("--method.ties", "inclusive", "--method.batch_semantics", "paper")
            entries.append(plain(scheme, scheme, *shared))
            entries.append(Entry(f"{scheme}_boost", scheme, boost, shared, {"5": number[f"{scheme}_boost"]}))
        entries.append(Entry("ignore", "ignore", ignore, note="no published numbers of this network"))
        default = tuple(e.name for e in entries)
        entries += self._large_loss(released, expected, linear)
        entries += self._query2label(query, expected, apl)
        note = (
            "published: BoostLU's main table (ResNet-50), alpha 5 of AN from its poster; *_2022 and *_2022_li: the "
            "Large Loss paper, end to end and after linear-init; q2l_*: CALR, with Query2Label"
        )
        statements = tuple(s for s in STATEMENTS if "1.5 points" not in s.text)
        return Preset(self.name, tuple(entries), statements, default, note)

    def _large_loss(self, recipe: str, expected: tuple[str, ...], linear: tuple[str, ...]) -> list[Entry]:
        """The Large Loss paper's own rows."""
        methods: dict[str, tuple[str, tuple[str, ...]]] = {
            "full": ("full", ()),
            "an": ("an", ()),
            "wan": ("wan", ()),
            "an_ls": ("an_ls", ()),
            "epr": ("epr", expected),
            "role": ("role", expected),
        }
        for scheme, delta in zip(("ll_r", "ll_ct", "ll_cp"), self.delta, strict=True):
            paper = ("--method.ties", "strict_flips", "--method.batch_semantics", "paper")
            methods[scheme] = (scheme, ("--method.delta_rel", delta, *paper))
        out = []
        for name, (method, options) in methods.items():
            end_to_end, initialised = self.large_loss[name]
            out.append(Entry(f"{name}_2022", method, recipe, options, {"1": end_to_end}))
            out.append(Entry(f"{name}_2022_li", method, recipe, (*options, *linear), {"1": initialised}))
        return out

    def _query2label(self, recipe: str, expected: tuple[str, ...], apl: tuple[str, ...]) -> list[Entry]:
        """CALR's rows."""
        entropy = ("--method.alpha", self.entropy)
        options: dict[str, tuple[str, ...]] = {
            "an": (),
            "wan": (),
            "epr": expected,
            "an_ls": (),
            "role": expected,
            "em": entropy,
            "em_apl": (*entropy, *apl),
            "ignore": ("--method.preset", "calr", "--method.cam_threshold", "0.5"),
        }
        return [
            Entry(f"q2l_{name}", name, recipe, given, {"1": self.query2label[name]}, "Query2Label", (1,))
            for name, given in options.items()
        ]


def _columns(table: str) -> list[dict[str, float]]:
    """Columns of a table of numbers whose rows begin with a name."""
    rows = [line.split() for line in table.strip().splitlines()]
    return [{name: float(values[i]) for name, *values in rows} for i in range(len(rows[0]) - 1)]


# Columns: VOC, COCO, NUS-WIDE, CUB. Source: BoostLU, main table (docs/sources.md#published-results).
_BOOSTLU = _columns("""
    full         89.42  76.78  52.08  30.90
    an           85.89  64.92  42.27  18.31
    an_ls        87.90  67.15  43.77  16.26
    asl          87.76  68.78  46.93  18.81
    role         87.77  67.04  41.63  13.66
    role_li      88.26  69.12  45.98  14.86
    em           89.09  70.70  47.15  20.85
    em_apl       89.19  70.87  47.59  21.84
    ll_r         88.27  70.70  48.76  19.56
    ll_r_boost   89.29  72.89  49.59  19.80
    ll_ct        87.79  70.29  48.08  19.06
    ll_ct_boost  88.61  71.78  48.37  19.25
    ll_cp        87.44  70.27  47.92  19.21
    ll_cp_boost  87.81  71.41  48.61  19.34
""")

# The same four end to end, then after linear-init. Source: Large Loss, main table (docs/sources.md#published-results).
_LARGE_LOSS = _columns("""
    full   90.2  78.0  54.5  32.9   91.1  77.2  54.9  34.0
    an     85.1  64.1  42.0  19.1   86.9  68.7  47.6  20.9
    wan    86.5  64.8  46.3  20.3   87.1  68.0  47.5  21.1
    an_ls  86.7  66.9  44.9  17.9   86.5  69.2  50.5  16.6
    epr    85.5  63.3  46.0  20.0   84.9  66.8  48.1  21.2
    role   87.9  66.3  43.1  15.0   88.2  69.0  51.0  16.8
    ll_r   89.2  71.0  47.4  19.5   89.4  71.9  49.1  21.5
    ll_ct  89.0  70.5  48.0  20.4   89.3  71.6  49.6  21.8
    ll_cp  88.4  70.7  48.3  20.1   88.3  71.0  49.4  21.4
""")

# `ignore` is CALR. Source: CALR, table 1 (docs/sources.md#published-results).
_QUERY2LABEL = _columns("""
    an      87.6  72.3  48.5  18.6
    wan     89.2  73.5  48.5  22.5
    epr     88.8  72.7  49.3  23.1
    an_ls   88.0  70.9  47.1  16.3
    role    88.1  69.6  44.5  14.2
    em      89.2  73.2  48.7  22.2
    em_apl  89.2  73.1  48.6  23.6
    ignore  90.1  76.1  52.8  23.4
""")


def _both(column: int) -> dict[str, tuple[float, float]]:
    return {name: (value, _LARGE_LOSS[column + 4][name]) for name, value in _LARGE_LOSS[column].items()}


_PAPERS = (
    _Paper(
        "voc",
        positives="1.5",
        entropy="0.2",
        apl=("5", "0.02"),
        em=("1e-5", "8"),
        linear_batch="16",
        delta=("0.2", "0.2", "0.1"),
        boostlu=_BOOSTLU[0],
        large_loss=_both(0),
        query2label=_QUERY2LABEL[0],
        boosted_an=87.31,
        scenario=86.73,
    ),
    _Paper(
        "coco",
        positives="2.9",
        entropy="0.1",
        apl=("5", "0.9"),
        em=("1e-5", "16"),
        linear_batch="16",
        delta=("0.4", "0.2", "0.2"),
        boostlu=_BOOSTLU[1],
        large_loss=_both(1),
        query2label=_QUERY2LABEL[1],
        boosted_an=66.27,
        scenario=65.33,
    ),
    _Paper(
        "nuswide",
        positives="1.9",
        entropy="0.1",
        apl=("4", "0.2"),
        em=("1e-5", "16"),
        linear_batch="16",
        delta=("0.4", "0.2", "0.2"),
        boostlu=_BOOSTLU[2],
        large_loss=_both(2),
        query2label=_QUERY2LABEL[2],
    ),
    _Paper(
        "cub",
        positives="31.4",
        entropy="0.01",
        apl=("3", "0.4"),
        em=("1e-4", "8"),
        linear_batch="8",
        delta=("0.4", "0.4", "0.2"),
        boostlu=_BOOSTLU[3],
        large_loss=_both(3),
        query2label=_QUERY2LABEL[3],
    ),
)

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "digits",
        DIGITS + MORE_DIGITS,
        STATEMENTS,
        tuple(e.name for e in DIGITS),
        "digit scenes: learning rate 3e-3 (Query2Label 1e-3), 12 epochs, batch 32, AdamW, one-cycle, test_resnet from "
        "random weights, warm-up 3 epochs for IGNORE as published (6 with Query2Label); "
        "the papers: 1e-5, 10 epochs (IGNORE 25), batch 16, "
        "Adam, constant, pretrained ResNet-50",
    ),
    "photos": PHOTOS,
    **{paper.name: paper.preset() for paper in _PAPERS},
}


def get_preset(name: str) -> Preset:
    """The preset called `name`; `UserError` lists those that exist."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def choose_entries(preset: Preset, names: Sequence[str] | None) -> list[Entry]:
    """The entries called `names` (all of the preset's defaults for None), in the preset's order."""
    known = {e.name: e for e in preset.entries}
    for name in names or ():
        if name not in known:
            raise UserError(f"preset {preset.name} has no method {name!r}; it has {', '.join(known)}")
    wanted = names or preset.default
    return [e for e in preset.entries if e.name in wanted]

"""The papers' statements on photographs with labels of one's own, on a machine without a GPU.

All hyper-parameters of the comparison stand here. Where the papers' do not suit a small set of photographs, the entry's
note says what was taken in their place. What one run costs is in docs/results.md.
"""

from __future__ import annotations

from spml_fast.reproduction.entries import PLAIN, STATEMENTS, Entry, Preset, Statement, better

RECIPE = "finetune.yaml"
# One small network at a size that two cores can train, and four epochs of everything: the same for every entry, in
# fp32 on every processor; the weights of an epoch's end, as the papers evaluate them, and no average.
NETWORK = ("--model.backbone", "tf_efficientnet_lite0", "--data.image_size", "128", "--train.precision", "fp32")
LAST = ("--train.average_weights", "false")
EPOCHS = ("--train.epochs", "4", "--train.batch_size", "16", "--train.patience", "0", *LAST)
# The head first: by steps, since not every method has a loss that a head can be solved for; or solved for, as the
# recipe does where it can.
STEPS = (*NETWORK, "--train.linear_epochs", "3", *EPOCHS, "--train.linear", "sgd")
SOLVED = (*NETWORK, *EPOCHS, "--train.linear", "solve")
BOOSTED = ("--model.alpha_train", "5")
# LL-R leaves out (t - 1) x delta_rel per cent of the unknown labels in epoch t: up to 3.9% in the fourth, the fraction
# of hidden positives among the unknown labels where an image has two positives, one of them observed, of 25 classes.
DELTA = ("--method.delta_rel", "1.3")
# One epoch of four that rejects nothing; published are 3 of 25 (VOC, COCO).
WARM_UP = ("--method.warm_up", "1")


def _photos(
    name: str,
    method: str,
    *options: str,
    note: str = "",
    alpha: tuple[str, ...] = PLAIN,
    head: tuple[str, ...] = STEPS,
) -> Entry:
    return Entry(name, method, RECIPE, (*head, *alpha, *options), note=note)


ENTRIES = (
    _photos("full", "partial", "--data.train_labels", "known", note="every label that is known"),
    _photos("an", "an"),
    _photos("an_boost", "an", alpha=BOOSTED, note="BoostLU in training too"),
    _photos("ll_r", "ll_r", *DELTA, note="delta_rel 1.3"),
    _photos("ll_r_boost", "ll_r", *DELTA, alpha=BOOSTED, note="delta_rel 1.3, BoostLU in training too"),
    _photos("ignore", "ignore", *WARM_UP, note="warm-up 1"),
    _photos("em", "em", "--method.alpha", "0.1", note="alpha 0.1, as for COCO"),
    _photos("gr", "gr", "--method.w_end", "10", "--method.b_end", "-8", note="w, b as for COCO"),
    _photos(
        *("full_solved", "partial", "--data.train_labels", "known"),
        note="every label that is known, from a solved head",
        head=SOLVED,
    ),
    _photos("an_solved", "an", note="from a solved head", head=SOLVED),
    _photos("ll_r_solved", "ll_r", *DELTA, note="delta_rel 1.3, from a solved head", head=SOLVED),
)


def half_of_the_gap(means: dict[tuple[str, str], float]) -> bool:
    """Whether one of LL-R + BoostLU, IGNORE and EM closes half of the gap between assumed negative and full labels."""
    names = [(name, alpha) for name in ("ll_r_boost", "ignore", "em") for alpha in ("1", "5")]
    gap = means["full", "1"] - means["an", "1"]
    # Without a gap there is nothing to close.
    return gap > 0 and max(means[name] for name in names) - means["an", "1"] >= gap / 2


PHOTOS = Preset(
    "photos",
    ENTRIES,
    (
        *(statement for statement in STATEMENTS if "1.5 points" not in statement.text),
        Statement("GR beats assumed negative", ("an", "gr"), better(("gr", "1"), ("an", "1"))),
        Statement(
            "LL-R + BoostLU, IGNORE or EM closes at least half of the gap between assumed negative and full labels",
            ("full", "an", "ll_r_boost", "ignore", "em"),
            half_of_the_gap,
        ),
    ),
    tuple(entry.name for entry in ENTRIES),
    "photographs: the recipe finetune with tf_efficientnet_lite0 at 128 px, 3 epochs of the head (or a solved one, as "
    "the recipe has it) and 4 of everything, "
    "batch 16, Adam 3e-3 and then 5e-5, one-cycle, BatchNorm's statistics kept; the papers: ResNet-50 at "
    "448 px, Adam 1e-5, 10 epochs (IGNORE 25), live BatchNorm",
    needs_data="a Manifest of photographs whose training images have one observed positive "
    "(prepare csv --observe single=1)",
)

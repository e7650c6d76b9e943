"""What OpenImages asks for: annotated pairs alone in evaluation, sparse corrections, class balance, recipes, memory."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spml_fast.cli.parse import parse_config
from spml_fast.core.batch import Batch, MicroBatch
from spml_fast.core.config import Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.data import labels as labels_module
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore, SparseLabels
from spml_fast.data.loader import TrainLoader
from spml_fast.data.manifest import Manifest
from spml_fast.data.repeat_factor import RepeatFactorSampler, repeat_factors
from spml_fast.data.sampler import TrainSampler, Windows
from spml_fast.evaluation.evaluate import class_groups, evaluate_split, score_split, table_rows, top_k_rows
from spml_fast.evaluation.metrics import evaluate_scores, groups_by_count
from spml_fast.evaluation.thresholds import top_k_mask
from spml_fast.methods import Progress, get_method
from spml_fast.models.batchnorm import bn_behaviour
from spml_fast.models.classifier import Classifier, HeadOutput, prior_logits
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.runs.recipe import validate
from spml_fast.train.optim import make_optimizer, parameter_groups
from spml_fast.train.trainer import Trainer, TrainingModule
from tests.support.paths import ROOT

CONFIGS = ROOT / "launch" / "configs"
CPU = torch.device("cpu")


def some_labels(images: int, classes: int, each: int, seed: int = 0) -> SparseLabels:
    """`each` known labels an image, rare classes at the end."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    rows = np.repeat(np.arange(images), each)
    chosen = rng.choice(classes, images * each, p=share / share.sum())
    keys = np.unique(rows * classes + chosen)
    codes = (rng.random(len(keys)) < 0.6).astype(np.int8)
    return SparseLabels.from_entries(keys // classes, keys % classes, codes, images, classes)


# --- evaluation ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.sampled_from([-1, 0, 0.5, 2])),
    st.integers(1, 4),
)
def test_top_k_where_the_scores_are(scores, k):
    assert np.array_equal(top_k_rows(torch.from_numpy(scores), k).numpy(), top_k_mask(scores, k))


class Scripted:
    """A classifier and loader whose two means of image i are given."""

    def __init__(self, mean: torch.Tensor, relu: torch.Tensor, batch: int) -> None:
        self.mean, self.relu, self.batch, self.device = mean, relu, batch, CPU
        self.training, self.head = False, SimpleNamespace(supports_boostlu=True)
        self.widest = 0

    def eval(self) -> None:
        pass

    def train(self, mode: bool) -> None:
        pass

    def __call__(self, images: torch.Tensor, boost: bool) -> HeadOutput:
        index = images[:, 0, 0, 0].long()
        self.widest = max(self.widest, len(index))
        return HeadOutput(self.mean[index], self.relu[index] if boost else None, self.mean[index])

    def __iter__(self) -> Any:
        for start in range(0, len(self.mean), self.batch):
            index = torch.arange(start, start + self.batch).clamp(max=len(self.mean) - 1)
            images = index.float()[:, None, None, None].expand(-1, 3, 1, 1)
            real = min(self.batch, len(self.mean) - start)
            yield MicroBatch({"eval": images}, index, real, real, real)


@pytest.fixture(scope="module")
def partly() -> tuple[Scripted, SparseLabels]:
    """300 images, 9,605 classes, about 13 labels an image."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(300, 9605, generator=generator)
    return Scripted(mean, mean.clamp(min=0) + 0.1, 64), some_labels(300, 9605, 13)


def test_scores_of_annotated_pairs_alone_are_held(partly):
    scripted, known = partly
    scores = score_split(scripted, scripted, known, [1.0, 5.0], None)
    pairs = len(known.codes)
    assert scores is not None and scores.nbytes == pairs * 19 < scripted.mean.nbytes // 50
    assert scripted.widest == 64
    rows = known.entry_rows()
    assert np.array_equal(scores.index, rows) and np.array_equal(scores.class_id, known.classes)
    assert np.array_equal(scores.mean, scripted.mean.numpy()[rows, known.classes])


def test_pairs_give_what_dense_scores_give(partly):
    scripted, known = partly
    config = Config(method=get_method("an").Options(name="an"))
    groups = groups_by_count(known.class_counts(POSITIVE) + known.class_counts(NEGATIVE))
    split = SimpleNamespace(known=known)
    names = [str(c) for c in range(9605)]
    found = evaluate_split(scripted, scripted, split, [1.0, 5.0], config, names, groups)
    for alpha in (1.0, 5.0):
        dense = scripted.mean + (alpha - 1) * scripted.relu
        expected = evaluate_scores(
            dense.numpy(), known.rows(range(300)), empty_classes="skip_unlabelled", groups=groups
        )
        assert found[alpha] == expected
        assert [g["num_classes"] for g in found[alpha]["groups"]] == [1921] * 5
    config.eval.empty_classes = "zero"
    again = evaluate_split(scripted, scripted, split, [5.0], config, names)[5.0]
    assert again["map"] == found[5.0]["map_zero"] < found[5.0]["map"] and "groups" not in again


def test_table_shows_conventions_and_groups(partly):
    scripted, known = partly
    config = Config(method=get_method("an").Options(name="an"))
    groups = groups_by_count(known.class_counts(POSITIVE) + known.class_counts(NEGATIVE))
    found = evaluate_split(scripted, scripted, SimpleNamespace(known=known), [1.0], config, ["x"] * 9605, groups)[1.0]
    rows = dict(table_rows(found))
    assert rows["mAP (skip_unlabelled)"] == f"{found['map']:.2f}"
    assert rows["mAP, classes without a positive count 0"] == f"{found['map_zero']:.2f}"
    assert rows["mAP, classes without a positive left out"] == f"{found['map_skipping']:.2f}"
    (shown,) = (value for name, value in rows.items() if "5 groups of about 1921" in name)
    # The rarest classes have no label in these images.
    assert shown.split(" / ")[0] == "not defined" and shown.split(" / ")[-1] == f"{found['groups'][-1]['map']:.2f}"
    assert rows["classes without a label"] == str(found["classes_without_label"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 1, 2, 3, 4]),
        ({"groups": 2}, [0, 0, 0, 1, 1, 1]),
        ({"groups": 2, "group_by": "positives"}, [1, 0, 0, 1, 1, 0]),
        ({"groups": 0}, None),
    ],
)
def test_groups_by_training_labels(options, expected):
    # Classes 0 to 5 have 2, 3, 4, 5, 6, 7 labels, of which 2, 0, 1, 3, 4, 1 are positive.
    positives, total = [2, 0, 1, 3, 4, 1], [2, 3, 4, 5, 6, 7]
    entries = [(row, c, int(row < positives[c])) for c in range(6) for row in range(total[c])]
    rows, classes, codes = zip(*entries, strict=True)
    known = SparseLabels.from_entries(rows, classes, codes, 7, 6)
    manifest = SimpleNamespace(splits={"train": None}, split=lambda name: SimpleNamespace(known=known), num_classes=6)
    config = Config(method=None)
    for key, value in options.items():
        setattr(config.eval, key, value)
    groups = class_groups(manifest, config)
    assert (None if groups is None else groups.tolist()) == expected


def test_groups_are_for_partly_known_data_unless_asked_for(small_digits):
    manifest, config = Manifest(small_digits), Config(method=None)
    assert class_groups(manifest, config) is None
    config.eval.groups = 2
    assert np.bincount(class_groups(manifest, config)).tolist() == [5, 5]
    config.data.train_split = "trian"
    with pytest.raises(UserError, match=r"'trian', which .* does not have; set eval.groups to 0"):
        class_groups(manifest, config)
    config.eval.groups = None
    assert class_groups(manifest, config) is None
    config.data.train_split, config.eval.groups = "train", 11
    with pytest.raises(UserError, match="10 classes cannot be cut into 11 groups"):
        class_groups(manifest, config)
    config.eval.groups = -1
    with pytest.raises(UserError, match=r"eval.groups is -1"):
        validate(Config(method=get_method("an").Options(), eval=config.eval))


# --- corrections -----------------------------------------------------------------------------------------------------


def test_many_corrections_over_epochs_and_checkpoints(monkeypatch):
    """Against a dictionary; with packing on the way and a restart through a file inside the second epoch."""
    monkeypatch.setattr(labels_module, "_WAITING_PLACES", 5000)
    known = some_labels(4000, 500, 3)
    store, expected = LabelStore(known), {}
    rng = np.random.default_rng(1)
    for epoch in range(3):
        for step in range(40):
            index, classes = torch.from_numpy(rng.integers(0, 4000, 400)), torch.from_numpy(rng.integers(0, 500, 400))
            valid = torch.from_numpy(rng.random(400) < 0.7)
            code = int(rng.integers(-1, 2))
            store.correct(index, classes, code, valid)
            kept = (index * 500 + classes)[valid].tolist()
            expected.update(dict.fromkeys(kept, code))
            if epoch == 1 and step == 20:
                file = io.BytesIO()
                torch.save(store.state_dict(), file)
                file.seek(0)
                store = LabelStore(known)
                store.load_state_dict(torch.load(file))
        before = store.num_corrections
        assert store.commit() == len(expected) - before
    assert store.num_corrections == len(expected) > 30_000
    codes = known.rows(range(4000))
    for key, code in expected.items():
        codes[divmod(key, 500)] = code
    assert np.array_equal(store.rows(torch.arange(4000)).numpy(), codes)
    state = store.state_dict()
    assert (
        sum(t.nbytes for t in state.values()) == 9 * len(expected) + state["calls"].nbytes + state["fingerprint"].nbytes
    )
    assert store.nbytes == known.indptr.nbytes * 2 + 3 * (len(known.codes) + len(expected))
    assert store.commit() == 0


def on_ranks(world: int, work: Any, monkeypatch: Any) -> list[Any]:
    """Run work(rank) in threads that stand for ranks, with a gather between them."""
    meet, slots, here = threading.Barrier(world, timeout=30), {}, threading.local()

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        slots[here.rank] = tensor
        meet.wait()
        whole = torch.cat([slots[r] for r in range(world)])
        meet.wait()
        return whole

    monkeypatch.setattr(labels_module, "all_gather_rows", gather)
    monkeypatch.setattr(labels_module, "is_main", lambda: here.rank == 0)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        here.rank = rank
        results[rank] = work(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("restart", [False, True])
def test_order_of_corrections_survives_ranks_and_a_restart(restart, monkeypatch):
    """Of two codes for one entry the later call wins, also when ranks and a checkpoint lie between them."""
    known = SparseLabels.from_positives([[0], [1], [2]], 4, UNKNOWN)
    first = {0: [(0, 1, 0), (1, 0, 1)], 1: [(0, 1, 1), (2, 3, 1)]}
    second = {0: [(2, 3, 0), (0, 2, 1)], 1: [(1, 0, 0), (0, 2, 0)]}

    def work(rank: int) -> tuple[int, list[list[int]]]:
        store = LabelStore(known)

        def record(calls: list[tuple[int, int, int]]) -> None:
            for row, column, code in calls:
                store.correct(torch.tensor([row]), torch.tensor([column]), code)

        record(first[rank])
        if restart:
            state = store.state_dict()
            store = LabelStore(known)
            store.load_state_dict(state)
        record(second[rank])
        return store.commit(), store.rows(torch.arange(3)).tolist()

    results = on_ranks(2, work, monkeypatch)
    # Entry (0, 1): both ranks in their first call, the higher rank wins. (2, 3) and (1, 0): the later call, whoever
    # made it. (0, 2): both in the last call.
    assert results[0] == results[1] == (4, [[1, 1, 0, -1], [0, 1, -1, -1], [-1, -1, 1, 0]])


def test_labels_are_shared_with_the_file_on_a_cpu(tmp_path):
    known = some_labels(50, 20, 3)
    known.save(tmp_path)
    mapped = SparseLabels.load(tmp_path)
    store = LabelStore(mapped)
    assert store._codes.data_ptr() == mapped.codes.ctypes.data
    store.correct(torch.arange(50), torch.zeros(50, dtype=torch.int64), 1)
    store.commit()
    assert (store.rows(torch.arange(50))[:, 0] == 1).all()
    assert np.array_equal(np.load(tmp_path / "codes.npy"), known.codes), "files never change"
    frozen = known.codes.copy()
    frozen.flags.writeable = False
    again = LabelStore(SparseLabels(known.indptr, known.classes, frozen, 20, UNKNOWN))
    assert torch.equal(again.rows(torch.arange(50), corrected=False), store.rows(torch.arange(50), corrected=False))


# --- class balance ---------------------------------------------------------------------------------------------------


def test_prior_logits_by_hand():
    positives, negatives = torch.tensor([3, 0, 0, 50]), torch.tensor([1, 5, 0, 0])
    logit = lambda p: float(np.log(p) - np.log1p(-p))  # noqa: E731
    by_labels = prior_logits(positives, negatives, 100, "labels", 0.01).tolist()
    assert by_labels == pytest.approx([logit(0.75), logit(0.01), logit(0.01), logit(0.99)], rel=1e-6)
    by_images = prior_logits(positives, negatives, 100, "pictures", 0.01).tolist()
    assert by_images == pytest.approx([logit(0.03), logit(0.01), logit(0.01), 0.0], rel=1e-6)
    with pytest.raises(UserError, match="no observed negative; use images"):
        prior_logits(positives, 0 * negatives, 100, "labels", 0.01)
    with pytest.raises(UserError, match=r"prior_floor is 0\.5"):
        prior_logits(positives, negatives, 100, "labels", 0.5)


@pytest.mark.parametrize("head", ["cam", "query2label"])
def test_head_starts_at_the_prior(head):
    options = {"preset": "tiny"} if head == "query2label" else {}
    config = ModelConfig(
        backbone="test_resnet", pretrained=False, head=head, head_options=options, prior_bias="labels", alpha_train=5.0
    )
    classifier = Classifier(config, 3, 64)
    positives, negatives = torch.tensor([90, 1, 50]), torch.tensor([10, 99, 50])
    classifier.set_prior(positives, negatives, 1000)
    weight = classifier.head.weight if head == "cam" else classifier.head.classify.weight
    with torch.no_grad():
        weight.zero_()
        logits = classifier(torch.randn(2, 3, 64, 64), alpha=classifier.alpha_train).logits
    torch.testing.assert_close(torch.sigmoid(logits), torch.tensor([0.9, 0.01, 0.5]).expand(2, 3))


def test_repeat_factors_by_hand():
    # Class 0 in all four images, class 1 in one of four, class 2 observed as a negative only.
    codes = np.array([[1, -1, 0], [1, 1, -1], [1, 0, -1], [1, -1, 0], [-1, 0, 0]], np.int8)
    factors = repeat_factors(SparseLabels.from_dense(codes), 0.5)
    assert factors.tolist() == pytest.approx([1, np.sqrt(0.5 / 0.2), 1, 1, 1])
    assert repeat_factors(SparseLabels.from_dense(codes), 1e-6).tolist() == [1.0] * 5
    with pytest.raises(UserError, match="repeat_threshold is 0"):
        repeat_factors(SparseLabels.from_dense(codes), 0)


@pytest.mark.parametrize("windows", [None, Windows(64, 8)])
def test_repeated_epochs_have_one_length_and_the_right_mean(windows):
    rng = np.random.default_rng(0)
    factors = (1 + rng.exponential(1.0, 300) * (rng.random(300) < 0.4)).astype(np.float32)
    order = RepeatFactorSampler(factors, 300, 32, seed=5, windows=windows)
    counts = np.stack([np.bincount(order.permutation(e), minlength=300) for e in range(200)])
    assert (counts.sum(1) == np.ceil(factors.sum(dtype=np.float64))).all() and order.size == counts[0].sum()
    assert (counts >= np.floor(factors)).all() and (counts <= np.ceil(factors * (1 + 1 / 300))).all()
    np.testing.assert_allclose(counts.mean(0), factors, atol=0.15)
    assert counts.mean() == pytest.approx(factors.mean(), rel=1 / 300)
    again = RepeatFactorSampler(factors, 300, 32, seed=5, windows=windows)
    assert np.array_equal(order.permutation(7), again.permutation(7))
    assert not np.array_equal(order.permutation(7), order.permutation(8))
    if windows is None:
        # Repeats of an image do not follow each other more often than chance has them.
        epochs = [order.permutation(e) for e in range(50)]
        assert np.mean([(p[1:] == p[:-1]).sum() for p in epochs]) < 5


def test_ranks_share_a_repeated_epoch_and_plain_factors_change_nothing():
    factors = np.linspace(1, 3, 50).astype(np.float32)
    whole = [u[0].index for u in RepeatFactorSampler(factors, 50, 20, seed=1).epoch(3)]
    parts = [[u[0].index for u in RepeatFactorSampler(factors, 50, 20, 1, 4, r, 1).epoch(3)] for r in range(4)]
    assert all(np.array_equal(w, np.concatenate(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))
    plain = RepeatFactorSampler(np.ones(50, np.float32), 50, 20, seed=1)
    assert sorted(plain.permutation(2)) == list(range(50))
    assert plain.updates_per_epoch == TrainSampler(50, 20).updates_per_epoch


# --- recipes ---------------------------------------------------------------------------------------------------------

LAYERS = ["ll_r", "ll_ct", "ll_cp", "partial", "p_asl", "ignore"]
# Every method once, every version at least twice.
RUNS = list(zip(["v3", "v6", "v7", "v3", "v6", "v7", "v3"], [None, *LAYERS], strict=True))


def layered(version: str, layer: str | None, *more: str) -> Config:
    """The recipe of a version with a method laid over it."""
    words = ["--config", str(CONFIGS / f"openimages_{version}_an.yaml")]
    if layer is not None:
        words += ["--config", str(CONFIGS / f"openimages_{layer}.yaml")]
    return parse_config([*words, *more])


def test_repeats_are_refused_where_every_image_has_a_row():
    words = ["--data.dir", "x", "--method", "role", "--method.expected_positives", "2"]
    config = parse_config([*words, "--train.sampling", "repeat_factor"])
    trainer = SimpleNamespace(config=config, method_class=get_method("role"))
    with pytest.raises(UserError, match="role keeps a row for every image"):
        Trainer._make_order(trainer, some_labels(10, 4, 1))


def test_every_openimages_recipe_is_looked_at():
    names = {p.stem for p in CONFIGS.glob("openimages_*.yaml")}
    assert names == {f"openimages_{n}" for n in ("v3_an", "v6_an", "v7_an", *LAYERS)}


def test_layers_keep_what_they_do_not_name():
    config = layered("v3", "ll_cp")
    assert (config.method.name, config.method.delta_rel, config.model.alpha_train) == ("ll_cp", 0.01, 5)
    assert (config.train.epochs, config.train.lr, config.model.backbone) == (20, 2e-5, "resnet101.tv_in1k")
    assert layered("v6", None).method.name == "an" and layered("v6", None).eval.empty_classes == "skip_one_sided"
    # The other way round the version's recipe would take the method's place, which is refused, not half done.
    words = [f"--config={CONFIGS / name}" for name in ("openimages_ll_cp.yaml", "openimages_v3_an.yaml")]
    with pytest.raises(UserError, match=r"openimages_ll_cp\.yaml: section method has no option 'delta_rel'"):
        parse_config(words)


@pytest.fixture(scope="module")
def tiny(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some digit scenes of which a part of the labels is known, positives and negatives."""
    source, folder = Manifest(small_digits), tmp_path_factory.mktemp("tiny") / "data"
    writer = ManifestWriter(folder, "tiny", source.classes, source.image_root)
    split, rng = source.split("train"), np.random.default_rng(0)
    codes = split.known.rows(range(24))
    known = SparseLabels.from_dense(np.where(rng.random(codes.shape) < 0.5, codes, UNKNOWN).astype(np.int8))
    paths = [split.relative_path(i) for i in range(24)]
    writer.add_split("train", known=known, width=split.width[:24], height=split.height[:24], paths=paths)
    return writer.finish({})


@pytest.mark.parametrize(("version", "layer"), RUNS)
def test_recipes_train_two_steps(version: str, layer: str | None, tiny: Manifest) -> None:
    words = "--data.image_size 64 --model.backbone test_resnet --model.pretrained false --data.threads 1"
    words += " --train.batch_size 8 --train.lr 0.01 --train.sampling repeat_factor --train.repeat_threshold 0.9"
    config = layered(version, layer, *words.split(), "--data.dir", str(tiny.folder))
    split = tiny.split("train")
    cls = get_method(config.method.name)
    cls.check_labels(split.observed, config.method)
    torch.manual_seed(0)
    store = LabelStore(split.observed)
    classifier = Classifier(config.model, tiny.num_classes, config.data.image_size)
    method = cls(config.method, store)
    factors = repeat_factors(split.observed, config.train.repeat_threshold)
    loader = TrainLoader(
        split,
        config.data,
        views=cls.views,
        batch_size=8,
        accumulation=1,
        seed=0,
        device=CPU,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        make_order=lambda *a: RepeatFactorSampler(factors, *a),
    )
    assert loader.updates_per_epoch > 3
    module = TrainingModule(classifier, method).train()
    optimizer = make_optimizer(
        parameter_groups(classifier, method, config.train, head_only=False), config.train, fused=False
    )
    before = classifier.head.weight.detach().clone()
    for step, (views,) in zip(range(2), loader.epoch(4), strict=False):
        batch = Batch(views.views, store.rows(views.index), views.index, views.global_size)
        # Epoch 4 is past every warm-up.
        loss, _ = module(batch, Progress(4, config.train.epochs, step, loader.updates_per_epoch))
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(before, classifier.head.weight)
    figures = method.on_epoch_end(Progress(4, config.train.epochs, 2, 2))
    if layer == "ll_cp":
        # ceil(8 x 10 x 0.0001) = 1 a step.
        assert figures["corrected"] == store.num_corrections == 2


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_activation_checkpointing_gives_the_same_gradients(backbone):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    saved, gradients, statistics = [], [], []
    for on in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(backbone=backbone, pretrained=False, grad_checkpointing=on)
        classifier = Classifier(config, 4, 64).train()
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, into: list[int] = sizes) -> torch.Tensor:
            into.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = classifier(images, alpha=5.0).logits.square().sum()
        saved.append(sum(sizes))
        # As the trainer does: a second forward must not move BatchNorm's statistics again.
        with bn_behaviour(classifier, "no_update" if on else "update"):
            loss.backward()
        gradients.append({name: p.grad for name, p in classifier.named_parameters()})
        statistics.append({name: b for name, b in classifier.named_buffers() if "running" in name})
    assert saved[1] < 0.6 * saved[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])
    assert bool(statistics[0]) == (backbone == "test_resnet")

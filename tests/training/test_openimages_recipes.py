"""The recipes of OpenImages: what they say, and that each trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spml_fast.cli.parse import parse_config
from spml_fast.core.batch import Batch
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.labels import UNKNOWN, LabelStore, SparseLabels
from spml_fast.data.loader import TrainLoader
from spml_fast.data.manifest import Manifest
from spml_fast.data.repeat_factor import RepeatFactorSampler, repeat_factors
from spml_fast.methods import Progress, get_method
from spml_fast.models.classifier import Classifier
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.training.module import TrainingModule
from spml_fast.training.optim import make_optimizer, parameter_groups
from spml_fast.training.setup import make_sampler
from tests.support.data import some_labels
from tests.support.paths import ROOT

CONFIGS = ROOT / "launch" / "configs"
CPU = torch.device("cpu")
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
    with pytest.raises(UserError, match="role keeps a row for every image"):
        make_sampler(config, some_labels(10, 4, 1))


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
        make_sampler=lambda *a: RepeatFactorSampler(factors, *a),
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

"""What looking at suggestions wins on one's own images: test mAP before, after N decisions, and with all labels.

    python benchmarks/label_cleaning.py --data.dir data/photos --backbone tf_efficientnet_lite0 --weights FILE
                                        [--image-size 224] [--draws 10] [--decisions 200 500 1000 2000] [--json OUT]

The data set's known labels are the truth. For each draw one positive of every training image is observed, everything
else unknown; a head on the frozen network is solved for with assumed negatives, as `train.linear solve` does; the
unknown labels that it gives the highest probability (of the training images themselves, as `suggest` without --folds)
are decided by the truth, as a patient person would: accept, reject, or skip where the truth is unknown. Then the head
is solved for again with the labels that are known now. Beside it as many unknown labels are decided that were drawn at
random: the gain of knowing more labels, whichever they are. A row is the mean over draws with its standard deviation.

First it is checked that what is measured is what is meant: a head on the mean features gives the classifier's own
logits, deciding every unknown label gives the truth, and what was solved for is a minimum. Else nothing is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine
from spml_fast.core.config import DataConfig, ModelConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.data.labels import SparseLabels
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.evaluation.average_precision import average_precision
from spml_fast.methods.assume_negative import AssumeNegative
from spml_fast.methods.base import EntryLoss
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads.cam import CamHead
from spml_fast.prepare.observed_labels import draw_published
from spml_fast.training.linear_probe import HeadObjective, solve

Codes = npt.NDArray[np.int8]
SPLITS = ("train", "val", "test")
# Of those that `train.linear solve` tries, the ones that were taken on photographs, so that a trial takes seconds.
PENALTIES = (1.0, 0.3, 0.1)
# Largest difference of two ways to the same logits, as a part of the largest of them, and largest entry of the gradient
# at a minimum.
TOLERANCE, FLAT = 1e-4, 1e-4


@torch.no_grad()
def mean_features(classifier: Classifier, split: Split, config: DataConfig) -> Tensor:
    """Mean feature of every image, fp32 [N, K].

    Raises:
        UserError: the classifier's head gives other logits of the images than of their mean features.
    """
    mean, std = classifier.input_normalisation()
    loader = EvalLoader(split, config, batch_size=32, device=torch.device("cpu"), mean=mean, std=std)
    features, head = torch.empty(len(split), classifier.channels), classifier.head
    assert isinstance(head, CamHead)
    for batch in loader:
        maps, index = classifier.features(batch.views["eval"][: batch.real]), batch.index[: batch.real]
        features[index] = maps.float().mean((1, 2))
        theirs = classifier.classify(maps).logits
        ours = torch.addmm(head.bias, features[index], head.weight.T)
        if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max():
            raise UserError("the head of the mean features is not the classifier's; its figures would mean nothing")
    return features


def check_decisions(codes: Codes, truth: Codes) -> None:
    """Raise `UserError` where somebody who decides every unknown label does not end at the truth, int8 [N, C]."""
    unknown = np.flatnonzero(codes.ravel() < 0)
    labels, accepted, skipped = decided(codes, truth, unknown)
    hidden = int((truth == 1).sum()) - int((codes == 1).sum())
    if not np.array_equal(labels, truth) or (accepted, skipped) != (hidden, int((truth < 0).sum())):
        raise UserError("deciding every unknown label does not give the truth; decisions are counted wrongly")


class Images:
    """Features and truth of the three splits.

    Args:
        manifest: the data set.
        classifier: the frozen network.
        config: size and threads.
    """

    def __init__(self, manifest: Manifest, classifier: Classifier, config: DataConfig) -> None:
        splits = {name: manifest.split(name) for name in SPLITS}
        self.features = {name: mean_features(classifier, split, config) for name, split in splits.items()}
        self.truth = {name: split.known.rows(range(len(split))) for name, split in splits.items()}
        self.known = splits["train"].known

    def train(self, codes: Codes) -> tuple[float, npt.NDArray[np.float32]]:
        """Test mAP in per cent of the head that labels int8 [N, C] give, and its logits of the training images.

        The penalty is chosen on the validation split's known labels.

        Raises:
            UserError: what was found is no minimum.
        """
        loss = EntryLoss(AssumeNegative.point)
        objective = HeadObjective(self.features["train"], torch.from_numpy(codes), loss)
        best: tuple[float, Tensor, Tensor] | None = None
        for solution in solve(objective, PENALTIES):
            if not solution.gradient <= FLAT:
                raise UserError(f"the head is no minimum: its gradient has an entry of {solution.gradient:.2g}")
            weight, bias = objective.head(solution.parameters)
            value = self._map("val", weight, bias)
            if best is None or value > best[0]:
                best = value, weight, bias
        assert best is not None
        _, weight, bias = best
        return self._map("test", weight, bias), torch.addmm(bias, self.features["train"], weight.T).numpy()

    def _map(self, split: str, weight: Tensor, bias: Tensor) -> float:
        scores = torch.addmm(bias, self.features[split], weight.T).numpy()
        return 100 * average_precision(scores, self.truth[split]).mean("skip")


def decided(codes: Codes, truth: Codes, places: npt.NDArray[np.int64]) -> tuple[Codes, int, int]:
    """Labels after somebody who knows the truth looked at these flat places; how many were accepted and skipped."""
    codes, answers = codes.copy(), truth.ravel()[places]
    codes.ravel()[places[answers >= 0]] = answers[answers >= 0]
    return codes, int((answers == 1).sum()), int((answers < 0).sum())


def one_draw(images: Images, seed: int, numbers: list[int]) -> dict[str, Any]:
    """Figures of one draw of observed labels."""
    truth = images.truth["train"]
    observed: SparseLabels = draw_published(images.known, seed)
    codes = observed.rows(range(len(truth)))
    check_decisions(codes, truth)
    before, logits = images.train(codes)
    unknown = np.flatnonzero(codes.ravel() < 0)
    if max(numbers) > len(unknown):
        raise UserError(f"--decisions {max(numbers)}: only {len(unknown)} labels are unknown; give smaller numbers")
    ranked = unknown[np.argsort(-logits.ravel()[unknown], kind="stable")]
    shuffled = np.random.default_rng(seed).permutation(unknown)
    found: dict[str, Any] = {"before": before, "suggested": {}, "random": {}}
    for name, places in (("suggested", ranked), ("random", shuffled)):
        for number in numbers:
            labels, accepted, skipped = decided(codes, truth, places[:number])
            found[name][number] = {"map": images.train(labels)[0], "accepted": accepted, "skipped": skipped}
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.dir", dest="data", type=Path, required=True, help="a Manifest with train, val and test")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--weights", help="file with its weights; else timm's")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--decisions", type=int, nargs="+", default=[200, 500, 1000, 2000])
    add_json_option(parser)
    args = parser.parse_args()
    if args.draws < 1 or min(args.decisions) < 1:
        parser.error("--draws and --decisions are whole numbers from 1 on")
    output = json_output(args, "label_cleaning")
    manifest = Manifest(args.data)
    start = time.perf_counter()
    model = ModelConfig(backbone=args.backbone, weights=args.weights)
    classifier = Classifier(model, manifest.num_classes, args.image_size).to(memory_format=torch.channels_last).eval()
    images = Images(manifest, classifier, DataConfig(image_size=args.image_size))
    truth = images.truth["train"]
    if not (truth == 1).any(1).all():
        raise UserError(f"{args.data}: an image of split 'train' has no known positive that could be observed")
    print(f"features of {sum(map(len, images.truth.values())):,} images in {time.perf_counter() - start:.0f} s")
    full, _ = images.train(truth)
    draws = [one_draw(images, seed, args.decisions) for seed in range(args.draws)]
    print(f"all labels: test mAP {full:.2f}")
    before = [one["before"] for one in draws]
    hidden = int((truth == 1).sum()) - len(truth)
    print(f"one positive an image ({hidden:,} hidden): {spread(before)}")
    for number in args.decisions:
        for name in ("suggested", "random"):
            cells = [one[name][number] for one in draws]
            gains = [cell["map"] - b for cell, b in zip(cells, before, strict=True)]
            accepted = statistics.fmean(cell["accepted"] for cell in cells)
            skipped = statistics.fmean(cell["skipped"] for cell in cells)
            print(
                f"{number:>6,} {name:>9} decisions: {accepted:6.1f} accepted, {skipped:5.1f} skipped, test mAP "
                f"{spread([cell['map'] for cell in cells])}, gain {spread(gains)} "
                f"(lowest {min(gains):+.2f}, highest {max(gains):+.2f})"
            )
    if output is not None:
        facts = {"machine": machine(torch.device("cpu")), "backbone": args.backbone, "image_size": args.image_size}
        output.write_json(facts | {"full": full, "draws": draws})


if __name__ == "__main__":
    run_command(main)

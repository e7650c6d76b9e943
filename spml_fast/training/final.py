"""The end of a run: test metrics of its best weights, its decisions, and what its trackers show of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.precision import autocast, inference_dtype, no_cudnn_benchmark
from spml_fast.data.labels import POSITIVE
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Split
from spml_fast.evaluation.decisions import Decisions
from spml_fast.evaluation.evaluate import class_groups, evaluate_split
from spml_fast.models.classifier import Classifier
from spml_fast.runs.evaluation_record import Recorder, headline_alpha, write_evaluation
from spml_fast.runs.open import input_normalisation, make_eval_loader
from spml_fast.runs.write import write_results
from spml_fast.training.decide import decide
from spml_fast.training.logs import device_name, memory_gib
from spml_fast.training.trackers.base import Example, Summary

if TYPE_CHECKING:
    from spml_fast.training.trainer import Trainer

# Predicted classes of an image that trackers show.
SHOWN_CLASSES = 5


def finish_run(trainer: Trainer) -> dict[str, Any]:
    """Test metrics of the best weights at every alpha asked for, which are written too (collective).

    Args:
        trainer: whose phases are done; gets the best weights as its classifier.

    Returns:
        What the closing table shows.
    """
    config, data = trainer.config, trainer.data
    trainer.classifier, metadata = trainer.load_best()
    trainer.classifier.to(trainer.device).to(memory_format=torch.channels_last)
    results: dict[str, Any] = {
        "run": str(trainer.run_dir),
        "method": config.method.name,
        "best_phase": metadata.get("phase", trainer.phases[-1].name),
        "best_epoch": int(metadata["epoch"]),
        "best_val_map": float(metadata["val_map"]) if data.val is not None else None,
        "images_per_second": trainer.trained_samples / max(trainer.trained_seconds, 1e-9),
        "data_wait": trainer.waited_seconds / max(trainer.trained_seconds, 1e-9),
        "train_seconds": trainer.trained_seconds,
        "memory_gib": memory_gib(trainer.device),
        "ranks": trainer.world,
        "device": device_name(trainer.device),
    }
    if trainer.started_from is not None:
        results["started_from"] = trainer.started_from
    classes, say = data.manifest.classes, trainer.log.say
    with trainer.spent.on("thresholds"):
        decisions = decide(trainer.classifier, trainer.val_loader, data.val, trainer.layout, config, classes, say)
    record: dict[str, Any] | None = None
    if data.test is not None:
        with trainer.spent.on("test"):
            tested, record = _test(trainer, data.test, decisions)
        results |= tested
    results["seconds"] = trainer.spent.take()
    if distributed.is_main():
        write_results(trainer.layout, results)
        if record is not None:
            write_evaluation(trainer.layout, record)
        maps = {alpha: metrics["map"] for alpha, metrics in results.get("alpha", {}).items()}
        trainer.log.record(
            "final", {k: v for k, v in results.items() if k not in ("alpha", "seconds")} | {"test_map": maps}
        )
        if trainer.trackers:
            trainer.trackers.finish(_summary(trainer, results, decisions))
    return results


def _test(trainer: Trainer, split: Split, decisions: Decisions | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The test split's name and its metrics by alpha; and on rank 0 what the report shows of its classes."""
    config = trainer.config
    alphas = config.eval.alphas or sorted({1.0, config.model.alpha_eval})
    loader = make_eval_loader(config, split, trainer.classifier, trainer.device)
    groups = class_groups(trainer.data.manifest, config)
    classes = trainer.data.manifest.classes
    task = f"evaluating the {split.name} split"
    recorder = Recorder(split, headline_alpha(alphas, config), config, classes, decisions)
    evaluated = (trainer.classifier, loader, split, alphas, config, classes, groups, decisions, task)
    metrics = evaluate_split(*evaluated, look=recorder.look)
    return {"split": split.name, "alpha": {f"{alpha:g}": metrics[alpha] for alpha in alphas}}, recorder.record


def _summary(trainer: Trainer, results: dict[str, Any], decisions: Decisions | None) -> Summary:
    """What the trackers of a finished run are given (rank 0)."""
    figures: dict[str, float] = {
        f"final/{name}": float(results[name])
        for name in ("best_epoch", "best_val_map", "images_per_second", "data_wait", "train_seconds", "memory_gib")
        if results[name] is not None
    }
    alphas: dict[str, dict[str, Any]] = results.get("alpha", {})
    for alpha, metrics in alphas.items():
        plain = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        figures |= {f"test/alpha_{alpha}/{name}": float(value) for name, value in plain.items()}
    classes = trainer.data.manifest.classes
    columns = ("class", *(f"AP, alpha {alpha}" for alpha in alphas))
    lists = [metrics["per_class_ap"] for metrics in alphas.values()]
    rows = [(name, *(values[i] for values in lists)) for i, name in enumerate(classes)] if lists else []
    split = trainer.data.test or trainer.data.val
    examples = []
    if split is not None and trainer.config.run.tracker_images:
        examples = example_images(trainer.classifier, trainer.config, split, classes, trainer.device, decisions)
    phase = trainer.phases[-1]
    # Of a run that had nothing left to train, where it stands.
    end = trainer.samples_seen(phase, phase.epochs * trainer.loader.updates_per_epoch)
    return Summary(figures, trainer.trackers.images or end, columns, rows, examples)


@torch.no_grad()
def example_images(
    classifier: Classifier,
    config: Config,
    split: Split,
    classes: list[str],
    device: torch.device,
    decisions: Decisions | None,
) -> list[Example]:
    """The first images of a split (`run.tracker_images`) with their predictions, on this rank alone.

    Args:
        classifier: on `device`, with whole weights; its mode is kept.
        config: the run's.
        split: that has images.
        classes: class names in class-id order.
        device: where it computes.
        decisions: thresholds and calibration, or None: then the most probable classes are shown.
    """
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in input_normalisation(config, classifier))
    loader = EvalLoader(
        split,
        config.data,
        batch_size=min(config.run.tracker_images, len(split)),
        device=device,
        mean=mean.flatten().tolist(),
        std=std.flatten().tolist(),
        world_size=1,
        rank=0,
    )
    batch = next(iter(loader))
    was_training = classifier.training
    classifier.eval()
    with autocast(device, inference_dtype(config.train.precision, device)), no_cudnn_benchmark():
        logits = classifier(batch.views["eval"], alpha=classifier.alpha_eval).logits
    classifier.train(was_training)
    pixels = ((batch.views["eval"] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    shown = []
    for row, index in enumerate(batch.index[: batch.real].tolist()):
        scores = logits[row].double().cpu().numpy()
        margins = scores if decisions is None else decisions.margins(scores[None])[0]
        calibrated = scores if decisions is None else decisions.calibration.logits(scores[None])[0]
        order = (-margins).argsort(kind="stable")[:SHOWN_CLASSES]
        chosen = order if decisions is None else order[margins[order] >= 0]
        probability = torch.sigmoid(torch.from_numpy(calibrated))
        predicted = [(classes[c], float(probability[c])) for c in chosen.tolist()]
        known = (split.known.rows([index])[0] == POSITIVE).nonzero()[0]
        image = pixels[row].permute(1, 2, 0).contiguous().cpu().numpy()
        shown.append(Example(image, predicted, [classes[c] for c in known.tolist()]))
    return shown

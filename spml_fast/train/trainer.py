"""The training loop."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

from spml_fast import __version__
from spml_fast.core import distributed
from spml_fast.core.batch import Batch, MicroBatch
from spml_fast.core.config import Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_json
from spml_fast.core.precision import autocast, autocast_dtype, set_cudnn_policy
from spml_fast.core.seeds import rng_seed
from spml_fast.data.labels import NEGATIVE, POSITIVE, LabelStore, SparseLabels
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Split
from spml_fast.data.repeat_factor import RepeatFactorSampler, repeat_factors
from spml_fast.data.sampler import TrainSampler
from spml_fast.evaluation.evaluate import class_groups, evaluate_split
from spml_fast.evaluation.metrics import selection_quality
from spml_fast.methods import Method, Progress, get_method
from spml_fast.models.batchnorm import bn_behaviour
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import load_weights, save_weights
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import input_normalisation, make_eval_loader, open_data
from spml_fast.runs.recipe import to_yaml
from spml_fast.train.checkpoint import (
    CheckpointPosition,
    clear_unfinished,
    commit_checkpoint,
    find_resume,
    load_rank_states,
    save_rank_state,
)
from spml_fast.train.engine import Engine, deepspeed_config
from spml_fast.train.logs import Meter, RunLog, memory_gib, print_table
from spml_fast.train.optim import make_optimizer, make_schedule, parameter_groups


class TrainingModule(nn.Module):
    """Classifier and method as one module, so that DeepSpeed sees one forward and one backward at every stage."""

    def __init__(self, classifier: Classifier, method: Method) -> None:
        super().__init__()
        self.classifier = classifier
        self.method = method

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-d) and metrics of one micro-batch."""
        out = self.method(self.classifier, batch, progress)
        return out.loss, out.metrics


@dataclass(frozen=True)
class Phase:
    """`linear` trains the head on a frozen backbone, `finetune` everything; each with its own optimizer."""

    name: str
    epochs: int


def shown(map_percent: float) -> str:
    """A mAP for people."""
    return f"{map_percent:.2f}" if math.isfinite(map_percent) else "not defined (no positive among the known labels)"


def shown_group(group: dict[str, Any]) -> str:
    """The mAP of a group of classes for people."""
    return "-" if group["map"] is None else f"{group['map']:.2f}"


class Trainer:
    """One run: data, model, method, engine, checkpoints.

    Args:
        config: the whole run; paths are used as they are.
        device: this rank's device, from `engine.init_distributed`.

    Raises:
        UserError: anything the user can mend.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.world, self.rank = distributed.world_size(), distributed.rank()
        set_cudnn_policy(device, config.run.deterministic)
        if distributed.is_main() and config.data.dir is None:
            open_data(config)
        distributed.barrier()
        self.manifest = open_data(config)
        method_class = get_method(config.method.name)
        self.method_class = method_class
        self.train_split = self.manifest.split(config.data.train_split)
        self.val_split = self._optional_split(config.data.val_split, "val")
        self.test_split = self._optional_split(config.data.test_split, "test")
        for split in (self.train_split, self.val_split, self.test_split):
            if split is not None and len(split) == 0:
                raise UserError(f"split {split.name!r} of {self.manifest.folder} has no images")
        labels = self.train_split.observed if method_class.label_source == "observed" else self.train_split.known
        if not (labels.codes == 1).any():
            raise UserError(f"no image of split {self.train_split.name!r} has a positive label; nothing to learn from")
        method_class.check_labels(self.train_split.known if method_class.uses_truth else labels, config.method)
        self.run_dir = self._make_run_dir()
        self.layout = RunLayout(self.run_dir)
        torch.manual_seed(config.run.seed)
        self.classifier = self._make_classifier(config.model)
        self.store = LabelStore(labels, device)
        if config.model.prior_bias != "none":
            positives, negatives = (self.store.class_counts(code).cpu() for code in (POSITIVE, NEGATIVE))
            self.classifier.set_prior(positives, negatives, len(self.train_split))
        self.truth: LabelStore | None = None
        if method_class.label_source == "observed" and self.train_split.hides_labels:
            self.truth = LabelStore(self.train_split.known, device)
        self.method: Method = method_class(config.method, self.store)
        mean, std = input_normalisation(config, self.classifier)
        self.loader = TrainLoader(
            self.train_split,
            config.data,
            views=method_class.views,
            batch_size=config.train.batch_size,
            accumulation=config.train.accumulation,
            seed=config.run.seed,
            device=device,
            mean=mean,
            std=std,
            make_sampler=self._make_order(labels),
        )
        self.train_scorer: EvalLoader | None = None
        self.val_loader = make_eval_loader(config, self.val_split, self.classifier, device) if self.val_split else None
        linear = [Phase("linear", config.train.linear_epochs)] if config.train.linear_epochs else []
        self.phases = [*linear, Phase("finetune", config.train.epochs)]
        self.total_updates = sum(p.epochs for p in self.phases) * self.loader.updates_per_epoch
        self.best = self.latest = -math.inf
        self.trained_samples, self.trained_seconds, self.waited_seconds = 0, 0.0, 0.0
        self.last_loss: float | None = None
        self.ema: ModelEmaV3 | None = None

    # ---- set-up

    def _make_order(self, labels: SparseLabels) -> Callable[..., TrainSampler]:
        """How often images come (`train.sampling`), from the labels that training sees."""
        train = self.config.train
        if train.sampling == "uniform":
            return TrainSampler
        if self.method_class.one_visit_per_step:
            raise UserError(
                f"method {self.config.method.name} keeps a row for every image, which must not come twice in a step; "
                f"it does not go with train.sampling {train.sampling}"
            )
        return functools.partial(RepeatFactorSampler, repeat_factors(labels, train.repeat_threshold))

    def _optional_split(self, name: str | None, default: str) -> Split | None:
        """The split called `name`. One that nobody asked for by name may be missing; the opening lines say so."""
        if name is None or (name == default and name not in self.manifest.splits):
            return None
        return self.manifest.split(name)

    def _make_run_dir(self) -> Path:
        """Make the run directory on rank 0, and settle where it is for all ranks."""
        folder = self.config.run.dir
        if folder is None:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            folder = f"runs/{self.manifest.name}-{self.config.method.name}-{stamp}"
            if distributed.is_main():
                number, base = 2, folder
                while Path(folder).exists():
                    folder, number = f"{base}-{number}", number + 1
        path = Path(distributed.broadcast_text(folder))
        if distributed.is_main():
            try:
                RunLayout(path).checkpoints.folder.mkdir(parents=True, exist_ok=True)
                probe = path / ".writable"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise UserError(f"run directory {path} cannot be written: {error.strerror}") from error
        distributed.barrier()
        return path

    def _make_classifier(self, model: ModelConfig) -> Classifier:
        """A classifier on the CPU, with what the run asks of it in training."""
        classifier = Classifier(model, self.manifest.num_classes, self.config.data.image_size)
        if model.sync_bn:
            if self.device.type != "cuda":
                raise UserError("model.sync_bn needs GPUs; leave it off (statistics are averaged over ranks anyway)")
            classifier.backbone = convert_sync_batchnorm(classifier.backbone)
        if model.compile:
            classifier.backbone.compile()
        return classifier

    def _best_classifier(self) -> tuple[Classifier, dict[str, str]]:
        """A new classifier with the best weights so far, and their metadata.

        The one that was trained cannot take them: ZeRO stage 3 leaves it in pieces.
        """
        distributed.barrier()
        classifier = self._make_classifier(dataclasses.replace(self.config.model, pretrained=False, weights=None))
        return classifier, load_weights(self.layout.weights, classifier)

    def _write_description(self, ds_config: dict[str, Any]) -> None:
        """Resolved recipe, DeepSpeed configuration and class names; says what differs when a run goes on."""
        if not distributed.is_main():
            return
        text = to_yaml(self._resolved())
        path = self.layout.config
        if path.exists() and path.read_text(encoding="utf-8") != text:
            old, new = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
            changed = [line.strip() for line in new if line not in old]
            self.log.say(f"note: this run goes on with other options than before: {'; '.join(changed) or 'fewer'}")
        path.write_text(text, encoding="utf-8")
        write_json(self.layout.deepspeed, ds_config)
        self.layout.classes.write_text("".join(f"{c}\n" for c in self.manifest.classes), encoding="utf-8")

    def _resolved(self) -> Config:
        """The configuration with what was decided on the way, so that the run can be repeated from it."""
        mean, std = input_normalisation(self.config, self.classifier)
        folder = str(self.manifest.folder.resolve())
        data = dataclasses.replace(self.config.data, dir=folder, mean=mean, std=std)
        run = dataclasses.replace(self.config.run, dir=str(self.run_dir))
        return dataclasses.replace(self.config, data=data, run=run)

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Train, then evaluate the best weights on the test split; returns what the closing table shows."""
        found = find_resume(self.layout.checkpoints.folder, self.config.run.resume)
        with RunLog(self.run_dir, self.total_updates) as self.log:
            self.log.say(self._opening())
            if self.val_split is None:
                self.log.say("no validation split: the weights of the last epoch are kept, not the best ones")
            if self.test_split is None:
                self.log.say("no test split: there will be no test figures")
            for phase in self.phases:
                if found is not None and [p.name for p in self.phases].index(phase.name) < self._place(found[1]):
                    continue
                resume = found if found is not None and found[1].phase == phase.name else None
                self._run_phase(phase, resume)
                found = None
            results = self._final()
        self._closing(results)
        return results

    def _place(self, mark: CheckpointPosition) -> int:
        """Index of the phase that a checkpoint belongs to."""
        names = [p.name for p in self.phases]
        if mark.phase not in names:
            raise UserError(f"the checkpoint is from phase {mark.phase!r}, which this run does not have")
        return names.index(mark.phase)

    def _opening(self) -> str:
        model = self.config.model
        dtype = autocast_dtype(self.config.train.precision, self.device)
        size = sum(p.numel() for p in self.classifier.parameters()) / 1e6
        where = f"{self.world} x {self.device.type}" + (f" ({'bf16' if dtype else 'fp32'})")
        return (
            f"{self.manifest.name}: {len(self.train_split)} training images, {self.manifest.num_classes} classes | "
            f"{self.config.method.name}, alpha {model.alpha_train:g} in training, {model.alpha_eval:g} in evaluation | "
            f"{model.backbone} ({size:.1f} M), {self.config.data.image_size} px | {where} | {self.run_dir}"
        )

    def _run_phase(self, phase: Phase, resume: tuple[Path, CheckpointPosition] | None) -> None:
        """Train one phase from its start or from a checkpoint."""
        config, train = self.config, self.config.train
        linear = phase.name == "linear"
        self.classifier.freeze_backbone(linear)
        updates = phase.epochs * self.loader.updates_per_epoch
        groups = parameter_groups(self.classifier, self.method, train, head_only=linear)
        optimizer = make_optimizer(groups, train, fused=self.device.type == "cuda")
        scheduler = make_schedule(optimizer, train, updates)
        ds_config = deepspeed_config(train, config.deepspeed, self.world, self.device, self.run_dir)
        self._write_description(ds_config)
        module = TrainingModule(self.classifier, self.method)
        self.engine = Engine(module, optimizer, scheduler, ds_config)
        self.classifier.to(self.device)
        self.ema = None
        if train.ema_decay:
            self.ema = ModelEmaV3(self.classifier, decay=train.ema_decay, use_warmup=True)
        start_epoch, start_update = 1, 0
        if resume is not None:
            start_epoch, start_update = self._restore(*resume)
        for epoch in range(start_epoch, phase.epochs + 1):
            if self._should_stop():
                self.log.say(f"stopped: validation mAP is {train.stop_after_drop:g} points below the best")
                break
            self._train_epoch(phase, epoch, start_update)
            start_update = 0
            validates = epoch == phase.epochs or epoch % config.eval.every == 0
            self._finish_epoch(phase, epoch, self._validate() if validates else None)
        self.engine.close()
        if linear and self.layout.weights.exists():
            # Fine-tuning starts from the best linear head (spec/boostlu_large_loss.md 1.6).
            self.classifier, _ = self._best_classifier()
            self.best = self.latest = -math.inf

    def _progress(self, phase: Phase, epoch: int, update: int) -> Progress:
        per_epoch = self.loader.updates_per_epoch
        done = (epoch - 1) * per_epoch + update
        return Progress(epoch, phase.epochs, done, per_epoch, phase.name, self.engine.learning_rate)

    def _train_epoch(self, phase: Phase, epoch: int, start_update: int) -> None:
        """One epoch, from an update on."""
        config = self.config
        self.engine.train()
        self.method.on_epoch_start(self._progress(phase, epoch, start_update))
        meter = Meter()
        sums: dict[str, Tensor] = {}
        phase_index = self.phases.index(phase)
        done = self._updates_before(phase)
        updates = self.loader.epoch(epoch, start_update)
        update = start_update
        while True:
            before = time.perf_counter()
            micro = next(updates, None)
            meter.waited += time.perf_counter() - before
            if micro is None:
                break
            progress = self._progress(phase, epoch, update)
            torch.manual_seed(rng_seed(config.run.seed, phase_index, progress.update, self.rank))
            self._update(micro, progress, sums)
            meter.samples += micro[0].update_size
            update += 1
            if update % config.train.log_every == 0 and update < self.loader.updates_per_epoch:
                self._log_update(phase, progress, meter, sums)
            if self.log.live:
                self.log.progress(done + progress.update + 1, self._live_text(epoch, phase, meter))
            if (
                config.run.save_updates
                and update % config.run.save_updates == 0
                and update < progress.updates_per_epoch
            ):
                self._save(phase, epoch - 1, update, best=False)
        figures: dict[str, Any] = dict(self._read(sums))
        self.trained_samples += meter.samples
        self.trained_seconds += meter.seconds
        self.waited_seconds += meter.waited
        figures |= {
            "images_per_second": meter.rate,
            "data_wait": meter.wait_share,
            "memory_gib": memory_gib(self.device),
            "lr": self.engine.learning_rate,
            "seconds": meter.seconds,
        }
        progress = self._progress(phase, epoch, update)
        if self.method.needs_train_scores(progress):
            self._score_training_split()
        figures |= self.method.on_epoch_end(progress)
        self.figures = figures

    def _live_text(self, epoch: int, phase: Phase, meter: Meter) -> str:
        best = f" | val mAP {self.best:.2f}" if math.isfinite(self.best) else ""
        loss = f" | loss {self.last_loss:.4f}" if self.last_loss is not None else ""
        return (
            f"{phase.name} {epoch}/{phase.epochs}{loss}{best} | {meter.rate:.0f} images/s | "
            f"data wait {meter.wait_share:.0%} | {memory_gib(self.device):.1f} GiB"
        )

    def _update(self, micro: list[MicroBatch], progress: Progress, sums: dict[str, Tensor]) -> None:
        """One optimizer update: forward, backward and step for each micro-batch."""
        train = self.config.train
        batches = [self._batch(views) for views in micro]
        if train.exact_accumulation and len(batches) > 1 and self.method.batch_statistics:
            self._plan(batches, progress)
        for views, batch in zip(micro, batches, strict=True):
            loss, metrics = self.engine(batch, progress)
            # DeepSpeed divides by the number of micro-steps, which may differ in size by a sample.
            weight = train.accumulation * self.method.fraction_of_update(batch.global_size, views.update_size)
            # What checkpointing computes again has moved BatchNorm's statistics before.
            with bn_behaviour(self.classifier, "no_update" if self.config.model.grad_checkpointing else "update"):
                self.engine.backward(loss if weight == 1 else loss * weight)
            self.engine.step()
            share = loss.detach() * (batch.global_size / self.world)
            for name, value in {"loss": share, **metrics}.items():
                value = value.detach()
                sums[name] = sums[name] + value if name in sums else value
            sums["samples"] = sums.get("samples", torch.zeros((), device=self.device)) + batch.global_size / self.world
        if self.ema is not None:
            self.ema.update(self.classifier, step=progress.update + 1)

    def _batch(self, views: MicroBatch) -> Batch:
        labels = self.store.rows(views.index)
        truth = self.truth.rows(views.index) if self.truth is not None else None
        return Batch(views.views, labels, views.index, views.global_size, truth)

    @torch.no_grad()
    def _plan(self, batches: list[Batch], progress: Progress) -> None:
        """Exact accumulation: one more forward without gradient, and the method's statistics over the whole update."""
        classifier = self.classifier
        dtype = autocast_dtype(self.config.train.precision, self.device)
        with (
            bn_behaviour(classifier, "no_update"),
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            autocast(self.device, dtype),
        ):
            logits = [self.method.statistics_forward(classifier, b, progress) for b in batches]
        for batch, statistics in zip(batches, self.method.update_statistics(logits, batches, progress), strict=True):
            batch.update_statistics = statistics

    @torch.no_grad()
    def _score_training_split(self) -> None:
        """A pass over the training split in evaluation mode, for methods that ask for it (collective)."""
        self._average_bn()
        if self.train_scorer is None:
            self.train_scorer = make_eval_loader(self.config, self.train_split, self.classifier, self.device)
        dtype = autocast_dtype(self.config.train.precision, self.device)
        self.classifier.eval()
        for batch in self.train_scorer:
            with autocast(self.device, dtype):
                logits = self.classifier(batch.views["eval"], alpha=self.classifier.alpha_train).logits
            if batch.real:
                self.method.on_train_scores(batch.index[: batch.real], logits[: batch.real])
        self.classifier.train()

    def _read(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over ranks as numbers (the one place that waits for the device), loss as a mean."""
        names = sorted(sums)
        if not names:
            return {"loss": math.nan}
        packed = distributed.all_reduce_sum(torch.stack([sums[n].double() for n in names])).tolist()
        values = dict(zip(names, packed, strict=True))
        samples = values.pop("samples")
        values["loss"] /= max(samples, 1)
        self.last_loss = values["loss"]
        if "selected_true_count" in values:
            counts = (values["selected_true_count"], values["selected_count"], values["hidden_positive_count"])
            quality = selection_quality(*(int(c) for c in counts))
            values |= {"selection_precision": quality["precision"], "selection_recall": quality["recall"]}
        return values

    def _log_update(self, phase: Phase, progress: Progress, meter: Meter, sums: dict[str, Tensor]) -> None:
        values = self._read(sums)
        values |= {"lr": self.engine.learning_rate, "images_per_second": meter.rate, "data_wait": meter.wait_share}
        norm = self.engine.gradient_norm
        if norm is not None:
            values["gradient_norm"] = norm
        place = {"phase": phase.name, "epoch": progress.epoch, "update": progress.update + 1}
        self.log.record("update", place | values)
        self.engine.write_events({f"train/{k}": v for k, v in values.items()}, self._seen(phase, progress.update + 1))

    def _updates_before(self, phase: Phase) -> int:
        """Updates of the phases before this one."""
        return sum(p.epochs for p in self.phases[: self.phases.index(phase)]) * self.loader.updates_per_epoch

    def _seen(self, phase: Phase, update: int) -> int:
        """Samples seen after `update` updates of a phase; the x axis of the monitor."""
        return (self._updates_before(phase) + update) * self.config.train.batch_size

    # ---- validation and saving

    def _average_bn(self) -> None:
        """BatchNorm statistics averaged over ranks; each rank has seen its own slices only."""
        if self.world > 1:
            distribute_bn(self.classifier, self.world, reduce=True)
            if self.ema is not None:
                distribute_bn(self.ema.module, self.world, reduce=True)

    def _should_stop(self) -> bool:
        """Whether the last validation fell too far below the best (`train.stop_after_drop`)."""
        drop = self.config.train.stop_after_drop
        return bool(drop) and self.best - self.latest > drop

    def _validate(self) -> float | None:
        """Validation mAP at model.alpha_eval; None without a validation split."""
        self._average_bn()
        if self.val_loader is None or self.val_split is None:
            return None
        model = self.ema.module if self.ema is not None else self.classifier
        alpha = self.config.model.alpha_eval
        found = evaluate_split(model, self.val_loader, self.val_split, [alpha], self.config, self.manifest.classes)
        return float(found[alpha]["map"])

    def _finish_epoch(self, phase: Phase, epoch: int, score: float | None) -> None:
        """Log the epoch, save, and keep the weights when they are the best (or when nothing can tell)."""
        best = self.val_split is None
        if score is not None and math.isfinite(score):
            best = score > self.best
            self.best, self.latest = max(self.best, score), score
        elif score is not None:
            self.log.say("validation mAP is not defined (no known labels in the split); these weights are kept")
            best = True
        place = {"phase": phase.name, "epoch": epoch}
        self.log.record("epoch", place | self.figures | ({"val_map": score} if score is not None else {}))
        update = epoch * self.loader.updates_per_epoch
        events = {f"epoch/{k}": v for k, v in self.figures.items() if isinstance(v, int | float)} | (
            {} if score is None else {"epoch/val_map": score}
        )
        self.engine.write_events(events, self._seen(phase, update))
        figures = self.figures
        quality = ""
        if "selection_precision" in figures and figures["selected_count"]:
            quality = (
                f" | selected {figures['selected_count']:.0f}, precision {figures['selection_precision']:.0%}, "
                f"recall {figures['selection_recall']:.0%}"
            )
        self.log.say(
            f"{phase.name} {epoch}/{phase.epochs} | loss {figures['loss']:.4f}"
            + (f" | val mAP {score:.2f}" if score is not None else "")
            + f" | {figures['images_per_second']:.0f} images/s | data wait {figures['data_wait']:.0%}"
            + f" | {figures['memory_gib']:.1f} GiB | {figures['seconds']:.1f} s{quality}"
        )
        self._save(phase, epoch, 0, best)

    def _save(self, phase: Phase, epoch: int, update: int, best: bool) -> None:
        """Checkpoint (collective); with `best` the weights file too."""
        self._average_bn()
        folder = self.layout.checkpoints.folder
        mark = CheckpointPosition(phase.name, epoch, update, self.world, self.engine.stage)
        state = {
            "version": __version__,
            "labels": self.store.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "best": (self.best, self.latest),
            "trained": (self.trained_samples, self.trained_seconds, self.waited_seconds),
        }
        clear_unfinished(folder, mark.tag)
        try:
            self.engine.save(folder, mark.tag, {"spml_fast": state})
            save_rank_state(folder / mark.tag, self.method.rank_state())
        except OSError as error:
            raise UserError(f"checkpoint {folder / mark.tag} cannot be written: {error}") from error
        if best:
            with self.engine.gathered_parameters():
                model = self.ema.module if self.ema is not None else self.classifier
                metadata = {"phase": phase.name, "epoch": str(epoch), "val_map": f"{self.best:.6f}"}
                metadata |= {"backbone": self.config.model.backbone, "version": __version__}
                save_weights(self.layout.weights, model, metadata)
        commit_checkpoint(folder, mark, self.config.run.keep, best)

    def _restore(self, folder: Path, mark: CheckpointPosition) -> tuple[int, int]:
        """Load a checkpoint; returns the epoch and update to go on with."""
        if (mark.world_size != self.world or mark.zero_stage != self.engine.stage) and (
            mark.zero_stage or self.engine.stage
        ):
            raise UserError(
                f"checkpoint {folder / mark.tag} was saved by {mark.world_size} ranks at ZeRO stage {mark.zero_stage}; "
                f"go on with the same, not with {self.world} ranks at stage {self.engine.stage} "
                "(stage 0 alone allows another number of ranks)"
            )
        state = self.engine.load(folder, mark.tag)["spml_fast"]
        self.store.load_state_dict(state["labels"])
        if self.method.rank_state():
            self.method.load_rank_state(load_rank_states(folder / mark.tag, mark.world_size))
        if self.ema is not None:
            if state["ema"] is None:
                raise UserError(f"checkpoint {folder / mark.tag} has no EMA; go on with train.ema_decay 0")
            self.ema.module.load_state_dict(state["ema"])
        self.best, self.latest = state["best"]
        self.trained_samples, self.trained_seconds, self.waited_seconds = state["trained"]
        self.log.say(f"going on from {folder / mark.tag}")
        return mark.epoch + 1, mark.update

    def _final(self) -> dict[str, Any]:
        """Test metrics of the best weights at every alpha asked for."""
        config = self.config
        self.classifier, metadata = self._best_classifier()
        self.classifier.to(self.device).to(memory_format=torch.channels_last)
        alphas = config.eval.alphas or sorted({1.0, config.model.alpha_eval})
        results: dict[str, Any] = {
            "run": str(self.run_dir),
            "method": config.method.name,
            "best_epoch": int(metadata["epoch"]),
            "best_val_map": float(metadata["val_map"]) if self.val_split is not None else None,
            "images_per_second": self.trained_samples / max(self.trained_seconds, 1e-9),
            "data_wait": self.waited_seconds / max(self.trained_seconds, 1e-9),
            "train_seconds": self.trained_seconds,
            "memory_gib": memory_gib(self.device),
            "ranks": self.world,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }
        if self.test_split is not None:
            loader = make_eval_loader(config, self.test_split, self.classifier, self.device)
            groups = class_groups(self.manifest, config)
            found = evaluate_split(
                self.classifier, loader, self.test_split, alphas, config, self.manifest.classes, groups
            )
            results |= {"split": self.test_split.name, "alpha": {f"{a:g}": found[a] for a in alphas}}
        if distributed.is_main():
            write_json(self.layout.results, results)
            self.log.record(
                "final",
                {k: v for k, v in results.items() if k != "alpha"}
                | {"test_map": {a: m["map"] for a, m in results.get("alpha", {}).items()}},
            )
        return results

    def _closing(self, results: dict[str, Any]) -> None:
        rows = [
            (f"{results['split']} mAP, alpha {alpha}", shown(metrics["map"]))
            for alpha, metrics in results.get("alpha", {}).items()
        ]
        rows += [
            (f"groups of classes, rarest first, alpha {alpha}", " / ".join(shown_group(g) for g in metrics["groups"]))
            for alpha, metrics in results.get("alpha", {}).items()
            if "groups" in metrics
        ]
        if results["best_val_map"] is not None:
            rows.append(("best validation mAP", f"{shown(results['best_val_map'])} (epoch {results['best_epoch']})"))
        rows += [
            ("training speed", f"{results['images_per_second']:.0f} images/s over {self.world} rank(s)"),
            ("waiting for data", f"{results['data_wait']:.1%} of the training time"),
            ("training time", f"{results['train_seconds']:.0f} s"),
            ("run directory", os.fspath(self.run_dir)),
        ]
        print_table(f"{self.config.method.name} on {self.manifest.name}", rows)

"""The training loop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from spml_fast import __version__
from spml_fast.core import distributed, spans
from spml_fast.core.batch import Batch, MicroBatch
from spml_fast.core.config import Config
from spml_fast.core.precision import autocast, autocast_dtype, set_cudnn_policy
from spml_fast.core.seeds import rng_seed, seed_device
from spml_fast.core.spans import span
from spml_fast.data.decoded_images import room_for
from spml_fast.data.labels import LabelStore
from spml_fast.data.loader import EvalLoader
from spml_fast.evaluation.evaluate import evaluate_split
from spml_fast.methods import Method, Progress, get_method
from spml_fast.models.batchnorm import bn_behaviour
from spml_fast.models.classifier import Classifier
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import make_eval_loader
from spml_fast.runs.recipe import to_yaml
from spml_fast.runs.warm_start import warm_start
from spml_fast.runs.write import write_description
from spml_fast.training import console, peers
from spml_fast.training.advice import opening_notes
from spml_fast.training.averaging import WeightAverage, weight_average
from spml_fast.training.bad_image_list import list_bad_images
from spml_fast.training.batchnorm_state import average_statistics, own_statistics
from spml_fast.training.checkpoint import CheckpointPosition
from spml_fast.training.compile_choice import compiled_sizes, settle_compile
from spml_fast.training.earlier_choices import earlier_choices
from spml_fast.training.examples import selected_examples
from spml_fast.training.final import finish_run
from spml_fast.training.logs import Meter, RunLog, memory_gib, selection_figures
from spml_fast.training.memory import explain_out_of_memory
from spml_fast.training.nonfinite import NonFiniteGuard
from spml_fast.training.pace import Pace
from spml_fast.training.precision_choice import settle_precision
from spml_fast.training.resume import Resume, check_same_run, defining_options, find_resume
from spml_fast.training.save_times import SaveTimes
from spml_fast.training.saving import RunCheckpoints
from spml_fast.training.scoring import score_training_split
from spml_fast.training.selection import BestScore
from spml_fast.training.setup import (
    Phase,
    load_best_classifier,
    load_data,
    make_classifier,
    make_phases,
    make_run_dir,
    make_train_loader,
    make_truth,
    phase_engine,
    phase_index,
    resolve_phases,
    resolved_config,
    set_prior,
)
from spml_fast.training.solved_phase import solve_phase
from spml_fast.training.spent import Spent
from spml_fast.training.state import restore_state, run_state
from spml_fast.training.step_profile import NoProfile, Profile, profiled_epoch
from spml_fast.training.tracking import Trackers


class Trainer:
    """One run: data, model, method, engine, checkpoints.

    Args:
        config: the whole run; paths are used as they are.
        device: this rank's device, from `engine.init_distributed`.
        program: the process is there for this run alone, so that signals may end it (training/signals.py).

    Raises:
        UserError: anything that the user can correct.
    """

    def __init__(self, config: Config, device: torch.device, program: bool = False) -> None:
        self.device = device
        # Before anything takes long.
        self.trackers = Trackers(config)
        self.world, self.rank = distributed.world_size(), distributed.rank()
        set_cudnn_policy(device, config.run.deterministic)
        self.data = load_data(config)
        config, self.notes = resolve_phases(config, len(self.data.train))
        self.config = config
        self.run_dir = make_run_dir(config, self.data.manifest.name)
        self.layout = RunLayout(self.run_dir)
        torch.manual_seed(config.run.seed)
        classes, side = self.data.manifest.num_classes, config.data.image_size
        checkpoints = self.layout.checkpoints.folder
        self.resume = distributed.from_main(lambda: find_resume(checkpoints, config.run.resume))
        # The weights that a run started from need not be there any more.
        self.classifier = make_classifier(config.model, classes, side, device, initial=self.resume is None)
        earlier = distributed.from_main(lambda: earlier_choices(self.resume, self.layout, config))
        config, chosen = settle_precision(config, self.classifier, earlier, device)
        self.config, self.notes = config, [*self.notes, *chosen]
        self.store = LabelStore(self.data.labels, device)
        set_prior(self.classifier, config, self.store, len(self.data.train))
        self.truth = make_truth(config, self.data.train, device)
        self.method: Method = get_method(config.method.name)(config.method, self.store)
        self.loader = make_train_loader(config, self.data, self.classifier, device)
        self.train_scorer: EvalLoader | None = None
        self.val_loader: EvalLoader | None = None
        if self.data.val is not None:
            decoded = room_for(self.data.val, config.data)
            self.val_loader = make_eval_loader(config, self.data.val, self.classifier, device, decoded=decoded)
        self.phases = make_phases(config)
        updates = self.loader.updates_per_epoch
        self.total_updates = sum(p.epochs for p in self.phases) * updates
        updated = self.phases[-1].epochs * updates
        config, chosen = settle_compile(config, self.classifier, earlier, device, updated)
        self.config, self.notes = config, [*self.notes, *chosen]
        self.pace = Pace(self.phases, updates, config.train, self.data.val, device, config.eval.every)
        defines = defining_options(config, self.data.manifest, device)
        self.checkpoints = RunCheckpoints(self.layout, config.run.keep, defines)
        self.saves = SaveTimes(config.run, self.run_dir, self.checkpoints, program)
        self.score = BestScore()
        self.trained_samples, self.trained_seconds, self.waited_seconds = 0, 0.0, 0.0
        # Since the last line of an epoch.
        self.spent = Spent()
        self.last_loss: float | None = None
        self.ema: WeightAverage | None = None
        # The run that this one started from (runs/warm_start.py).
        self.started_from: dict[str, Any] | None = None
        # Of the epoch that is under way: its clock, and its sums on this rank.
        self.running: tuple[Meter, dict[str, Tensor]] | None = None
        # Phases of which updates were measured (`run.profile`), and what measures those of this epoch.
        self.profiled: set[str] = set()
        self.profile: Profile = NoProfile()
        # Of the epoch's last update.
        self.selected: list[list[Any]] = []

    def run(self) -> dict[str, Any]:
        """Train, then evaluate the best weights on the test split; returns what the closing table shows."""
        with explain_out_of_memory(self.config, self.device):
            return self._run()

    def _run(self) -> dict[str, Any]:
        resume, notes = self.resume, self.notes
        if resume is not None:
            forced = check_same_run(resume, self.checkpoints.defines, self.run_dir)
            notes = [*notes, *resume.notes, *([forced] if forced else [])]
        with RunLog(self.run_dir, self.total_updates) as self.log, self.trackers:
            self.log.say(console.opening_line(self.config, self.data, self.classifier, self.device, self.run_dir))
            for note in [*opening_notes(self.config, self.data, self.classifier, self.total_updates), *notes]:
                self.log.say(note)
            if resume is None:
                self._start_from_run()
            first = 0 if resume is None else phase_index(self.phases, resume.checkpoint.position.phase)
            with self.saves:
                for phase in self.phases[first:]:
                    self._run_phase(phase, resume)
                    resume = None
            results = finish_run(self)
        title = f"{self.config.method.name} on {self.data.manifest.name}"
        console.print_table(title, console.closing_rows(results, self.run_dir))
        return results

    def _start_from_run(self) -> None:
        """Take the weights of the run that `model.weights` names; nothing where it names none."""
        started = warm_start(self.config, self.classifier, self.data.manifest.classes)
        if started is not None:
            text, self.started_from = started
            self.log.say(text)

    def _describe(self, ds_config: dict[str, Any]) -> None:
        """Write what the run is, say what differs when it is resumed, and start the trackers (collective)."""
        config = resolved_config(self.config, self.data, self.run_dir, self.classifier, self.started_from)
        note = None
        if distributed.is_main():
            note = write_description(self.layout, config, ds_config, self.data.manifest.classes)
        if note is not None:
            self.log.say(note)
        options = dataclasses.asdict(config)
        self.trackers.start(self.layout, options, to_yaml(config), self.resume is not None, self.log.say)

    def _run_phase(self, phase: Phase, resume: Resume | None) -> None:
        """Train one phase from its start or from a checkpoint."""
        config, train = self.config, self.config.train
        linear = phase.name == "linear"
        self.classifier.freeze_backbone(linear)
        if config.model.compile:
            self.classifier.compile_backbone()
            self.classifier.compiled_sizes = compiled_sizes(config)
        updates = phase.epochs * self.loader.updates_per_epoch
        monitored = "tensorboard" in self.trackers.names
        self.engine, ds_config = phase_engine(
            config, self.classifier, self.method, linear, updates, self.run_dir, self.device, monitored
        )
        self.classifier.to(self.device)
        self.ema = weight_average(self.classifier, train, linear)
        self.guard = NonFiniteGuard(train, self.engine, self.classifier, self.loader, self.checkpoints)
        start_epoch, start_update = 1, 0
        if resume is not None:
            start_epoch, start_update = restore_state(self, phase, resume)
        # Once the checkpoint was accepted: until then the run is what it was.
        self._describe(ds_config)
        self.pace.begin(phase)
        for epoch in range(start_epoch, phase.epochs + 1):
            if (reason := self.score.stops(train.stop_after_drop, train.patience)) is not None:
                self.log.say(f"stopped: {reason}")
                break
            self.figures = solve_phase(self, phase) if phase.solved else self._train_epoch(phase, epoch, start_update)
            start_update = 0
            validates = epoch == phase.epochs or epoch % config.eval.every == 0
            self._finish_epoch(phase, epoch, self._validate() if validates else None)
        # Before they are used.
        self.checkpoints.ensure_best(config.model.backbone, self.score.latest, self.log.say)
        self.engine.close()
        if linear and self.layout.weights.exists():
            # Fine-tuning starts from the best linear head. Source: docs/sources.md#large-loss.
            self.classifier, _ = self.load_best()
            self.score.next_phase(keep_best=train.best_of == "run")

    def load_best(self) -> tuple[Classifier, dict[str, str]]:
        """As `load_best_classifier`, of this run (collective)."""
        return load_best_classifier(self.config, self.layout, self.data.manifest.num_classes, self.device)

    def _progress(self, phase: Phase, epoch: int, update: int) -> Progress:
        per_epoch = self.loader.updates_per_epoch
        done = (epoch - 1) * per_epoch + update
        return Progress(epoch, phase.epochs, done, per_epoch, phase.name, self.engine.learning_rate)

    def _train_epoch(self, phase: Phase, epoch: int, start_update: int) -> dict[str, Any]:
        """One epoch, from an update on; returns its figures."""
        config = self.config
        self.engine.train()
        self.method.on_epoch_start(self._progress(phase, epoch, start_update))
        meter, sums = self.running = self.running or (Meter(), {})
        update = self._train_updates(phase, epoch, start_update, meter, sums)
        self.running = None
        figures: dict[str, Any] = dict(self._read(sums))
        self.trained_samples += meter.samples
        self.trained_seconds += meter.seconds
        self.waited_seconds += meter.waited
        if (cost := self.pace.end_epoch(epoch, meter.rate)) is not None:
            self.log.say(cost)
        figures |= {
            "images_per_second": meter.rate,
            "data_wait": meter.wait_fraction,
            "memory_gib": memory_gib(self.device),
            "lr": self.engine.learning_rate,
            "seconds": meter.seconds,
        }
        progress = self._progress(phase, epoch, update)
        if self.method.needs_train_scores(progress):
            with self.spent.on("scoring"):
                score_training_split(self)
        figures |= self.method.on_epoch_end(progress)
        figures |= {"selected_examples": self.selected} if self.selected else {}
        if config.data.bad_images == "replace":
            figures["bad_images"] = list_bad_images(self.loader.bad_images, self.layout)
        return figures

    def _train_updates(self, phase: Phase, epoch: int, update: int, meter: Meter, sums: dict[str, Tensor]) -> int:
        """The updates of an epoch from one on; returns how many of it are done."""
        config, phase_index = self.config, self.phases.index(phase)
        updates = self.loader.epoch(epoch, update)
        with profiled_epoch(self, phase, epoch, update) as self.profile:
            while True:
                if (spent := self.profile.before_update()) > 0:
                    meter.leave_out(spent)
                    self.pace.leave_out(spent)
                with meter.waiting(), span(spans.DATA):
                    micro = next(updates, None)
                if micro is None:
                    return update
                peers.begin_update()
                progress = self._progress(phase, epoch, update)
                seed_device(rng_seed(config.run.seed, phase_index, progress.update, self.rank), self.device)
                self._update(micro, progress, sums)
                meter.samples += micro[0].update_size
                update += 1
                peers.end_update(phase.name, epoch, update)
                if update % config.train.log_every == 0 and update < self.loader.updates_per_epoch:
                    self._log_update(phase, progress, meter, sums)
                if (cost := self.pace.update(epoch, update)) is not None:
                    self.log.say(cost)
                if self.log.due:
                    self._show(phase, epoch, update, meter)
                if self.saves.due(update, progress.updates_per_epoch):
                    with span(spans.SAVING):
                        self._save(phase, epoch - 1, update, best=False)

    def _show(self, phase: Phase, epoch: int, update: int, meter: Meter) -> None:
        """Where the run stands, for who watches it."""
        done = self._updates_before(phase) + (epoch - 1) * self.loader.updates_per_epoch + update
        notes = console.live_notes(self.last_loss, self.score.best, meter, self.device)
        self.log.progress(done, console.epoch_name(phase, epoch), notes, self.pace.seconds_left(epoch, update))

    def _update(self, micro: list[MicroBatch], progress: Progress, sums: dict[str, Tensor]) -> None:
        """One optimizer update: forward, backward and step for each micro-batch."""
        train = self.config.train
        with span(spans.LABELS):
            batches = [self._batch(micro_batch) for micro_batch in micro]
        self.profile.see(batches)
        figures: list[dict[str, Tensor]] = []
        self.guard.begin()
        if train.exact_accumulation and len(batches) > 1 and self.method.batch_statistics:
            with span(spans.METHOD):
                self._update_statistics(batches, progress)
        for micro_batch, batch in zip(micro, batches, strict=True):
            with span(spans.METHOD):
                loss, metrics = self.engine(batch, progress)
            # DeepSpeed divides by the number of micro-steps, which may differ in size by a sample.
            weight = train.accumulation * self.method.fraction_of_update(batch.global_size, micro_batch.update_size)
            # What checkpointing computes again has moved BatchNorm's statistics before.
            again = self.config.model.grad_checkpointing
            with span(spans.BACKWARD), bn_behaviour(self.classifier, "no_update" if again else "update"):
                self.engine.backward(loss if weight == 1 else loss * weight)
            with span(spans.OPTIMIZER):
                counts = self.guard.step(loss.detach(), progress)
            samples = batch.global_size / self.world
            figures.append({name: value.detach() for name, value in {"loss": loss * samples, **metrics}.items()})
            figures[-1]["samples"] = torch.full((), samples, device=self.device)
        if progress.ends_epoch:
            self.selected = selected_examples(batches[-1], self.data.train)
        for name, value in (item for step in figures if counts for item in step.items()):
            sums[name] = sums[name] + value if name in sums else value
        if self.ema is not None:
            with span(spans.OPTIMIZER):
                self.ema.update(self.classifier, step=progress.update + 1)

    def _batch(self, micro: MicroBatch) -> Batch:
        labels = self.store.rows(micro.index)
        truth = self.truth.rows(micro.index) if self.truth is not None else None
        return Batch(micro.views, labels, micro.index, micro.global_size, truth)

    @torch.no_grad()
    def _update_statistics(self, batches: list[Batch], progress: Progress) -> None:
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

    def _read(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over ranks as numbers (the one place that waits for the device), loss as a mean."""
        self.guard.check()
        names = sorted(sums)
        if not names:
            return {"loss": math.nan}
        packed = distributed.all_reduce_sum(torch.stack([sums[n].double() for n in names])).tolist()
        values = dict(zip(names, packed, strict=True))
        samples = values.pop("samples")
        values["loss"] /= max(samples, 1)
        self.last_loss = values["loss"]
        return values | selection_figures(values)

    def _log_update(self, phase: Phase, progress: Progress, meter: Meter, sums: dict[str, Tensor]) -> None:
        values = self._read(sums)
        values |= {"lr": self.engine.learning_rate, "images_per_second": meter.rate, "data_wait": meter.wait_fraction}
        norm = self.engine.gradient_norm
        if norm is not None:
            values["gradient_norm"] = norm
        position = {"phase": phase.name, "epoch": progress.epoch, "update": progress.update + 1}
        self.log.record("update", position | values)
        self._publish({f"train/{k}": v for k, v in values.items()}, self.samples_seen(phase, progress.update + 1))

    def _publish(self, figures: dict[str, float], images: int) -> None:
        """Figures for DeepSpeed's monitor and the trackers."""
        self.engine.write_events(figures, images)
        self.trackers.log(figures, images)

    def _updates_before(self, phase: Phase) -> int:
        """Updates of the phases before this one."""
        return sum(p.epochs for p in self.phases[: self.phases.index(phase)]) * self.loader.updates_per_epoch

    def samples_seen(self, phase: Phase, update: int) -> int:
        """Samples seen after `update` updates of a phase; the x axis of the monitor and the trackers."""
        return (self._updates_before(phase) + update) * self.config.train.batch_size

    def _validate(self) -> float | None:
        """Validation mAP at model.alpha_eval; None without a validation split."""
        average_statistics(self.classifier, self.ema)
        if self.val_loader is None or self.data.val is None:
            return None
        model = self.ema.module if self.ema is not None else self.classifier
        alpha = self.config.model.alpha_eval
        classes = self.data.manifest.classes
        with self.spent.on("validation"):
            metrics = evaluate_split(
                model, self.val_loader, self.data.val, [alpha], self.config, classes, task="validation"
            )
        return float(metrics[alpha]["map"])

    def _finish_epoch(self, phase: Phase, epoch: int, score: float | None) -> None:
        """Log the epoch, save, and keep the weights when they are the best (or when nothing can tell)."""
        best = self.data.val is None
        if score is not None:
            best = self.score.offer(score)
            if not math.isfinite(score):
                self.log.say("validation mAP is not defined (no known labels in the split); these weights are kept")
        figures = self.figures | ({"val_map": score} if score is not None else {}) | self.spent.take()
        self.log.record("epoch", {"phase": phase.name, "epoch": epoch} | figures)
        events = {f"epoch/{k}": v for k, v in figures.items() if isinstance(v, int | float)}
        self._publish(events, self.samples_seen(phase, epoch * self.loader.updates_per_epoch))
        name = console.epoch_name(phase, epoch)
        self.log.say_fields(console.epoch_fields(name, figures, score, self.method.corrects_labels))
        self._save(phase, epoch, 0, best)

    def _save(self, phase: Phase, epoch: int, update: int, best: bool) -> None:
        """Checkpoint (collective); with `best` the weights file too. Within an epoch it changes nothing.

        Training goes on while it is written, unless the run or its phase ends with it.
        """
        with self.spent.on("saving_within" if update else "saving"):
            self._write_checkpoint(phase, epoch, update, best)

    def _write_checkpoint(self, phase: Phase, epoch: int, update: int, best: bool) -> None:
        if not update:
            self.saves.agree()
        statistics = own_statistics(self.classifier, self.ema) if update else {}
        if not update:
            average_statistics(self.classifier, self.ema)
        self.guard.check_weights(self.ema.module if self.ema is not None else None)
        position = CheckpointPosition(phase.name, epoch, update, self.world, self.engine.stage)
        weights = None
        if best:
            metadata = {"phase": phase.name, "epoch": str(epoch), "val_map": f"{self.score.best:.6f}"}
            metadata |= {"backbone": self.config.model.backbone, "version": __version__}
            weights = (self.ema.module if self.ema is not None else self.classifier, metadata)
        state = {"spml_fast": run_state(self, epoch, update)}
        place, rank_state = console.place_name(phase, position), self.method.rank_state() | statistics
        last = not update and epoch == phase.epochs
        if not (self.engine.stage or self.saves.stopping or last):
            self.checkpoints.begin(position, self.engine, state, rank_state, weights)
            self.saves.begun(place)
            return
        self.checkpoints.save(position, self.engine, state, rank_state, weights)
        self.saves.saved(place, epoch_ends=not update)

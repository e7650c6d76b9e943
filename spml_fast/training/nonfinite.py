"""Notices losses and gradients that are not finite, says where they began, and keeps such weights off the disk.

Losses and gradient norm of every update stay on the device, and are looked through there, some dozens of updates at a
time and without waiting: whether they were finite, and which was the first that was not. `check` reads what was found
on all ranks; the trainer calls it whenever it waits for the device anyway, every `train.log_every` updates and at the
end of an epoch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.config import TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data.loader import TrainLoader
from spml_fast.methods import Progress
from spml_fast.training.engine import Engine
from spml_fast.training.saving import RunCheckpoints

# Updates that are looked through at once: their losses and norms take half a kilobyte each of a GPU's memory.
_TOGETHER = 64


class NonFiniteGuard:
    """Judges every update of a phase.

    Args:
        train: `nonfinite` says what to do, `nonfinite_limit` how often.
        engine: makes the updates.
        classifier: the model that is trained, the engine's.
        loader: knows which images an update sees.
        checkpoints: the run's; one that is being written is finished before the run stops.
    """

    def __init__(
        self,
        train: TrainConfig,
        engine: Engine,
        classifier: nn.Module,
        loader: TrainLoader,
        checkpoints: RunCheckpoints,
    ) -> None:
        self.train, self.engine, self.loader = train, engine, loader
        self.checkpoints, self.layout = checkpoints, checkpoints.layout
        self.classifier = classifier
        self.skips = train.nonfinite == "skip"
        self.skipped = 0
        self._phase = ""
        self._losses: list[Tensor] = []
        # Number from 1 and learning rate of every update since the last check, and losses of its micro-steps and
        # gradient norm of those that were not looked through yet.
        self._updates: list[tuple[int, float]] = []
        self._unseen: list[tuple[list[Tensor], Tensor]] = []
        # Of the first update that was not finite, on the device: its place in `_updates` from 1 (0: none), its losses
        # and norm; the host asks in `check` alone.
        self._first = torch.zeros((), device=engine.device, dtype=torch.int64)
        self._values = torch.zeros(train.accumulation + 1, device=engine.device, dtype=torch.float64)
        self._saved: list[tuple[Tensor, Tensor]] = []
        if self.skips:
            engine.refuse_overflow()
            self._saved = [(buffer, buffer.clone()) for buffer in classifier.buffers()]

    @torch.no_grad()
    def begin(self) -> None:
        """Call before the forwards of an update: what they change beside gradients can then be undone."""
        for buffer, copy in self._saved:
            copy.copy_(buffer)

    @torch.no_grad()
    def step(self, loss: Tensor, progress: Progress) -> bool:
        """The engine's step after a micro-step's backward.

        Args:
            loss: of the micro-step on this rank, 0-d, without gradient.
            progress: of the update.

        Returns:
            Whether the update counts; False when it was left out. Always True before the boundary.

        Raises:
            UserError: more updates were left out than `train.nonfinite_limit`.
        """
        self._losses.append(loss)
        if not self.engine.at_boundary:
            self.engine.step()
            return True
        losses, self._losses = self._losses, []
        norm: Tensor | float | None = self.engine.gradient_norm_on_device()
        if not self.skips:
            self.engine.step()
            self._note(losses, self.engine.step_norm() if norm is None else norm, progress)
            return True
        return self._step_or_skip(losses, norm, progress)

    def _note(self, losses: list[Tensor], norm: Tensor | float | None, progress: Progress) -> None:
        """Keep what tells whether an update was finite on this rank."""
        if not isinstance(norm, Tensor):
            norm = torch.full_like(losses[0], 0.0 if norm is None else norm)
        self._updates.append((progress.update + 1, progress.lr))
        self._unseen.append((losses, norm.reshape(())))
        self._phase = progress.phase
        if len(self._unseen) == _TOGETHER:
            self._look()

    def _look(self) -> None:
        """Look through what was kept, on the device."""
        if not self._unseen:
            return
        unseen, self._unseen = self._unseen, []
        losses = torch.stack([loss for update, _ in unseen for loss in update]).double().view(len(unseen), -1)
        values = torch.cat([losses, torch.stack([norm for _, norm in unseen]).double()[:, None]], 1)
        bad = ~values.isfinite().all(1)
        place = bad.int().argmax(0, keepdim=True)
        first = bad.any() & (self._first == 0)
        self._first = torch.where(first, place[0] + (len(self._updates) - len(unseen) + 1), self._first)
        self._values = torch.where(first, values.index_select(0, place)[0], self._values)

    def _forget(self) -> None:
        """Begin anew, after all updates were judged."""
        self._updates, self._unseen = [], []
        self._first = torch.zeros_like(self._first)

    def _step_or_skip(self, losses: list[Tensor], norm: Tensor | float | None, progress: Progress) -> bool:
        """An update that is left out if it is not finite on any rank; waits for the device."""
        applied = True
        if self.engine.stage:
            applied = self.engine.step_unless_overflow()
            norm = self.engine.step_norm() if applied else math.inf
        self._note(losses, norm, progress)
        if self._all_finite():
            if not self.engine.stage:
                self.engine.step()
            return True
        if self.engine.stage and applied:
            # The loss alone was not finite, and its gradient has moved the weights.
            self.check()
        if not self.engine.stage:
            self.engine.step_without_update()
        for buffer, copy in self._saved:
            buffer.copy_(copy)
        self.skipped += 1
        if self.skipped > self.train.nonfinite_limit:
            self.check()
        self._report("skipped")
        self._forget()
        return False

    def _all_finite(self) -> bool:
        """Whether all updates that were not judged yet were finite on all ranks (collective; waits for the device)."""
        self._look()
        finite = not int(distributed.all_reduce_sum((self._first > 0).long()))
        if finite:
            self._forget()
        return finite

    def check(self) -> None:
        """Stop the run if any update on any rank was not finite (collective; waits for the device).

        Raises:
            UserError: on rank 0, with all that is known; the others leave without a word.
        """
        if not self._all_finite():
            self._stop(self._report("stopped"))

    def check_weights(self, ema: nn.Module | None) -> None:
        """Call before weights are written: as `check`, and the weights themselves (collective).

        Args:
            ema: the moving average that is written too, or None.

        Raises:
            UserError: on rank 0; the others leave without a word.
        """
        self.check()
        modules = [self.engine.module] if ema is None else [self.engine.module, ema]
        tensors = [getattr(p, "ds_tensor", p) for module in modules for p in module.parameters()]
        tensors += [b for m in (self.classifier, ema) if m is not None for b in m.buffers()]
        flags = [t.detach().isfinite().all() for t in tensors if t.is_floating_point() and t.numel()]
        bad = (~torch.stack(flags)).sum() if flags else torch.zeros((), dtype=torch.long)
        if int(distributed.all_reduce_sum(bad.to(self.engine.device))):
            self._stop("weights or statistics of the model are not finite, although the losses were")

    def _report(self, outcome: str) -> str:
        """Write down the first update that was not finite, with the images of all ranks; a sentence's beginning."""
        place = int(self._first)
        own = (*(self._updates[place - 1] if place else (0, 0.0)), [float(v) for v in self._values])
        ranks = distributed.gather_objects(own)
        number = min(first for first, _, _ in ranks if first)
        epoch, update = divmod(number - 1, self.loader.updates_per_epoch)
        samples = [
            entry for part in distributed.gather_objects(list(self._samples(epoch + 1, update))) for entry in part
        ]
        marked = [(rank, lr, values) for rank, (first, lr, values) in enumerate(ranks) if first == number]
        losses = {str(rank): [f"{value:g}" for value in values[:-1]] for rank, _, values in marked}
        _, lr, values = marked[0]
        entry: dict[str, Any] = {"outcome": outcome, "phase": self._phase, "epoch": epoch + 1, "update": update + 1}
        entry |= {"lr": lr, "gradient_norm": f"{values[-1]:g}", "loss_by_rank": losses, "samples": samples}
        if distributed.is_main():
            with self.layout.nonfinite.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return (
            f"the loss or its gradient is not finite at update {update + 1} of epoch {epoch + 1} ({self._phase}; "
            f"loss {', '.join(f'{v:g}' for v in values[:-1])} on rank {marked[0][0]}, gradient norm {values[-1]:g}, "
            f"learning rate {lr:g}); {self.layout.nonfinite} lists the images of its batch"
        )

    def _samples(self, epoch: int, update: int) -> Iterator[dict[str, Any]]:
        """The images of this rank's micro-steps of an update, which the sampler draws again."""
        split = self.loader.split
        for step, micro in enumerate(next(iter(self.loader.sampler.epoch(epoch, update)))):
            index = micro.index.tolist()
            places = [printable(split.place(i)) for i in index]
            yield {"rank": distributed.rank(), "micro_step": step, "index": index, "images": places}

    def _stop(self, what: str) -> NoReturn:
        """End the run on every rank; rank 0 alone says why (collective)."""
        kept = self._kept()
        if not distributed.is_main():
            raise SystemExit(1)
        advice = "lower train.lr or set train.clip"
        if self.skips:
            advice += f" ({self.skipped} updates were left out; train.nonfinite_limit is {self.train.nonfinite_limit})"
        else:
            advice += ", or leave such updates out with --train.nonfinite skip"
        raise UserError(f"{what}; {kept}; {advice}")

    def _kept(self) -> str:
        """What there is to resume from (collective)."""
        try:
            # It was finite when it was begun.
            self.checkpoints.finish()
        except UserError as error:
            return str(error)
        newest = self.layout.checkpoints.newest.exists()
        return "the last checkpoint is from before" if newest else "no checkpoint was written yet"

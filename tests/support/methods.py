"""A small data set, classifier and batches to run any method on, alone or as one of several ranks."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.config import ModelConfig
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import Method, Progress, get_method
from spml_fast.models.classifier import Classifier

SAMPLES, CLASSES, SIDE = 24, 6, 32
# Rows of which nothing at all is known.
BLANK = (5, 17, 23)
UPDATES = 3


def known_codes() -> np.ndarray:
    """Every label of every sample: about a third positive, at least one a row."""
    codes = (np.random.default_rng(7).random((SAMPLES, CLASSES)) < 0.3).astype(np.int8)
    codes[np.arange(SAMPLES), np.arange(SAMPLES) % CLASSES] = 1
    return codes


def observed_codes() -> np.ndarray:
    """One positive a row and a few negatives; nothing of the rows in BLANK."""
    known, codes = known_codes(), np.full((SAMPLES, CLASSES), -1, dtype=np.int8)
    for row in range(SAMPLES):
        if row not in BLANK:
            codes[row, row % CLASSES] = 1
            if row % 2 and (known[row] == 0).any():
                codes[row, np.flatnonzero(known[row] == 0)[0]] = 0
    return codes


def required_options(name: str) -> dict[str, object]:
    """Options without a usable default."""
    given: dict[str, object] = {"expected_positives": 1.8}
    return {f.name: given[f.name] for f in dataclasses.fields(get_method(name).Options) if f.name in given}


class Rig:
    """One method with all that it needs, always the same for equal arguments.

    Args:
        name: of the method.
        options: of the method, beside its name.
    """

    def __init__(self, name: str, **options: object) -> None:
        torch.manual_seed(11)
        method_class = get_method(name)
        # Frozen BatchNorm statistics, so that logits do not depend on how a batch is cut.
        config = ModelConfig(backbone="test_resnet", pretrained=False, freeze_bn=True, alpha_train=2.0)
        self.classifier = Classifier(config, CLASSES, SIDE).train()
        self.known = SparseLabels.from_dense(known_codes(), default=0)
        self.observed = SparseLabels.from_dense(observed_codes())
        learned = self.observed if method_class.label_source == "observed" else self.known
        self.store = LabelStore(learned)
        self.truth = LabelStore(self.known) if method_class.label_source == "observed" else None
        self.method: Method[Any, Any] = method_class(
            method_class.Options(name=name, **required_options(name), **options), self.store
        )
        self.images = {view: torch.randn(SAMPLES, 3, SIDE, SIDE) for view in self.method.views}

    def batch(self, rows: list[int] | range, global_size: int | None = None) -> Batch:
        """A micro-batch of these samples."""
        index = torch.tensor(list(rows))
        views = {name: v[index].to(memory_format=torch.channels_last) for name, v in self.images.items()}
        truth = self.truth.rows(index) if self.truth is not None else None
        return Batch(views, self.store.rows(index), index, global_size or len(index), truth)

    def step(self, batch: Batch, progress: Progress) -> Tensor:
        """Loss of a micro-step; adds its gradients to the classifier's."""
        loss: Tensor = self.method(self.classifier, batch, progress).loss
        torch.autograd.backward(loss)
        return loss.detach()

    def gradients(self) -> Tensor:
        """All gradients of the classifier in one row, and a clean slate."""
        parameters = list(self.classifier.parameters())
        flat = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        self.classifier.zero_grad(set_to_none=True)
        return torch.cat([g.flatten() for g in flat])

    def epoch(self, number: int) -> None:
        """One epoch of the method's own business without any training of the network; this process alone."""
        self.method.on_epoch_start(at(number, 0))
        for update in range(UPDATES):
            self.step(self.batch(range(update * 8, update * 8 + 8)), at(number, update))
        self.classifier.zero_grad(set_to_none=True)
        self.end_epoch(number)

    def end_epoch(self, number: int) -> dict[str, float]:
        """What the trainer does when an epoch has ended (collective)."""
        if self.method.needs_train_scores(at(number, UPDATES)):
            rows = torch.arange(SAMPLES).tensor_split(distributed.world_size())[distributed.rank()]
            batch = self.batch(rows.tolist())
            with torch.no_grad():
                logits = self.classifier(batch.views[self.method.views[0]], alpha=self.classifier.alpha_train).logits
            self.method.on_train_scores(batch.index, logits)
        return self.method.on_epoch_end(at(number, UPDATES))

    def state(self) -> dict[str, object]:
        """Everything that training has changed, in the method and in the label store."""
        return {**self.method.state_dict(), "labels": self.store.rows(torch.arange(SAMPLES))}

    def copy(self) -> Rig:
        """An independent rig in the same state."""
        return copy.deepcopy(self)


def at(epoch: int, update: int) -> Progress:
    """A place in a run of ten epochs."""
    return Progress(epoch=epoch, epochs=10, update=(epoch - 1) * UPDATES + update, updates_per_epoch=UPDATES, lr=1e-3)


IMAGES = 14
RANK_EPOCH = 5


def share(rank: int, world: int) -> list[int]:
    """This rank's slice of the 14 images; slices differ by an image at most, as the trainer's do."""
    return torch.arange(IMAGES).tensor_split(world)[rank].tolist()


def rank_case(rig: Rig, rows: list[int]) -> tuple[Tensor, Tensor, dict[str, object]]:
    """Mean over ranks of the loss and of the gradients of one step on all images, and the state it leaves.

    Args:
        rows: the images of this rank.
    """
    rig.method.on_epoch_start(at(RANK_EPOCH, 0))
    loss = rig.step(rig.batch(rows, IMAGES), at(RANK_EPOCH, 0))
    means = [distributed.all_reduce_sum(t) / distributed.world_size() for t in (loss, rig.gradients())]
    rig.end_epoch(RANK_EPOCH)
    return means[0], means[1], rig.state()


Cases = list[tuple[str, dict[str, object]]]


def rank_main(rank: int, world: int, folder: str, cases: Cases) -> None:
    """One of several processes; writes what `rank_case` gives for every case (name of a method, and options)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = [rank_case(Rig(name, **options), share(rank, world)) for name, options in cases]
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class ThreadRanks:
    """Threads that stand for ranks: while inside, the collectives of `spml_fast.core.distributed` meet in memory."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.local = threading.local()
        self.meet = threading.Barrier(world)
        self.handed: list[Any] = [None] * world
        self.patches = pytest.MonkeyPatch()

    def _exchange(self, value: Tensor) -> list[Tensor]:
        self.handed[self.local.rank] = value.detach().clone()
        self.meet.wait(60)
        values = list(self.handed)
        self.meet.wait(60)
        return values

    def __enter__(self) -> ThreadRanks:
        # What rests on these, such as gathering rows, is the program's own.
        replaced = {
            "world_size": lambda: self.world,
            "rank": lambda: self.local.rank,
            "all_reduce_sum": lambda t: torch.stack(self._exchange(t)).sum(0, dtype=t.dtype),
            "all_gather_equal": lambda t: torch.stack(self._exchange(t)),
        }
        for name, function in replaced.items():
            self.patches.setattr(distributed, name, function)
        return self

    def __exit__(self, *_: object) -> None:
        self.patches.undo()

    def run(self, work: Callable[[int], object]) -> list[Any]:
        """`work(rank)` on every rank at once."""

        def start(rank: int) -> object:
            self.local.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.meet.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            futures = [pool.submit(start, rank) for rank in range(self.world)]
        errors = [error for f in futures if (error := f.exception()) is not None]
        # The first to fail breaks the barrier of the others.
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [f.result() for f in futures]


def on_ranks(world: int, work: Callable[[int], object]) -> list[Any]:
    """`work(rank)` on threads that stand for so many ranks, all at once."""
    with ThreadRanks(world) as ranks:
        return ranks.run(work)

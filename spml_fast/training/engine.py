"""The only file that imports DeepSpeed: one class hides its engine."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spml_fast.core import distributed, env
from spml_fast.core.allocator import keep_freed_memory
from spml_fast.core.errors import UserError, ranks_met
from spml_fast.core.io import FileRecord
from spml_fast.training import peers
from spml_fast.training.async_save import FileContent, HostCopy
from spml_fast.training.cluster import set_environment
from spml_fast.training.collectives import all_within, wrapped
from spml_fast.training.engine_config import AVERAGING_KEYS
from spml_fast.training.gradient_buckets import GradientBuckets
from spml_fast.training.optim import match_layouts, restore_schedule_options, schedule_options
from spml_fast.training.tensor_files import first_line, read_tensors, write_tensors
from spml_fast.training.watch import watch_launchers

# Of all that DeepSpeed says: settings, notices and warnings, which this program's own checks make superfluous.
_LOGGER = logging.getLogger("DeepSpeed")
_LEVELS = ("debug", "info", "warning", "error")


@functools.cache
def _log_level() -> int:
    """The level from which on DeepSpeed's messages are printed.

    A filter stays where it is when DeepSpeed sets up its logger, and already holds while it is imported.

    Raises:
        UserError: SPML_DEEPSPEED_LOG names none.
    """
    name = env.deepspeed_log().lower()
    if name not in _LEVELS:
        raise UserError(f"SPML_DEEPSPEED_LOG is {name!r}; it must be {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}")
    level = logging.getLevelNamesMapping()[name.upper()]
    _LOGGER.addFilter(lambda record: record.levelno >= level)
    return level


def _deepspeed() -> Any:
    """DeepSpeed, imported late and quietly, without its C++ build on machines without a GPU."""
    set_environment()
    level = _log_level()
    # DeepSpeed calls collectives by names that PyTorch 2.14 has changed: lines in every update, on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    _LOGGER.setLevel(level)
    for handler in _LOGGER.handlers:
        handler.setLevel(level)
    if not torch.cuda.is_available():
        # Its shared-memory collectives for CPUs are an optional speed-up that needs a compiler and over a minute at the
        # first start, and a killed build leaves a lock that hangs later runs. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# How long ranks that do not train wait for one that does not move.
TIMEOUT_MINUTES = 10.0


def init_distributed(timeout_minutes: float | None = None) -> torch.device:
    """Join the process group and choose this rank's device.

    Works under `deepspeed`, `torchrun` and SLURM, and alone, when no launcher set the environment.

    Args:
        timeout_minutes: how long ranks of a training wait for one that does not move; None for another command.
    """
    minutes = TIMEOUT_MINUTES if timeout_minutes is None else timeout_minutes
    watch_launchers()
    env.default_ranks()
    alone = env.world_size() == 1
    if not alone and not env.has_master_port():
        raise UserError("MASTER_PORT is not set although WORLD_SIZE is; start with deepspeed, torchrun or srun")
    deepspeed = _deepspeed()
    device = torch.device("cpu")
    if not env.threads_given():
        # Ranks on one machine divide its cores, or they would slow each other down.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // env.local_world_size()))
    if torch.cuda.is_available():
        local = distributed.local_rank()
        if local >= torch.cuda.device_count():
            raise UserError(f"local rank {local} has no GPU; this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone and not dist.is_initialized():
        # Nobody to meet: no port, so two trainings on one machine cannot take each other's.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        # The watch over the ranks ends a run at the limit, with a sentence; collectives give up a little later.
        limit = timedelta(minutes=minutes + 1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=limit)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {env.master_port()}, where the ranks meet, is taken by another program; "
            "start with another, as in: deepspeed --master_port 29501 ..."
        ) from error
    peers.start(60 * minutes, trains=timeout_minutes is not None)
    ranks_met.set()
    return device


def shutdown_distributed() -> None:
    """Leave the process group, so that no rank is killed while another still talks."""
    if dist.is_initialized():
        distributed.barrier()
        peers.stop()
        dist.destroy_process_group()


@functools.cache
def _checkpoint_files() -> Any:
    """Class of what writes and reads DeepSpeed's files in this program: `CheckpointFiles`."""
    _deepspeed()
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # The ZeRO stages save objects of these beside tensors and plain values.
    allowed = [LossScaler, ZeroStageEnum, fragment_address]

    class CheckpointFiles(TorchCheckpointEngine):  # type: ignore[misc]
        """Takes the checksum of what is written, and reads tensors and plain values alone.

        Where this rank cannot write, the first error is kept in `error`, so that it still meets the others at
        DeepSpeed's barriers.
        """

        def __init__(self) -> None:
            super().__init__()
            self.begin()

        def begin(self) -> None:
            """Forget what was written."""
            self.records: dict[str, FileRecord] = {}
            self.error: OSError | None = None
            # What copies files in the place of writing them, and the copies; None writes them.
            self.copy: HostCopy | None = None
            self.copies: list[FileContent] = []

        def save(self, state_dict: Any, path: str) -> None:
            """Write one file, to the disk, or copy what it would hold."""
            if self.copy is not None:
                self.copies.append((Path(path), self.copy(state_dict)))
                return
            try:
                self.records[Path(path).name] = write_tensors(Path(path), state_dict)
            except OSError as error:
                self.error = self.error or error

        def load(self, path: str, map_location: Any = None) -> Any:
            """Read one file without running what it may hold. `UserError` for anything else than values."""
            with torch.serialization.safe_globals(allowed):
                return read_tensors(Path(path), map_location)

    return CheckpointFiles


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


class Engine:
    """A DeepSpeed engine around one module whose forward returns (loss, ...).

    Args:
        module: on any device; moved by DeepSpeed.
        optimizer: torch optimizer over the module's trainable parameters.
        scheduler: stepped by DeepSpeed at every update.
        config: what `engine_config.deepspeed_config` made.
        channels_last: give convolution weights channels_last memory (stage 0 only; DeepSpeed cannot start with it).
        overlap: average gradients during the backward (stage 0 on several ranks; `gradient_buckets`).
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        config: dict[str, Any],
        channels_last: bool = True,
        overlap: bool = True,
    ) -> None:
        deepspeed = _deepspeed()
        # An earlier engine of this process may have left channels_last weights, which DeepSpeed cannot start with.
        module.to(memory_format=torch.contiguous_format)
        options = schedule_options(optimizer, scheduler)
        self._schedule = (optimizer, scheduler, options)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=dict(config)
        )
        self._files = self._engine.checkpoint_engine = _checkpoint_files()()
        self._monitored = bool(self._engine.monitor.enabled)
        if not (self._engine.wall_clock_breakdown() or self._engine.flops_profiler_enabled()):
            # It would write and flush the learning rate in every update; `write_events` has it where it is due.
            self._engine.monitor.enabled = False
        self.stage: int = config["zero_optimization"]["stage"]
        if channels_last and self.stage == 0:
            self._engine.module.to(memory_format=torch.channels_last)
        # Walking through all modules in every step takes a hundredth of a small network's.
        self._parameters = list(self.module.parameters())
        self._buckets: GradientBuckets | None = None
        ranks = distributed.world_size()
        if overlap and self.stage == 0 and ranks > 1 and not set(AVERAGING_KEYS) & set(config):
            # Through DeepSpeed's function, so that its log of communication has them.
            self._buckets = GradientBuckets(
                module.parameters(), lambda tensor, **how: deepspeed.comm.all_reduce(tensor, **how), ranks
            )
        if self.stage == 0:
            # `backward` averages. With one rank there is nobody to average with; DeepSpeed would copy all gradients
            # into one buffer, multiply it by 1 and copy it back, a twentieth of a ResNet-50 step on a CPU.
            self._engine.enable_backward_allreduce = False
            self._engine.zero_grad = functools.partial(_forget_gradients, self._parameters)

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self._engine.device)

    def __call__(self, *args: Any) -> Any:
        """The module's forward, under autocast when that is on."""
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Backward; DeepSpeed divides by the number of accumulation steps. At the boundary gradients are averaged."""
        if self.stage or not self.at_boundary:
            self._engine.backward(loss)
        elif self._buckets is not None:
            with self._buckets.averaged():
                self._engine.backward(loss)
        else:
            self._engine.backward(loss)
            # As DeepSpeed does before it averages, since optimizers pass over parameters without a gradient; but in the
            # memory layout of the parameter, without which a fused update takes elements for others.
            for parameter in self._parameters:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if distributed.world_size() > 1:
                self._engine.allreduce_gradients()

    def step(self) -> None:
        """Optimizer and schedule, at the accumulation boundary."""
        self._engine.step()

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self._engine.eval()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self._engine.get_lr()[0])

    @property
    def gradient_norm(self) -> float | None:
        """Global gradient norm of the last update, where DeepSpeed computed one (clipping on, or stage 1 and up)."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def at_boundary(self) -> bool:
        """Whether the next `step` updates the weights; the others of an accumulation only count."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def gradient_norm_on_device(self) -> Tensor | None:
        """Norm of the gradients that the next update takes, 0-d, without waiting; None at ZeRO stages 1 to 3.

        Those keep gradients in buffers of their own, and know their norm after the step (`gradient_norm`).
        """
        if self.stage:
            return None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else None

    def step_norm(self) -> Tensor | float | None:
        """Gradient norm of the update just made as DeepSpeed keeps it, perhaps still on the device (stages 1 to 3)."""
        norm: Tensor | float | None = self._engine.get_global_grad_norm()
        return norm

    def refuse_overflow(self) -> None:
        """From now on a step whose gradients are not finite changes nothing (stages 1 to 3, by their own check)."""
        if self.stage:
            self._engine.optimizer.check_grad_overflow = True

    def step_unless_overflow(self) -> bool:
        """An update at stages 1 to 3 after `refuse_overflow`; whether it was applied, which the host waits for."""
        self._engine.step()
        return not self._engine.optimizer.overflow

    def step_without_update(self) -> None:
        """At stage 0: count an update, and move the schedule, but leave weights and optimizer state alone."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                # Clipping wants gradients to be there.
                parameter.grad.zero_()
        optimizer = self._engine.optimizer
        step = optimizer.step
        optimizer.step = lambda *_, **__: None
        try:
            self._engine.step()
        finally:
            optimizer.step = step

    def write_events(self, values: dict[str, float], samples: int) -> None:
        """Hand figures to DeepSpeed's monitor (TensorBoard, W&B, CSV), rank 0 only."""
        if self._monitored and distributed.is_main():
            self._engine.monitor.write_events([(name, value, samples) for name, value in values.items()])

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> dict[str, FileRecord]:
        """Write a checkpoint (collective); returns name and checksum of every file that this rank wrote.

        Raises:
            OSError: this rank could not write its files; all ranks have reached the end.
        """
        self._files.begin()
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
        if self._files.error is not None:
            raise self._files.error
        return dict(self._files.records)

    def copy_state(self, folder: Path, tag: str, state: dict[str, Any], copy: HostCopy) -> list[FileContent]:
        """What `save` would write on this rank, in host memory (collective); the checkpoint's folder is made.

        Args:
            folder: the run's checkpoint directory.
            tag: name of the checkpoint.
            state: plain values and tensors that are saved too.
            copy: copies tensors.
        """
        self._files.begin()
        self._files.copy = copy
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
        copies: list[FileContent] = self._files.copies
        self._files.begin()
        return copies

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restore module and optimizer (collective); returns the client state. `place_schedule` comes next.

        The schedule stays as configured now, so a run may be resumed with more epochs or another schedule. Files are
        read as tensors and plain values; nothing in them is run.

        Raises:
            UserError: nothing usable is there.
        """
        try:
            path, state = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        except (RuntimeError, KeyError, ValueError, TypeError, OSError, AssertionError) as error:
            raise UserError(f"checkpoint {folder / tag} cannot be loaded: {first_line(error)}") from error
        if path is None:
            raise UserError(f"checkpoint {folder / tag} cannot be loaded: files are missing")
        if self.stage == 0:
            match_layouts(self._schedule[0])
        return dict(state)

    def place_schedule(self, updates: int) -> None:
        """After `load`: count so many updates of the schedule as done, and take its learning rate there."""
        restore_schedule_options(*self._schedule, updates)

    @contextlib.contextmanager
    def gathered_parameters(self, change: bool = False) -> Iterator[None]:
        """Inside, every parameter of the module is whole on every rank (ZeRO stage 3 gathers them).

        Args:
            change: every rank gives parameters new values, the same ones, which are kept.
        """
        if self.stage < 3:
            yield
            return
        with _deepspeed().zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0 if change else None):
            yield

    @contextlib.contextmanager
    def collectives_within(self, span: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Inside, averaging of gradients, and every other collective, runs within a span."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(wrapped(self._engine, ["allreduce_gradients"], span))
            if self._buckets is not None:
                stack.enter_context(wrapped(self._buckets, ["finish"], span))
            stack.enter_context(all_within([dist, _deepspeed().comm], span))
            yield

    def close(self) -> None:
        """Release what DeepSpeed holds, the optimizer's state among it, so that another engine can be made."""
        if self._buckets is not None:
            self._buckets.close()
        self._engine.destroy()
        del self._engine, self._schedule, self._buckets
        # DeepSpeed's objects refer to each other, and would stay until Python next looks at old ones.
        gc.collect()

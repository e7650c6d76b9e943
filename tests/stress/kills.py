"""Runs that are killed at random moments, resumed, and compared with a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.paths import ROOT
from tests.support.runs import environment, rank_variables, read_metrics
from tests.support.warm import WARM, Kill

# A run that needs more starts than this does not get on.
MAX_STARTS = 12
# What is compared of an update or an epoch; times and speeds differ.
FIGURES = ("loss", "gradient_norm", "lr", "val_map", "selected_count", "corrected_total")


@dataclass(frozen=True)
class Setting:
    """A run that is to be killed.

    Attributes:
        name: for the table.
        options: section__field -> value, over `BASE`.
        ranks: ranks of the first start and of every other one.
        exact: whether the end must be bit for bit that of the undisturbed run; another number of ranks sums in another
            order.
    """

    name: str
    options: dict[str, object]
    ranks: tuple[int, int] = (1, 1)
    exact: bool = True


BASE: dict[str, object] = {
    "config": ROOT / "launch" / "configs" / "digits.yaml",
    "train__epochs": 3,
    "train__precision": "fp32",
    "train__log_every": 1,
    "eval__batch_size": 32,
    "deepspeed__tensorboard": "false",
    "run__save_updates": 2,
}
SETTINGS = (
    Setting("AN, accumulation 2", {"method": "an", "train__accumulation": 2}),
    Setting("LL-Cp, EMA", {"method": "ll_cp", "method__delta_rel": 5, "train__ema_decay": 0.9}),
    Setting("IGNORE", {"method": "ignore", "method__warm_up": 1}),
    Setting("AN, Query2Label", {"method": "an", "model__head": "query2label", "model__head_options__preset": "tiny"}),
    Setting("EM+APL", {"method": "em_apl"}),
    Setting("AN, ML-Decoder", {"method": "an", "model__head": "ml_decoder"}),
    Setting("AN, mean of the weights", {"method": "an", "train__average_weights": "true"}),
    Setting("AN, image cache", {"method": "an", "data__cache": "auto"}),
    Setting("LL-R, two ranks, accumulation 2", {"method": "ll_r", "train__accumulation": 2}, (2, 2)),
    Setting("ROLE, two ranks", {"method": "role", "method__expected_positives": 2.5}, (2, 2)),
    # Statistics of BatchNorm in training mode depend on how the batch is split.
    Setting("AN, one rank and two by turns", {"method": "an", "model__freeze_bn": "true"}, (2, 1), exact=False),
    Setting("AN, saved by time", {"method": "an", "run__save_updates": 0, "run__save_minutes": 0.005}),
)


@dataclass
class Trial:
    """What became of one killed run.

    Attributes:
        setting: what was run.
        kills: when, with which signal, and who.
        hits: how many of them came before the run had ended.
        starts: how often it was started until it ended by itself.
        fault: what differed or failed; empty where it survived.
    """

    setting: Setting
    kills: list[Kill]
    hits: int = 0
    starts: int = 0
    fault: str = ""


class Killer:
    """Kills runs of some settings in turn.

    Args:
        folder: where runs are kept.
        data: the Manifest that they train on.
        seed: of moments and signals.
        latest: latest moment, as a fraction of the undisturbed run's time.
    """

    def __init__(self, folder: Path, data: Path, seed: int, latest: float = 1.0) -> None:
        self.folder, self.data, self.latest = folder, data, latest
        self.random = random.Random(seed)
        self.undisturbed: dict[str, tuple[Path, float]] = {}

    def trials(self, number: int, settings: tuple[Setting, ...] = SETTINGS) -> Iterator[Trial]:
        """Run `number` trials, the settings in turn."""
        for i in range(number):
            yield self.trial(settings[i % len(settings)], self.folder / f"killed-{i}")

    def trial(self, setting: Setting, run: Path) -> Trial:
        """Kill a run once, twice or three times, let it end, and compare; `run` is deleted where it survived."""
        whole, seconds = self._whole(setting)
        trial, planned = Trial(setting, []), self.random.choice((1, 1, 2, 3))
        for start in range(MAX_STARTS):
            trial.starts = start + 1
            kill = None
            if start < planned:
                number = self.random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
                kill = Kill(
                    self.random.uniform(0.3, self.latest * seconds), number, self.random.randrange(-1, setting.ranks[0])
                )
                trial.kills.append(kill)
            done = self._start(setting, run, setting.ranks[start % 2], kill)
            if done.returncode == 0 and (run / "results.json").exists():
                break
            if kill is None:
                trial.fault = f"start {start + 1} failed: {done.stderr.strip()[-300:]}"
                return trial
            trial.hits += 1
        trial.fault = trial.fault or compare(whole, run, setting.exact)
        if not trial.fault:
            shutil.rmtree(run)
        return trial

    def _whole(self, setting: Setting) -> tuple[Path, float]:
        """The undisturbed run, and how long it took."""
        if setting.name not in self.undisturbed:
            if not self.undisturbed:
                # What the first start alone does is no part of a run's time.
                WARM.run([str(ROOT / "launch" / "train.py"), "--help"], [{}], 300, environment())
            run = self.folder / f"whole-{len(self.undisturbed)}"
            begin = time.monotonic()
            done = self._start(setting, run, setting.ranks[0], None)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            self.undisturbed[setting.name] = run, time.monotonic() - begin
        return self.undisturbed[setting.name]

    def _start(self, setting: Setting, run: Path, ranks: int, kill: Kill | None) -> Any:
        options = BASE | {"data__dir": self.data, "run__dir": run} | setting.options
        words = [w for key, value in options.items() for w in (f"--{key.replace('__', '.')}", str(value))]
        return WARM.run([str(ROOT / "launch" / "train.py"), *words], rank_variables(ranks), 300, environment(), kill)


def figures_of(run: Path) -> dict[tuple[object, ...], dict[str, object]]:
    """Figures of every update and epoch; where an update was done again after a kill, those of the last time."""
    found: dict[tuple[object, ...], dict[str, object]] = {}
    for kind in ("update", "epoch"):
        for entry in read_metrics(run, kind):
            place = (kind, entry["phase"], entry["epoch"], entry.get("update"))
            found[place] = {name: entry[name] for name in FIGURES if name in entry}
    return found


def compare(whole: Path, run: Path, exact: bool) -> str:
    """What is different in a run that was killed; empty when nothing is.

    Args:
        whole: the undisturbed run.
        run: the killed one.
        exact: bit for bit; otherwise weights within 1e-3 and figures of the same updates.
    """
    first, second = load_file(whole / "model.safetensors"), load_file(run / "model.safetensors")
    if first.keys() != second.keys():
        return "the weights have other names"
    for name, tensor in first.items():
        other = second[name]
        if not (torch.equal(tensor, other) if exact else torch.allclose(tensor, other, atol=1e-3, rtol=1e-2)):
            return f"weights differ at {name} by up to {(tensor - other).abs().max():.3g}"
    before, after = figures_of(whole), figures_of(run)
    if before.keys() != after.keys():
        missing = sorted(map(str, before.keys() ^ after.keys()))
        return f"{len(missing)} updates or epochs are in one run alone, such as {missing[0]}"
    if exact:
        for place, figures in before.items():
            if figures != after[place]:
                return f"figures differ at {place}: {figures} and {after[place]}"
        results = [json.loads((r / "results.json").read_text(encoding="utf-8"))["alpha"] for r in (whole, run)]
        if results[0] != results[1]:
            return "results.json has other figures"
    return ""

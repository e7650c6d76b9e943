"""Where everything of a run lies: the only file that spells the names.

RUN/config.yaml                    the recipe with everything that was decided, to repeat the run
RUN/deepspeed.json                 the configuration that DeepSpeed got
RUN/classes.txt                    class names, one per line, line number = class id
RUN/metrics.jsonl                  figures of updates and epochs, one JSON object per line
RUN/nonfinite.jsonl                updates whose loss or gradient was not finite, one JSON object per line
RUN/results.json                   the final figures; a run that has it is finished
RUN/model.safetensors              the best weights, whole
RUN/decisions.json                 thresholds of the classes and calibration, made for those weights
RUN/evaluation.json                curves, counts and hardest labels of every class on the test split, for the report
RUN/profile/trace.json             of `run.profile`: what PyTorch's profiler saw of some updates; trace-2.json and so on
RUN/profile/steps.json             where the time of those updates went
RUN/options.json                   of `reproduce`: the options that the run was begun with
RUN/.lock                          which process trains here
RUN/folds-K/                       of `suggest --folds K`: folds.json, which says of what, and of each fold its data set
                                   fold-k/data and its run fold-k/run
RUN/tensorboard/                   TensorBoard's events
RUN/trackers/NAME.json             which run of a tracker this is, so that a resumed run continues it; beside it lies
                                   what trackers keep
RUN/checkpoints/newest.json        which checkpoint to resume from
RUN/checkpoints/best.json          which checkpoint has the best weights
RUN/checkpoints/TAG/               what DeepSpeed saved
RUN/checkpoints/TAG/mark.json      position of a whole checkpoint and checksums of its files, written last
RUN/checkpoints/TAG/model.safetensors  the best weights, of a best checkpoint at ZeRO stage 3, whose files hold parts
RUN/checkpoints/TAG/method_rank_R.pt  rank R's part of a method's state that grows with the samples; versions before
                                   0.2.0 wrote method_shard_R.pt

and of a folder that `export --format timm` or `push` wrote:

FOLDER/model.safetensors           weights and, in their metadata, everything that they need
FOLDER/config.json                 the model as timm opens it, where it is one of timm's
FOLDER/README.md                   of `push`: the model card
FOLDER/spml_fast.json              checksum of the weights, written last
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from spml_fast.core.errors import UserError

TENSORBOARD = "tensorboard"
TRACKERS = "trackers"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CHECKPOINTS = "checkpoints"
PROFILE = "profile"


@dataclass(frozen=True)
class CheckpointLayout:
    """Names within a run's checkpoint directory.

    Attributes:
        folder: RUN/checkpoints.
    """

    folder: Path

    @property
    def newest(self) -> Path:
        """Position of the checkpoint to resume from."""
        return self.folder / "newest.json"

    @property
    def best(self) -> Path:
        """Position of the checkpoint with the best weights."""
        return self.folder / "best.json"

    def position(self, tag: str) -> Path:
        """Position of one checkpoint; it is there once the checkpoint is whole."""
        return self.folder / tag / "mark.json"

    @property
    def marks(self) -> list[Path]:
        """Positions of all whole checkpoints that are there."""
        return sorted(self.folder.glob("*/mark.json"))

    def weights(self, tag: str) -> Path:
        """The best weights in a checkpoint's own folder, where its other files hold parts of them only."""
        return self.folder / tag / WEIGHTS

    def model_states(self, tag: str) -> Path:
        """DeepSpeed's file with the whole module of a checkpoint at ZeRO stages 0 to 2."""
        return self.folder / tag / "mp_rank_00_model_states.pt"

    @property
    def inside(self) -> Path:
        """The checkpoint directory, were the folder a run directory."""
        return self.folder / CHECKPOINTS

    @property
    def run(self) -> RunLayout:
        """The run that the directory belongs to."""
        return RunLayout(self.folder.absolute().parent)


def rank_state(checkpoint: Path, rank: int) -> Path:
    """Where a rank's part of a method's state is written in one checkpoint's folder."""
    return checkpoint / f"method_rank_{rank:05d}.pt"


def saved_rank_state(checkpoint: Path, rank: int) -> Path:
    """A rank's part of a method's state as it was saved, by this version or by one before 0.2.0."""
    path, before = rank_state(checkpoint, rank), checkpoint / f"method_shard_{rank:05d}.pt"
    return before if before.is_file() and not path.is_file() else path


@dataclass(frozen=True)
class FoldsLayout:
    """Names within the folder of `suggest --folds`.

    Attributes:
        folder: of the folds.
    """

    folder: Path

    @property
    def plan(self) -> Path:
        """What the folds are of; a folder that has it was made by the command."""
        return self.folder / "folds.json"

    def data(self, fold: int) -> Path:
        """The data set of a fold, counted from 0: without its images, which are a split of their own."""
        return self.folder / f"fold-{fold + 1}" / "data"

    def run(self, fold: int) -> RunLayout:
        """The run that has not seen the images of a fold."""
        return RunLayout(self.folder / f"fold-{fold + 1}" / "run")


@dataclass(frozen=True)
class ExportLayout:
    """Names within a folder that holds an exported model.

    Attributes:
        folder: of the model.
    """

    folder: Path

    @property
    def weights(self) -> Path:
        """Weights, with what they need in their metadata."""
        return self.folder / WEIGHTS

    @property
    def timm_config(self) -> Path:
        """The model as timm opens it."""
        return self.folder / "config.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / "README.md"

    @property
    def record(self) -> Path:
        """Who wrote the folder, and the checksum of its weights."""
        return self.folder / "spml_fast.json"

    @property
    def files(self) -> list[Path]:
        """Those of the folder's own files that are there."""
        return [p for p in (self.weights, self.timm_config, self.card, self.record) if p.is_file()]


@dataclass(frozen=True)
class RunLayout:
    """Names within a run directory.

    Attributes:
        folder: the run directory.
    """

    folder: Path

    @property
    def config(self) -> Path:
        """The recipe with everything that was decided."""
        return self.folder / "config.yaml"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's configuration."""
        return self.folder / "deepspeed.json"

    @property
    def classes(self) -> Path:
        """Class names in class-id order, one per line."""
        return self.folder / "classes.txt"

    @property
    def metrics(self) -> Path:
        """Figures of updates and epochs, one JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events."""
        return self.folder / TENSORBOARD

    @property
    def trackers(self) -> Path:
        """What trackers keep."""
        return self.folder / TRACKERS

    def tracker(self, name: str) -> Path:
        """Which run of a tracker this is."""
        return self.trackers / f"{name}.json"

    @property
    def lock(self) -> Path:
        """Names the process that trains here."""
        return self.folder / ".lock"

    @property
    def nonfinite(self) -> Path:
        """Updates whose loss or gradient was not finite."""
        return self.folder / "nonfinite.jsonl"

    @property
    def bad_images(self) -> Path:
        """Training images that could not be used, and why (`data.bad_images replace`)."""
        return self.folder / "bad_images.csv"

    @property
    def results(self) -> Path:
        """The final figures."""
        return self.folder / "results.json"

    @property
    def weights(self) -> Path:
        """The best weights."""
        return self.folder / WEIGHTS

    @property
    def decisions(self) -> Path:
        """Thresholds of the classes and calibration, for the best weights."""
        return self.folder / "decisions.json"

    @property
    def evaluation(self) -> Path:
        """What the last evaluation of the test split tells of every class, for the best weights."""
        return self.folder / "evaluation.json"

    def free_profile(self) -> tuple[Path, Path]:
        """Where the next profile's trace and figures go: names that no profile of the run has yet."""
        folder = self.folder / PROFILE
        for number in itertools.count(1):
            end = f"-{number}.json" if number > 1 else ".json"
            pair = folder / f"trace{end}", folder / f"steps{end}"
            if not any(path.exists() for path in pair):
                return pair
        raise AssertionError("numbers do not end")

    def export(self, kind: str) -> ExportLayout:
        """Where a command leaves a folder with the model, unless it is told otherwise."""
        return ExportLayout(self.folder / f"export-{kind}")

    @property
    def options(self) -> Path:
        """What `reproduce` began the run with."""
        return self.folder / "options.json"

    def folds(self, number: int) -> FoldsLayout:
        """Where `suggest --folds NUMBER` trains, unless it is told otherwise."""
        return FoldsLayout(self.folder / f"folds-{number}")

    @property
    def checkpoints(self) -> CheckpointLayout:
        """The checkpoint directory."""
        return CheckpointLayout(self.folder / CHECKPOINTS)

    @property
    def begun(self) -> bool:
        """Whether the run has a checkpoint or is finished."""
        return self.results.exists() or self.checkpoints.newest.exists()

    @property
    def foreign(self) -> list[str]:
        """Names in the folder that no run writes; empty where it is missing, empty, a run, or a start that failed.

        Hidden files and what launchers write (.log, .out, .err) are nobody's.
        """
        if not self.folder.is_dir() or (self.config.is_file() and not (self.folder / MANIFEST).exists()):
            return []
        own = [self.config, self.deepspeed, self.classes, self.metrics, self.results, self.weights, self.options]
        own += [self.decisions, self.evaluation]
        names = {TENSORBOARD, TRACKERS, CHECKPOINTS, PROFILE, *(f.name + end for f in own for end in ("", ".partial"))}
        entries = [entry.name for entry in self.folder.iterdir()]
        # A Manifest has a list of classes too.
        if MANIFEST not in entries and self.checkpoints.newest.exists():
            return []
        return sorted(
            name
            for name in entries
            if name not in names and not name.startswith(".") and not name.endswith((".log", ".out", ".err"))
        )

    def require(self) -> RunLayout:
        """Itself; `UserError` if the folder is not a run directory."""
        if not self.config.is_file():
            raise UserError(f"{self.folder} is not a run directory (no {self.config.name} in it)")
        return self

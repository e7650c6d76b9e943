"""What a run that has begun chose where its options say auto: it keeps that, whatever a measurement would tell now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spml_fast.core.config import Config
from spml_fast.runs.layout import CheckpointLayout, RunLayout
from spml_fast.training.resume import Resume, precision_of, recipe_of

# A start with another network was another run.
SAME = ("model.backbone", "model.head", "data.image_size")


@dataclass(frozen=True)
class EarlierChoices:
    """What was chosen.

    Attributes:
        precision: None where the run is of a version that did not write it down.
        compiled: whether its backbone is.
        source: the file that says so, of a start that ended before its first checkpoint; None for a resumed run.
    """

    precision: Literal["fp32", "bf16"] | None
    compiled: bool
    source: Path | None = None

    def notes(self, option: str, value: str) -> list[str]:
        """What there is to say of an option whose value is kept; nothing of a resumed run, where that is the rule."""
        kept = f"{option} auto: {value}, as an earlier start of this run chose ({self.source})"
        return [] if self.source is None else [kept]


def earlier_choices(resume: Resume | None, run: RunLayout, config: Config) -> EarlierChoices | None:
    """The choices that a run keeps; None for one that begins.

    Args:
        resume: the checkpoint that it is resumed from, or None.
        run: the run's files. A start that ended before its first checkpoint has left config.yaml.
        config: the run's.
    """
    if resume is not None:
        compiled = recipe_of(CheckpointLayout(resume.checkpoint.folder).run).get("model.compile") is True
        return EarlierChoices(precision_of(resume), compiled)
    if config.run.resume == "never" or not run.config.is_file():
        return None
    recipe = recipe_of(run)
    now = (config.model.backbone, config.model.head, config.data.image_size)
    precision = recipe.get("train.precision")
    if precision not in ("fp32", "bf16") or tuple(recipe.get(name) for name in SAME) != now:
        return None
    return EarlierChoices(precision, recipe.get("model.compile") is True, run.config)

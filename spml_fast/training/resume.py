"""Which checkpoint a run resumes from, and whether it is this run's at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.precision import autocast_dtype
from spml_fast.data.manifest import Manifest
from spml_fast.runs.layout import CheckpointLayout, RunLayout
from spml_fast.runs.read import default_options, flatten
from spml_fast.runs.recipe import read_recipe
from spml_fast.training.checkpoint import TAG, Checkpoint, Listed, list_checkpoints, read_mark, read_position


@dataclass(frozen=True)
class Resume:
    """The checkpoint to resume from.

    Attributes:
        checkpoint: a whole one.
        notes: what was found to be damaged on the way, in sentences.
        damaged: names of the run's own checkpoints that are damaged.
        force: whether what defines the run may differ.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    force: bool = False


def find_resume(folder: Path, resume: str) -> Resume | None:
    """The checkpoint to resume from: the newest whole one, or the one that was asked for.

    Args:
        folder: the run's checkpoint directory.
        resume: `auto`, `never`, `force`, or the path of a checkpoint folder (or of a run directory) to start from;
            `force:PATH` is that path where what defines the run may differ.

    Returns:
        None to start afresh.

    Raises:
        UserError: `never` and there is one, the path holds none, or all of them are damaged.
    """
    force = resume == "force" or resume.startswith("force:")
    path = None if resume in ("auto", "never", "force") else Path(resume.removeprefix("force:"))
    if path is not None and not _is_directory_of(path, folder) and path.parent.resolve() == folder.resolve():
        return _chosen(folder, path.name, force)
    own = list_checkpoints(folder)
    if any(one.checkpoint or one.damage for one in own):
        if resume == "never":
            raise UserError(
                f"{folder.parent} already holds a run; choose another --run.dir, or resume it with --run.resume auto"
            )
        # A run that was started from a path and then killed resumes from its own checkpoints.
        return _newest_whole(folder, own, force)
    _refuse_restart(folder)
    if path is None:
        return None
    if (source := _directory(path)) is not None:
        theirs = list_checkpoints(source)
        if any(one.checkpoint or one.damage for one in theirs):
            found = _newest_whole(source, theirs, force)
            return dataclasses.replace(found, damaged=())
    elif path.is_dir() and TAG.fullmatch(path.resolve().name):
        return _chosen(path.resolve().parent, path.resolve().name, force)
    raise UserError(f"--run.resume {resume}: there is no checkpoint (give a run directory or a checkpoint folder)")


def _directory(path: Path) -> Path | None:
    """The checkpoint directory that a path of a run, or of that directory, means; None for another one."""
    inside = CheckpointLayout(path).inside
    if inside.is_dir():
        return inside
    return path if CheckpointLayout(path).newest.is_file() or list_checkpoints(path) else None


def _is_directory_of(path: Path, folder: Path) -> bool:
    return path.resolve() in (folder.resolve(), folder.parent.resolve())


def _chosen(folder: Path, tag: str, force: bool) -> Resume:
    """One checkpoint by name. `UserError` unless it is whole."""
    checkpoint = read_mark(folder, tag)
    whole = [one.tag for one in list_checkpoints(folder) if one.checkpoint is not None and one.tag != tag]
    others = f"; others there: {', '.join(whole)}" if whole else ""
    if checkpoint is None:
        state = "was not saved to its end" if (folder / tag).is_dir() else "is not there"
        raise UserError(f"--run.resume: there is no checkpoint {folder / tag}: it {state}{others}")
    if (damage := checkpoint.damage()) is not None:
        raise UserError(f"--run.resume: checkpoint {folder / tag} is damaged ({damage}){others}")
    return Resume(checkpoint, force=force)


def _refuse_restart(folder: Path) -> None:
    """Raise `UserError` where training from the start would write over the results of a run without checkpoints."""
    run = CheckpointLayout(folder).run
    lost = [path.name for path in (run.results, run.weights, CheckpointLayout(folder).newest) if path.exists()]
    if lost:
        raise UserError(
            f"{run.folder} has {', '.join(lost)} but no checkpoint to resume from, and training from the start would "
            "write over it; choose another --run.dir"
        )


def _newest_whole(folder: Path, listed: Sequence[Listed], force: bool) -> Resume:
    """The checkpoint of newest.json if it is whole, else the newest that is. `UserError` when none is."""
    notes: list[str] = []
    damaged: list[str] = []
    layout = CheckpointLayout(folder)
    try:
        newest = read_position(layout.newest)
    except UserError as error:
        newest = None
        notes.append(f"{error}; the newest checkpoint is found without it")
    tags = [one.tag for one in listed]
    if newest is not None and newest.tag not in tags:
        notes.append(f"{layout.newest} names checkpoint {newest.tag}, which is not there")
    for one in sorted(listed, key=lambda one: newest is None or one.tag != newest.tag):
        if one.checkpoint is None and one.damage is None:
            continue
        damage = one.damage if one.checkpoint is None else one.checkpoint.damage()
        if damage is None:
            assert one.checkpoint is not None
            if damaged:
                notes.append(f"resuming from {one.tag}, the newest whole checkpoint")
            return Resume(one.checkpoint, tuple(notes), tuple(damaged), force)
        notes.append(f"checkpoint {folder / one.tag} is damaged ({damage})")
        damaged.append(one.tag)
    raise UserError(
        f"no checkpoint in {folder} is whole: {'; '.join(notes)}; choose another --run.dir to train from the start"
    )


def defining_options(config: Config, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """What defines a run, by the name of the option: results of other values belong to another run.

    The labels that training sees are compared when a checkpoint is loaded (`LabelStore.load_state_dict`).
    """
    version = manifest.meta.get("version")
    return {
        "method.name": config.method.name,
        "data.name": manifest.name,
        **({} if version is None else {"data.version": str(version)}),
        "data.image_size": config.data.image_size,
        "model.backbone": config.model.backbone,
        "model.head": config.model.head,
        "train.precision": "fp32" if autocast_dtype(config.train.precision, device) is None else "bf16",
        "run.seed": config.run.seed,
    }


def _defined_by_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The same from the recipe of a run of a version before 0.2.0, as far as it tells; nothing where it is damaged."""
    if not recipe:
        return {}
    names = ("method.name", "data.image_size", "model.backbone", "model.head", "train.precision", "run.seed")
    options = default_options(recipe.get("method.name")) | dict(recipe)
    return {name: options[name] for name in names if options.get(name) not in (None, "auto")}


def precision_of(resume: Resume) -> Literal["fp32", "bf16"] | None:
    """What a checkpoint's run computes in; None where it is of a version that did not write down what auto meant."""
    value = _defined_before(resume).get("train.precision")
    return value if value in ("fp32", "bf16") else None


def recipe_of(run: RunLayout) -> dict[str, Any]:
    """The options in a run's config.yaml, by `section.option`; none where it is not there or damaged."""
    try:
        return flatten(read_recipe(str(run.config.absolute())))
    except UserError:
        return {}


def _defined_before(resume: Resume) -> Mapping[str, Any]:
    return resume.checkpoint.defines or _defined_by_recipe(recipe_of(CheckpointLayout(resume.checkpoint.folder).run))


def check_same_run(resume: Resume, defines: Mapping[str, Any], run_dir: Path) -> str | None:
    """Compare what defines the run with what the checkpoint belongs to.

    Args:
        resume: the checkpoint.
        defines: of this run, from `defining_options`.
        run_dir: the run directory.

    Returns:
        A sentence where they differ and `--run.resume force` takes that; None where they agree.

    Raises:
        UserError: they differ.
    """
    checkpoint = resume.checkpoint
    before = _defined_before(resume)
    names = [name for name in defines if name in before and before[name] != defines[name]]
    if not names:
        return None
    changes = ", ".join(f"{name} {before[name]} -> {defines[name]}" for name in names)
    if resume.force:
        return f"resuming another run's checkpoint, as --run.resume force says: {changes}"
    own = checkpoint.folder.resolve().parent == run_dir.resolve()
    new, force = ("another --run.dir", "force") if own else ("no --run.resume", f"force:{checkpoint.path}")
    raise UserError(
        f"{checkpoint.folder.parent} is another run ({changes}); give {new} to train a new one, or --run.resume "
        f"{force} to continue from its weights and optimizer"
    )

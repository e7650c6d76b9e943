"""Modules outside of this package that register methods, heads and data sets.

Installed distributions name theirs under the entry point group `spml_fast.plugins`; these are imported whenever a
configuration is read or the data sets are listed. Others are named by `--plugins MODULE`. A run's `run.plugins` says
which it needs, but a file that may be somebody else's must not run code: those are imported only when they are named by
`--plugins` as well, or were imported before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from spml_fast.core.errors import UserError

GROUP = "spml_fast.plugins"

# By the name that a configuration keeps: a module's, or the path of a file.
_loaded: dict[str, ModuleType] = {}


@functools.cache
def load_installed() -> tuple[str, ...]:
    """Import the plugins of installed distributions, once; returns the names of their modules.

    Raises:
        UserError: one cannot be imported.
    """
    modules = sorted({entry.module for entry in importlib.metadata.entry_points(group=GROUP)})
    for module in modules:
        _load(module, f", which an installed distribution names under {GROUP}")
    return tuple(modules)


def load_plugins(names: Sequence[str]) -> list[str]:
    """Import modules that a user has named, each once.

    Args:
        names: of modules, which may lie in the working directory, or paths of .py files; commas separate several.

    Returns:
        The names that a configuration keeps: those of modules as they are, files by their full path.

    Raises:
        UserError: a module or file does not exist, or an error ends its import.
    """
    load_installed()
    found: list[str] = []
    for name in (part.strip() for text in names for part in text.split(",")):
        if not name:
            continue
        if name.endswith(".py"):
            name = str(Path(name).resolve())
        if name not in found:
            _load(name, "")
            found.append(name)
    return found


def require_plugins(names: Sequence[str], needed_by: str) -> list[str]:
    """Check that the plugins which a file names are there; nothing but installed plugins is imported.

    Args:
        names: as the file has them.
        needed_by: the file, for messages.

    Returns:
        The same names.

    Raises:
        UserError: one has not been imported, which takes `--plugins` or an `import` of one's own.
    """
    installed = load_installed()
    for name in names:
        # A file may have moved since the run was made.
        same_file = name.endswith(".py") and any(Path(name).name == Path(other).name for other in _loaded)
        if not same_file and name not in installed and name not in _loaded and name not in sys.modules:
            raise UserError(
                f"{needed_by} needs the plugin {name}, which is code; give --plugins {name} (or import it first) if "
                "you trust it"
            )
    return list(names)


def used_plugins(names: Iterable[str], classes: Iterable[type]) -> list[str]:
    """What a run must name to be loaded again.

    Args:
        names: what `load_plugins` gave.
        classes: what the run uses, such as its method; those of installed plugins add the plugin's module.
    """
    kept = list(names)
    for cls in classes:
        for module in load_installed():
            inside = cls.__module__ == module or cls.__module__.startswith(module + ".")
            if inside and module not in kept:
                kept.append(module)
    return kept


def _load(name: str, why: str) -> None:
    """Import one plugin. `why` ends the first half of the sentence that says what is wrong."""
    if name in _loaded:
        return
    try:
        with _working_directory_first():
            _loaded[name] = _load_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _broken(name, why, error) from error
        raise UserError(
            f"there is no plugin {name}{why}; start in the folder that holds {name.replace('.', '/')}.py, "
            "give --plugins the path of the file, or install it"
        ) from error
    except Exception as error:
        # A plugin is somebody's own code, where anything may happen.
        raise _broken(name, why, error) from error


def _load_file(path: Path) -> ModuleType:
    """Import a file as a module of its own, whatever its name."""
    if not path.is_file():
        raise UserError(f"there is no plugin file {path}; give --plugins another, or put it back")
    name = f"spml_fast_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module while it is being made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _broken(name: str, why: str, error: Exception) -> UserError:
    """The sentence about an import that ended with an error, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return UserError(f"plugin {name}{why} cannot be imported: {type(error).__name__}: {error}{location}")


@contextlib.contextmanager
def _working_directory_first() -> Iterator[None]:
    """Inside, modules of the working directory can be imported, which a console script's path does not have."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)

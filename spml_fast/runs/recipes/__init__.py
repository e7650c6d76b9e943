"""The recipes that come with the package.

Published settings, those of the embedded digit scenes, and what is taken for one's own images.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from spml_fast.core.errors import UserError

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of all packaged recipes, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def default_recipe(own_data: bool, random_weights: bool) -> str:
    """The recipe of a run that names none.

    Args:
        own_data: a data set was named; without one training takes the digit scenes.
        random_weights: the backbone starts without pretrained weights.
    """
    if not own_data:
        return "digits"
    return "scratch" if random_weights else "finetune"


def find_recipe(recipe: str) -> Path:
    """The file of a recipe.

    Args:
        recipe: a path, or the name of a packaged recipe with or without `.yaml`; a file of that name wins.

    Raises:
        UserError: a word without a folder that names neither a file nor a packaged recipe.
    """
    path = Path(recipe)
    if path.is_file() or path.name != recipe:
        return path
    name = recipe.removesuffix(".yaml")
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    if path.exists():
        return path
    close = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(recipe_names())}"
    raise UserError(f"recipe {recipe} is neither a file nor one of the packaged recipes; {hint}")

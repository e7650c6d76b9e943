"""What a comparison is made of: entries, statements of the papers, presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One line of a table: a method with its options.

    Attributes:
        name: short name, part of the run directories.
        method: registry name of the method.
        recipe: file among the recipes.
        options: command line options after the recipe.
        published: published test mAP, for presets of real data sets; alpha -> value.
        note: how its setting differs, for the table.
        alphas: BoostLU factors that the trained model is tested with; 1 alone for heads without a map to boost.
    """

    name: str
    method: str
    recipe: str
    options: tuple[str, ...] = ()
    published: dict[str, float] = field(default_factory=dict)
    note: str = ""
    alphas: tuple[int, ...] = (1, 5)


@dataclass(frozen=True)
class Statement:
    """What a paper says, as a comparison of means.

    Attributes:
        text: the statement.
        needs: entries that it compares.
        holds: means by (entry, alpha) -> whether it holds.
    """

    text: str
    needs: tuple[str, ...]
    holds: Callable[[dict[tuple[str, str], float]], bool]


@dataclass(frozen=True)
class Preset:
    """A data set with its entries and statements.

    Attributes:
        name: of the preset.
        entries: all that exist.
        statements: those that are judged when their entries were run.
        default: names of the entries that run when none are named.
        note: the text below the table.
        needs_data: what to prepare, for presets whose recipe names no data set; then the data set must be given.
    """

    name: str
    entries: tuple[Entry, ...]
    statements: tuple[Statement, ...]
    default: tuple[str, ...]
    note: str = ""
    needs_data: str = ""


PLAIN = ("--model.alpha_train", "1")

# Entries that train with hidden labels.
ORACLES = ("full", "full_ls", "iun", "q2l_full")


def better(first: tuple[str, str], second: tuple[str, str]) -> Callable[[dict[tuple[str, str], float]], bool]:
    """Whether the mean of one (entry, alpha) is above another's."""
    return lambda means: means[first] > means[second]


STATEMENTS = (
    Statement(
        "BoostLU at inference improves a trained assumed-negative model",
        ("an",),
        better(("an", "5"), ("an", "1")),
    ),
    Statement(
        "training assumed-negative with BoostLU is worse than boosting at inference only",
        ("an", "an_boost"),
        better(("an", "5"), ("an_boost", "5")),
    ),
    Statement(
        "LL-R + BoostLU beats LL-R and assumed negative",
        ("an", "ll_r", "ll_r_boost"),
        lambda m: m["ll_r_boost", "5"] > max(m["ll_r", "1"], m["an", "1"]),
    ),
    Statement("IGNORE beats assumed negative", ("an", "ignore"), better(("ignore", "1"), ("an", "1"))),
    Statement(
        "IGNORE gains at least 1.5 points over assumed negative at alpha 1",
        ("an", "ignore"),
        lambda m: m["ignore", "1"] - m["an", "1"] >= 1.5,
    ),
    Statement("EM beats assumed negative", ("an", "em"), better(("em", "1"), ("an", "1"))),
    Statement(
        "nothing beats full labels",
        ("full",),
        lambda m: m["full", "1"] >= max([v for (name, _), v in m.items() if name not in ORACLES], default=0),
    ),
)

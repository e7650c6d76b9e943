"""YAML that anybody may have written: read without letting it take the memory or the stack."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import CollectionNode, Node

from spml_fast.core.errors import UserError

# Values of a file once its aliases are written out, and levels of nesting; recipes have a hundred and four.
MAX_VALUES = 100_000
MAX_DEPTH = 50


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text.

    Args:
        text: the whole file.
        name: what it is called in messages, `recipe a.yaml`.

    Raises:
        UserError: it is not valid YAML, or its aliases or nesting have no reasonable end; names the line where known.
    """
    loader: Any = None
    try:
        _check_depth(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, 0) > MAX_VALUES:
            raise UserError(f"{name} has more than {MAX_VALUES:,} values, aliases written out; write fewer")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        position = getattr(error, "problem_mark", None)
        line = f" in line {position.line + 1}" if position else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{name} is not valid YAML{line}: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{name} is nested more than {MAX_DEPTH} levels deep") from error
    except (ValueError, OverflowError, KeyError, IndexError, TypeError, AttributeError) as error:
        # The library converts dates, numbers and bases without a look at them.
        raise UserError(f"{name} is not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(text: str) -> None:
    """RecursionError for a text that is nested too deeply, which would take the library minutes to read whole."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecursionError


def _size(node: Node, known: dict[int, int], depth: int) -> int:
    """Values of a node with those of its aliases, each counted as often as it would be written out."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if not isinstance(node, CollectionNode):
        return 1
    if id(node) not in known:
        # An alias within its own value has no end: it runs into the limit of levels.
        pairs = (child for item in node.value for child in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_size(child, known, depth + 1) for child in pairs)
    return known[id(node)]

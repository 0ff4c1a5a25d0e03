"""Which layers a glob means: said once, for everything that takes ``pattern``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import paddle

from flatwater.errors import SurgeryError
from flatwater.paddle.running import layers_of

__all__ = ["paths_of", "select"]


def select(
    model: paddle.nn.Layer,
    is_wanted: Callable[[paddle.nn.Layer], bool],
    pattern: str | Sequence[str] | None,
    what: str,
    *,
    required: bool = True,
) -> dict[str, Any]:
    """The layers that are wanted and that a pattern selects, each by the first of its paths.

    A layer that is used in several places is selected by any of its paths.

    Args:
        pattern: a glob, or several, one of which a path must match; None for every layer that is wanted.
        what: such layers in words, for errors.
        required: whether a model without any is an error where there is no pattern.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``, has none, or a pattern matches none of them.
    """
    found = {path: layer for path, layer in layers_of(model) if is_wanted(layer)}
    if pattern is None:
        if required and not found:
            raise SurgeryError(f"the {type(model).__name__} has no {what}; see model.named_sublayers() for its layers")
        return found
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise SurgeryError(f"pattern={pattern!r} selects no {what}; use None for all of them")
    paths = paths_of(model)
    selected = set()
    for one in patterns:
        matching = {first for first, layer in found.items() if any(fnmatchcase(path, one) for path in paths[id(layer)])}
        if not matching:
            raise SurgeryError(
                f"the {type(model).__name__} has no {what} whose path matches {one!r} (of {len(found)}); "
                "see model.named_sublayers() for its paths"
            )
        selected |= matching
    return {path: layer for path, layer in found.items() if path in selected}


def paths_of(model: paddle.nn.Layer) -> dict[int, list[str]]:
    """All paths of each layer, in the order of ``named_sublayers``, by its ``id``; the model itself is ``""``."""
    paths: dict[int, list[str]] = {}
    for path, layer in _walk(model, ""):
        paths.setdefault(id(layer), []).append(path)
    return paths


def _walk(layer: paddle.nn.Layer, path: str) -> Iterator[tuple[str, paddle.nn.Layer]]:
    yield path, layer
    for name, child in layer._sub_layers.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name)

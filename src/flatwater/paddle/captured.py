"""What ``paddle.jit.to_static`` captured of a model: programs that know nothing of what its layers are told later.

``full_graph=True`` keeps one program for each signature, made from the layers as they were. Without it Paddle looks at
the layers anew where their settings are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import paddle
from paddle.jit.dy2static.program_translator import ASTStaticFunction, StaticFunction

from flatwater.paddle.running import layers_of
from flatwater.paddle.select import paths_of

__all__ = ["capture_anew", "captured_norm"]


def captured_norm(model: paddle.nn.Layer, norms: Iterable[str], *, whole: bool = False) -> str | None:
    """The first of these paths that is, or is within, a layer that ``to_static`` captured; None if there is none.

    Args:
        whole: whether only ``full_graph=True`` counts.
    """
    layers = dict(layers_of(model))
    captured = {id(layer) for layer in layers.values() if _is_captured(layer, whole=whole)}
    if not captured:
        return None
    everywhere = paths_of(model)
    places = [f"{path}." if path else "" for one in captured for path in everywhere[one]]
    return next(
        (norm for norm in norms for path in everywhere[id(layers[norm])] if f"{path}.".startswith(tuple(places))), None
    )


def capture_anew(model: paddle.nn.Layer) -> None:
    """Let whatever ``full_graph=True`` captured of the model be captured again at the next call.

    To be called where a setting has changed that a program keeps. A program captured from a function, or from a layer
    that ``model`` is a part of, is not found.
    """
    for _, layer in layers_of(model):
        for forward in _programs(layer):
            forward.program_cache.clear()


def _is_captured(layer: paddle.nn.Layer, *, whole: bool) -> bool:
    # In the instance, or, where the class was written with @to_static, in the class. Of the latter kind those that
    # look at their layers anew run them as they are, hooks included.
    symbolic = not whole and isinstance(vars(layer).get("forward"), StaticFunction)
    return symbolic or any(True for _ in _programs(layer))


def _programs(layer: paddle.nn.Layer) -> Iterator[ASTStaticFunction]:
    for name in {"forward", *getattr(layer, "_original_funcs", ())}:
        method = getattr(layer, name, None)
        if isinstance(method, ASTStaticFunction):
            yield method

"""Which norm layer is the first at which a form computes something else.

Tensors are told by their values, not by names, which no two file formats share: a norm layer is computed by a file if
the file computes a tensor with what the layer wrote. So a norm that was folded into the convolution before it is found
too, in what that convolution now writes; one that was folded into what reads it, in what that now writes.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from flatwater.inspection import Graph, Linear, Norm
from flatwater.verify.compare import difference
from flatwater.verify.forms import Arrays, Form, Inside, Look, Written
from flatwater.verify.report import Divergence

__all__ = ["find_divergence", "look_inside"]

_Array: TypeAlias = npt.NDArray[Any]

# So many of a tensor's first values are compared before all of them are.
_SAMPLE = 64


def look_inside(form: Form) -> Look | None:
    """What shows the norms of a form's file at work, else, where none is left, its convolutions and products.

    None if the form cannot be looked into.
    """
    if form.inside is None:
        return None
    opened = form.inside

    def look(inputs: Arrays) -> list[Written]:
        inside = opened()
        present = set(inside.tensors)
        kinds = (Norm, Linear)
        parts = [
            [one for one in inside.graph.operations if isinstance(one.part, kind) and one.writes[0] in present]
            for kind in kinds
        ]
        norm, marked = (True, parts[0]) if parts[0] else (False, parts[1])
        readers = {
            one.writes[0]: [
                reader.writes[0]
                for reader in inside.graph.readers(one.writes[0])
                if reader.writes and reader.writes[0] in present
            ]
            for one in marked
        }
        names = list(dict.fromkeys(name for own, others in readers.items() for name in (own, *others)))
        values = dict(zip(names, inside.load(names)(inputs), strict=True))
        return [
            Written(
                one.name if norm else str(one),
                values[one.writes[0]],
                [values[name] for name in readers[one.writes[0]]],
                norm,
            )
            for one in marked
        ]

    return look


def find_divergence(form: Form, written: Sequence[Written], inputs: Arrays, tolerance: float) -> Divergence | None:
    """Where a form, whose outputs are off, first computes something else than the reference.

    First in its file as it stands. If that computes all the norms, the form's own optimisation is at fault, and the
    first norm that it moves is found by bisection: one tensor more is returned in each run, as all of them together
    would keep a runtime from the fusions that are wrong. Of several that are wrong in branches beside each other, one
    is found.

    Args:
        form: the form.
        written: what the reference wrote on these inputs, in running order.
        inputs: of both.
        tolerance: as for the outputs, for each tensor on its own scale.

    Returns:
        None if the form cannot be looked into, or the reference has no layers to tell of.
    """
    if form.inside is None or not written:
        return None
    inside = form.inside()
    kind = "norm layer" if written[0].norm else "layer with weights"
    values = dict(zip(inside.tensors, inside.plain(inside.tensors)(inputs), strict=True))
    twins: list[tuple[str, _Array]] = []
    for one in written:
        twin = _twin(one, values, tolerance)
        if twin is None:
            return Divergence(form.name, one.layer, f"the first {kind} to diverge is {one.layer}")
        twins.append(twin)
    first = _first_moved(inside, twins, inputs, tolerance)
    if first < len(twins):
        layer = written[first].layer
        return Divergence(form.name, layer, f"as it optimises the file, the first {kind} to diverge is {layer}")
    layer = written[-1].layer
    return Divergence(form.name, None, f"every {kind} agrees when looked at; what diverges may be behind {layer}")


def _twin(one: Written, values: Mapping[str, _Array], tolerance: float) -> tuple[str, _Array] | None:
    """The tensor that holds what the layer wrote, or what was made of that, and the value it should have."""
    for expected in (one.tensor, *one.read_by):
        finite = np.abs(expected[np.isfinite(expected)])
        limit = tolerance * finite.max(initial=0.0)
        sample = expected.reshape(-1)[:_SAMPLE]
        for name, value in values.items():
            if value.shape != expected.shape:
                continue
            with np.errstate(invalid="ignore"):
                far = np.abs(value.reshape(-1)[:_SAMPLE] - sample) > limit
            if not far.any() and difference(expected, value).max_rel <= tolerance:
                return name, expected
    return None


def _first_moved(inside: Inside, twins: Sequence[tuple[str, _Array]], inputs: Arrays, tolerance: float) -> int:
    """The index of a tensor that is off in the form while all that it is computed from are not.

    ``len(twins)`` if that is none of them, but only what is behind them. Bisection takes it for granted that what
    follows a tensor that is off is off too, which does not hold from one branch to another. So from the tensor that it
    ends at, those of other branches that it is computed from are looked at as well.
    """
    places = {name: index for index, (name, _) in enumerate(twins)}
    results = inside.graph.results

    @functools.cache
    def moved(index: int) -> bool:
        name, expected = twins[index]
        (actual,) = inside.load([name])(inputs)
        return difference(expected, actual).max_rel > tolerance

    first = bisect.bisect_left(range(len(twins)), True, key=moved)
    while True:
        if first == len(twins):
            returned = {places[name] for name in results & places.keys()}
            before = sorted(returned.union(_nearest(inside.graph, results, places)))
        else:
            before = _nearest(inside.graph, {twins[first][0]}, places)
        earlier = next(filter(moved, before), None)
        if earlier is None:
            return first
        first = earlier


def _nearest(graph: Graph, tensors: Collection[str], places: Mapping[str, int]) -> list[int]:
    """The places of what ``tensors`` are computed from, as far back as the first of them on each way."""
    found = set()
    seen = set(tensors)
    waiting = list(tensors)
    while waiting:
        writer = graph.writer(waiting.pop())
        for name in writer.reads if writer is not None else ():
            if name in places:
                found.add(places[name])
            elif name not in seen:
                seen.add(name)
                waiting.append(name)
    return sorted(found)

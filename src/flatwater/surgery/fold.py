"""Folding: find the pairs by dataflow, fold them, prove it on the example inputs, take back what fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from flatwater.errors import SurgeryError
from flatwater.surgery.arithmetic import check_statistics, fold_values
from flatwater.surgery.report import FoldedPair, FoldReport
from flatwater.surgery.view import Call, ModelView, Trace

__all__ = ["fold_model", "pair_up"]


def fold_model(view: ModelView, tolerance: float) -> FoldReport:
    """Fold every norm layer of which it is proven that nothing but itself is changed by it.

    1. *Pair*: a norm that runs once and reads the very tensor that one linear layer wrote (:func:`pair_up`).
    2. *Alone*: the example inputs run again with rubbish in place of that tensor, which only the norm does not
       see. If anything observed changes, somebody else reads the tensor too (``relu(y)``, ``y + x``, an output).
    3. *Fold*, and run the example inputs: whatever moved by more than ``tolerance``, or keeps the model
       from running, is taken back.

    Raises:
        StatisticsError: running statistics that are NaN, infinite or negative; nothing was changed.
        SurgeryError: the example inputs prove nothing, or the model does not run on them; nothing was changed.
    """
    trace = view.trace()
    for path, obstacle in trace.norms.items():
        if obstacle is None:
            check_statistics(path, view.norm_values(path))
    pairs, left = pair_up(trace)
    before = view.observe()
    if reason := view.unprovable(before):
        raise SurgeryError(reason)

    shared = set(_readers_besides_norm(view, pairs, before, tolerance))
    for pair in shared:
        left[pair.norm] = f"something besides it reads the output of {pair.conv!r}"
    pairs = [pair for pair in pairs if pair not in shared]

    folding = _Folding(view, before, tolerance, left)
    try:
        folding.settle(pairs)
        moved = view.movement(before, view.observe(), outputs_only=True)
    except BaseException:
        folding.undo_to(0)
        raise
    return FoldReport(folding.folded, left, moved.max_abs, moved.max_rel, tolerance, [undo for _, undo in folding.done])


def pair_up(trace: Trace) -> tuple[list[FoldedPair], dict[str, str]]:
    """The pairs that the dataflow shows, and why each other norm layer is in none."""
    runs = Counter(call.path for call in trace.calls)
    writers: dict[int | None, Call] = {
        call.writes: call for call in trace.calls if call.path in trace.linears and call.writes is not None
    }
    reading = {call.path: call for call in trace.calls if call.path in trace.norms}
    readers = Counter(call.reads for call in reading.values())

    def obstacle(path: str, own: str | None) -> str | None:
        if own is not None or path not in reading:
            return own or "the example inputs do not reach it"
        if runs[path] > 1:
            return f"it runs {runs[path]} times, and one convolution cannot stand for all of them"
        writer = writers.get(reading[path].reads)
        if writer is None:
            return "what it reads was not written by a convolution or Linear layer"
        if trace.linears[writer.path] is not None:
            return f"what it reads comes from {writer.path!r}, and {trace.linears[writer.path]}"
        if runs[writer.path] > 1:
            return f"what it reads comes from {writer.path!r}, which runs {runs[writer.path]} times"
        if readers[writer.writes] > 1:
            return f"another norm layer reads the output of {writer.path!r} too"
        if writer.channel_axis != reading[path].channel_axis:
            return f"{writer.path!r} has its channels on axis {writer.channel_axis}, the norm on another"
        return None

    pairs, left = [], {}
    for path, own in trace.norms.items():
        reason = obstacle(path, own)
        if reason is None:
            pairs.append(FoldedPair(writers[reading[path].reads].path, path))
        else:
            left[path] = reason
    return pairs, left


def _readers_besides_norm(
    view: ModelView, pairs: Sequence[FoldedPair], before: object, tolerance: float
) -> list[FoldedPair]:
    """The pairs whose tensor is read by more than the norm; found by halving, as mostly there are none."""
    if not pairs:
        return []
    runs = view.observe_poisoned(pairs)
    if runs and all(view.movement(before, run).max_rel <= tolerance for run in runs):
        return []
    if len(pairs) == 1:
        return list(pairs)
    half = len(pairs) // 2
    return [
        *_readers_besides_norm(view, pairs[:half], before, tolerance),
        *_readers_besides_norm(view, pairs[half:], before, tolerance),
    ]


class _Folding:
    """Folds that were done and stand, each with its way back."""

    def __init__(self, view: ModelView, before: object, tolerance: float, left: dict[str, str]) -> None:
        self.view = view
        self.before = before
        self.tolerance = tolerance
        self.left = left
        self.done: list[tuple[FoldedPair, Callable[[], None]]] = []

    @property
    def folded(self) -> list[FoldedPair]:
        return [pair for pair, _ in self.done]

    def settle(self, pairs: Sequence[FoldedPair]) -> None:
        """Fold ``pairs``; where the model moved too far or fails, take them back and try each half by itself."""
        if not pairs:
            return
        start = len(self.done)
        for pair in pairs:
            self.fold(pair)
        damage = self.damage()
        if damage is None:
            return
        self.undo_to(start)
        if len(pairs) == 1:
            self.left[pairs[0].norm] = f"folding it into {pairs[0].conv!r} {damage}; it was taken back"
            return
        half = len(pairs) // 2
        self.settle(pairs[:half])
        self.settle(pairs[half:])

    def damage(self) -> str | None:
        """What the folds that stand have done to the model, None if it computes what it did before."""
        try:
            observed = self.view.observe()
        except MemoryError:
            raise
        except Exception as error:  # whatever the model's own code raises that misses its norm layer
            reason = next(iter(str(error).strip().splitlines()), "")
            return f"made the model fail ({type(error).__name__}: {reason})"
        moved = self.view.movement(self.before, observed)
        if moved.max_rel <= self.tolerance:
            return None
        return f"moved {moved.where} by {moved.max_rel:.2g} of its scale, more than the tolerance {self.tolerance:.2g}"

    def fold(self, pair: FoldedPair) -> None:
        weight, bias = fold_values(self.view.linear_values(pair.conv), self.view.norm_values(pair.norm))
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            self.left[pair.norm] = "the folded weight or bias would not be finite"
            return
        self.done.append((pair, self.view.substitute(pair, weight, bias)))

    def undo_to(self, count: int) -> None:
        while len(self.done) > count:
            self.done.pop()[1]()

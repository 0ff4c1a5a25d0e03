"""Folding: find the folds by dataflow, do them, prove it on the example inputs, take back what fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flatwater.errors import SurgeryError
from flatwater.rounding import MOST_NOISE, NOISE_FACTOR, with_rounding
from flatwater.surgery.arithmetic import (
    Affine,
    affine_after,
    affine_before,
    affine_before_norm,
    affine_of,
    check_statistics,
)
from flatwater.surgery.plan import Planner
from flatwater.surgery.report import FoldedPair, FoldReport, Movement
from flatwater.surgery.view import Absorption, Fold, ModelView

__all__ = ["fold_model"]


def fold_model(view: ModelView, tolerance: float, *, adapt: bool = False) -> FoldReport:
    """Fold every norm layer of which it is proven that nothing but itself is changed by it.

    1. *Plan*: norms whose input was copied from what linear layers wrote go into those, and of the others
       those whose output is copied into linear or norm layers go into these (:class:`~flatwater.surgery.Planner`).
    2. *Alone*: the example inputs run again with rubbish in place of the tensors between the two, which only the
       layers of the fold do not see. If anything observed changes, somebody else reads them too (``relu(y)``,
       ``y + x``, an output).
    3. *Fold*, and run the example inputs: whatever moved by more than ``tolerance``, or keeps the model
       from running, is taken back.
    4. Again from 1., as long as a norm is left that read what a folded norm wrote.

    Args:
        adapt: where the model itself moves a tensor by more than the tolerance when its inputs move by one unit in
            the last place, allow that tensor eight times this movement, at most :data:`~flatwater.rounding.MOST_NOISE`;
            what a norm writes that would need more is not looked at.

    Raises:
        StatisticsError: running statistics that are NaN, infinite or negative; nothing was changed.
        SurgeryError: the example inputs prove nothing, or the model does not run on them; nothing was changed.
    """
    trace = view.trace()
    for path, obstacle in trace.norms.items():
        if obstacle is None:
            check_statistics(path, view.norm_values(path))
    before = view.observe()
    if reason := view.unprovable(before):
        raise SurgeryError(reason)

    proof = _Proof(view, before, tolerance, adapt=adapt)
    folding = _Folding(view, proof)
    try:
        while folding.round(Planner(trace, folding.affine_of)):
            trace = view.trace()
        moved = view.movements(before, view.observe()).outputs.values()
    except BaseException:
        folding.undo_to(0)
        raise
    return FoldReport(
        [pair for fold, _ in folding.done for pair in _pairs(fold)],
        folding.left,
        max((movement.max_abs for movement in moved), default=0.0),
        max((movement.max_rel for movement in moved), default=0.0),
        max((proof.limit(name) for name in view.movements(before, before).outputs), default=tolerance),
        {path for fold, _ in folding.done for path in fold.hidden},
        [undo for _, undo in folding.done],
    )


def _pairs(fold: Fold) -> Iterator[FoldedPair]:
    for norm in fold.norms:
        # Of norms that are alike behind one channel only one is noted there.
        into = [one for one in fold.absorptions if norm in one.norms] or fold.absorptions
        yield from (FoldedPair(one.path, norm) for one in into)


class _Proof:
    """How far the model has moved since before, and how far it may have."""

    def __init__(self, view: ModelView, before: Any, tolerance: float, *, adapt: bool) -> None:
        self.view = view
        self.before = before
        self.tolerance = tolerance
        self.adapt = adapt
        self._noise: dict[str, float] = {}
        # Norms whose tensors move so far by themselves that they prove nothing; the outputs are to prove it.
        self._chaotic: set[str] = set()

    def measure_noise(self) -> None:
        """See how far each tensor moves when the inputs move by one unit in the last place."""
        if not self._noise:
            found = self.view.movements(self.before, self.view.observe(shaken=True))
            moved = (*found.outputs.items(), *found.norms.items())
            self._noise = {name: movement.max_rel for name, movement in moved}
            if self.adapt:
                self._chaotic = {path for path in found.norms if NOISE_FACTOR * self._noise[path] > MOST_NOISE}

    def limit(self, name: str) -> float:
        """How far this tensor may move; its noise counts once it has been measured."""
        if not self.adapt:
            return self.tolerance
        return with_rounding(self.tolerance, self._noise.get(name, 0.0))

    def damage(self, observation: Any, changed: set[str]) -> tuple[str, Movement] | None:
        """What moved too far, and the farthest; the norms in ``changed`` are meant to write something else."""
        found = self.view.movements(self.before, observation)
        ignored = changed | self._chaotic
        moved = {path: movement for path, movement in found.norms.items() if path not in ignored}
        moved |= found.outputs
        beyond = [(name, movement) for name, movement in moved.items() if movement.max_rel > self.limit(name)]
        return max(beyond, key=lambda one: one[1].max_rel, default=None)

    def describe(self, name: str, moved: Movement) -> tuple[str, bool]:
        """In words what has moved, and whether it is no more than what rounding does to this model."""
        limit, noise = self.limit(name), self._noise.get(name, 0.0)
        text = f"moved {moved.where} by {moved.max_rel:.2g} of its scale, more than the tolerance {limit:.2g}"
        if NOISE_FACTOR * noise < moved.max_rel:
            return text, False
        return (
            f"{text}, and proves nothing: this model multiplies rounding, and moves it by {noise:.2g} when its inputs "
            "move by one unit in the last place; give other inputs or a larger tolerance"
        ), True


class _Folding:
    """Folds that were done and stand, each with its way back, and why other norms are left."""

    def __init__(self, view: ModelView, proof: _Proof) -> None:
        self.view = view
        self.proof = proof
        self.left: dict[str, str] = {}
        self.done: list[tuple[Fold, Callable[[], None]]] = []
        # Norms of which it is known that they write something else than before.
        self.displaced: set[str] = set()
        self._affine: dict[str, Affine] = {}

    def affine_of(self, norm: str) -> Affine:
        if norm not in self._affine:
            self._affine[norm] = affine_of(self.view.norm_values(norm))
        return self._affine[norm]

    def round(self, planner: Planner) -> bool:
        """Fold what the planner finds; whether another look may find more."""
        gone = set(self.folded)
        # What the norm behind them read of a folded one, a layer before both may be about to write otherwise.
        self.displaced |= gone
        self.left = planner.left
        after = self.alone(planner.after())
        before = self.alone(planner.before([norm for norm in self.left if norm not in gone]))
        self.settle(after)
        self.settle(before)
        new = set(self.folded) - gone
        for norm in new | gone:
            self.left.pop(norm, None)
        return any(planner.reads_from(norm, new) for norm in self.left)

    @property
    def folded(self) -> list[str]:
        return [norm for fold, _ in self.done for norm in fold.norms]

    def refuse(self, fold: Fold, reason: str) -> None:
        """Say why a fold is not done; that the norms cannot go backwards either has been said before."""
        for norm in fold.norms:
            self.left[norm] = reason if fold.after or norm not in self.left else f"{self.left[norm]}; and {reason}"

    def alone(self, folds: Sequence[Fold]) -> list[Fold]:
        """The folds whose tensors nobody else reads: mostly all, else without suspects, else each half by itself."""
        if not folds:
            return []
        runs = self.view.observe_poisoned(folds)
        unlike = self.displaced.union(*(fold.hidden for fold in folds))
        if runs and all(self.proof.damage(run, unlike) is None for run in runs):
            return list(folds)
        if len(folds) > 1:
            suspects = self.view.read_elsewhere(folds)
            for fold in suspects:
                self.refuse_shared(fold)
            if suspects:
                return self.alone([fold for fold in folds if fold not in suspects])
            half = len(folds) // 2
            return [*self.alone(folds[:half]), *self.alone(folds[half:])]
        self.refuse_shared(folds[0])
        return []

    def refuse_shared(self, fold: Fold) -> None:
        readers = "it" if fold.after and len(fold.norms) == 1 else _listed(fold.readers)
        writer = _listed(fold.hidden) if fold.after else "it"
        self.refuse(fold, f"something besides {readers} reads the output of {writer}")

    def settle(self, folds: Sequence[Fold]) -> None:
        """Do ``folds``; where the model moved too far or fails, take them back and try each half by itself."""
        if not folds:
            return
        start = len(self.done)
        self.fold_all(folds)
        try:
            observed = self.view.observe()
        except MemoryError:
            raise
        except Exception as error:  # whatever the model's own code raises that misses its norm layer
            reason = next(iter(str(error).strip().splitlines()), "")
            damage, by_rounding = f"made the model fail ({type(error).__name__}: {reason})", False
        else:
            displaced = self.displaced.union(*(fold.norms for fold, _ in self.done if not fold.after))
            if self.proof.damage(observed, displaced) is None:
                return
            self.undo_to(start)
            self.proof.measure_noise()
            found = self.proof.damage(observed, displaced)
            if found is None:
                self.fold_all(folds)
                return
            damage, by_rounding = self.proof.describe(*found)
        self.undo_to(start)
        if by_rounding or len(folds) == 1:
            for fold in folds:
                into = _listed([one.path for one in fold.absorptions])
                self.refuse(fold, f"folding it into {into} {damage}; it was taken back")
            return
        half = len(folds) // 2
        self.settle(folds[:half])
        self.settle(folds[half:])

    def fold_all(self, folds: Sequence[Fold]) -> None:
        for fold in folds:
            self.fold(fold)

    def fold(self, fold: Fold) -> None:
        """Do it, unless its weights cannot be."""
        undo: list[Callable[[], None]] = []

        def restore() -> None:
            for step in reversed(undo):
                step()
            self._affine.clear()

        new = [(one, *self.new_values(one, after=fold.after)) for one in fold.absorptions]
        for one, weight, bias in new:
            if not all(array is None or _holds(array, self.view.largest(one.path)) for array in (weight, bias)):
                self.refuse(fold, "the folded weight or bias would not be finite")
                return
        try:
            for one, weight, bias in new:
                like = next((norm for norm in one.norms if norm is not None), fold.norms[0])
                undo.append(self.view.absorb(one.path, weight, bias, like=like))
            undo += [self.view.retire(norm) for norm in fold.norms]
        except BaseException:
            restore()
            raise
        self._affine.clear()
        self.done.append((fold, restore))

    def new_values(self, one: Absorption, *, after: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """Weight and bias of a layer that takes up norms; no bias where it had none and needs none."""
        affine = Affine(np.ones(len(one.norms)), np.zeros(len(one.norms)))
        for norm in {norm for norm in one.norms if norm is not None}:
            chosen = np.array([name == norm for name in one.norms])
            scale, shift = self.affine_of(norm)
            affine.scale[chosen] = scale[one.channels[chosen]]
            affine.shift[chosen] = shift[one.channels[chosen]]
        if self.view.is_norm(one.path):
            norm_values = self.view.norm_values(one.path)
            had_bias = norm_values.bias is not None
            weight, bias = affine_before_norm(norm_values, affine)
        else:
            values = self.view.linear_values(one.path)
            had_bias = values.bias is not None
            weight, bias = (affine_after if after else affine_before)(values, affine)
        return weight, bias if had_bias or bias.any() else None

    def undo_to(self, count: int) -> None:
        while len(self.done) > count:
            self.done.pop()[1]()


def _listed(paths: Sequence[str]) -> str:
    return " and ".join(map(repr, paths))


def _holds(array: np.ndarray[Any, Any], largest: float) -> bool:
    return bool(np.isfinite(array).all() and np.abs(array).max(initial=0.0) <= largest)

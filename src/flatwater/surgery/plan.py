"""Which norm layers can go into which layers beside them: read off the dataflow, nothing is changed yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

import numpy as np

from flatwater.surgery.arithmetic import Affine
from flatwater.surgery.view import ELSEWHERE, Absorption, Fold, Source, Trace

__all__ = ["Planner"]

_AffineOf: TypeAlias = Callable[[str], Affine]
# For each channel of an absorbing layer: path of the norm (None: none) and that norm's channel.
_Claims: TypeAlias = list[tuple[str, int] | None]


class Planner:
    """Plans of one trace.

    Args:
        trace: the dataflow.
        affine_of: what a norm computes, by its path; asked where it decides.

    Attributes:
        left: path of a norm -> why it is in none of the folds planned so far.
    """

    def __init__(self, trace: Trace, affine_of: _AffineOf) -> None:
        self.trace = trace
        self.affine_of = affine_of
        self.calls_of: dict[str, list[int]] = defaultdict(list)
        for index, call in enumerate(trace.calls):
            self.calls_of[call.path].append(index)
        self.left: dict[str, str] = {}

    def after(self) -> list[Fold]:
        """Folds of norms into the linear layers before them; ``left`` says why each other norm is in none.

        Norms and linear layers that read from each other, or have a parameter in common, go together or not at all:
        a convolution that runs twice, one convolution behind two norms, several that are joined before one norm.
        """
        group = _Groups()
        candidates = [path for path, own in self.trace.norms.items() if not self._refuse(path, own)]
        for norm in candidates:
            for linear in self._writers(norm):
                group.join(("norm", norm), ("linear", linear))
                for other in self.trace.shared.get(linear, ()):
                    group.join(("linear", linear), ("linear", other))
        order = {path: index for index, path in enumerate(self.calls_of)}
        folds = []
        for members in group.all():
            norms = sorted((path for kind, path in members if kind == "norm"), key=order.__getitem__)
            linears = [path for kind, path in members if kind == "linear"]
            fold = self._fold_after(norms, linears)
            if isinstance(fold, str):
                self.left.update(dict.fromkeys(norms, fold))
            else:
                folds.append(fold)
        return sorted(folds, key=lambda fold: order[fold.norms[0]])

    def before(self, norms: Iterable[str]) -> list[Fold]:
        """Folds of these norms into the linear and norm layers after them; adds to ``left`` why not."""
        folds = []
        for norm in norms:
            fold = self._fold_before(norm)
            if isinstance(fold, Fold):
                folds.append(fold)
            elif fold:
                self.left[norm] += f"; and {fold}"
        return folds

    def reads_from(self, norm: str, others: Collection[str]) -> bool:
        """Whether the norm reads anything that one of these layers wrote."""
        sources = [self.trace.calls[index].reads for index in self.calls_of.get(norm, ())]
        return any(
            self.trace.calls[writer].path in others for source in sources if source for writer in source.writers()
        )

    # --- Into what comes before -----------------------------------------------------------------------

    def _refuse(self, norm: str, own: str | None) -> bool:
        """Whether this norm cannot go into linear layers before it, whatever others do; ``left`` says why."""
        reason = own or self._refusal(norm)
        if reason is not None:
            self.left[norm] = reason
        return reason is not None

    def _refusal(self, norm: str) -> str | None:
        runs = self.calls_of.get(norm, [])
        if not runs:
            return "the example inputs do not reach it"
        for index in runs:
            call = self.trace.calls[index]
            prefix = f"it runs {len(runs)} times, and " if len(runs) > 1 else ""
            strangers = f"{prefix}what it reads was not written by a convolution or Linear layer"
            if call.reads is None:
                return prefix + call.note if call.note else strangers
            if (call.reads.calls == ELSEWHERE).any():
                return strangers if not call.reads.writers() else f"{strangers} alone"
            for writer in call.reads.writers():
                path = self.trace.calls[writer].path
                if path not in self.trace.linears:
                    return strangers
                if obstacle := self.trace.linears[path]:
                    return f"what it reads comes from {path!r}, and {obstacle}"
        return None

    def _writers(self, norm: str) -> set[str]:
        """The linear layers that write what the norm reads, by path."""
        sources = [self.trace.calls[index].reads for index in self.calls_of[norm]]
        return {self.trace.calls[writer].path for source in sources if source for writer in source.writers()}

    def _fold_after(self, norms: list[str], linears: list[str]) -> Fold | str:
        of_call: dict[int, _Claims] = {}
        for norm in norms:
            for index in self.calls_of[norm]:
                source = self.trace.calls[index].reads
                assert source is not None  # _refusal has seen to it
                for channel, (call, written) in enumerate(zip(*source, strict=True)):
                    path = self.trace.calls[call].path
                    claims = of_call.setdefault(int(call), [None] * self.trace.ports[path].outputs)
                    claim = (norm, channel)
                    if not self._same(claims[written] or claim, claim):
                        return f"another norm layer reads the output of {path!r} too"
                    claims[written] = claim
        claims_of: dict[str, _Claims] = {}
        for linear in linears:
            runs = [of_call.get(index) for index in self.calls_of.get(linear, [])]
            first = next((claims for claims in runs if claims is not None), None)
            if first is None:
                continue  # it is here for a parameter that it shares
            if not all(claims is not None and self._agree(first, claims) for claims in runs):
                reader = "the same norm" if len(norms) == 1 else "norms of the same values"
                return f"what it reads comes from {linear!r}, which runs {len(runs)} times, not always before {reader}"
            claims_of[linear] = first
        for linear in claims_of:
            for other in sorted(self.trace.shared.get(linear, ())):
                if other not in claims_of or not self._agree(claims_of[linear], claims_of[other]):
                    return f"what it reads comes from {linear!r}, and it shares a parameter with {other!r}"
        return Fold(tuple(norms), tuple(_absorption(path, claims) for path, claims in claims_of.items()), after=True)

    def _same(self, one: tuple[str, int], two: tuple[str, int]) -> bool:
        """Whether two channels of norms compute the same."""
        if one == two:
            return True
        first, second = self.affine_of(one[0]), self.affine_of(two[0])
        return bool(first.scale[one[1]] == second.scale[two[1]] and first.shift[one[1]] == second.shift[two[1]])

    def _agree(self, one: _Claims, two: _Claims) -> bool:
        return len(one) == len(two) and all(
            first is second or (first is not None and second is not None and self._same(first, second))
            for first, second in zip(one, two, strict=True)
        )

    # --- Into what comes after ------------------------------------------------------------------------

    def _fold_before(self, norm: str) -> Fold | str | None:
        if self.trace.norms[norm] is not None or norm not in self.calls_of:
            return None
        own = set(self.calls_of[norm])
        readers = dict.fromkeys(
            call.path for call in self.trace.calls if call.reads is not None and own & set(call.reads.writers())
        )
        if not readers:
            return None
        if norm in self.trace.fused:
            return f"{self.trace.fused[norm]} stands between it and {next(iter(readers))!r}"
        shift = self.affine_of(norm).shift
        absorptions = []
        for path in readers:
            claims = self._claims_on(path, norm, own)
            if isinstance(claims, str):
                return claims
            if path in self.trace.linears and np.any(shift != 0.0) and not self.trace.ports[path].even:
                return f"{path!r}, which reads it, pads with zeros or overlaps, so that its shift has no place there"
            absorptions.append(_absorption(path, claims))
        return Fold((norm,), tuple(absorptions), after=False)

    def _claims_on(self, path: str, norm: str, own: set[int]) -> _Claims | str:
        """Which channels of what a reader reads are the norm's, the same in all its runs; or why not."""
        obstacle = self.trace.linears[path] if path in self.trace.linears else self.trace.norms[path]
        if obstacle:
            return f"{path!r}, which reads it, cannot take it up: {obstacle}"
        if self.trace.shared.get(path):
            return f"{path!r}, which reads it, shares a parameter with {min(self.trace.shared[path])!r}"
        agreed: _Claims | None = None
        for index in self.calls_of[path]:
            source = self.trace.calls[index].reads
            claims = _claims_of(source, norm, own) if source is not None else None
            if claims is None or (agreed is not None and claims != agreed):
                return f"{path!r} runs {len(self.calls_of[path])} times and does not always read it"
            agreed = claims
        assert agreed is not None  # it is a reader because a call of it reads
        if path in self.trace.linears and len(agreed) != self.trace.ports[path].inputs:
            return f"{path!r}, which reads it, groups its channels otherwise"
        return agreed


def _claims_of(source: Source, norm: str, own: set[int]) -> _Claims:
    return [(norm, int(channel)) if int(call) in own else None for call, channel in zip(*source, strict=True)]


def _absorption(path: str, claims: _Claims) -> Absorption:
    return Absorption(
        path,
        tuple(None if claim is None else claim[0] for claim in claims),
        np.array([0 if claim is None else claim[1] for claim in claims], np.intp),
    )


class _Groups:
    """Disjoint sets of layers that have been joined."""

    def __init__(self) -> None:
        self._set_of: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def join(self, one: tuple[str, str], two: tuple[str, str]) -> None:
        first, second = (self._set_of.setdefault(item, [item]) for item in (one, two))
        if first is not second:
            first += second
            for item in second:
                self._set_of[item] = first

    def all(self) -> list[list[tuple[str, str]]]:
        return list({id(members): members for members in self._set_of.values()}.values())

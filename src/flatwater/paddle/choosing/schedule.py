"""``MomentumSchedule``: the momentum of batch norms that follows a curve over the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import paddle

from flatwater.errors import InputError, SurgeryError
from flatwater.momentum import Curve, MomentumCurve, Unit
from flatwater.paddle.captured import captured_norm
from flatwater.paddle.kinds import BATCH_NORMS, normalizes_by_batch
from flatwater.paddle.select import select

__all__ = ["MomentumSchedule", "matching_batch_norms"]


class MomentumSchedule(paddle.callbacks.Callback):
    """Sets the momentum of the batch norms of ``model``, step by step or epoch by epoch.

        schedule = fw.MomentumSchedule(model, {0: 0.5, 1000: 0.99}, curve="cosine")
        for x, target in batches:
            ...
            optimizer.step()
            schedule.step()            # as with a learning rate; or model.fit(..., callbacks=[schedule])

    ``momentum`` is Paddle's: the share of the OLD statistics that a step keeps, ``moving = momentum · moving +
    (1 - momentum) · batch``. Weights move fast early, so that old statistics are soon those of another network: 0.5
    forgets them within a few steps. Late they hardly move, and 0.99 averages over about a hundred steps, which is what
    noisy statistics of small batches want. (In PyTorch's sense these are 0.5 and 0.01.)

    Stock layers of Paddle, subclasses of them and ours are set alike. Frozen ones are passed by: at the time, so that a
    layer that is frozen or thawed on the way is let go, or joins. How a batch is normalized in training does not depend
    on any of this; ``eval()`` does.

    ``state_dict()`` holds where the schedule is, and ``set_state_dict()`` goes on from there: a checkpoint of the model
    does not hold momentum.

    Args:
        at: momentum by step or epoch, counted from 0; the first one is set at once.
        curve: between these places, ``"linear"``, ``"cosine"``, or ``"constant"`` up to the next one.
        by: what ``at`` counts, and so :meth:`step`: ``"step"`` or ``"epoch"``. In ``paddle.Model.fit`` a step is a
            batch, whether or not gradients are accumulated over several.
        pattern: a glob, or several, one of which a layer's path must match (``"backbone.*"``); None for every layer.

    Raises:
        InputError: ``at`` is empty or holds what is no place or momentum, or another curve or unit.
        SurgeryError: no batch norm matches, or one was captured by ``to_static(full_graph=True)``, whose program keeps
            the momentum that it was captured with.
    """

    def __init__(
        self,
        model: paddle.nn.Layer,
        at: Mapping[int, float],
        *,
        curve: Curve = "linear",
        by: Unit = "step",
        pattern: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._curve = MomentumCurve(dict(at), curve, by)
        self._layers = matching_batch_norms(model, pattern)
        self._network = model
        self._position = 0
        self.step(0)

    @property
    def position(self) -> int:
        """The step or epoch, counted from 0, whose momentum is set."""
        return self._position

    @property
    def momentum(self) -> float:
        """What the layers have now, if they are not frozen."""
        return self._curve.value(self._position)

    def step(self, position: int | None = None) -> float:
        """Go on to the next step or epoch, or to the one that is given; returns its momentum.

        Raises:
            InputError: a position that is not a whole number from 0 on.
            SurgeryError: a layer was captured by ``to_static(full_graph=True)`` since.
        """
        position = self._position + 1 if position is None else position
        if type(position) is bool or not hasattr(position, "__index__") or position < 0:
            raise InputError(f"position={position!r} is no {self._curve.by}; they are whole numbers and count from 0")
        captured = captured_norm(self._network, self._layers, whole=True)
        if captured is not None:
            raise SurgeryError(
                f"batch norm {captured!r} was captured by to_static, and its program keeps the momentum that it had; "
                "use full_graph=False, or call forward.rollback() on what was captured"
            )
        self._position = position
        for layer in self._layers.values():
            # Asked anew: a layer may have been frozen since, or made another kind of norm.
            if isinstance(layer, BATCH_NORMS) and normalizes_by_batch(layer, training=True):
                layer._momentum = self.momentum
        return self.momentum

    def state_dict(self) -> dict[str, int]:
        """Where the schedule is; the curve itself is not in it."""
        return {"position": self._position}

    def set_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from what :meth:`state_dict` gave, and set that momentum.

        Raises:
            InputError: it is not such a state.
        """
        position = state.get("position")
        if isinstance(position, bool) or not isinstance(position, int):
            raise InputError(f"{dict(state)!r} is not the state of a MomentumSchedule; give what state_dict() returned")
        self.step(position)

    def on_train_batch_end(self, step: int, logs: Any = None) -> None:
        if self._curve.by == "step":
            self.step()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._curve.by == "epoch":
            self.step()


def matching_batch_norms(model: paddle.nn.Layer, pattern: str | Sequence[str] | None) -> dict[str, Any]:
    """The batch norms that a pattern selects, by path.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``, or none matches.
    """
    return select(model, lambda layer: isinstance(layer, BATCH_NORMS), pattern, "batch norm layer")

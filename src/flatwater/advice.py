"""Which norm a layer should have, by what it really normalizes over: one rule of thumb, said once.

A note on ``momentum``, which means opposite things. Here, as in Paddle, it is the share of the OLD statistics that a
step keeps: ``moving = momentum · moving + (1 - momentum) · batch``. In PyTorch it is the share of the NEW ones. Noisy
batches want an average over more of them: what is called "a lower momentum" there is a HIGHER one here.
"""

from __future__ import annotations

import glob
import io
import math
from collections import Counter
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flatwater.errors import BackendError, ConfigError, InputError

if TYPE_CHECKING:
    from flatwater.policy import Policy

__all__ = [
    "ENOUGH_SAMPLES",
    "AdviceReport",
    "Batch",
    "Choice",
    "Kind",
    "LayerAdvice",
    "check_count",
    "choose_groups",
    "choose_norm",
    "steadier_momentum",
]

ENOUGH_SAMPLES = 16
"""Per device. Wu & He (2018, figure 1) see the error of batch norm rise below this."""

_ENOUGH_VALUES = 16
"""That statistics should at least be of: fewer are noise whatever they are taken over."""

_MOST_GROUPS = 32
"""Of group norm: the number that Wu & He (2018) use throughout."""

Kind: TypeAlias = Literal["batch_norm", "sync_batch_norm", "group_norm"]


class Batch(NamedTuple):
    """What a norm layer gets in one step on one device.

    Attributes:
        samples: in its batch.
        positions: values per channel of each; None if not known.
    """

    samples: int
    positions: int | None = None

    @property
    def values(self) -> int | None:
        """Per channel, of all samples."""
        return None if self.positions is None else self.samples * self.positions


class Choice(NamedTuple):
    """A kind of norm, and why.

    Attributes:
        kind: of norm.
        reason: in words.
        groups: of group norm, where the channels are known.
        momentum: what batch norm in this place would need, see :func:`steadier_momentum`; None where it needs none.
    """

    kind: Kind
    reason: str
    groups: int | None = None
    momentum: float | None = None


def choose_norm(
    samples: int,
    world_size: int = 1,
    *,
    positions: int | None = None,
    channels: int | None = None,
    momentum: float = 0.9,
    obstacle: str | None = None,
) -> Choice:
    """The kind of norm for a layer that gets this much in a training step.

    From 16 samples per device on, batch norm. With fewer, sync batch norm where several devices share statistics,
    and group norm where there is but one, or batch norm with a momentum that averages over more steps. Sync batch norm
    wants 16 values per channel, too, over all devices.

    Args:
        samples: in the layer's batch on one device; of a detector's head that is regions, not images.
        world_size: how many devices share statistics.
        positions: values per channel of a sample (height × width); None if not known, then taken for many.
        channels: of the layer, for the number of groups; None if not known.
        momentum: of the layer now, the share of the OLD statistics kept.
        obstacle: why the layer has to stay batch norm; None if it need not.

    Raises:
        InputError: a number below 1, or a momentum outside 0 to 1.
    """
    given = {"samples": samples, "world_size": world_size, "positions": positions, "channels": channels}
    for name, number in given.items():
        check_count(name, number)
    seen = f"{samples} sample{'s' if samples != 1 else ''} per device"
    if samples >= ENOUGH_SAMPLES:
        return Choice("batch_norm", f"{seen}, at least {ENOUGH_SAMPLES}")
    steadier = steadier_momentum(momentum, samples)
    single = "; one value per channel cannot be normalized in training: bring more samples, or freeze it"
    single = single if samples == positions == 1 else ""
    if obstacle is not None:
        return Choice("batch_norm", f"{seen}, fewer than {ENOUGH_SAMPLES}, but {obstacle}{single}", momentum=steadier)
    values = samples * world_size * (_ENOUGH_VALUES if positions is None else positions)
    if world_size > 1 and values >= _ENOUGH_VALUES:
        return Choice("sync_batch_norm", f"{seen}, fewer than {ENOUGH_SAMPLES}, but {world_size} devices share")
    few = f"{seen}, fewer than {ENOUGH_SAMPLES}, and one device"
    if world_size > 1:
        few = f"{seen}; {values} values per channel on all {world_size} are too few"
    if channels is None:
        return Choice("group_norm", few, momentum=steadier)
    groups = choose_groups(channels, positions)
    if groups is None:
        alone = f"{few}; but group norm has nothing to average over: one channel at one position{single}"
        return Choice("batch_norm", alone, momentum=steadier)
    return Choice("group_norm", f"{few}; {_described(groups, channels, positions)}", groups, steadier)


def check_count(name: str, number: Any) -> None:
    """Raise InputError for a number of things that is none; None is not known."""
    if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
        raise InputError(f"{name}={number!r} must be at least 1, and a whole number")


def _default_groups(channels: int) -> int:
    """32, as Wu & He (2018) have it, or the largest power of two below that divides the channels."""
    return math.gcd(_MOST_GROUPS, channels)


def choose_groups(channels: int, positions: int | None = None) -> int | None:
    """How many groups group norm should have: 32 or the largest power of two below that divides the channels, or fewer.

    Wu & He (2018) take 32. A group should hold 16 values, which matters after global pooling, and two channels, for
    with one it would be instance norm. None where all channels together hold but one value, which has no variance.
    """
    groups = _default_groups(channels)
    values = _ENOUGH_VALUES if positions is None else positions
    while groups > 1 and (groups == channels or channels // groups * values < _ENOUGH_VALUES):
        groups //= 2
    return groups if channels // groups * values > 1 else None


def _described(groups: int, channels: int, positions: int | None) -> str:
    each = channels // groups
    words = f"{groups} group{'s' if groups != 1 else ''} of {each} channel{'s' if each != 1 else ''}"
    if groups < _default_groups(channels):
        few = positions is not None and channels // (2 * groups) * positions < _ENOUGH_VALUES
        return f"{words}; more would hold {f'fewer than {_ENOUGH_VALUES} values' if few else 'one channel'} each"
    return words if groups == _MOST_GROUPS else f"{words}, as {_MOST_GROUPS} does not divide {channels}"


def steadier_momentum(momentum: float, samples: int) -> float:
    """The momentum with which moving statistics of few samples a step are as steady as those of 16 are with this one.

    Batch means of n independent samples of variance σ² have the variance σ²/n, and their moving average
    σ²/n · (1 - m)/(1 + m), with m the share of the OLD value that is kept. That is the same for n samples as for 16 if

        (1 - m')/(1 + m') = n/16 · (1 - m)/(1 + m)

    The price is inertia: the average goes back over about 1/(1 - m') steps. How the batch itself is normalized does
    not change: this mends ``eval()``, not the noise of training.

    Args:
        momentum: m.
        samples: n, of all devices that share statistics.

    Returns:
        m', to four digits; ``momentum`` itself for 16 samples or more.

    Raises:
        InputError: a momentum outside 0 to 1, or less than one sample.
    """
    if not 0 <= momentum <= 1 or samples < 1:
        raise InputError(f"momentum={momentum}, samples={samples}: give a momentum of 0 to 1, and at least one sample")
    if samples >= ENOUGH_SAMPLES:
        return momentum
    ratio = samples / ENOUGH_SAMPLES * (1 - momentum) / (1 + momentum)
    return round((1 - ratio) / (1 + ratio), 4)


@dataclass(frozen=True)
class LayerAdvice:
    """What is advised for one norm layer.

    Attributes:
        path: where it is in the model.
        layer: the name of its class.
        channels: how many it has; of layer norm, how many features.
        batch: the smallest that it got; None if the inputs did not reach it.
        use: the kind of norm that it should be; None to leave it as it is.
        reason: why.
        groups: of group norm.
        momentum: the share of the OLD statistics that batch norm in this place should keep, see
            :func:`steadier_momentum`; None if the present one will do, or there is none.
    """

    path: str
    layer: str
    channels: int
    batch: Batch | None
    use: Kind | None
    reason: str
    groups: int | None = None
    momentum: float | None = None


@dataclass(frozen=True)
class AdviceReport:
    """Which norm each layer of a model should have. Prints as a table; :meth:`policy` acts on it.

    Attributes:
        layers: every norm layer, in the order of ``model.named_sublayers()``.
        batch_size: samples of the model's own inputs, on one device.
        world_size: how many devices share statistics.
    """

    layers: list[LayerAdvice]
    batch_size: int
    world_size: int

    @property
    def unreached(self) -> list[str]:
        """Paths of the layers that the inputs did not reach, for which nothing is advised."""
        return [one.path for one in self.layers if one.batch is None]

    def policy(self, *, unshared: Literal["group_norm", "momentum"] = "group_norm") -> Policy:
        """The advice as rules for :func:`flatwater.paddle.apply_policy`; ``model_dump()`` of it can be kept as YAML.

        Args:
            unshared: what to do about small batches that no devices share: take group norm, as advised, or stay with
                batch norm and the momentum that averages over more steps, as suits weights trained with batch norm.

        Raises:
            InputError: ``unshared`` is neither.
            ConfigError: every layer stays as it is, so there is nothing to say.
            BackendError: pydantic or PyYAML, which policies need, is not installed.
        """
        if unshared not in ("group_norm", "momentum"):
            raise InputError(f"unshared={unshared!r} must be 'group_norm' or 'momentum'")
        try:
            from flatwater.policy import Policy
        except ImportError as error:
            raise BackendError(
                f"{error.name} is not installed, which policies need; pip install pydantic pyyaml"
            ) from error
        rules: dict[tuple[Any, ...], list[str]] = {}
        for one in self.layers:
            if one.use is not None:
                rules.setdefault(_setting(one, unshared), []).append(glob.escape(one.path))
        if not rules:
            raise ConfigError("the advice is to leave every norm layer as it is; there is nothing for a policy to do")
        return Policy.of([{"match": paths, **dict(setting)} for setting, paths in rules.items()], "the advice")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``batch_size``, ``world_size``, and ``layers`` with the fields of :class:`LayerAdvice`."""
        layers = [asdict(one) | {"batch": one.batch and one.batch._asdict()} for one in self.layers]
        return {"batch_size": self.batch_size, "world_size": self.world_size, "layers": layers}

    def __rich__(self) -> Table:
        counts = Counter(one.use for one in self.layers if one.use is not None)
        words = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing to change"
        caption = ""
        if any(one.momentum is not None for one in self.layers):
            caption = (
                "momentum: the share of the OLD statistics kept, where the layer is to stay batch norm all the same; "
                "higher averages over more steps (in PyTorch, which counts the new share, that is lower)"
            )
        table = Table(
            title=f"{len(self.layers)} norm layers, batch {self.batch_size} on each of {self.world_size}: {words}",
            caption=caption or None,
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("is")
        for heading in ("samples", "values"):
            table.add_column(heading, justify="right")
        table.add_column("advice")
        table.add_column("momentum", justify="right")
        table.add_column("why", overflow="fold", ratio=1)
        for one in self.layers:
            numbers = ("–", "–") if one.batch is None else (str(one.batch.samples), str(one.batch.values or "–"))
            momentum = "" if one.momentum is None else f"{one.momentum:g}"
            table.add_row(escape(one.path), one.layer, *numbers, one.use or "stays", momentum, escape(one.reason))
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def _setting(one: LayerAdvice, unshared: str) -> tuple[tuple[str, Any], ...]:
    """What a rule sets for this layer, in a form that can be compared."""
    if one.use == "group_norm" and unshared == "group_norm":
        return (("norm", "group_norm"), *((("groups", one.groups),) if one.groups else ()))
    if one.use == "sync_batch_norm":
        return (("norm", "sync_batch_norm"),)
    return (("norm", "batch_norm"), *((("momentum", one.momentum),) if one.momentum is not None else ()))

"""Cases of synchronised batch norm: the global batch of each, and how it is dealt out to the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import paddle

from flatwater import reference
from flatwater.spec import canonical_activation

STEPS = 2  # the second with a running mean, about which the sums are taken
CHANNELS = 5


@dataclass(frozen=True)
class Case:
    """One layer, and the batches that it sees."""

    data_format: str = "NCHW"
    act: str | None = None
    residual: bool = False
    mean: float = 0.0  # in deviations
    shares: tuple[int, ...] = (3, 1, 2, 4)  # samples of each rank
    dtype: str = "float32"

    def slices(self, world: int) -> list[slice]:
        """Which samples of the global batch each rank has."""
        ends = np.cumsum((0, *self.shares[:world]))
        return [slice(start, end) for start, end in pairwise(ends)]

    def batch(self, world: int, step: int) -> dict[str, np.ndarray]:
        """x, dy and the residual of the whole world; float32, the least exact of them in ``dtype``."""
        random = np.random.default_rng(step)
        count, spatial = sum(self.shares[:world]), (4, 6)
        shape = (count, CHANNELS, *spatial) if self.data_format == "NCHW" else (count, *spatial, CHANNELS)
        x, dy, residual = (random.standard_normal(shape).astype("float32") for _ in range(3))
        return {"x": x + np.float32(self.mean), "dy": dy, **({"residual": residual} if self.residual else {})}

    def parameters(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(99)
        return {name: random.uniform(0.5, 2.0, CHANNELS).astype("float32") for name in ("weight", "bias")}

    def expected(self, world: int) -> list[dict[str, np.ndarray]]:
        """What one process computes on the whole batch, by the float64 reference."""
        moving = np.zeros(CHANNELS), np.ones(CHANNELS)
        steps = []
        for step in range(STEPS):
            batch = {name: in_dtype(array, self.dtype) for name, array in self.batch(world, step).items()}
            x, dy = batch["x"], batch["dy"]
            options: dict[str, Any] = {
                **self.parameters(),
                "residual": batch.get("residual"),
                "activation": canonical_activation(self.act),
                "axis": 1 if self.data_format == "NCHW" else -1,
            }
            forward = reference.batch_norm(x, **options)
            gradients = reference.batch_norm_gradients(dy, x, **options)
            moving = reference.update_running(*moving, forward.statistics)
            steps.append(
                {
                    "y": forward.y,
                    "dx": gradients.x,
                    **({"dresidual": gradients.residual} if self.residual else {}),
                    "dweight": gradients.weight,
                    "dbias": gradients.bias,
                    "mean": moving[0],
                    "variance": moving[1],
                }
            )
        return steps


def in_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values that ``dtype`` makes of them, as float32."""
    return paddle.to_tensor(array).astype(dtype).astype("float32").numpy()


CASES: dict[str, Case] = {
    "plain": Case(),
    "channels last": Case(data_format="NHWC"),
    "fused": Case(act="relu", residual=True),
    "fused, channels last": Case(data_format="NHWC", act="swish", residual=True),
    "far mean": Case(mean=1e4),
    "far mean, channels last": Case(mean=1e4, data_format="NHWC", act="leaky_relu", residual=True),
    "an empty rank": Case(shares=(3, 0, 2, 4), act="relu", residual=True),
    "an empty first rank": Case(shares=(0, 3, 2, 1)),
    "bfloat16": Case(dtype="bfloat16", act="hardswish", residual=True),
}

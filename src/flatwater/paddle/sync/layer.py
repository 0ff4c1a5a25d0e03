"""``SyncBatchNorm``: batch norm by the statistics of the global batch, over any process group."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle.jit.sot.psdb import fallback

from flatwater.errors import InputError, SingleValueError
from flatwater.paddle.backend import is_replay
from flatwater.paddle.kinds import normalizes_by_batch
from flatwater.paddle.layers import _BatchNorm
from flatwater.paddle.running import to_numpy
from flatwater.paddle.sync.call import Shared, SyncNormCall, normalize_shared
from flatwater.paddle.sync.collectives import communicator_of
from flatwater.paddle.sync.groups import Sharing, world_ranks
from flatwater.paddle.sync.operators import normalize_by_operators, update_by_operators
from flatwater.spec import SingleValue

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm, paddle.nn.SyncBatchNorm):
    """Batch norm by the statistics of all ranks' batches; subclass of ``paddle.nn.SyncBatchNorm``.

        y = act(γ·(x - mean)·(var + ε)^(-1/2) + β + residual)

    In ``train()`` mean and var are over the batches of every rank of the process group together, whatever share of
    the values each of them has (none, even), and so are the terms of dx: n ranks compute what one process computes
    on the concatenated batch, and their moving statistics stay equal, as long as they were. One all-reduce of
    2·C + 5 float64 values (2·C + 4 in the kernels' backward pass) runs in each direction, for any number of ranks; on
    the CPU over TCP connections of its own, by recursive doubling (:mod:`flatwater.paddle.sync.doubling`).

    In ``eval()``, frozen (``use_global_stats=True``), in a world of one, and where
    ``paddle.distributed.init_parallel_env`` was never called, this is plain batch norm: it needs no group, waits
    for nobody, and is exported as one.

    Gradients: with the losses L_1 … L_n of n ranks, dx is that of Σ L_r, because x reaches the losses of other
    ranks through the statistics. dγ and dβ are this rank's own Σdz·x̂ and Σdz, whose sum over the ranks is the
    gradient of Σ L_r. ``paddle.DataParallel`` averages all gradients, so that every parameter of the model, γ and
    β as well, gets the gradient of the mean loss 1/n Σ L_r: what one process gets if its loss is that mean. (With
    batches of unequal size, a loss that is a mean over samples has to be weighted by the rank's share of them.)

    Faults: every rank has to run the same layers in the same order, in both directions. A rank that died, that
    stays away for longer than ``timeout``, or that comes with another layer, channel count, setting (epsilon, momentum,
    format, activation) or other moving statistics, ends the others' calls with a DistributedError that says what each
    rank was at, within ``timeout``, and within seconds where a connection is closed. Afterwards nothing can be shared
    with these ranks, by no layer and no ``average_statistics``: start all of them again. From a backward pass, Paddle
    raises an OSError with that text in it. Layers are told apart by their names, ``layer.full_name()``: build them in
    the same order on every rank.

    Args:
        num_features: channels.
        momentum, epsilon, weight_attr, bias_attr, data_format, name: as in ``paddle.nn.SyncBatchNorm``.
        act: an activation fused behind the norm, see :mod:`flatwater.paddle.layers`.
        use_global_stats: True freezes the statistics.
        single_value: what training does with one value per channel on all ranks together, of which no variance exists:
            ``"error"``, or ``"passthrough"``, as in :mod:`flatwater.paddle.layers`.
        process_group: with whom to share statistics: ranks as numbers, or a group from
            ``paddle.distributed.new_group`` (which on devices other than the CPU it has to be); None for all. Each
            rank names the ranks of its own group.
        timeout: seconds to wait for the other ranks.

    Raises:
        InputError: a timeout that is not positive, or a ``process_group`` that is no set of ranks of this world.
    """

    _ranks = (2, 3, 4, 5)
    _shared_ranks: tuple[int, ...] | None = None
    _group_id: int | None = None
    _timeout: float = 60.0

    def __init__(
        self,
        num_features: int,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        weight_attr: Any = None,
        bias_attr: Any = None,
        data_format: str = "NCHW",
        name: str | None = None,
        *,
        act: str | None = None,
        use_global_stats: bool | None = None,
        single_value: SingleValue = "error",
        process_group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(num_features, momentum, epsilon, weight_attr, bias_attr, data_format, name)
        self._use_global_stats = use_global_stats
        self._extend(act, single_value)
        self._share(Sharing.of(process_group, timeout))

    def _share(self, sharing: Sharing) -> None:
        """Set the group. Its ranks and number are kept, for the group itself can be neither copied nor pickled."""
        self._shared_ranks, self._group_id, self._timeout = sharing

    def extra_repr(self) -> str:
        """The settings; also of a layer converted from ``paddle.nn.BatchNorm``, which lacks half of the attributes."""
        parts = [f"num_features={self._channels()}", f"momentum={self._momentum}", f"epsilon={self._epsilon}"]
        parts += [f"data_format={self._format()}"] if self._channels_last() else []
        parts += [f"act={self._act}"] if self._act else []
        parts += [f"use_global_stats={self._use_global_stats}"] if self._use_global_stats is not None else []
        parts += [f"single_value={self._single_value}"] if self._single_value != "error" else []
        parts += [f"ranks={list(self._shared_ranks)}"] if self._shared_ranks else []
        parts += [f"timeout={self._timeout:g}"]
        return ", ".join(parts)

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None) -> paddle.Tensor:
        """``act(γ·x̂ + β + residual)``; in training the moving statistics follow the global batch.

        Args:
            x: float tensor, channels where the layer's data format says, of any strides; its batch may be empty.
            residual: of x's shape and dtype, added before the activation.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            InputError: wrong rank, channel count or dtype, a residual that does not fit, or a graph being captured
                in ``train()`` by one of several ranks.
            SingleValueError: training with one value per channel on all ranks together, under
                ``single_value="error"``.
            DistributedError: see the class.
        """
        if not normalizes_by_batch(self, training=self.training):
            return super().forward(x, residual)
        ranks = world_ranks(self._shared_ranks)
        if len(ranks) == 1:
            return super().forward(x, residual)
        fallback(recursive=True)  # to_static(full_graph=False) runs what follows as it is, instead of looking into it
        return self._synchronized(x, residual, ranks)

    @paddle.jit.not_to_static
    def _synchronized(self, x: paddle.Tensor, residual: paddle.Tensor | None, ranks: tuple[int, ...]) -> paddle.Tensor:
        if not paddle.in_dynamic_mode():
            raise InputError(
                f"{self._label()} is being captured in train(), where a graph cannot wait for other ranks; "
                "capture it in eval(), or train with to_static(full_graph=False)"
            )
        held = self._held()
        self._check(x, residual, held)
        spec = self._spec()
        communicator = communicator_of(ranks, self._group_id, x.place)
        call = SyncNormCall(
            Shared(communicator, self._label(), self._timeout, self._settings()),
            to_numpy(self._mean).astype(np.float64),
            to_numpy(self._variance).astype(np.float64),
            channels_last=self._channels_last(),
            activation=spec.activation,
            epsilon=spec.epsilon,
        )
        kernels = self._backend(x, held) == "flatwater"
        normalize = normalize_shared if kernels else normalize_by_operators
        try:
            y = normalize(x, self.weight, self.bias, residual, call)
        except SingleValueError:  # on every rank alike, for the count is that of all
            if self._single_value == "error":
                raise
            return self._finish(x, residual)
        if is_replay():
            return y
        if kernels:
            call.update(self._mean, self._variance, spec)
        else:
            update_by_operators(self._mean, self._variance, call, spec.momentum)
        return y

    def _settings(self) -> str:
        last = "last" if self._channels_last() else "first"
        act = f", {self._act}" if self._act else ""
        return f"epsilon {self._epsilon:g}, momentum {self._momentum:g}, channels {last}{act}"

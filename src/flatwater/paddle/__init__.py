"""Flatwater for PaddlePaddle: ``import flatwater.paddle as fw``.

Train    ``BatchNorm``, ``BatchNorm1D/2D/3D``, ``GroupNorm``, ``InstanceNorm1D/2D/3D``, ``ConvBNLayer``, or
         ``convert(model)`` for a model that exists; ``flatwater.paddle.nn`` stands in for ``paddle.nn``
Share    ``SyncBatchNorm``, ``convert_sync_batchnorm`` and ``revert_sync_batchnorm`` for a model that exists, and
         ``average_statistics`` (``AverageStatistics``, a callback) for one that was trained without
Choose   ``advise`` which norm; where batches are small, ``MomentumSchedule`` and ``accumulate_statistics`` (for
         ``paddle.Model``: ``AccumulateStatistics``)
See      ``NormMonitor``
Control  ``apply_policy`` for everything at once, ``float32_layers``; ``freeze``, ``frozen_report`` and ``thaw``;
         ``recalibrate``
Ship     ``fold``, ``export``, ``verify``
"""

from flatwater.advice import AdviceReport
from flatwater.paddle import nn
from flatwater.paddle.choosing.accumulate import (
    AccumulatedStatistics,
    AccumulateStatistics,
    accumulate_statistics,
)
from flatwater.paddle.choosing.advise import advise
from flatwater.paddle.choosing.schedule import MomentumSchedule
from flatwater.paddle.conv import ConvBNLayer
from flatwater.paddle.layers import (
    BatchNorm,
    BatchNorm1D,
    BatchNorm2D,
    BatchNorm3D,
    GroupNorm,
    InstanceNorm1D,
    InstanceNorm2D,
    InstanceNorm3D,
    backend_of,
)
from flatwater.paddle.monitor import NormMonitor
from flatwater.paddle.policy.applied import AppliedPolicy, float32_layers
from flatwater.paddle.policy.apply import apply_policy
from flatwater.paddle.shipping.export import ExportReport, export
from flatwater.paddle.shipping.verify import verify
from flatwater.paddle.surgery.convert import convert, revert
from flatwater.paddle.surgery.fold import fold
from flatwater.paddle.surgery.folded import FoldedNorm
from flatwater.paddle.surgery.freeze import freeze, frozen_report, thaw
from flatwater.paddle.surgery.recalibrate import recalibrate
from flatwater.paddle.sync.average import AverageStatistics, average_statistics
from flatwater.paddle.sync.convert import convert_sync_batchnorm, revert_sync_batchnorm
from flatwater.paddle.sync.layer import SyncBatchNorm
from flatwater.surgery import ChangeReport, FoldReport
from flatwater.surgery.converted import ConvertReport
from flatwater.surgery.frozen import FreezeReport, FrozenReport
from flatwater.surgery.recalibration import RecalibrationReport
from flatwater.verify import VerifyReport

__all__ = [
    "AccumulateStatistics",
    "AccumulatedStatistics",
    "AdviceReport",
    "AppliedPolicy",
    "AverageStatistics",
    "BatchNorm",
    "BatchNorm1D",
    "BatchNorm2D",
    "BatchNorm3D",
    "ChangeReport",
    "ConvBNLayer",
    "ConvertReport",
    "ExportReport",
    "FoldReport",
    "FoldedNorm",
    "FreezeReport",
    "FrozenReport",
    "GroupNorm",
    "InstanceNorm1D",
    "InstanceNorm2D",
    "InstanceNorm3D",
    "MomentumSchedule",
    "NormMonitor",
    "RecalibrationReport",
    "SyncBatchNorm",
    "VerifyReport",
    "accumulate_statistics",
    "advise",
    "apply_policy",
    "average_statistics",
    "backend_of",
    "convert",
    "convert_sync_batchnorm",
    "export",
    "float32_layers",
    "fold",
    "freeze",
    "frozen_report",
    "nn",
    "recalibrate",
    "revert",
    "revert_sync_batchnorm",
    "thaw",
    "verify",
]

"""The recogniser: plain convolutions down to one row of frames, and a class for each frame.

======================  ==========================  =================
block (3 × 3 if none)   stride, height × width      result, W = width
======================  ==========================  =================
image                                               1 × 32 × W
conv 1                  2 × 2                       16 × W/2
conv 2                  2 × 2                       8 × W/4
conv 3                  1 × 1                       8 × W/4
conv 4                  2 × 1                       4 × W/4
conv 5, 4 × 3           height is used up           1 × W/4
linear                                              W/4 × classes
======================  ==========================  =================

Depthwise convolutions would need fewer multiplications, but Paddle's CPU build runs them forty times slower each.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import nn

import flatwater.paddle as fw
from flatwater.paddle.policy.applied import AppliedPolicy
from flatwater.policy import Policy, Rule
from flatwater.recipes.ocr.config import Config, ModelConfig, NormConfig
from flatwater.recipes.ocr.preprocess import HEIGHT

__all__ = ["Recognizer", "build"]


class Recognizer(nn.Layer):
    """Images of lines to logits.

    Takes float32 [N, 1, 32, W] as :mod:`flatwater.recipes.ocr.preprocess` makes it, for any N and W, and gives float32
    [N, ceil(W / 4), classes], before softmax, with CTC's blank as class 0.
    """

    def __init__(self, model: ModelConfig, norm: NormConfig, classes: int) -> None:
        super().__init__()
        first, second, third, fourth = model.channels
        self.backbone = nn.Sequential(
            _block(norm, 1, first, stride=2),
            _block(norm, first, second, stride=2),
            _block(norm, second, third),
            _block(norm, third, fourth, stride=(2, 1)),
        )
        self.neck = _block(norm, fourth, model.features, kernel_size=(4, 3), padding=(0, 1))
        self.head = nn.Linear(model.features, classes)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        """Logits [N, ceil(W / 4), classes]."""
        features = self.neck(self.backbone(images))
        return self.head(features.squeeze(2).transpose([0, 2, 1]))


def build(config: Config, classes: int, ranks: int = 1) -> tuple[Recognizer, AppliedPolicy | None]:
    """The recogniser with the norms that ``norm`` makes of it, and what is still to come of its rules; None without.

    Args:
        config: what to build.
        classes: CTC's blank among them.
        ranks: that share a batch.

    Raises:
        ConfigError: a rule matches nothing, or asks for what the layers have not.
    """
    model = Recognizer(config.model, config.norm, classes)
    if config.norm.kind == "sync_batch_norm":
        fw.convert_sync_batchnorm(model)
    rules = config.norm.rules
    if config.norm.kind == "auto":
        rules = (Rule.model_validate({"norm": "auto"}), *rules)
    if not rules:
        _wait_for(model, config.train.timeout)
        return model, None
    # A rank's share of a batch of the longest lines, which is the smallest: for rules that look at it.
    lines = config.smallest_batch // ranks
    images = paddle.zeros([lines, 1, HEIGHT, max(config.data.sizes) * config.data.max_length])
    applied = fw.apply_policy(model, Policy(rules=rules), inputs=images, world_size=ranks)
    _wait_for(model, config.train.timeout)
    return model, applied


def _wait_for(model: nn.Layer, timeout: float) -> None:
    """Set how long the norms that share statistics wait, whichever setting made them share."""
    for layer in model.sublayers():
        if isinstance(layer, fw.SyncBatchNorm):
            layer._timeout = timeout


def _block(
    norm: NormConfig,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
) -> nn.Layer:
    """Convolution, norm, ReLU: a ConvBNLayer where the norm is batch norm, or becomes what it is to be later."""
    # He's initialization for what ReLU leaves; Paddle's default deviates with the size of the *output*.
    weight = paddle.ParamAttr(initializer=nn.initializer.KaimingNormal())
    if norm.kind in ("batch_norm", "sync_batch_norm", "auto"):
        return fw.ConvBNLayer(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            momentum=norm.momentum,
            epsilon=norm.epsilon,
            weight_attr=weight,
        )
    conv = nn.Conv2D(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        weight_attr=weight,
        bias_attr=None if norm.kind == "none" else False,
    )
    if norm.kind == "none":
        return nn.Sequential(conv, nn.ReLU())
    if norm.kind == "group_norm":
        return nn.Sequential(conv, fw.GroupNorm(norm.groups, out_channels, epsilon=norm.epsilon, act="relu"))
    return nn.Sequential(conv, fw.InstanceNorm2D(out_channels, epsilon=norm.epsilon, act="relu"))

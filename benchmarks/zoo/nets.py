"""The nets of the zoo: a small member or two of every family, by library and kind, and how each is built.

Random weights, nothing is downloaded; norms have statistics that do something.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depthfuse import _torchvision
from depthfuse.benching.bench import randomised
from depthfuse.merging.model_inputs import input_size
from depthfuse.spec import ModelSource

_TIMM = {
    "CNN": """
        resnet18 resnet34 resnet50 resnet18d resnet26t resnet32ts resnext50_32x4d seresnet18 ecaresnet26t resnetrs50
        resnetv2_50 resnetv2_18 resnetv2_50d_gn wide_resnet50_2 res2net50_14w_8s resnest14d skresnet18 legacy_seresnet18
        resnetblur18 gcresnext26ts resnet50_clip bat_resnext26ts lambda_resnet26t
        mobilenetv2_100 mobilenetv2_140 mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv4_conv_small mnasnet_100
        fbnetc_100 fbnetv3_b spnasnet_100 hardcorenas_a lcnet_100 lcnetv2_small tinynet_e mixnet_s
        efficientnet_b0 efficientnet_lite0 tf_efficientnet_lite0 tf_efficientnet_b0 efficientnet_es efficientnetv2_rw_t
        tf_efficientnetv2_b0 efficientnet_b0_gn efficientnet_cc_b0_4e efficientnet_blur_b0
        convnext_tiny convnext_atto convnext_atto_rms convnextv2_atto mambaout_femto inception_next_atto rdnet_tiny
        regnetx_002 regnety_002 regnetz_005 regnetz_b16 repvgg_a0 repvit_m1 mobileone_s0 gernet_s ghostnet_050
        ghostnetv2_100 ghostnetv3_050 repghostnet_050 densenet121 densenetblur121d vgg11 vgg11_bn vgg16_bn
        inception_v3 inception_v4 xception41 legacy_xception dla34 dla60_res2net dpn68 hrnet_w18_small selecsls42b
        vovnet39a ese_vovnet19b_dw cspresnet50 darknet53 cs3darknet_s cspnext_tiny hgnet_tiny hgnetv2_b0 tresnet_m
        nf_resnet26 nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0 rexnet_100 starnet_s1 fasternet_t0 convmixer_1024_20_ks9_p14
        focalnet_tiny_srf poolformer_s12 poolformerv2_s12 convformer_s18
        test_resnet test_convnext test_convnext2 test_efficientnet test_byobnet test_nfnet test_mambaout
    """,
    "ViT": """
        deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 vit_tiny_patch16_224
        vit_small_patch32_224 vit_small_patch14_dinov2 vit_small_patch16_dinov3 vit_wee_patch16_reg1_gap_256
        vit_relpos_small_patch16_224 eva02_tiny_patch14_224 beit_base_patch16_224 cait_xxs24_224
        xcit_nano_12_p16_224 crossvit_tiny_240 convit_tiny tnt_s_patch16_224 volo_d1_224 hiera_tiny_224 flexivit_small
        naflexvit_base_patch16_gap samvit_base_patch16_224 swin_tiny_patch4_window7_224 swin_s3_tiny_224
        swinv2_tiny_window8_256 swinv2_cr_tiny_224
        twins_pcpvt_small twins_svt_small pvt_v2_b0 mvitv2_tiny jx_nest_tiny davit_tiny gcvit_xxtiny
        test_vit test_vit2 test_vit3 test_vit4
    """,
    "hybrid": """
        levit_128s levit_conv_128s mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientformer_l1
        efficientformerv2_s0 efficientvit_b0 efficientvit_m0 fastvit_t8 coatnet_pico_rw_224 maxvit_pico_rw_256
        coat_lite_tiny tiny_vit_5m_224 visformer_tiny nextvit_small caformer_s18 swiftformer_xs shvit_s1 iformer_t
        lowformer_b0 mobilenetv4_hybrid_medium vit_tiny_r_s16_p8_224 vitamin_small_224 pit_ti_224 halonet26t
        botnet26t_256 sequencer2d_s mixer_s32_224 resmlp_12_224 gmixer_12_224 gmlp_ti16_224
    """,
}
_TORCHVISION = {
    "CNN": """
        alexnet vgg11 vgg16_bn resnet18 resnet50 resnext50_32x4d densenet121 squeezenet1_1 googlenet inception_v3
        mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 efficientnet_b0 efficientnet_v2_s regnet_x_400mf
        regnet_y_400mf convnext_tiny
    """,
    "ViT": "vit_b_32 swin_t swin_v2_t",
    "hybrid": "maxvit_t",
}
_HUGGING_FACE = {
    "CNN": "resnet mobilenet_v2 mobilenet_v2_fixed_padding convnext",
    "ViT": "vit deit swin segformer dinov2 beit poolformer",
}


@dataclass(frozen=True)
class Net:
    """One net: where it is from, what kind it is, and its name there."""

    library: str
    kind: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model in evaluation mode, and one image for it, the same each time."""
        torch.manual_seed(0)
        side = (3, 224, 224)
        if self.library == "timm":
            model: nn.Module = ModelSource.make(self.name).build()
            side = input_size(model)
        elif self.library == "torchvision":
            _torchvision.ensure()
            models = importlib.import_module("torchvision.models")
            init = {"init_weights": False} if self.name in ("googlenet", "inception_v3") else {}
            model = models.get_model(self.name, weights=None, **init)
        else:
            model = _hugging_face(self.name)
        image = torch.randn(1, *side, generator=torch.Generator().manual_seed(0))
        return randomised(model.eval()), image


def _hugging_face(name: str) -> nn.Module:
    """A classifier of transformers', of the size of the smallest published one where that is small."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise SystemExit("these nets need transformers: pip install transformers") from error
    small = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    classes = {
        "vit": ("ViT", small),
        "deit": ("DeiT", small),
        "dinov2": ("Dinov2", {"hidden_size": 192, "num_attention_heads": 3}),
        "swin": ("Swin", {}),
        "convnext": ("ConvNext", {}),
        "resnet": (
            "ResNet",
            {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
        ),
        "mobilenet_v2": ("MobileNetV2", {}),
        "mobilenet_v2_fixed_padding": ("MobileNetV2", {"tf_padding": False}),
        "beit": ("Beit", small),
        "poolformer": ("PoolFormer", {}),
        "segformer": ("Segformer", {}),
    }
    cls, arguments = classes[name]
    config = getattr(transformers, f"{cls}Config")(**arguments)
    return getattr(transformers, f"{cls}ForImageClassification")(config)


ZOO = tuple(
    Net(library, kind, name)
    for library, kinds in (("timm", _TIMM), ("torchvision", _TORCHVISION), ("transformers", _HUGGING_FACE))
    for kind, names in kinds.items()
    for name in names.split()
)

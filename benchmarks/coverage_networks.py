"""Networks to try bitwright on: timm's, torchvision's and those of transformers, with seeded weights.

Nothing is downloaded. Blocks that repeat are cut to two, and images have 128 pixels where the network allows it, so
that hundreds of networks can be tried in an hour. What an initialisation leaves constant (zeros in residual branches,
layer scales of 1e-6, batch norms that have seen nothing) is filled with seeded values, so that every operator matters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.given.compat import import_timm, import_torchvision

SIZES = (128, 112)
"""Pixels of an image's side that are tried before the network's own."""
EMBEDDING = re.compile("token|pos|cls|dist")
"""In the names of what is added to features or put beside them; trained, it is about as large as they are."""
REPEATS = 2
"""Blocks of equal shape that are kept."""
_SMALLEST = """
beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
convnext_zepto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 mobilenetv2_035 efficientvim_m1 efficientvit_b0 efficientvit_m0
vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto
maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs
mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d
resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224
vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224
ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
"""
TIMM = tuple(_SMALLEST.split())
"""The network with the fewest parameters of each of timm's families, in their order; made by :func:`smallest`."""
SETTINGS = {"deepseek_vit_412m": {"depth": REPEATS}}
"""Of networks of timm that are too large to be made whole before they are cut."""
NAMED = ("vgg11_bn",)
"""Networks of timm that are tried although they are not the smallest of their family."""
TORCHVISION: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "maxvit_t": {"pixels": 224},
    "mnasnet0_5": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "regnet_x_400mf": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_0": {},
    "swin_t": {},
    "swin_v2_t": {},
    "vgg11": {},
    "vgg11_bn": {},
    "vit_b_16": {"image_size": 128},
    "fcn_resnet50": {},
    "deeplabv3_mobilenet_v3_large": {},
    "deeplabv3_resnet50": {},
    "lraspp_mobilenet_v3_large": {},
}
"""Networks of torchvision with their settings; ``pixels`` is the side of their images where 128 do not fit."""


@dataclass(frozen=True)
class Subject:
    """A network that is ready to be tried, and images for it."""

    network: nn.Module
    images: Tensor
    """[N, 3, H, W], smooth and seeded."""
    parameters: int
    cut: int
    """How many repeated blocks were taken out."""


def names() -> list[str]:
    """All networks, as ``library:name``."""
    return [
        *(f"timm:{n}" for n in (*TIMM, *NAMED)),
        *(f"torchvision:{n}" for n in TORCHVISION),
        *(f"transformers:{n}" for n in TRANSFORMERS),
    ]


def build(name: str, count: int) -> Subject:
    """The network of that name with seeded weights, in evaluation mode, and ``count`` images."""
    library, _, short = name.partition(":")
    for create, size in _candidates(library, short):
        for repeats in (REPEATS, None):
            torch.manual_seed(0)
            try:
                network = create().eval()
                taken = 0 if repeats is None else cut(network, repeats)
                images = smooth_images(count, size)
                with torch.no_grad():
                    network(images[:2])
            except (RuntimeError, AssertionError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
                reason = error
                continue
            fill(network, images)
            network.train().eval()  # attention that has kept its biases forgets them
            return Subject(network, images, sum(p.numel() for p in network.parameters()), taken)
    raise RuntimeError(f"{name} cannot be run here: {reason}") from reason


def _candidates(library: str, name: str) -> Iterator[tuple[Callable[[], nn.Module], int]]:
    """Ways to make the network, with the size of its images, the cheapest first."""
    if library == "timm":
        timm = import_timm()
        own = timm.get_pretrained_cfg(name).input_size[-1]
        for size in (*(s for s in SIZES if s < own), own):
            settings = SETTINGS.get(name, {})
            yield partial(timm.create_model, name, pretrained=False, img_size=size, **settings), size
            yield partial(timm.create_model, name, pretrained=False, **settings), size
    elif library == "torchvision":
        models = import_torchvision().models
        settings = dict(TORCHVISION[name])
        size = settings.pop("pixels", SIZES[0])
        segments = hasattr(models.segmentation, name)
        if segments:
            settings["weights_backbone"] = None
        make = getattr(models.segmentation if segments else models, name)
        yield partial(make, weights=None, **settings), size
    else:
        import_torchvision()
        yield TRANSFORMERS[name], 64


def smooth_images(count: int, size: int) -> Tensor:
    """Seeded images [count, 3, size, size] of soft shapes of all sizes, the larger the stronger, of deviation 1."""
    generator = torch.Generator().manual_seed(1)
    images = torch.zeros(count, 3, size, size)
    for octave in range(6):
        shapes = torch.randn(count, 3, 4 * 2**octave, 4 * 2**octave, generator=generator)
        images += 0.7**octave * F.interpolate(shapes, (size, size), mode="bicubic", align_corners=False)
    return images / images.std()


# -------------------------------------------------------------------------------------------------- smaller, and alive


def cut(network: nn.Module, repeats: int) -> int:
    """Keeps the first ``repeats`` of a container's blocks that are equal; returns how many went."""
    taken = 0
    for container in list(network.modules()):
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        seen: Counter[str] = Counter()
        kept = {}
        for key, block in container._modules.items():
            signature = _signature(block)
            seen[signature] += 1
            if not signature or seen[signature] <= repeats:
                kept[key] = block
        gone = len(container._modules) - len(kept)
        if gone:
            numbered = all(key.isdigit() for key in kept)
            container._modules = {str(i) if numbered else key: b for i, (key, b) in enumerate(kept.items())}
            taken += gone
    return taken


def _signature(block: nn.Module | None) -> str:
    """Equal for blocks that differ in their values alone; empty for what is no block with parameters."""
    if block is None or not list(block.children()):
        return ""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()]
    return f"{re.sub(r'(drop_prob|p)=[0-9.e-]+', '', repr(block))} {shapes}" if shapes else ""


def fill(network: nn.Module, images: Tensor) -> None:
    """Seeded values for what an initialisation leaves constant, and statistics of the images for batch norms.

    Constants near 1 (scales of norms) are spread over 0.7 to 1.3 of their value, biases and embeddings of zeros become
    normal with a deviation of 0.1, other small constants (layer scales, gains of residual branches) lie in 0.2 to 0.5.
    Weights too small to hand a signal on are scaled to a deviation of one over the root of their inputs, tokens and
    embeddings that would be lost beside the features to 0.5.
    The statistics of batch norms are those of the images, so that no signal dies or explodes, spread in the same way;
    their biases lie around 1, because a deep random network with biases around 0 makes any small difference
    larger from layer to layer (Yang et al. 2019, arXiv:1902.08129), the one of rounding an image as well.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.is_floating_point() and _constant(parameter):
                parameter.copy_(_in_place_of(name, parameter, generator))
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                _strengthen(module)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.copy_(0.7 + 0.6 * torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(1 + 0.3 * torch.randn(module.bias.shape, generator=generator))
        for name, parameter in network.named_parameters():
            deviation = float(parameter.std(correction=0)) if parameter.is_floating_point() else 0.0
            if EMBEDDING.search(_last(name)) and parameter.dim() > 1 and 0 < deviation < 0.1:
                parameter.mul_(0.5 / deviation)
        _measure_statistics(network, images)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                floor = 0.1 * module.running_var.median()  # a channel that is hardly ever above zero is no scale
                module.running_var.clamp_(min=floor)
                deviation = module.running_var.sqrt()
                module.running_mean += 0.1 * deviation * torch.randn(deviation.shape, generator=generator)
                module.running_var *= 0.7 + 0.6 * torch.rand(deviation.shape, generator=generator)


def _constant(parameter: Tensor) -> bool:
    return bool(parameter.numel()) and bool((parameter == parameter.flatten()[0]).all())


def _last(name: str) -> str:
    """The attribute that holds a parameter; the module, for a weight of it."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _in_place_of(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    value = float(parameter.flatten()[0])
    if abs(value) >= 0.1:
        return value * (0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
    axes = sum(size > 1 for size in parameter.shape)
    if axes > 1 or "bias" in name or "beta" in name or EMBEDDING.search(_last(name)):
        return 0.1 * torch.randn(parameter.shape, generator=generator)
    return 0.2 + 0.3 * torch.rand(parameter.shape, generator=generator)


def _strengthen(layer: nn.Module) -> None:
    """In place; a layer of deviation 0.02 with few inputs makes its signal smaller at each step."""
    weight = layer.weight
    fan_in = weight[0].numel()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        fan_in = weight.numel() // weight.shape[1]
    share = float(weight.std(correction=0)) * fan_in**0.5
    if 0 < share < 0.7:
        weight.mul_(1 / share)


def _measure_statistics(network: nn.Module, images: Tensor) -> None:
    """Lets batch norms see the images once; nothing else leaves evaluation mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


# ------------------------------------------------------------------------------------------------------------- timm


def smallest() -> dict[str, str]:
    """The network with the fewest parameters of each of timm's families, its test networks left out (minutes)."""
    timm = import_timm()
    return {
        family: min(
            (n for n in timm.list_models(module=family) if not n.startswith("test_")),
            key=lambda name: _parameters(timm, name),
        )
        for family in timm.list_modules()
    }


def _parameters(timm: Any, name: str) -> float:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    except (RuntimeError, NotImplementedError):  # reads values while it is built
        return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())


# ----------------------------------------------------------------------------------------------------- transformers


class Pixels(nn.Module):
    """A network of transformers as one of an image tensor that returns its first output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(pixel_values=images, return_dict=True)[0]


def _from_config(config: str, kind: str, **settings: Any) -> Pixels:
    import transformers

    settings = {"num_labels": 20} | settings
    return Pixels(getattr(transformers, kind)(getattr(transformers, config)(**settings)))


_TOKENS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_PATCHES = _TOKENS | {"image_size": 64, "patch_size": 8}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]}
_WINDOWS = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_PYRAMID = _STAGES | {"num_attention_heads": [1, 2, 3, 4]}


def _upernet() -> Pixels:
    import transformers

    backbone = transformers.ConvNextConfig(**_STAGES, out_features=["stage1", "stage2", "stage3", "stage4"])
    settings = {"hidden_size": 32, "use_auxiliary_head": False}
    return _from_config("UperNetConfig", "UperNetForSemanticSegmentation", backbone_config=backbone, **settings)


def _dpt() -> Pixels:
    settings = _PATCHES | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
    widths = {"neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16}
    return _from_config("DPTConfig", "DPTForDepthEstimation", **settings, **widths)


def _classifier(architecture: str, **settings: Any) -> Callable[[], Pixels]:
    return partial(_from_config, f"{architecture}Config", f"{architecture}ForImageClassification", **settings)


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "ViT": _classifier("ViT", **_PATCHES),
    "DeiT": _classifier("DeiT", **_PATCHES),
    "Beit": _classifier("Beit", **_PATCHES, use_relative_position_bias=True),
    "Swin": _classifier("Swin", **_WINDOWS),
    "Swinv2": _classifier("Swinv2", **_WINDOWS),
    "ConvNext": _classifier("ConvNext", **_STAGES),
    "ConvNextV2": _classifier("ConvNextV2", **_STAGES),
    "ResNet": _classifier("ResNet", embedding_size=16, **_STAGES),
    "RegNet": _classifier("RegNet", embedding_size=16, groups_width=16, **_STAGES),
    "Levit": _classifier("Levit", image_size=64, depths=[1, 1, 1], hidden_sizes=[32, 48, 64]),
    "MobileNetV1": _classifier("MobileNetV1", depth_multiplier=0.25),
    "MobileNetV2": _classifier("MobileNetV2", depth_multiplier=0.35),
    "MobileViT": _classifier("MobileViT", image_size=64, hidden_sizes=[48, 64, 80]),
    "MobileViTV2": _classifier("MobileViTV2", image_size=64, width_multiplier=0.5),
    "Segformer": partial(
        _from_config, "SegformerConfig", "SegformerForSemanticSegmentation", **_PYRAMID, decoder_hidden_size=32
    ),
    "PoolFormer": _classifier("PoolFormer", **_STAGES),
    "EfficientNet": _classifier(
        "EfficientNet", width_coefficient=0.5, depth_coefficient=1.0, hidden_dim=640, image_size=64
    ),
    "Cvt": _classifier("Cvt", embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3]),
    "Pvt": _classifier("Pvt", **_PYRAMID, image_size=64),
    "Dinov2": _classifier("Dinov2", **_TOKENS, image_size=64, patch_size=8),
    "SiglipVision": partial(_from_config, "SiglipVisionConfig", "SiglipVisionModel", **_PATCHES),
    "CLIPVision": partial(_from_config, "CLIPVisionConfig", "CLIPVisionModel", **_PATCHES),
    "Hiera": _classifier("Hiera", image_size=[64, 64], embed_dim=24, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8]),
    "UperNet": _upernet,
    "DPT": _dpt,
    "Data2VecVision": _classifier("Data2VecVision", **_PATCHES),
    "DINOv3ViT": partial(_from_config, "DINOv3ViTConfig", "DINOv3ViTModel", **_PATCHES, num_register_tokens=2),
    "FocalNet": _classifier("FocalNet", image_size=64, embed_dim=24, depths=[1, 1, 2, 1]),
    "SwiftFormer": _classifier("SwiftFormer", depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48]),
    "PvtV2": _classifier("PvtV2", **_PYRAMID),
    "Bit": _classifier("Bit", embedding_size=16, num_groups=8, **_STAGES),
}
"""Small networks of transformers, each from its class of configurations."""

"""Detectors with torchvision's parts: the body with its raw heads, which is quantized, and torchvision's own decoding.

This is the one place that knows how torchvision builds detectors. It goes by parts, not by names, so a detector that a
user built from the same classes is treated alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bitwright.errors import DataError

PARTS = ("transform", "backbone", "head", "anchor_generator", "postprocess_detections")
"""What a detector of one stage has: its boxes follow from the outputs of its heads by arithmetic and suppression."""
TWO_STAGES = ("transform", "backbone", "rpn", "roi_heads")
"""What one of two stages has: the second looks at regions that the first one proposes."""
DetectedBoxes: TypeAlias = list[dict[str, Tensor]]
"""For each image ``boxes`` (M, 4), ``scores`` and ``labels`` (M,)."""


def is_detector(module: object) -> bool:
    """Whether a module is a detector of one stage or of two."""
    return any(_has(module, parts) for parts in (PARTS, TWO_STAGES))


def has_two_stages(module: object) -> bool:
    """Whether a module is a detector whose second network reads regions that its first one proposes."""
    return _has(module, TWO_STAGES)


def _has(module: object, parts: tuple[str, ...]) -> bool:
    return isinstance(module, nn.Module) and all(hasattr(module, part) for part in parts)


class DetectorBody(nn.Module):
    """Backbone and heads, under the names that the detector has for them.

    Returns what the heads do, boxes and scores apart: a dict of tensors [B, A, ...] over all A anchors.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.get_submodule("backbone"), detector.get_submodule("head")

    def forward(self, images: Tensor) -> Any:
        """The raw outputs for normalised images [B, C, H, W]."""
        head: Any = self.head
        return head(list(named_levels(self.backbone(images)).values()))


def named_levels(features: Any) -> dict[str, Tensor]:
    """What a backbone gives, [N, C, h, w] by the name of its level, as torchvision calls the only one ``0``."""
    return {"0": features} if isinstance(features, Tensor) else dict(features)


class KnownPart(nn.Module):
    """Stands for a part of a detector, and gives what is known already."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known = known

    def forward(self, *_: Any) -> Any:
        """The same for whatever it is given."""
        return self.known


class _AsTheyAre(nn.Module):
    """In the place of a detector's own resizing: images have the size of the network's input already."""

    def forward(self, images: Any, targets: None = None) -> tuple[Any, None]:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(images, [tuple(images.shape[-2:])] * len(images)), targets

    def postprocess(self, found: DetectedBoxes, *_: Any) -> DetectedBoxes:
        return found


@dataclass
class TorchvisionDecode:
    """From raw outputs to boxes in pixels of the network's input, by the detector's own forward.

    Attributes:
        detector: whose anchors, box coder, thresholds and suppression are used; not changed.
        size: height and width of the network's input.
    """

    detector: nn.Module
    size: tuple[int, int]
    _shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, outputs: Mapping[str, Tensor]) -> DetectedBoxes:
        """Boxes, scores and labels of each image of a batch.

        Raises:
            DataError: the outputs are those of images of another size.
        """
        raw = {name: value.detach().cpu().float() for name, value in outputs.items()}
        count = len(next(iter(raw.values())))
        stand_in = copy.copy(self.detector)
        stand_in._modules = dict(self.detector._modules)
        levels = [torch.zeros(1).expand(count, *shape) for shape in self._levels()]
        stand_in.backbone = KnownPart({str(k): level for k, level in enumerate(levels)})
        stand_in.head, stand_in.transform = KnownPart(raw), _AsTheyAre()
        try:
            with torch.no_grad():
                return stand_in(torch.zeros(1).expand(count, 3, *self.size))  # type: ignore[no-any-return]
        except (RuntimeError, IndexError) as error:
            found = ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in raw.items())
            raise DataError(
                f"Expected raw outputs for images of {self.size[0]}x{self.size[1]} (height x width), found {found}. "
                "Give input_size= with the size of the network's input."
            ) from error

    def _levels(self) -> list[tuple[int, ...]]:
        """Shapes of one image's features on each level, found without computing any."""
        if not self._shapes:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                features = self.detector.get_submodule("backbone")(torch.empty(1, 3, *self.size))
            self._shapes += [tuple(level.shape[1:]) for level in named_levels(features).values()]
        return self._shapes


def input_settings(detector: nn.Module) -> dict[str, Any]:
    """How the detector's own transform prepares images, as settings of a preprocessing of one fixed size.

    Detectors that take any size get a square of their shorter side, in which the image keeps its proportions.
    """
    how: Any = detector.transform
    fixed = how.fixed_size
    width, height = fixed if fixed is not None else (how.min_size[-1], how.min_size[-1])
    return {
        "input_size": (3, height, width),
        "mean": tuple(how.image_mean),
        "std": tuple(how.image_std),
        "interpolation": "bilinear",
        "crop_mode": "border" if fixed is None else "squash",
    }


def classes_of(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], classes: int) -> int | None:
    """Number of classes, background included, of weights that differ from a detector in this alone.

    Args:
        state: the weights.
        wanted: those of the detector.
        classes: that the detector has.
    """
    rows = {
        (len(state[name]), len(value))
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape and state[name].dim() and value.dim()
    }
    found = {have * classes / want for have, want in rows}
    number = found.pop() if len(found) == 1 else 0.0
    return int(number) if number >= 1 and number == int(number) else None

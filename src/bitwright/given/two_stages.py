"""Detectors of two stages with torchvision's parts: both networks side by side as one, and what runs between them.

The first network proposes regions of an image, the second says what each region shows (Ren et al. 2015, "Faster
R-CNN"). Both are captured as one network of two inputs: images, and features that were cut out for regions. What
chooses the regions and cuts them out is torchvision's own, as is what makes boxes of the answers.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn

from bitwright.errors import DataError
from bitwright.given.detectors import DetectedBoxes, KnownPart, named_levels
from bitwright.given.images import Images
from bitwright.given.several import InputPart
from bitwright.graph import ops
from bitwright.graph.devices import device_of
from bitwright.graph.units import Cut, part

IMAGE_INPUT, REGION_INPUT = "images", "regions"
FEATURES, OBJECTNESS, SIDES = "features_", "proposals_objectness_", "proposals_deltas_"
REGION_OUTPUTS = ("class_logits", "box_regression")
TOGETHER = 32
"""Regions of an image that are calibrated on, spread evenly over those that the float network proposes."""
BOXES = ("boxes", "scores", "labels")
First: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]
"""Images [B, C, H, W] to features, and to scores and boxes of anchors, by name."""
Second: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Regions [B, R, C, h, w] to scores [B, R, K] and boxes [B, R, 4 K]."""


class TwoStageBody(nn.Module):
    """Both networks under the names that the detector has for them; neither reads what the other gives.

    Attributes:
        pooled: levels of features that regions are cut out of, as far as the backbone gives them.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        heads: Any = detector.roi_heads
        self.backbone = detector.get_submodule("backbone")
        self.rpn = nn.ModuleDict({"head": detector.get_submodule("rpn.head")})
        self.roi_heads = nn.ModuleDict({"box_head": heads.box_head, "box_predictor": heads.box_predictor})
        self.pooled = tuple(heads.box_roi_pool.featmap_names)

    def forward(self, images: Tensor, regions: Tensor) -> dict[str, Tensor]:
        """The raw outputs for normalised images [B, C, H, W] and regions [B, R, C', h, w]."""
        return {**self.first(images), **dict(zip(REGION_OUTPUTS, self.second(regions), strict=True))}

    def first(self, images: Tensor) -> dict[str, Tensor]:
        """Features, and scores and boxes of anchors, level by level, [N, K, h, w] each, for images [N, 3, H, W]."""
        levels = named_levels(self.backbone(images))
        scores, sides = self.rpn["head"](list(levels.values()))
        found = {f"{FEATURES}{i}": levels[name] for i, name in enumerate(self.pooled) if name in levels}
        found |= {f"{OBJECTNESS}{i}": each for i, each in enumerate(scores)}
        return found | {f"{SIDES}{i}": each for i, each in enumerate(sides)}

    def second(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, R, K] and boxes [B, R, 4 K] of regions [B, R, C, h, w]."""
        many = regions.shape[1]
        scores, sides = self.roi_heads["box_predictor"](
            self.roi_heads["box_head"](regions.reshape(-1, *regions.shape[2:]))
        )
        return scores.reshape(-1, many, scores.shape[-1]), sides.reshape(-1, many, sides.shape[-1])


class Proposed(NamedTuple):
    """Regions of an image: corners (R, 4) in pixels of the network's input, and features (R, C, h, w)."""

    corners: Tensor
    features: Tensor


@dataclass
class TwoStages:
    """What runs before, between and after the two networks of a detector: torchvision's own.

    Attributes:
        detector: whose anchors, box coders, thresholds, pooling and suppression are used; not changed.
        size: height and width of the network's input; that of the images if not given, where there are some.
        together: regions of an image in one row of the second network's input.
    """

    detector: nn.Module
    size: tuple[int, int] | None = None
    together: int = TOGETHER

    def __call__(self, outputs: Any) -> DetectedBoxes:
        """Regions depend on the network that is measured, so that its outputs alone make no boxes.

        Raises:
            DataError: always; what evaluates calls :meth:`boxes`.
        """
        raise DataError(
            "Expected both networks of a detector of two stages, found outputs of one run. Evaluate a run folder, or "
            "call boxes() of TwoStages with the second network."
        )

    def completed(self, images: Images, first: First | None = None) -> Images:
        """Images with the regions that a network proposes beside each, computed when they are first asked for.

        Args:
            images: returned as they are if they hold regions already.
            first: that network; the detector's own if not given.
        """
        if any(p.name == REGION_INPUT for p in images.parts):
            return images
        network = first or TwoStageBody(self.detector).eval().first

        def regions(batch: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                raw, size = network(batch), (int(batch.shape[-2]), int(batch.shape[-1]))
            return {REGION_INPUT: torch.stack([self._spread(each) for each in self.proposed(raw, size)])}

        return images.joined(IMAGE_INPUT, regions)

    def _spread(self, found: Proposed) -> Tensor:
        """As many regions as lie in one row, evenly over those of an image, [R, C, h, w]."""
        if not len(found.features):
            return found.features.new_zeros(self.together, *found.features.shape[1:])
        return found.features[torch.linspace(0, len(found.features) - 1, self.together).round().long()]

    def proposed(self, raw: Mapping[str, Tensor], size: tuple[int, int]) -> Iterator[Proposed]:
        """The regions that outputs of the first network propose, image by image.

        Args:
            raw: outputs by name.
            size: height and width of the images.

        Raises:
            DataError: the outputs are those of images of another size.
        """
        from torchvision.models.detection.image_list import ImageList

        raw = {name: value.detach().cpu().float() for name, value in raw.items()}
        detector: Any = self.detector
        pool = copy.copy(detector.roi_heads.box_roi_pool)
        for i in range(len(raw[f"{OBJECTNESS}0"])):
            one = {name: value[i : i + 1] for name, value in raw.items()}
            pool.scales = pool.map_levels = None  # it keeps those of the first images that it sees
            scores, sides = ([v for k, v in one.items() if k.startswith(what)] for what in (OBJECTNESS, SIDES))
            rpn = copy.copy(detector.rpn)
            rpn._modules = {**detector.rpn._modules, "head": KnownPart((scores, sides))}
            levels = {name: one.get(f"{FEATURES}{k}") for k, name in enumerate(pool.featmap_names)}
            features = OrderedDict((name, level) for name, level in levels.items() if level is not None)
            try:
                with torch.no_grad():
                    (corners,), _ = rpn(ImageList(torch.zeros(1).expand(1, 3, *size), [size]), dict(enumerate(scores)))
                    yield Proposed(corners, pool(features, [corners], [size]))
            except (RuntimeError, IndexError) as error:
                raise DataError(
                    f"Expected raw outputs for images of {size[0]}x{size[1]} (height x width), found others. Give "
                    "input_size= with the size of the network's input."
                ) from error

    def boxes(self, raw: Mapping[str, Tensor], second: Second, size: tuple[int, int]) -> DetectedBoxes:
        """What a detector finds, with its own regions and answers.

        Args:
            raw: outputs of the first network by name.
            second: the second network.
            size: height and width of the images.
        """
        heads: Any = self.detector.roi_heads
        found = []
        for corners, features in self.proposed(raw, size):
            with torch.no_grad():
                scores, sides = (o.cpu().flatten(0, 1)[: len(corners)] for o in second(self._rows(features)))
                each = heads.postprocess_detections(scores, sides, [corners], [size])
            found.append(dict(zip(BOXES, (e[0] for e in each), strict=True)))
        return found

    def _rows(self, features: Tensor) -> Tensor:
        """All regions in rows, [N, R, C, h, w], the last filled up with zeros."""
        missing = -len(features) % self.together if len(features) else self.together
        filled = torch.cat([features, features.new_zeros(missing, *features.shape[1:])])
        return filled.reshape(-1, self.together, *features.shape[1:])

    def behind(
        self, flat: Sequence[Tensor], second: Second, names: Sequence[str], size: tuple[int, int]
    ) -> list[Tensor]:
        """What :meth:`boxes` finds, as tensors: boxes (B, M, 4), scores and labels (B, M), filled up.

        Args:
            flat: outputs of both networks, of which those of the first count.
            second: the second network.
            names: of the outputs.
            size: height and width of the images.
        """
        detector: Any = self.detector
        found = self.boxes(dict(zip(names, flat, strict=True)), second, size)
        return _filled(found, int(detector.roi_heads.detections_per_img))


def _filled(found: DetectedBoxes, most: int) -> list[Tensor]:
    """Boxes (B, most, 4), scores and labels (B, most); rows that only fill up have the score 0."""
    made = [torch.zeros(len(found), most, 4), torch.zeros(len(found), most), torch.zeros(len(found), most)]
    for i, each in enumerate(found):
        for values, name in zip(made, BOXES, strict=True):
            values[i, : len(each[name])] = each[name].to(values)
    return made


def unfilled(flat: Sequence[Tensor]) -> DetectedBoxes:
    """The boxes of each of N images that :meth:`TwoStages.behind` made tensors [N, most, ...] of."""
    return [
        {name: values[each[1] > 0] for name, values in zip(BOXES, each, strict=True)}
        for each in zip(*flat, strict=True)
    ]


def two_networks(
    graph: fx.GraphModule, outputs: Sequence[str], parts: Mapping[str, InputPart] | None = None
) -> tuple[First, Second] | None:
    """The two networks of a captured detector, each by itself; they share its tensors as they are now.

    None where the inputs are others than those of a detector of two stages.

    Args:
        graph: of both, with quantizers or without.
        outputs: names of its outputs.
        parts: the inputs by the nodes that take them out of the packed tensor; told by the graph if not given.
    """
    given = {p.name: node for node, p in (parts or {}).items()}
    given = given or {str(n.meta[ops.PART]): n.name for n in graph.graph.nodes if ops.PART in n.meta}
    if given.keys() != {IMAGE_INPUT, REGION_INPUT}:
        return None
    (end,) = (n for n in graph.graph.nodes if n.op == "output")
    ends = [n.name for n in end.args[0]]
    cut, device = len(ends) - len(REGION_OUTPUTS), device_of(graph)
    first, second = (
        part(graph, Cut((given[name],), (), tuple(exits)))
        for name, exits in ((IMAGE_INPUT, ends[:cut]), (REGION_INPUT, ends[cut:]))
    )

    def proposing(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(outputs, first(images.to(device))[1], strict=False))

    return proposing, lambda regions: second(regions.to(device))[1]

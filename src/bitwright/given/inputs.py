"""What a job is given, brought into one form: a model, images, a device."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright import together
from bitwright.collector import uncollected
from bitwright.errors import UsageError
from bitwright.given.arguments import one_of, whole_number
from bitwright.given.detectors import DetectorBody, has_two_stages, is_detector
from bitwright.given.images import Images, load_images
from bitwright.given.models import Model, as_file_takes, load_model
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing, has_channels_last
from bitwright.given.several import input_names, taking
from bitwright.given.spoilt import without_spoilt
from bitwright.given.two_stages import TwoStageBody, TwoStages
from bitwright.graph.capture import Captured, capture
from bitwright.graph.equalize import ChannelScales, equalized
from bitwright.graph.prepare import prepare
from bitwright.graph.recentre import Recentring, recentred

DEFAULT_SAMPLES = 512
UNUSABLE = {
    "mps": "it has no float64, in which sums are taken",
    "xpu": "not every one has float64, in which sums are taken, and none was tried",
}
"""Devices that PyTorch knows and why they are refused."""


def as_model(
    model: nn.Module | torch.export.ExportedProgram | Model | str | Path,
    preprocessing: Preprocessing | PreprocessFunction | None = None,
) -> Model:
    """A model under one type, however it was given."""
    if isinstance(model, str | Path):
        model = load_model(str(model))
    if isinstance(model, Model):
        return model if preprocessing is None else replace(model, preprocessing=as_file_takes(model, preprocessing))
    name, decode = type(model).__name__, None
    if isinstance(model, nn.Module) and has_two_stages(model):
        model, decode = TwoStageBody(model).eval(), TwoStages(model)
    elif isinstance(model, nn.Module) and is_detector(model):
        model = DetectorBody(model).eval()
    return Model(model, name, preprocessing, None, decode=decode)


def sized_by(network: Model, images: Images) -> Model:
    """The network with the size of these images in its preprocessing, where nobody said another."""
    how = network.preprocessing
    if not isinstance(how, Preprocessing) or how.input_size is not None:
        return network
    if images.preprocessing is not None:
        return replace(network, preprocessing=images.preprocessing)
    shape = tuple(images.seen(0).shape)
    if len(shape) != 3:
        return network
    return replace(network, preprocessing=how.sized((shape[2], *shape[:2]) if has_channels_last(shape) else shape))


@uncollected()
def prepare_teacher(
    network: Model, images: Images, output: str | None = None, *, result: Mapping[str, Any] | None = None
) -> Captured:
    """Captures the network on two of the images and brings it into the form that is quantized.

    Args:
        network: not changed.
        images: of which two are looked at.
        output: name of the one to keep.
        result: of a run whose float network this is, for the scales of channels that it has moved.
    """
    example = images.batch(range(min(2, len(images))))
    if network.source is not None:
        network.source.check(example, images.parts)
    if output is not None and not output:
        raise UsageError("Expected the name of an output as output=, found ''.")
    module, name = network.module, output or network.output
    if isinstance(module, nn.Module):
        captured = capture(taking(module, images.parts), example, output=name)
    else:
        captured = capture(module, example, images.parts, name)
    teacher = prepare(captured)
    teacher = recentred(teacher, map(Recentring.read, (result or {}).get("recentred", [])))
    moved = (result or {}).get("balanced", [])
    return equalized(teacher, [ChannelScales(each["node"], tuple(each["exponents"])) for each in moved])


def find_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one; ``cuda:1`` the second of several.

    Raises:
        UsageError: a name other than auto, cpu, cuda, cuda:N; or a GPU that is not there.
    """
    if isinstance(name, str) and name.partition(":")[0] in UNUSABLE:
        raise UsageError(
            f"Expected 'auto', 'cpu', 'cuda' or 'cuda:N' as device=, found '{name}': "
            f"{UNUSABLE[name.partition(':')[0]]}. Use device='cpu'."
        )
    numbered = isinstance(name, str) and re.fullmatch(r"cuda:\d{1,4}", name)
    if not numbered:
        one_of("device", name, ("auto", "cpu", "cuda"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and not count:
        raise UsageError("There is no CUDA device here. Use device='cpu'.")
    if numbered and torch.device(name).index >= count:
        raise UsageError(f"Expected a GPU below cuda:{count}, found device='{name}'. Here are {count}.")
    name = ("cuda" if count else "cpu") if name == "auto" else name
    return torch.device("cuda", together.local_gpu()) if name == "cuda" and together.launched() else torch.device(name)


def calibration_images(
    source: Any,
    network: Model,
    samples: int | None,
    skip_unreadable: bool,
    *,
    labelled: bool = False,
    input_key: str | None = None,
) -> Images:
    """The images that calibration takes: evenly spread, unlabelled, :data:`DEFAULT_SAMPLES` at most if not said.

    Args:
        source: in any form.
        network: whose preprocessing they get.
        samples: how many; all of them if not said and ``labelled``.
        skip_unreadable: go on when a file cannot be decoded.
        labelled: for a recipe that trains with labels, which keeps them.
        input_key: name of the images where items are dicts.

    Raises:
        UsageError: none are asked for, or there are none.
    """
    if samples is not None:
        samples = whole_number("samples", samples, least=1)
    images = load_images(
        source,
        network.preprocessing,
        inputs=input_names(network.module),
        channels_last=network.channels_last,
        skip_unreadable=skip_unreadable,
        most=samples or (None if labelled else DEFAULT_SAMPLES),
        input_key=input_key,
        read_labels=labelled,
    )
    if samples is not None and samples > len(images):
        warnings.warn(f"{samples} images were asked for, there are {len(images)}; all are used.", stacklevel=3)
    count = min(samples or (len(images) if labelled else DEFAULT_SAMPLES), len(images))
    chosen = images.sample(count, seed=0)
    return network.completed(without_spoilt(chosen if labelled else chosen.unlabelled()))

"""Finds the network that a reference names, fills in its weights and says how it wants its images."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import ExportedProgram

from bitwright.errors import ModelError, UsageError
from bitwright.given import detectors
from bitwright.given.compat import import_timm, import_torchvision
from bitwright.given.pickles import program_in
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing, parse_input_size
from bitwright.given.references import absolute_reference
from bitwright.given.saved_program import load_program
from bitwright.given.scripts import builder_of, callables_in, preprocessing_function, run_script, seeded
from bitwright.given.two_stages import TwoStageBody, TwoStages
from bitwright.given.weights import (
    CHECKPOINTS,
    check_on_a_device,
    load_weights,
    on_one_line,
    other_classes_of,
    read_state_dict,
    under_known_names,
)
from bitwright.graph.outputs import Interface
from bitwright.graph.plain import tell_of_types
from bitwright.graph.program import input_shapes

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.onnx_in.source import OnnxFile

FORMS = "zoo:NAME, timm:NAME[@weights], torchvision:NAME[@weights], path/to/file.py:callable, model.pt2 or model.onnx"

Settings: TypeAlias = dict[str, Any]
Build: TypeAlias = Callable[..., nn.Module]


@dataclass(frozen=True)
class Model:
    """A float32 network in evaluation mode, ready to be captured.

    Attributes:
        module: the network, on the CPU, or a saved ``torch.export`` program.
        name: short name for tables and results.
        preprocessing: what turns an image into the network's input; None if nobody said.
        output: which entry of a dict output counts (``"out"`` for torchvision's segmentation); None for all.
        reference: what names it from any folder; None where it was not loaded by name.
        settings: of preprocessing that were given with the name.
        source: the ONNX file that it was read from, if it was.
        decode: what turns its outputs into boxes, where it is a detector that brings this with it.
    """

    module: nn.Module | ExportedProgram
    name: str
    preprocessing: Preprocessing | PreprocessFunction | None = None
    output: str | None = None
    reference: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: OnnxFile | None = None
    decode: Callable[[Any], Any] | None = None

    @property
    def channels_last(self) -> bool:
        """Whether it is an ONNX file that takes images (N, H, W, C)."""
        return self.source is not None and self.source.channels_last

    def completed(self, images: Images) -> Images:
        """The images with all that the network takes beside them: regions, for a detector of two stages."""
        return self.decode.completed(images) if isinstance(self.decode, TwoStages) else images


def load_model(
    reference: str,
    *,
    input_size: int | str | Sequence[int] | None = None,
    mean: float | str | Sequence[float] | None = None,
    std: float | str | Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    channel_order: str | None = None,
    pixel_bits: int | None = None,
    preprocess: str | None = None,
) -> Model:
    """Return the network that ``reference`` names; nothing is ever downloaded.

    ``zoo:``, ``timm:`` and ``torchvision:`` networks bring their own preprocessing. Beside the callable in a
    ``.py`` file may stand a function ``preprocess``, or a dict ``PREPROCESSING`` of settings (or of such
    dicts by the name of the callable). The arguments below replace single settings. A function ``decode`` beside the
    callable turns a detector's outputs into boxes when it is evaluated.

    Args:
        reference: one of the forms in ``FORMS``; ``@weights`` is a state dict in a ``.safetensors``, ``.pt``,
            ``.pth``, ``.th``, ``.ckpt``, ``.bin`` or ``.tar`` file. Without it weights are random (seed 0),
            with a warning. Whole pickled models are refused, since reading one runs its code.
        input_size: ``224``, ``"224x320"`` (height x width) or (C, H, W).
        mean: one number, or one per channel, for values in 0..1.
        std: one number above 0, or one per channel.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``.
        crop_pct: input size over resized size.
        crop_mode: ``center``, ``squash`` or ``border``.
        channel_order: ``rgb`` or ``bgr``.
        pixel_bits: of grey images whose files hold 16 bits: 10, 12 or 14 for those of many cameras and scanners.
        preprocess: instead of all these, a function in a Python file, as ``file.py:name``, which is run.

    Raises:
        ModelError: the network cannot be found, built or loaded, or its weights do not fit or are not finite.
        UsageError: the reference or a setting has no meaning, or a needed package is absent.
    """
    given = {
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "channel_order": channel_order,
        "pixel_bits": pixel_bits,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    try:
        model = _resolve(str(reference), settings)
    except (OSError, ValueError, RecursionError) as error:
        said = f"{str(reference)[:80]}{'...' if len(str(reference)) > 80 else ''}"
        raise ModelError(f"Expected a model as {FORMS}, cannot read {said!r} ({on_one_line(error)}).") from error
    _check_weights(model)
    if preprocess is not None:
        model = replace(model, preprocessing=preprocessing_function(preprocess, settings))
    if detectors.is_detector(model.module):
        model = _without_decoding(model)
    named = {} if preprocess is None else {"preprocess": absolute_reference(str(preprocess))}
    return replace(model, reference=absolute_reference(str(reference)), settings={**settings, **named})


def _resolve(reference: str, settings: Settings) -> Model:
    kind, colon, rest = reference.partition(":")
    if colon and kind in ("zoo", "timm", "torchvision"):
        return {"zoo": _from_zoo, "timm": _from_timm, "torchvision": _from_torchvision}[kind](rest, settings)
    script = re.fullmatch(r"(.+\.py):([^:@]+)(?:@(.+))?", reference)
    if script:
        return _from_script(Path(script[1]).expanduser(), script[2], script[3], settings)
    path = Path(reference).expanduser()
    if path.suffix == ".py":
        raise UsageError(f"Expected file.py:callable, found {reference}. Name one of {callables_in(path)}.")
    if path.suffix == ".onnx":
        return _from_onnx(path, settings)
    if path.suffix == ".pt2":
        return _from_program(path, settings)
    if path.suffix in CHECKPOINTS:
        _check_is_no_torchscript(path)
        raise UsageError(
            f"Expected a network, {reference} holds weights at most. Name the network too, as in timm:NAME@{reference}."
        )
    raise UsageError(f"Expected a model as {FORMS}, found {reference!r}.{_perhaps_zoo(reference)}")


def _check_is_no_torchscript(path: Path) -> None:
    if program_in(path) == "TorchScript":
        raise UsageError(
            f"Expected a network, {path} is a TorchScript program, which shows no layers. Give what it was made of, as "
            f"file.py:callable@weights.pt; torch.jit.load({str(path)!r}).state_dict() gives the weights."
        )


def _without_decoding(model: Model) -> Model:
    """The body of a detector, and its own decoding beside it."""
    detector, how = model.module, model.preprocessing
    assert isinstance(detector, nn.Module)
    shape = (
        how.shape if isinstance(how, Preprocessing) else tuple(how(Image.new("RGB", (256, 256))).shape) if how else ()
    )
    if detectors.has_two_stages(detector):
        if model.decode is not None:
            warnings.warn(
                f"The function decode beside {model.name} is not used: boxes of a detector of two stages are made by "
                "torchvision's own code. Remove it, or let forward end in raw maps.",
                UserWarning,
                stacklevel=4,
            )
        return replace(model, module=TwoStageBody(detector).eval(), decode=TwoStages(detector))
    decode = model.decode or (detectors.TorchvisionDecode(detector, (shape[1], shape[2])) if shape else None)
    return replace(model, module=detectors.DetectorBody(detector).eval(), decode=decode)


def decoder_beside(reference: str | None, settings: Mapping[str, Any] | None = None) -> Callable[[Any], Any] | None:
    """What turns outputs of a network into boxes, where its name alone says that: no file of the user's is run.

    Args:
        reference: of the network.
        settings: of preprocessing that were given with it.
    """
    kind, _, name = (reference or "").partition(":")
    if kind == "zoo":
        from bitwright import zoo

        decode: Callable[[Any], Any] | None = zoo.decoder(name)
        return decode
    name = name.partition("@")[0]
    if kind != "torchvision" or name not in _torchvision_detectors():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its weights are random, and nobody asks for them
        return load_model(f"torchvision:{name}", **(settings or {})).decode


def decoder_behind(names: Interface | None) -> Callable[[Any], Any] | None:
    """What turns outputs of a network into boxes, where operators of the ONNX file that it came from follow it.

    Args:
        names: what is kept of the file.
    """
    if names is None or names.frame is None:
        return None
    from bitwright.onnx_in.tail import boxes_behind

    return boxes_behind(names.frame, names.batch)


def _torchvision_detectors() -> list[str]:
    models: Any = import_torchvision().models
    return list(models.list_models(module=models.detection))


def _perhaps_zoo(name: str) -> str:
    from bitwright import zoo

    return f" Did you mean zoo:{name}?" if name in zoo.NETWORKS else ""


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"Did you mean {', '.join(close)}?" if close else "Check the spelling."


def _with_settings(base: Settings, settings: Settings) -> Preprocessing:
    merged = {**base, **settings}
    if "input_size" in settings and "input_size" in base and not _names_channels(settings["input_size"]):
        merged["input_size"] = (parse_input_size(base["input_size"])[0], *parse_input_size(settings["input_size"])[1:])
    return Preprocessing(**merged)


def _names_channels(size: Any) -> bool:
    return len(size.split("x") if isinstance(size, str) else [size] if isinstance(size, int) else size) == 3


# ----------------------------------------------------------------------------------------- the builders


def _from_zoo(name: str, settings: Settings) -> Model:
    from bitwright import zoo

    network, how = zoo.network(name).eval(), _with_settings(zoo.preprocessing(name), settings)
    return Model(network, name, how, decode=zoo.decoder(name))


def _from_timm(rest: str, settings: Settings) -> Model:
    timm: Any = import_timm()
    name, _, weights = rest.partition("@")
    if not timm.is_model(name):
        raise ModelError(f"There is no timm model {name!r}. {_closest(name.split('.')[0], timm.list_models())}")
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = [tag for tag in timm.list_pretrained() if tag.startswith(name.split(".")[0] + ".")]
        raise ModelError(f"There is no timm weights tag {name!r}. {_closest(name, tags)}") from error
    size = config.input_size
    arguments: Settings = {"pretrained": False}
    if "input_size" in settings:
        wanted = _with_settings({"input_size": size}, {"input_size": settings["input_size"]}).size
        if wanted[0] != size[0]:
            arguments["in_chans"] = wanted[0]
        if wanted[1:] != tuple(size[1:]) and config.fixed_input_size:
            arguments["img_size"] = wanted[1:]

    def build(**more: Any) -> nn.Module:
        module: nn.Module = timm.create_model(name, **arguments, **more)
        return module

    module = _with_weights(build, weights, f"timm:{name}")
    base = timm.data.resolve_model_data_config(module, pretrained_cfg=config.to_dict())
    return Model(module, name, _with_settings(base, settings))


def _from_torchvision(rest: str, settings: Settings) -> Model:
    torchvision: Any = import_torchvision()
    models = torchvision.models
    name, _, weights = rest.partition("@")
    segmentation = models.list_models(module=models.segmentation)
    known = [*models.list_models(module=models), *segmentation, *_torchvision_detectors()]
    if name in models.list_models() and name not in known:
        raise ModelError(
            f"Expected a network of images, torchvision:{name} is none. "
            "Wrap it in a file.py:callable that takes and returns one tensor."
        )
    if name in _torchvision_detectors():
        return _from_torchvision_detector(name, weights, settings)
    if name not in known:
        raise ModelError(f"There is no torchvision model {name!r}. {_closest(name, known)}")
    base = _torchvision_settings(models.get_model_weights(name))
    preprocessing = _with_settings(base, settings)
    arguments: Settings = {"weights": None}
    if name in segmentation:
        arguments["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False  # minutes of truncated normals otherwise
    if name.startswith("vit_") and preprocessing.size[1:] != base["input_size"][1:]:
        arguments["image_size"] = preprocessing.size[1]

    def build(**more: Any) -> nn.Module:
        module: nn.Module = models.get_model(name, **arguments, **more)
        return module

    module = _with_weights(build, weights, f"torchvision:{name}")
    return Model(module, name, preprocessing, "out" if name in segmentation else None)


def _from_torchvision_detector(name: str, weights: str, settings: Settings) -> Model:
    models: Any = import_torchvision().models
    classes = len(models.get_model_weights(name).DEFAULT.meta["categories"])

    def build(**more: Any) -> nn.Module:
        module: nn.Module = models.get_model(name, weights=None, weights_backbone=None, **more)
        return module

    def other(module: nn.Module, state: Mapping[str, Tensor]) -> int | None:
        wanted = module.state_dict()
        return detectors.classes_of(under_known_names(state, wanted), wanted, classes)

    module = _with_weights(build, weights, f"torchvision:{name}", other)
    return Model(module, name, _with_settings(detectors.input_settings(module), settings))


def _torchvision_settings(weights: Any) -> Settings:
    """Read what torchvision's own transform for these weights would do, without fetching them."""
    transform = weights.DEFAULT.transforms()
    resized = transform.resize_size[0]
    cropped = transform.crop_size[0] if hasattr(transform, "crop_size") else resized
    crop_pct = cropped / resized
    while math.floor(cropped / crop_pct) < resized:  # a rounding of the quotient would lose a pixel
        crop_pct = math.nextafter(crop_pct, 0)
    return {
        "input_size": (3, cropped, cropped),
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": crop_pct,
    }


def _with_weights(
    build: Build,
    weights: str,
    reference: str,
    other_classes: Callable[[nn.Module, Mapping[str, Tensor]], int | None] | None = None,
) -> nn.Module:
    module = seeded(build, reference)
    if not weights:
        warnings.warn(
            f"{reference} has random weights: none were given, and none are downloaded. "
            f"Name a file, as in {reference}@weights.safetensors",
            UserWarning,
            stacklevel=5,
        )
        return module
    state = read_state_dict(weights)
    classes = (other_classes or other_classes_of)(module, state)
    if classes is not None:
        module = seeded(lambda: build(num_classes=classes), reference)
    load_weights(module, state, weights)
    return module


# ------------------------------------------------------------------------------------- the user's files


def _from_script(path: Path, name: str, weights: str | None, settings: Settings) -> Model:
    script = run_script(path)
    if not hasattr(script, name):
        raise ModelError(f"Expected {name!r} in {path}, it has {callables_in(path)}.")
    made = getattr(script, name)
    module = made if isinstance(made, nn.Module) else seeded(builder_of(made, path, name), f"{path}:{name}")
    check_on_a_device(module.state_dict(), name)
    tell_of_types(module.state_dict().values())
    module = module.eval().cpu().float()
    if weights:
        load_weights(module, read_state_dict(weights), weights)
    decode = getattr(script, "decode", None)
    own = detectors.input_settings(module) if detectors.is_detector(module) else {}
    how = _script_preprocessing(script, path, name, settings, own)
    return Model(module, name, how, decode=decode if callable(decode) else None)


def preprocessing_of(base: Settings, given: Settings) -> Preprocessing | PreprocessFunction:
    """What was said of preprocessing: settings, of which the given ones come first, or the function that is named."""
    settings = {k: v for k, v in given.items() if k != "preprocess"}
    if "preprocess" in given:
        return preprocessing_function(given["preprocess"], settings)
    return Preprocessing(**{**base, **settings})


def _script_preprocessing(
    script: ModuleType, path: Path, name: str, settings: Settings, own: Settings
) -> Preprocessing | PreprocessFunction | None:
    """What stands beside the callable; ``own`` is what the network itself says."""
    function = getattr(script, "preprocess", None)
    if callable(function):
        if settings:
            raise UsageError(
                f"Expected one preprocessing, found a function preprocess in {path} and {', '.join(settings)}. "
                "Leave one of them out."
            )
        typed: PreprocessFunction = function
        return typed
    base = getattr(script, "PREPROCESSING", {})
    if isinstance(base, Mapping) and base and all(isinstance(value, Mapping) for value in base.values()):
        base = base.get(name, {})
    if not isinstance(base, Mapping):
        raise ModelError(f"Expected PREPROCESSING in {path} to be a dict, found {type(base).__name__}.")
    return _given_preprocessing({**own, **base}, settings, f"{path}:{name}")


def _given_preprocessing(base: Settings, settings: Settings, reference: str) -> Preprocessing | None:
    """Build it from what was said, if anything was; warn when nobody said how values are scaled."""
    said = {**base, **settings}
    if not said or (not settings and set(base) == {"input_size"}):
        return None
    preprocessing = _with_settings(base, settings)
    if "mean" not in said and "std" not in said:
        warnings.warn(
            f"No mean and std are known for {reference}, whose images stay in 0..1. Give mean=0 and std=1 if so.",
            UserWarning,
            stacklevel=5,
        )
    return preprocessing


def _from_program(path: Path, settings: Settings) -> Model:
    if not path.is_file():
        raise ModelError(f"Expected a saved torch.export program, {path} does not exist. Check the path.")
    program = load_program(path)
    size = _program_input_size(program)
    base = {"input_size": size} if size is not None else {}
    return Model(program, path.stem, _given_preprocessing(base, settings, str(path)))


def as_file_takes(
    model: Model, preprocessing: Preprocessing | PreprocessFunction
) -> Preprocessing | PreprocessFunction:
    """A preprocessing that has size and order of axes of the ONNX file where it says none."""
    if model.source is None or not isinstance(preprocessing, Preprocessing):
        return preprocessing
    said = {name: getattr(preprocessing, name) for name in preprocessing.model_fields_set}
    said = {name: value for name, value in said.items() if value is not None}
    return Preprocessing(**{**_of_one_image(model.source), **said})


def _from_onnx(path: Path, settings: Settings) -> Model:
    from bitwright.onnx_in.source import OnnxFile

    given = settings.get("input_size")
    file = OnnxFile.read(path, None if given is None else parse_input_size(given))
    base = _of_one_image(file)
    said = {k: v for k, v in settings.items() if k != "input_size"}
    known = said or file.inputs[0].whole
    preprocessing = _given_preprocessing(base, said, str(path)) if known and base else None
    return Model(file.network, path.stem, preprocessing, source=file, decode=decoder_behind(file.names))


def _of_one_image(file: OnnxFile) -> Settings:
    """Size and order of axes of the images that a file takes; nothing where it takes other than one image."""
    shape = file.image
    if len(file.inputs) > 1 or len(shape) != 3 or not (file.channels_last or shape[0] in (1, 3)):
        return {}
    scale: Settings = {"std": 1 / 255} if file.inputs[0].whole else {}
    if file.channels_last:
        return {"input_size": (shape[2], *shape[:2]), "layout": "channels_last", **scale}
    return {"input_size": shape, **scale}


def example_shapes(program: ExportedProgram) -> dict[str, tuple[int, ...]]:
    """Of one image, of each tensor that a saved program takes; those are left out of which a side is free."""
    shapes = {name: shape[1:] for name, shape in input_shapes(program).items()}
    return {name: shape for name, shape in shapes.items() if all(isinstance(side, int) for side in shape)}


def _program_input_size(program: ExportedProgram) -> tuple[int, int, int] | None:
    shapes = list(example_shapes(program).values())
    alone = len(program.graph_signature.user_inputs) == len(shapes) == 1 and len(shapes[0]) == 3
    return (shapes[0][0], shapes[0][1], shapes[0][2]) if alone and shapes[0][0] in (1, 3) else None


def _check_weights(model: Model) -> None:
    """What is no parameter may hold infinities: masks do. A weight that does is found where its layer's output is."""
    module = model.module
    learned = (
        module.graph_signature.parameters if isinstance(module, ExportedProgram) else dict(module.named_parameters())
    )
    state = module.state_dict if isinstance(module, ExportedProgram) else module.state_dict()
    check_on_a_device(state, model.name)
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        broken = int((~torch.isfinite(value) if name in learned else torch.isnan(value)).sum())
        if broken:
            raise ModelError(
                f"Expected finite weights in {model.name}, {name} has NaN or infinity in {broken} of "
                f"{value.numel()} values. Train or fetch it again."
            )
        if isinstance(module, ExportedProgram) and value.dtype != torch.float32:
            raise ModelError(f"Expected float32 in {model.name}, {name} is {value.dtype}. Export it in float32.")

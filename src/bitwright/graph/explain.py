"""One line for each thing that keeps a model from being captured: the user's source line, and a remedy that fits."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from itertools import pairwise
from pathlib import Path

import torch
from torch import fx, nn

from bitwright.errors import BitwrightError, ModelError, lacks_memory, no_memory

OURS = str(Path(__file__).parents[1])
LIBRARY = sysconfig.get_paths()["stdlib"]
TORCH = str(Path(torch.__file__).parent)
LONGEST = 160
"""Characters of another package's message that are shown."""


def cannot_run(error: BaseException, images: torch.Tensor) -> BitwrightError:
    """The model fails on the images, without any capture."""
    if lacks_memory(error):
        return no_memory(error)
    said, place, text = first_line(error), where(error), str(error)
    if isinstance(error, TypeError) and "argument" in text and not place:
        return ModelError(
            f"Expected a model of one image tensor ({said}). Give several inputs by name, in a dict or an .npz file, "
            "or wrap it in a module that takes one."
        )
    shape = "x".join(str(d) for d in images.shape[1:])
    remedy = next((remedy for words, remedy in REMEDIES if any(word in text for word in words)), None)
    if remedy in OF_SHAPE and images.dim() < 4:
        remedy = (
            "Give images as (N, C, H, W), a single one as image[None], and signals or vectors in the shape it takes"
        )
    if remedy == OF_SHAPE[0] and images.dim() == 4 and images.shape[-1] in PICTURES:
        remedy += "; if these have theirs last, images.permute(0, 3, 1, 2)"
    if remedy is None:
        remedy = f"Try it alone: model(torch.zeros(1, {', '.join(str(d) for d in images.shape[1:])}))"
    return ModelError(f"The model cannot run on images of {shape} ({said}){place}. {remedy}.")


PICTURES = (1, 3)
"""Channels of a picture."""
OF_SHAPE = ("Give images with as many channels as it takes", "Give images of the shape that it takes (preprocessing=)")
REMEDIES = (
    (("CUDA", "cuda", "same device", "MPS"), "Take devices out of forward, or use x.device"),
    (
        ("not Tensor", "list of", "too many indices", "indices must be", "unpack"),
        "If it takes a list or a dict of images, wrap it in a module whose forward takes one tensor, [N, C, H, W]",
    ),
    (
        ("scalar type", "dtype", "Half", "BFloat16", "Double"),
        "Weights and images are float32 here: take conversions to another type, such as .half(), out of forward",
    ),
    (("require grad", "grad_fn"), "A forward that needs gradients cannot be quantized"),
    (
        ("input to conv1d", "expected 2D or 3D input"),
        "If it takes signals, give all of them in one tensor, (N, C, T), instead of pieces",
    ),
    (("channels, but got",), OF_SHAPE[0]),
    (("size", "shape", "channels", "dimension", "mat1"), OF_SHAPE[1]),
)
"""What to do where a message holds one of the words; the first that fits."""


def cannot_capture(error: Exception | None, model: nn.Module, output: object) -> BitwrightError:
    """The model runs, and cannot be made into a graph."""
    if isinstance(error, ModelError):
        return error
    if error is not None and lacks_memory(error):
        return no_memory(error)
    if error is None:
        return ModelError(
            "The model fixes its batch size while it runs (a shape taken as a plain number). "
            "Use x.shape[0] or -1 where it reshapes."
        )
    place = where(error)
    construct, remedy = _construct(error, place, detects(output, error), model)
    return ModelError(f"The model cannot be captured: {construct}{place}. {remedy}.")


def _construct(error: Exception, place: str, detector: bool, model: nn.Module) -> tuple[str, str]:
    text, kind, code = str(error), type(error).__name__, place.partition(": ")[2]
    if detector:
        return "its boxes are chosen by their values", without_boxes(model)
    if "numpy" in text.lower() or "numpy" in code:
        return "values that leave PyTorch for NumPy", "Compute them with PyTorch, or once in __init__"
    if "sparse" in text:
        return "a sparse tensor", "Use a dense one"
    if "data-dependent" in text.lower() or "DataDependent" in kind or ".item()" in text:
        return _by_values(code)
    if "specializ" in text.lower() or "constraints violated" in text.lower() or "dynamic" in text.lower():
        return "a batch size that is fixed while the model runs", "Reshape with x.shape[0] or -1"
    if "FakeTensor" in text or "INTERNAL ASSERT" in text or "__torch__" in text or kind == "Unsupported":
        return "something that PyTorch cannot export", "Rewrite the line with tensor operators of PyTorch"
    return first_line(error), "Rewrite the line with tensor operators of PyTorch"


def _by_values(code: str) -> tuple[str, str]:
    """What is wrong with a line of code that reads the values of a tensor."""
    if code.startswith("assert "):
        return "a check of a tensor's values", "Take it out of forward"
    if any(read in code for read in (".tolist()", ".item()", "int(", "float(", "range(")) and not code.startswith(
        "if "
    ):
        return "a number read from a tensor", "Keep it as a plain number, computed in __init__ or from x.shape"
    return "a decision that depends on the values of a tensor", "Use torch.where, or decide once in __init__"


def without_boxes(model: nn.Module) -> str:
    """How a detector is captured."""
    head = next((f"model.{path}" for path in ("head", "rpn.head") if _has(model, path)), "the raw outputs of its heads")
    maps = "list(model.backbone(x).values())" if _has(model, "backbone") and head.startswith("model.") else ""
    return (
        "A detector is captured without its box decoding: wrap it in a module whose forward returns "
        f"{head}{f'({maps})' if maps else ''}, and give what makes boxes of them as decode=, or as a function decode "
        "beside the callable"
    )


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def detects(output: object, error: Exception | None = None) -> bool:
    """Whether it returns boxes that were chosen, as detectors do: a dict for each image, not one for all of them."""
    rows = output if isinstance(output, list | tuple) else []
    boxes = any(isinstance(row, dict) and "boxes" in row and len(row) > 1 for row in rows)
    chosen = error is not None and any(f.name in {"nms", "batched_nms"} for f in _frames(error))
    return boxes or chosen


def where(error: BaseException) -> str:
    """The innermost source line of the user's own code, as `` at file:line: code``."""
    users = [f for f in _frames(error) if _is_users(f.filename)]
    users = [f for f in users if f.name == "forward"] or users
    if not users or users[-1].filename.endswith(("__main__.py", "/bitwright")):
        return ""
    frame = users[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f" at {frame.filename}:{frame.lineno}: {line[:LONGEST]}"


def _is_users(file: str) -> bool:
    library = file.startswith(LIBRARY) and "site-packages" not in file
    return not library and not file.startswith((OURS, TORCH, "<"))


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames = list(traceback.extract_tb(error.__traceback__))
    behind = error.__cause__ or error.__context__
    return frames if behind is None else [*frames, *traceback.extract_tb(behind.__traceback__)]


def recorded_line(node: fx.Node) -> str:
    """The user's source line that made the operator, as `` at file:line: code``."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    found = ""
    for line, code in pairwise([*lines, ""]):
        place = re.fullmatch(r'File "(.+)", line (\d+), in .*', line)
        if place and _is_users(place[1]):
            found = f" at {place[1]}:{place[2]}: {code[:LONGEST]}"
    return found


def several_inputs(names: list[str]) -> ModelError:
    """The model takes more than the image."""
    return ModelError(
        f"Expected a model of one image tensor, found {len(names)} inputs ({', '.join(names)}). Wrap it in a module "
        "that holds the others."
    )


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return line if len(line) <= LONGEST else f"{line[:LONGEST].rsplit(' ', 1)[0]} …"

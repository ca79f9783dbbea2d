"""One line for each thing that keeps a model from being captured: the user's source line, and a remedy that fits."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import torch
from torch import fx, nn

from bitwright.errors import ModelError

OURS = str(Path(__file__).parents[1])
TORCH = str(Path(torch.__file__).parent)
LONGEST = 160
"""Characters of another package's message that are shown."""

DETECTOR = (
    "A detector is captured without its box decoding: wrap it in a module whose forward returns the raw outputs of its "
    "heads, such as list(model.backbone(x).values())"
)


def cannot_run(error: Exception, images: torch.Tensor) -> ModelError:
    """The model fails on the images, without any capture."""
    said, place = first_line(error), where(error)
    if isinstance(error, TypeError) and "argument" in str(error) and not place:
        return ModelError(f"Expected a model of one image tensor ({said}). Wrap it in a module that takes one.")
    shape = "x".join(str(d) for d in images.shape[1:])
    if any(word in str(error) for word in ("list of", "dict", "str")) and isinstance(error, TypeError | ValueError):
        remedy = "Wrap it in a module whose forward takes one image tensor, [N, C, H, W]"
    elif "scalar type" in str(error) or "dtype" in str(error):
        remedy = (
            "Weights and images are float32 here: take conversions to another type, such as .half(), out of forward"
        )
    else:
        remedy = "Give the size it was trained with, for instance --input-size 224"
    return ModelError(f"The model cannot run on images of {shape} ({said}){place}. {remedy}.")


def cannot_capture(error: Exception | None, model: nn.Module, output: object) -> ModelError:
    """The model runs, and cannot be made into a graph."""
    if isinstance(error, ModelError):
        return error
    if error is None:
        return ModelError(
            "The model fixes its batch size while it runs (a shape taken as a plain number). "
            "Use x.shape[0] or -1 where it reshapes."
        )
    place = where(error)
    construct, remedy = _construct(error, place, detects(model, output, error))
    return ModelError(f"The model cannot be captured: {construct}{place}. {remedy}.")


def _construct(error: Exception, place: str, detector: bool) -> tuple[str, str]:
    text, kind = str(error), type(error).__name__
    if detector:
        return "its boxes are chosen by their values", DETECTOR
    if "numpy" in text or "numpy" in place:
        return "values that leave PyTorch for NumPy", "Compute them with PyTorch, or once in __init__"
    if "data-dependent" in text.lower() or "DataDependent" in kind or ".item()" in text:
        if any(read in place for read in (".tolist()", ".item()", "int(", "float(", "range(")):
            return "a number read from a tensor", "Keep it as a plain number, computed in __init__ or from x.shape"
        return "a decision that depends on the values of a tensor", "Use torch.where"
    if "specializ" in text.lower() or "constraints violated" in text.lower() or "dynamic" in text.lower():
        return "a batch size that is fixed while the model runs", "Reshape with x.shape[0] or -1"
    return first_line(error), "Rewrite the line with tensor operators of PyTorch"


def detects(model: nn.Module, output: object, error: Exception | None = None) -> bool:
    """Whether it returns boxes that were chosen, as detectors do: a dict for each image, not one for all of them."""
    rows = output if isinstance(output, list | tuple) else []
    boxes = any(isinstance(row, dict) and "boxes" in row and len(row) > 1 for row in rows)
    chosen = error is not None and any(f.name in {"nms", "batched_nms"} for f in _frames(error))
    return boxes or chosen


def where(error: BaseException) -> str:
    """The innermost source line of the user's own code, as `` at file:line: code``."""
    users = [f for f in _frames(error) if not f.filename.startswith((OURS, TORCH, "<"))]
    users = [f for f in users if f.name == "forward"] or users
    if not users or users[-1].filename.endswith(("__main__.py", "/bitwright")):
        return ""
    frame = users[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f" at {frame.filename}:{frame.lineno}: {line}"


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames = list(traceback.extract_tb(error.__traceback__))
    behind = error.__cause__ or error.__context__
    return frames if behind is None else [*frames, *traceback.extract_tb(behind.__traceback__)]


def recorded_line(node: fx.Node) -> str:
    """The source line that made the operator, as `` at file:line: code``."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not places:
        return ""
    file, line = lines[places[-1]].removeprefix('File "').split('", line ')
    return f" at {file}:{line.split(',')[0]}: {' '.join(lines[places[-1] + 1 : places[-1] + 2])}"


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

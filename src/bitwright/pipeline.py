"""Runs the stages of a recipe in order."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitwright.capture import Captured
from bitwright.data import Images
from bitwright.errors import BitwrightError, UsageError
from bitwright.quant.quantizer import Grid, Quantizer
from bitwright.quantized import QuantizedModel
from bitwright.recipes import Recipe
from bitwright.stages.base import Run


def run_stages(
    recipe: Recipe,
    student: QuantizedModel,
    teacher: Captured,
    images: Images,
    run: Run,
    *,
    state: Path | None = None,
    identity: str = "",
) -> QuantizedModel:
    """Applies each stage; after each, the state is kept so that an interrupted run goes on from there.

    Args:
        recipe: its stages.
        student: with quantizers that are not calibrated yet.
        teacher: the float network; never changed.
        images: without labels.
        run: seed, device, progress.
        state: folder for the checkpoint; none is kept without.
        identity: what the run depends on; a checkpoint of another identity is refused.

    Raises:
        UsageError: the checkpoint belongs to another run.
        BitwrightError: the result is not finite.
    """
    done = _restore(student, state, identity)
    for position, stage in enumerate(recipe.stages):
        if position < done:
            continue
        torch.manual_seed(run.seed + position)
        with run.timed(stage.kind):
            student = stage.run(student, teacher, images.unlabelled(), run)
        _check_finite(student)
        if state is not None:
            _keep(student, state, position + 1, identity)
    return student


def fingerprint(graph: nn.Module) -> str:
    """SHA-256 over the names and values of all stored tensors."""
    digest = hashlib.sha256()
    for name, tensor in graph.named_buffers():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_finite(student: QuantizedModel) -> None:
    for name, tensor in student.graph.named_buffers():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) and "mask" not in name:
            if torch.isneginf(tensor).any() and not torch.isnan(tensor).any():
                continue  # an attention mask
            raise BitwrightError(f"{name} is not finite after the last stage. Please report this with the command.")


def _keep(student: QuantizedModel, state: Path, done: int, identity: str) -> None:
    """Writes the checkpoint beside the last one and swaps them, so that a kill leaves one of the two."""
    state.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in student.graph.named_buffers()}
    signs = {k: m.grid.symmetric for k, m in student.graph.named_children() if isinstance(m, Quantizer)}
    header = {"done": str(done), "identity": identity, "symmetric": json.dumps(signs)}
    fresh = state / "checkpoint.new"
    save_file(tensors, fresh, metadata=header)
    fresh.replace(state / "checkpoint.safetensors")


def _restore(student: QuantizedModel, state: Path | None, identity: str) -> int:
    """Takes over the checkpoint, if there is one; how many stages it has behind it."""
    path = None if state is None else state / "checkpoint.safetensors"
    if path is None or not path.is_file():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UsageError(f"{path} is no checkpoint ({error}). Delete it, or use --force.") from error
    if header.get("identity") != identity:
        raise UsageError("The unfinished run in this folder had other settings. Repeat its command, or use --force.")
    signs = json.loads(header["symmetric"])
    for name, tensor in load_file(path).items():
        *owner, leaf = name.split(".")
        module = student.graph.get_submodule(".".join(owner))
        module._buffers[leaf] = tensor
        if isinstance(module, Quantizer):
            module.grid = Grid(module.grid.bits, signs[".".join(owner)])
    return int(header["done"])

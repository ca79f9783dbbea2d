"""What a result says of the network, of this machine and of the process that works here."""

from __future__ import annotations

import platform
import resource
import sys
from typing import Any

import torch

from bitwright import together
from bitwright._version import __version__
from bitwright.graph import ops, rewrite
from bitwright.graph.student import Student
from bitwright.quant.quantizer import BiasQuantizer, Frozen
from bitwright.run.lock import command_line
from bitwright.run.result import LayerRow


def describe_layers(model: Student) -> list[LayerRow]:
    """One row per quantized tensor, without its signal to noise."""
    rows = []
    for layer in model.layers:
        weight = None if layer.weight is None else model.quantizer(layer.weight)
        activation = None if layer.activation is None else model.quantizer(layer.activation)
        stored = layer.op == "parameter"
        described = activation if weight is None else weight
        holder = activation if stored and activation is not None else weight
        rows.append(
            LayerRow(
                name=layer.name,
                op=layer.op,
                weight_bits=None if holder is None else holder.grid.bits,
                activation_bits=None if stored or activation is None else activation.grid.bits,
                granularity="tensor" if described is None else described.granularity,
                parameters=layer.parameters,
                macs=layer.macs,
            )
        )
    return rows


def environment(device: torch.device | str, seed: int) -> dict[str, Any]:
    """Versions, machine, threads (on whose number the last bits of sums depend), seed and command.

    And how many processes share the work, where ``torchrun`` started some.
    """
    shared = {"processes": together.processes()} if together.is_shared() else {}
    return {
        "bitwright": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        **shared,
        "seed": seed,
        "command": command_line(),
    }


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def totals(model: Student) -> dict[str, int]:
    """Parameters and MACs of the whole network, for one image."""
    return {"parameters": stored_values(model), "macs": sum(x.macs for x in model.layers)}


def stored_values(model: Student) -> int:
    """Numbers that the float network stores: weights, biases, and parameters of what is not quantized."""
    read = [n for n in model.graph.graph.nodes if n.op == "get_attr"]
    names = dict.fromkeys(str(n.target) for n in read if not all(ops.RESCALES in user.meta for user in n.users))
    count = sum(rewrite.get_tensor(model.graph, name).numel() for name in names)
    used = dict.fromkeys(str(n.target) for n in model.graph.graph.nodes if n.op == "call_module")
    frozen = [m for m in (model.graph.get_submodule(key) for key in used) if isinstance(m, Frozen)]
    # layers that share a weight share its bias, of which each has integers of its own
    biases = {id(q.weight): m for m in frozen if isinstance(q := m.quantizer, BiasQuantizer)}
    weights = [m for m in frozen if not isinstance(m.quantizer, BiasQuantizer)]
    return count + sum(m.codes.numel() for m in (*weights, *biases.values()))


def sizes(model: Student) -> dict[str, int]:
    """Bytes in float, and bytes expected at the bits planned: codes, scales, zero points and what stays float."""
    quantized = 0
    for key in dict.fromkeys(layer.weight for layer in model.layers if layer.weight):
        quantizer = model.quantizer(key)
        codes, scales = 1, 1
        for extent, block in zip(quantizer.shape, quantizer.block or quantizer.shape, strict=True):
            codes, scales = codes * extent, scales * -(-extent // block)
        quantized += -(-codes * quantizer.grid.bits // 8) + 4 * scales - 4 * codes
    activations = {layer.activation for layer in model.layers if layer.activation}
    stored = stored_values(model)
    for layer in model.layers:
        if layer.op == "parameter" and layer.activation is not None:
            bits = model.quantizer(layer.activation).grid.bits
            quantized += -(-layer.parameters * bits // 8) - 4 * layer.parameters
    return {"float_bytes": 4 * stored, "expected_bytes": 4 * stored + quantized + 8 * len(activations)}

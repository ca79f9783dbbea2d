"""One record per runtime: what it executes, how files are opened and timed in it, how it rounds, what installs it.

A new runtime is a file with a record, and its name in :data:`RUNTIMES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from bitwright.errors import UsageError
from bitwright.runtimes.executorch import EXECUTORCH
from bitwright.runtimes.generic import GENERIC, GENERIC_POT
from bitwright.runtimes.onnxruntime import ONNXRUNTIME
from bitwright.runtimes.openvino import OPENVINO
from bitwright.runtimes.record import Runtime, narrowest
from bitwright.runtimes.target import FAMILIES, Target
from bitwright.runtimes.tensorrt import TENSORRT

__all__ = [
    "EXECUTORCH", "GENERIC", "GENERIC_POT", "ONNXRUNTIME", "OPENVINO", "RUNTIMES", "TENSORRT", "Runtime", "Target",
    "absent", "chosen", "running", "runtime", "target",
]  # fmt: skip

RUNTIMES = {r.name: r for r in (ONNXRUNTIME, OPENVINO, TENSORRT, EXECUTORCH, GENERIC, GENERIC_POT)}


def target(name: str) -> Target:
    """What the runtime of this name can execute.

    Raises:
        UsageError: there is none; the error lists those that exist.

    Example:
        >>> target("generic").conv_into_add
        True
    """
    if name not in RUNTIMES:
        raise UsageError(f"Expected a runtime out of {', '.join(RUNTIMES)}, found '{name}'.")
    return RUNTIMES[name].target


def runtime(name: str) -> Runtime:
    """The runtime of this name, in which files run here.

    Raises:
        UsageError: there is none; the error lists those that exist.
    """
    known = {r.name: r for r in running()}
    if name not in known:
        raise UsageError(f"Expected a runtime out of {', '.join(known)}, found '{name}'.")
    return known[name]


def running() -> list[Runtime]:
    """Those in which files run here, once they are installed."""
    return [r for r in RUNTIMES.values() if r.runs_here]


def chosen(names: Iterable[str] | None, path: Path) -> list[Runtime]:
    """Those that are asked for, or all that are installed and read the integers of an ONNX file; others are told of.

    Raises:
        UsageError: one is not installed or does not exist, or none is there.
    """
    found = [runtime(n) for n in dict.fromkeys(names)] if names else [r for r in running() if r.installed]
    for each in found or running():
        each.require()
    bits = None if names else narrowest(path)
    for each in found:
        if not names and not each.reads(bits):
            warnings.warn(
                f"{each.title} is left out, since it does not read integers of {bits} bits, which {path.name} holds.",
                stacklevel=3,
            )
    return [each for each in found if names or each.reads(bits)]


def absent() -> list[dict[str, str]]:
    """Those that are not installed, with the line that installs each, as results keep them."""
    return [{"runtime": r.name, "install": r.remedy} for r in running() if not r.installed]


def tables() -> str:
    """All targets as two tables in Markdown: weights by operator, and the rest. The documentation shows them."""
    weights = [
        "| `--runtime` | operator | bits of weights | computed in integers | one scale per |",
        "|---|---|---|---|---|",
    ]
    for each in (r.target for r in RUNTIMES.values()):
        for name in FAMILIES:
            able = each.weights(name)
            cells = (f"`{each.name}`", name, _spans(able.bits), _spans(able.integer), ", ".join(able.granularities))
            weights.append(f"| {' | '.join(cells)} |")
    others = [
        "| `--runtime` | what it is | bits of activations | of those, integer kernels read | grid | scales | "
        "one with a convolution | concatenated tensors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in (r.target for r in RUNTIMES.values()):
        facts = (
            f"`{each.name}`",
            each.title,
            _spans(each.activation_bits),
            _spans(each.integer_inputs),
            " or ".join(each.activation_grids) + ("" if each.unsigned else ", with a sign"),
            "powers of two" if each.power_of_two_scales else "any",
            "any activation, additions" if each.conv_into_add else "activations that clamp",
            "share a scale" if each.concat_shares_scale else "have their own",
        )
        others.append(f"| {' | '.join(facts)} |")
    return "\n".join(weights) + "\n\n" + "\n".join(others) + "\n"


def _spans(bits: tuple[int, ...]) -> str:
    """``2 to 8, 16``."""
    runs: list[list[int]] = []
    for b in bits:
        if runs and b == runs[-1][-1] + 1:
            runs[-1].append(b)
        else:
            runs.append([b])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs) or "none"

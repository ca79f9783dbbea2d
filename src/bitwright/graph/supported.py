"""Refuses what a target cannot run, before the long work, and names the nearest that it can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from bitwright.errors import UsageError
from bitwright.graph import ops
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.runtimes.target import SYMMETRIC, nearest_bits

if TYPE_CHECKING:
    from bitwright.graph.layer import Layer

MOST_FIXES = 4


@dataclass(frozen=True)
class _Problem:
    layer: str
    has: str
    found: str
    fix: str
    """The arguments that decide, with what the runtime has."""


def check_supported(student: nn.Module, layers: list[Layer], scheme: Scheme) -> None:
    """Compares every quantizer with what the scheme's target has.

    Args:
        student: with quantizers, calibrated or not.
        layers: its description.
        scheme: whose target it is, and whose rules or plan may be at fault.

    Raises:
        UsageError: the target lacks bits, a granularity or a grid; with the settings that come nearest.
    """
    problems = [*_grid(scheme), *_weights(student, layers, scheme), *_activations(student, layers, scheme)]
    if not problems:
        return
    first, fixes = problems[0], list(dict.fromkeys(p.fix for p in problems))
    others = len({p.layer for p in problems} - {first.layer})
    where = f"'{first.layer}'{f' and {others} more' if others else ''}" if first.layer else "the scheme"
    more = f" and {len(fixes) - MOST_FIXES} more" if len(fixes) > MOST_FIXES else ""
    raise UsageError(
        f"The runtime {scheme.runtime} has {first.has}, found {first.found} in {where}. "
        f"The nearest that it runs: {' '.join(fixes[:MOST_FIXES])}{more}"
    )


def _grid(scheme: Scheme) -> Iterator[_Problem]:
    grids = scheme.target.activation_grids
    if scheme.activations is not None and scheme.activation_grid not in grids:
        fix = f"activation_grid='{grids[0]}' (\"symmetric\": {str(grids[0] == SYMMETRIC).lower()} in a plan)"
        yield _Problem("", f"{grids[0]} activations only", scheme.activation_grid, fix)


def _weights(student: nn.Module, layers: list[Layer], scheme: Scheme) -> Iterator[_Problem]:
    for layer in layers:
        if layer.weight is None or layer.op not in ops.LINEAR:
            continue
        quantizer, able = student.get_submodule(layer.weight), scheme.target.weights(layer.op)
        assert isinstance(quantizer, Quantizer)
        bits, kind = quantizer.grid.bits, quantizer.granularity
        if bits not in able.bits:
            fix = _bits_fix(scheme, [layer.name], "weights", nearest_bits(bits, able.bits))
            yield _Problem(layer.name, f"weights of {_listed(able.bits)} bits", str(bits), fix)
        if kind not in able.granularities:
            has = f"one weight scale per {_listed(able.granularities)}"
            yield _Problem(layer.name, has, f"one per {kind}", _granularity_fix(scheme, layer.name))
        elif kind == "group" and not scheme.target.ragged_groups and _ragged(quantizer):
            assert quantizer.block is not None
            has, wide = "groups that divide the input channels", quantizer.shape[1]
            found = f"groups of {quantizer.block[1]} for {wide}"
            yield _Problem(layer.name, has, found, _granularity_fix(scheme, layer.name))


def _activations(student: nn.Module, layers: list[Layer], scheme: Scheme) -> Iterator[_Problem]:
    possible = scheme.target.activation_bits
    for layer in layers:
        if layer.activation is None or layer.end != layer.node:
            continue
        quantizer = student.get_submodule(layer.activation)
        assert isinstance(quantizer, Quantizer)
        bits = quantizer.grid.bits
        if bits in possible:
            continue
        near = nearest_bits(bits, possible)
        if quantizer.role == "parameter" and layer.name not in scheme.plan:
            fix = f"parameter_bits={near}"
        else:
            members = [x.name for x in layers if x.activation == layer.activation]
            fix = _bits_fix(scheme, members, "activations", near)
        yield _Problem(layer.name, f"activations of {_listed(possible)} bits", str(bits), fix)


def _bits_fix(scheme: Scheme, names: list[str], what: str, bits: int) -> str:
    """The option that decided, with other bits: a rule, an entry of the plan (a rule comes after it), the default."""
    rules = [r for r in scheme.rules if getattr(r, what) is not None and any(fnmatchcase(n, r.pattern) for n in names)]
    if rules:
        return f"rules=['{rules[-1].pattern}={what[0]}{bits}']"
    planned = next((n for n in names if getattr(scheme.plan.get(n), what, None) is not None), None)
    return f"{what}={bits}" if planned is None else f"rules=['{planned}={what[0]}{bits}']"


def _granularity_fix(scheme: Scheme, layer: str) -> str:
    planned = scheme.plan.get(layer)
    if planned is not None and planned.granularity is not None:
        return f'"granularity": "channel" for \'{layer}\' in the plan'
    return "granularity='channel'"


def _ragged(quantizer: Quantizer) -> bool:
    return quantizer.block is not None and quantizer.shape[1] % quantizer.block[1] > 0


def _listed(values: tuple[object, ...]) -> str:
    """``2, 4 or 8``."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last

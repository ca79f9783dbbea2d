"""`bitwright inspect`: every tensor that is or is not quantized, and why."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import fx

from bitwright import api, words
from bitwright.cli import tables
from bitwright.cli.calls import InspectCall
from bitwright.cli.options import ImageOptions
from bitwright.cli.sources import blank_images, is_run, load_run
from bitwright.errors import UsageError, quiet_libraries
from bitwright.given.models import load_model
from bitwright.graph import rewrite
from bitwright.graph.blocks import find_blocks
from bitwright.graph.fold import Unfolded
from bitwright.graph.student import Student
from bitwright.run.about import describe_layers, describe_unquantized, sizes, totals
from bitwright.run.result import LayerRow, RunResult
from bitwright.terminal import Terminal


def inspect(call: InspectCall, terminal: Terminal) -> None:
    """Shows a run, or what would become of a float network.

    Raises:
        UsageError: there is no such network or run, or a run is to be shown with a plan.
    """
    if is_run(call.model) or Path(call.model).expanduser().is_dir():
        if call.bits.plan is not None:
            raise UsageError(f"{call.model} is a run, which has its bits already. Give the float network with --plan.")
        run = load_run(call.model)
        rows = RunResult.read(run.result, call.model).layers if "layers" in run.result else None
        found, shown = _described(run, call.model, rows, call.blocks)
    else:
        terminal.begin("Capturing the network")
        network = load_model(call.model, **ImageOptions(call.input_size).preprocessing)
        scheme, plan = call.bits.scheme(call.weights), call.bits.planned
        with quiet_libraries():
            model = api.preview(network, blank_images(network), scheme=scheme, plan=plan, output=call.output)
        terminal.finish()
        found, shown = _described(model, network.name, None, call.blocks)
    terminal.result(found)
    terminal.show(*shown)


def _described(
    model: Student, name: str, recorded: list[LayerRow] | None, blocks: bool
) -> tuple[dict[str, Any], list[RenderableType]]:
    found, shown = facts(model, name, recorded), views(model, name, recorded)
    if blocks:
        rows = block_rows(model)
        found["blocks"] = [asdict(row) for row in rows]
        shown.insert(-1, _block_table(rows))
    return found, shown


def facts(model: Student, name: str, recorded: list[LayerRow] | None = None) -> dict[str, Any]:
    """Names as in ``result.json``."""
    size = sizes(model)
    return {
        "model": {"name": name, **totals(model)},
        "bits": model.scheme.described_bits(),
        "size": model.result.get("size") or size,
        "layers": [asdict(row) for row in (describe_layers(model) if recorded is None else recorded)],
        "unquantized": describe_unquantized(model),
        "unfolded": [asdict(u) for u in unfolded(model)],
    }


def unfolded(model: Student) -> list[Unfolded]:
    """Batch norms that remain, with the reason."""
    return model.teacher.unfolded if model.teacher is not None else RunResult.read(model.result).unfolded or []


def views(model: Student, name: str, recorded: list[LayerRow] | None = None) -> list[RenderableType]:
    """The same as tables."""
    shown: list[RenderableType] = [*tables.structure(model, recorded)]
    left = unfolded(model)
    if left:
        made = tables.table("batch norm", "why it is not folded into a layer", title="Not folded")
        for item in left:
            made.add_row(item.name, item.reason)
        shown.append(made)
    return [*shown, tables.summary(model, name)]


@dataclass(frozen=True)
class BlockRow:
    """A block of the network: what it is, its layers, and what they store and compute."""

    name: str
    kind: str
    layers: tuple[str, ...]
    parameters: int
    macs: int


def block_rows(model: Student) -> list[BlockRow]:
    """The network's blocks, as the prepared float network or, of a run, the quantized one shows them."""
    if model.teacher is not None:
        graph = model.teacher.graph
    else:
        graph = fx.GraphModule(model.graph, copy.deepcopy(model.graph.graph))
        rewrite.propagate(graph, torch.zeros(2, *model.input_shape))
    layers = {layer.node: layer for layer in model.layers}
    rows = []
    for block in find_blocks(graph):
        members = [layers[name] for name in block.nodes]
        stored, computed = sum(x.parameters for x in members), sum(x.macs for x in members)
        rows.append(BlockRow(block.name, block.kind, block.layers, stored, computed))
    return rows


def _block_table(rows: list[BlockRow]) -> RenderableType:
    made = tables.table("block", "kind", ">layers", ">parameters", ">MACs", title="Blocks")
    for row in rows:
        made.add_row(row.name, row.kind, str(len(row.layers)), words.scaled(row.parameters), words.scaled(row.macs))
    return made

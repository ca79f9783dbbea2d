"""`bitwright inspect`: every tensor that is or is not quantized, and why."""

from __future__ import annotations

import copy
from dataclasses import asdict
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
from bitwright.graph.student import Student
from bitwright.run import folder as run_folder
from bitwright.run.result import LayerRow, describe_layers, describe_unquantized, totals
from bitwright.terminal import Terminal

Rows = list[dict[str, Any]]


def inspect(call: InspectCall, terminal: Terminal) -> None:
    """Shows a run, or what would become of a float network.

    Raises:
        UsageError: there is no such network or run, or a run is to be shown with a plan.
    """
    if is_run(call.model) or Path(call.model).expanduser().is_dir():
        if call.bits.plan is not None:
            raise UsageError(f"{call.model} is a run, which has its bits already. Give the float network with --plan.")
        run = load_run(call.model)
        with run_folder.shown(call.model):
            recorded = run.result.get("layers")
            rows = None if recorded is None else [LayerRow.read(row) for row in recorded]
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
        found["blocks"] = block_rows(model)
        shown.insert(-1, _block_table(found["blocks"]))
    return found, shown


def facts(model: Student, name: str, recorded: list[LayerRow] | None = None) -> dict[str, Any]:
    """Names as in ``result.json``."""
    size = tables.sizes(model)
    return {
        "model": {"name": name, **totals(model)},
        "bits": model.scheme.described_bits(),
        "size": model.result.get("size") or size,
        "layers": [asdict(row) for row in (describe_layers(model) if recorded is None else recorded)],
        "unquantized": describe_unquantized(model),
        "unfolded": unfolded(model),
    }


def unfolded(model: Student) -> list[dict[str, Any]]:
    """Batch norms that remain, with the reason."""
    if model.teacher is not None:
        return [vars(u) for u in model.teacher.unfolded]
    return list(model.result.get("unfolded", []))


def views(model: Student, name: str, recorded: list[LayerRow] | None = None) -> list[RenderableType]:
    """The same as tables."""
    shown: list[RenderableType] = [*tables.structure(model, recorded)]
    left = unfolded(model)
    if left:
        made = tables.table("batch norm", "why it is not folded into a layer", title="Not folded")
        for item in left:
            made.add_row(str(item["name"]), str(item["reason"]))
        shown.append(made)
    return [*shown, tables.summary(model, name)]


def block_rows(model: Student) -> Rows:
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
        row = {k: v for k, v in asdict(block).items() if k not in {"nodes", "closing"}}
        rows.append(row | {"parameters": sum(x.parameters for x in members), "macs": sum(x.macs for x in members)})
    return rows


def _block_table(rows: Rows) -> RenderableType:
    made = tables.table("block", "kind", ">layers", ">parameters", ">MACs", title="Blocks")
    for row in rows:
        sizes = words.scaled(row["parameters"]), words.scaled(row["macs"])
        made.add_row(row["name"], row["kind"], str(len(row["layers"])), *sizes)
    return made

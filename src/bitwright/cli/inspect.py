"""`bitwright inspect`: every tensor that is or is not quantized, and why.

Of a run it reads the files; PyTorch is imported for a network, and for the blocks of a run.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from bitwright import words
from bitwright.cli import tables
from bitwright.cli.calls import InspectCall
from bitwright.cli.options import ImageOptions
from bitwright.cli.tables import NetworkShape
from bitwright.errors import UsageError, quiet_libraries
from bitwright.run import folder as run_folder
from bitwright.run.result import RunResult
from bitwright.terminal import Terminal

if TYPE_CHECKING:
    from bitwright.graph.student import Student


def inspect(call: InspectCall, terminal: Terminal) -> None:
    """Shows a run, or what would become of a float network.

    Raises:
        UsageError: there is no such network or run, or a run is to be shown with a plan.
    """
    path = Path(call.model).expanduser()
    is_run = run_folder.holds_run(path)
    if (is_run or path.is_dir()) and call.bits.plan is not None:
        raise UsageError(f"{call.model} is a run, which has its bits already. Give the float network with --plan.")
    recorded = _recorded(path, call.model) if is_run and not call.blocks else None
    model = None
    if recorded is None:
        model, recorded = _loaded(call, terminal) if is_run or path.is_dir() else _captured(call, terminal)
    found, shown = facts(recorded), views(recorded)
    if call.blocks and model is not None:
        rows = block_rows(model)
        found["blocks"] = [asdict(row) for row in rows]
        shown.insert(-1, _block_table(rows))
    terminal.result(found)
    terminal.show(*shown)


def _recorded(path: Path, name: str) -> NetworkShape | None:
    """A run from its ``result.json``; None where there is none beside its network.

    Raises:
        UsageError: the network is damaged, or the result is.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / run_folder.RESULT).is_file() or (path.is_file() and path.name != run_folder.MODEL):
        return None
    result = run_folder.read_result(folder)
    run_folder.check_file(folder, run_folder.MODEL, result.files, "Copy the run again, or quantize again.")
    found, bits = result.model, result.bits
    if found.parameters is None or found.macs is None or bits is None or result.unquantized is None:
        return None
    whole = (found.parameters, found.macs, bits, result.size)
    return NetworkShape(name, *whole, result.layers, result.unquantized, result.unfolded or [])


def _loaded(call: InspectCall, terminal: Terminal) -> tuple[Student, NetworkShape]:
    """A run that has to be read as a network."""
    from bitwright.cli.sources import load_run

    terminal.begin("Loading PyTorch")
    run = load_run(call.model)
    rows = RunResult.read(run.result, call.model).layers if "layers" in run.result else None
    found = network_shape(run, call.model)
    return run, found if rows is None else replace(found, layers=rows)


def _captured(call: InspectCall, terminal: Terminal) -> tuple[Student, NetworkShape]:
    """What would become of a float network."""
    terminal.begin("Loading PyTorch")
    from bitwright import api
    from bitwright.cli.sources import blank_images
    from bitwright.given.models import load_model

    terminal.begin("Capturing the network")
    network = load_model(call.model, **ImageOptions(call.input_size).preprocessing)
    scheme, plan = call.bits.scheme(call.weights), call.bits.planned
    with quiet_libraries():
        model = api.preview(network, blank_images(network), scheme=scheme, plan=plan, output=call.output)
    terminal.finish()
    return model, network_shape(model, network.name)


def network_shape(model: Student, name: str) -> NetworkShape:
    """What a network's graph says of it."""
    from bitwright.run.about import describe_layers, sizes, totals

    unfolded = model.teacher.unfolded if model.teacher is not None else RunResult.read(model.result).unfolded
    return NetworkShape(
        name,
        **totals(model),
        bits=model.scheme.described_bits(),
        size=model.result.get("size") or sizes(model),
        layers=describe_layers(model),
        unquantized=model.unquantized,
        unfolded=unfolded or [],
    )


def facts(found: NetworkShape) -> dict[str, Any]:
    """Names as in ``result.json``."""
    return {
        "model": {"name": found.name, "parameters": found.parameters, "macs": found.macs},
        "bits": dict(found.bits),
        "size": dict(found.size),
        "layers": [asdict(row) for row in found.layers],
        "unquantized": [asdict(u) for u in found.unquantized],
        "unfolded": [asdict(u) for u in found.unfolded],
    }


def views(found: NetworkShape) -> list[RenderableType]:
    """The same as tables."""
    shown: list[RenderableType] = [*tables.structure(found)]
    if found.unfolded:
        made = tables.table("batch norm", "why it is not folded into a layer", title="Not folded")
        for item in found.unfolded:
            made.add_row(item.name, item.reason)
        shown.append(made)
    return [*shown, tables.summary(found)]


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
    import torch
    from torch import fx

    from bitwright.graph import rewrite
    from bitwright.graph.blocks import find_blocks

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

"""`bitwright inspect`: every tensor that is or is not quantized, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import RenderableType

from bitwright import api
from bitwright.commands import tables
from bitwright.commands.sources import Settings, blank_images, is_run, load_run
from bitwright.models import load_model
from bitwright.quant.scheme import Scheme
from bitwright.quantized import QuantizedModel
from bitwright.result import describe_unquantized, totals
from bitwright.terminal import Terminal, quiet_libraries

Rows = list[dict[str, Any]]


def inspect(
    model: str, *, scheme: Scheme, output: str | None, settings: Settings, terminal: Terminal
) -> tuple[dict[str, Any], list[RenderableType]]:
    """Looks at a run, or at what would become of a float network.

    Returns:
        The facts as JSON keeps them, and as tables.
    """
    if is_run(model) or Path(model).expanduser().is_dir():
        run = load_run(model)
        return facts(run, model, run.result.get("layers")), views(run, model, run.result.get("layers"))
    terminal.begin("Capturing the network")
    network = load_model(model, **settings)
    with quiet_libraries():
        planned = api.preview(network, blank_images(network), scheme=scheme, output=output)
    terminal.finish()
    return facts(planned, network.name), views(planned, network.name)


def facts(model: QuantizedModel, name: str, recorded: Rows | None = None) -> dict[str, Any]:
    """Names as in ``result.json``."""
    size = tables.sizes(model)
    return {
        "model": {"name": name, **totals(model)},
        "bits": {"weights": model.scheme.weights, "activations": model.scheme.activations},
        "size": model.result.get("size") or size,
        "layers": tables.layer_rows(model) if recorded is None else recorded,
        "unquantized": describe_unquantized(model),
        "unfolded": unfolded(model),
    }


def unfolded(model: QuantizedModel) -> list[dict[str, Any]]:
    """Batch norms that remain, with the reason."""
    if model.teacher is not None:
        return [vars(u) for u in model.teacher.unfolded]
    return list(model.result.get("unfolded", []))


def views(model: QuantizedModel, name: str, recorded: Rows | None = None) -> list[RenderableType]:
    """The same as tables."""
    shown: list[RenderableType] = [*tables.structure(model, recorded)]
    left = unfolded(model)
    if left:
        made = tables.table("batch norm", "why it is not folded into a layer", title="Not folded")
        for item in left:
            made.add_row(str(item["name"]), str(item["reason"]))
        shown.append(made)
    return [*shown, tables.summary(model, name)]

"""The page of ``bitwright sensitivity``: where the curvature of a network lies, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright import words
from bitwright.quant.scheme import escaped
from bitwright.report.frame import Section, document, paragraph, versions
from bitwright.report.markup import Child, tag
from bitwright.report.panels import Panel, Series, colour, single
from bitwright.report.tables import TableCell, page_table
from bitwright.run.files import write_json, write_text
from bitwright.run.result import RunNetwork, UsedImages, read_as
from bitwright.sensitivity.report import LayerCurvature, MeasuredCurvature

DECADES = 1e8
"""The density is shown down to its peak over this."""


@dataclass(frozen=True)
class PageSettings:
    """What a page says of the settings: the bits that layers are ranked at, Lanczos steps, and what was measured."""

    bits: int
    steps: int
    meaning: str


@dataclass(frozen=True, kw_only=True)
class SensitivityRecord(MeasuredCurvature):
    """What ``sensitivity.json`` holds, as far as it is shown."""

    model: RunNetwork
    data: UsedImages
    settings: PageSettings
    bitwright: str
    torch: str
    sources: dict[str, Any] | None = None
    """Where network and images are, and how these are read; None where nobody says so."""


def write_sensitivity(found: Mapping[str, Any], folder: Path) -> tuple[SensitivityRecord, list[Path]]:
    """Writes ``sensitivity.json`` and ``sensitivity.html``; each is whole, or what it was before."""
    paths, record = [folder / "sensitivity.json", folder / "sensitivity.html"], read_as(SensitivityRecord, found)
    write_json(paths[0], found)
    write_text(paths[1], sensitivity_page(record))
    return record, paths


def panels(found: SensitivityRecord) -> dict[str, Panel]:
    """Predicted loss, mean trace and top eigenvalue along the layers, and the network's density, by their titles."""
    layers, density = found.layers, found.network.density
    errors = [r.trace_error / r.parameters for r in layers]
    made = {
        f"Predicted loss at {found.settings.bits} bits, each layer alone": _bars(
            layers, [r.predicted_loss for r in layers], 0
        ),
        "Mean of the trace over the layer's weights, with its standard error": _bars(
            layers, [r.mean_trace for r in layers], 1, errors
        ),
    }
    if density is not None:
        made["Largest eigenvalue of the layer"] = _bars(layers, [r.eigenvalues[0] for r in layers], 2)
        line = Series(density["eigenvalue"], density["density"], colour(3), ("line",))
        peak = max(*density["density"], 1e-300)
        made["Spectral density of the network"] = Panel(
            (line,), "eigenvalue", "density", y_log=True, least=peak / DECADES, most=3 * peak
        )
    return made


def _bars(layers: Sequence[LayerCurvature], values: Sequence[float], at: int, errors: Sequence[float] = ()) -> Panel:
    """A bar for each layer as high as the value's size, grey where it is negative."""
    titles = [f"{i}. {r.name}: {v:.3g}" for i, (r, v) in enumerate(zip(layers, values, strict=True), 1)]
    drawn = []
    for look, negative in ((colour(at), False), ("float", True)):
        own = [i for i, v in enumerate(values) if v != 0 and (v < 0) == negative]
        drawn.append(
            Series(
                [i + 1 for i in own],
                [abs(values[i]) for i in own],
                look,
                ("bar",),
                titles=[titles[i] for i in own],
                ends=[(abs(values[i]) - errors[i], abs(values[i]) + errors[i]) for i in own] if errors else (),
            )
        )
    return Panel(tuple(drawn), "layer, in order", y_log=True)


def sensitivity_verdict(found: SensitivityRecord) -> list[str]:
    """The layers that matter, in sentences, and what to do about them."""
    shares = {r.name: r.share for r in found.layers}
    matter, bits = found.matter, found.settings.bits
    if not matter:
        return ["No layer's weights matter to the outputs, as far as second derivatives can tell."]
    listed = ", ".join(f"{name} ({100 * shares[name]:.0f} %)" for name in matter[:10])
    more = f" and {len(matter) - 10} more" if len(matter) > 10 else ""
    together = 100 * sum(shares[name] for name in matter)
    said = [
        f"At {bits} bits, {len(matter)} of {len(shares)} layers make{'s' * (len(matter) == 1)} up {together:.0f} % of "
        "the predicted loss: "
        f"{listed}{more}.",
    ]
    if bits < 8:
        said.append(f"To give the worst of them more bits: {_with_more_bits(found)}")
    return [*said, *_pruned(found), *found.notes]


def _with_more_bits(found: SensitivityRecord) -> str:
    """The command that quantizes with 8 bits in the layers that matter most."""
    rules = [word for name in found.matter[:3] for word in ("--rule", f"{escaped(name)}=w8")]
    about = found.sources or {}
    given = {**(about.get("preprocessing") or {}), "input_key": about.get("input_key"), "weights": found.settings.bits}
    network = [str(about.get("model", "MODEL")), str(about.get("images", "IMAGES"))]
    return words.typed("bitwright", "quantize", *network, *words.as_options(given), *rules)


def _pruned(found: SensitivityRecord) -> list[str]:
    """What HAP would prune, and the layers that would give most of it."""
    rows = found.channels
    if not rows:
        return []
    count, total = sum(len(r.pruned) for r in rows), sum(len(r.scores) for r in rows)
    most = sorted((r for r in rows if r.pruned), key=lambda r: -len(r.pruned) / len(r.scores))[:5]
    listed = ", ".join(f"{r.name} ({len(r.pruned)} of {len(r.scores)})" for r in most)
    cost = sum(r.predicted_loss for r in rows)
    return [
        f"HAP would prune {count} of {total} channels at a predicted loss of {cost:.2g}"
        f"{', most of all in ' + listed if listed else ''}; nothing was pruned."
    ]


def sensitivity_page(found: SensitivityRecord) -> str:
    """The page: what it says, the charts, a table of the layers."""
    name, settings = found.model.name, found.settings
    under = f"{settings.meaning}; {found.data.count} images"
    charts = [single(made, tag("b", said)) for said, made in panels(found).items()]
    lead = paragraph("A grey bar is negative and shows its size. Point at a bar for its name.")
    rows = [[TableCell(said, v) for said, v in zip(layer_cells(r), _values(r), strict=True)] for r in ranked(found)]
    heads = [h if h == "layer" else f">{h}" for h in HEADINGS]
    sections = [
        Section("depth", "Along the network", [lead, charts]),
        Section("layers", "Every layer", page_table("The worst first", heads, rows, sortable=True, name="layer-table")),
        _channels(found),
    ]
    foot = (
        "predicted loss: half the mean of the trace times the squared rounding error (HAWQ-V2, arXiv:1911.03852). "
        f"Eigenvalues and density: Lanczos with {settings.steps} steps at most (arXiv:1912.07145). "
        f"{versions(vars(found))}"
    )
    title = f"sensitivity of {name} - bitwright"
    return document(title, f"Sensitivity of {name}", under, sensitivity_verdict(found), sections, foot=foot)


def _values(row: LayerCurvature) -> list[float | None]:
    """What a layer's cells are sorted by."""
    top = row.eigenvalues[0] if row.eigenvalues else None
    return [None, row.parameters, row.trace, row.mean_trace, top, row.predicted_loss, row.share]


def _channels(found: SensitivityRecord) -> Section | None:
    """The channels that HAP's score puts last, where it was asked for."""
    rows = [
        [r.name, ", ".join(map(str, r.least)), f"{len(r.pruned)} of {len(r.scores)}", f"{r.predicted_loss:.3g}"]
        for r in found.channels or []
    ]
    heads = ["layer", "least important channels", ">would be pruned", ">predicted loss"]
    made: Child = page_table("By their share of the predicted loss", heads, rows)
    return Section("channels", "Channels (HAP, arXiv:2101.08940)", made) if rows else None


HEADINGS = ("layer", "parameters", "trace", "mean trace", "top eigenvalue", "predicted loss", "share")


def ranked(found: SensitivityRecord) -> list[LayerCurvature]:
    """Rows of the layers, the worst first."""
    return sorted(found.layers, key=lambda r: -r.predicted_loss)


def layer_cells(row: LayerCurvature) -> list[str]:
    """A layer's row under :data:`HEADINGS`.

    Example:
        >>> layer_cells(LayerCurvature("a", 9, 1.5, 0.1, 1 / 6, [0.5], [0.0], None, 0.02, 0.25))
        ['a', '9', '1.5 ± 0.1', '0.167', '0.5', '0.02', '25.0 %']
    """
    return [
        row.name,
        str(row.parameters),
        f"{row.trace:.3g} ± {row.trace_error:.1g}",
        f"{row.mean_trace:.3g}",
        f"{row.eigenvalues[0]:.3g}" if row.eigenvalues else "-",
        f"{row.predicted_loss:.3g}",
        f"{100 * row.share:.1f} %",
    ]

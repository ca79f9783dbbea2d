"""`bitwright export`: a run as a file for a runtime, checked in that runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bitwright import run_folder
from bitwright.commands import tables
from bitwright.commands.sources import Settings, float_network, images_at, load_run
from bitwright.data import Images
from bitwright.errors import BitwrightError, UsageError
from bitwright.export.parity import export_checked
from bitwright.models import Model
from bitwright.quantized import QuantizedModel
from bitwright.terminal import Terminal, quiet_libraries

FORMATS = ("onnx",)


def export(
    run: str,
    *,
    to: str,
    images: str | None,
    out: Path | None,
    force: bool,
    skip_unreadable: bool,
    settings: Settings,
    samples: int,
    terminal: Terminal,
) -> dict[str, Any]:
    """Writes ``model.onnx`` into the run folder (or to ``out``) after the parity check on real images.

    Returns:
        ``file``, ``onnx_bytes`` and ``parity``.

    Raises:
        UsageError: another format, no images for the check, or a target that cannot be written.
        ParityError: the file computes something else than the simulation.
    """
    if to not in FORMATS:
        raise UsageError(f"Expected a format out of {', '.join(FORMATS)}, found '{to}'.")
    model = load_run(run)
    folder = Path(run).expanduser() if Path(run).expanduser().is_dir() else Path(run).expanduser().parent
    path = (out or folder / run_folder.ONNX).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"Expected a file in an existing folder as --out, found {path}.")
    terminal.begin("Opening the images")
    found = run_images(model, images, skip_unreadable, settings)
    terminal.begin("Writing ONNX and checking it in ONNX Runtime")
    partial = path.with_name(f".{path.name}.partial")
    recorded = dict(model.result.get("model", {}))
    model.result["model"] = {k: v for k, v in recorded.items() if k not in {"reference", "settings"}}
    try:
        with quiet_libraries():
            parity = export_checked(model, partial, found, force=force, count=samples)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}). Choose another --out.") from error
    finally:
        partial.unlink(missing_ok=True)
    terminal.finish()
    size = path.stat().st_size
    if out is None:
        _record(folder / run_folder.RESULT, parity.to_dict(), size)
    return {"file": str(path), "onnx_bytes": size, "parity": parity.to_dict()}


def run_images(
    model: QuantizedModel, source: str | None, skip_unreadable: bool, settings: Settings, how: str = "--images"
) -> Images:
    """The images named, or else those that the run was evaluated on, or calibrated.

    Raises:
        UsageError: there are none any more; others are given as ``how`` says.
    """
    data = model.result.get("data", {})
    recorded = (data.get("evaluation") or {}).get("source") or data.get("calibration", {}).get("source")
    source = source or recorded
    if source is None:
        raise UsageError(f"The check of the exported file needs a few images. Give {how}.")
    network: Model | None = Model(model, "", model.preprocessing) if model.preprocessing is not None else None
    if network is None and not settings and not source.endswith(".npz"):
        network = float_network(model, None, settings)
    try:
        return images_at(source, network, skip_unreadable=skip_unreadable, settings=settings)
    except BitwrightError as error:
        if source is recorded:
            raise UsageError(
                f"The images of the run are not where they were ({error}). Give others with {how}."
            ) from error
        raise


def _record(path: Path, parity: dict[str, Any], size: int) -> None:
    """Into the run's ``result.json``, so that it tells of the file that lies beside it."""
    if not path.is_file():
        return
    result = json.loads(path.read_text())
    result["parity"] = parity
    result.setdefault("size", {})["onnx_bytes"] = size
    result["files"] = {**result.get("files", {}), **run_folder.checksums(path.parent)}
    fresh = path.with_name(f".{path.name}.partial")
    fresh.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    fresh.replace(path)


def table(found: dict[str, Any]) -> Table:
    """What the check found, for people."""
    parity, whole = found["parity"], found["parity"]["optimized"]
    made = tables.table("", ">", title=f"{found['file']}, {tables.bytes_text(found['onnx_bytes'])}")
    made.add_row("runtime", parity["runtime"])
    made.add_row("images", str(parity["images"]))
    worst = parity["worst_layer"]
    share = 100 * worst["differing_fraction"]
    made.add_row(
        "layer that differs most", f"{worst['name']}: {share:.4f} % of its values" if share else "none differs"
    )
    for what, figures in (("optimisations off", parity), ("optimisations on", whole)):
        spread = figures["mean_abs"] / figures["range"] if figures["range"] else 0.0
        made.add_row(f"mean difference, {what}", f"{100 * spread:.3f} % of the output's range")
        if figures["agreement"] is not None:
            made.add_row(f"same answer, {what}", tables.percent(figures["agreement"]))
    made.add_row("verdict", tables.parity_text(parity))
    return made

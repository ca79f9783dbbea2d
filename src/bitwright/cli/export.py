"""`bitwright export`: a run as a file for a runtime, checked in that runtime."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from bitwright import words
from bitwright.cli import tables
from bitwright.cli.calls import ExportCall
from bitwright.cli.options import ImageOptions
from bitwright.cli.sources import float_network, images_at, load_run, with_regions
from bitwright.errors import BitwrightError, UsageError, quiet_libraries
from bitwright.export.formats import named, write_format
from bitwright.export.verdict import OutputParity, Parity
from bitwright.given.images import Images
from bitwright.given.models import Model
from bitwright.given.text import read_json, short
from bitwright.graph.student import Student
from bitwright.run import folder as run_folder
from bitwright.run.files import cannot_write, target_file, write_json
from bitwright.run.result import RunResult
from bitwright.terminal import Terminal

OPTIMISED = frozenset({"onnx", "openvino"})
"""Formats whose check looks at the runtime's optimisations apart."""


def export(call: ExportCall, terminal: Terminal) -> None:
    """Writes the file and shows what its check found."""
    made = _exported(call.run, call, terminal)
    terminal.result({**made.to_dict(), "warnings": terminal.warnings})
    terminal.show(parity_table(made))


class Exported(NamedTuple):
    """A file that was written, the bytes of all files of its format together, and what its check found."""

    file: Path
    format: str
    bytes: int
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        about = {**self._asdict(), "file": str(self.file), "parity": asdict(self.parity)}
        return about | {"onnx_bytes": self.bytes} if self.format == "onnx" else about


@run_folder.exclusive
def _exported(run: str, call: ExportCall, terminal: Terminal) -> Exported:
    """Writes the file of a format into the run folder (or to ``--out``) after the parity check on real images.

    Raises:
        UsageError: another format, no images for the check, or what the runtime lacks.
        ParityError: the file computes something else than the simulation.
    """
    to, made = call.to, named(call.to)
    model = load_run(run)
    folder = Path(run).expanduser() if Path(run).expanduser().is_dir() else Path(run).expanduser().parent
    path = (call.out or folder / made.files[0]).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"Expected a file in an existing folder as --out, found {path}.")
    if call.out is not None:
        path = target_file(path, made.suffix, force=call.force)
        _check_run_of(path, folder, force=call.force)
        for beside in made.files[1:]:
            target_file(path.with_suffix(Path(beside).suffix), Path(beside).suffix, force=call.force)
    if made.check is not None:
        made.check(model)
    terminal.begin("Opening the images")
    images = run_images(model, call.images, call.reading)
    terminal.begin(f"Writing {to} and checking it in {made.where}")
    try:
        with quiet_libraries():
            parity, files = write_format(model, to, path, images, force=call.force, count=call.samples)
    except OSError as error:
        raise cannot_write(path, error) from error
    terminal.finish()
    size = sum(file.stat().st_size for file in files)
    if path.resolve() == (folder / made.files[0]).resolve():
        _record(folder / run_folder.RESULT, to, parity, size)
    return Exported(path, to, size, parity)


def _check_run_of(path: Path, folder: Path, *, force: bool) -> None:
    """Keeps what a run says of itself, and unless ``force`` the files of runs."""
    inside = (path.parent / run_folder.RESULT).is_file()
    if inside and path.name in run_folder.RECORDS:
        raise UsageError(f"{path} is a part of the run's record. Choose another name.")
    if inside and path.is_file() and not force:
        whose = "the run itself, which --out may not replace" if path.parent == folder.resolve() else "another run"
        raise UsageError(f"{path} belongs to {whose}. Choose another name, or --force.")


def run_images(model: Student, source: str | None, reading: ImageOptions, how: str = "--images") -> Images:
    """The images named, or else those that the run was evaluated on, or calibrated.

    Raises:
        UsageError: there are none any more; others are given as ``how`` says.
    """
    result = RunResult.read(model.result)
    used = result.evaluated_on if result.evaluated_on.source else result.calibrated_on
    recorded = used.source
    if source is None:
        source, reading = recorded, replace(reading, input_key=reading.input_key or used.input_key)
    if source is None:
        raise UsageError(f"The check of the exported file needs a few images. Give {how}.")
    network = Model(model, "", model.preprocessing) if model.preprocessing is not None or model.parts else None
    if network is None and not reading.preprocessing and not source.endswith(".npz"):
        network = float_network(model, None, reading)
    try:
        return with_regions(model, images_at(source, network, reading))
    except BitwrightError as error:
        if source is recorded:
            raise UsageError(
                f"The images of the run are not where they were ({short(error)}). Give others with {how}."
            ) from error
        raise


def _record(path: Path, to: str, parity: Parity, size: int) -> None:
    """Into the run's ``result.json``, so that it tells of the file that lies beside it."""
    if not path.is_file():
        return
    result = read_json(path)
    if to == "onnx":
        result["parity"] = asdict(parity)
    else:
        result.setdefault("exports", {})[to] = {"parity": asdict(parity)}
    result.setdefault("size", {})[f"{to}_bytes"] = size
    result["files"] = {**result.get("files", {}), **run_folder.checksums(path.parent)}
    write_json(path, result)


def parity_table(found: Exported) -> Table:
    """What the check found, for people."""
    parity = found.parity
    made = tables.table("", ">", title=f"{found.file}, {words.size(found.bytes)}")
    made.add_row("runtime", parity.runtime)
    made.add_row("images", str(parity.images))
    if worst := parity.worst_layer:
        share = 100 * worst.differing_fraction
        made.add_row(
            "layer that differs most", f"{worst.name}: {share:.4f} % of its values" if share else "none differs"
        )
    levels: list[tuple[str, Parity | OutputParity]] = [("whole network", parity)]
    if found.format in OPTIMISED:
        levels = [("optimisations off", parity), ("optimisations on", parity.optimized or OutputParity())]
    for what, figures in levels:
        spread = figures.mean_abs / figures.range if figures.range else 0.0
        made.add_row(f"mean difference, {what}", f"{100 * spread:.3f} % of the output's range")
        if figures.agreement is not None:
            made.add_row(f"same answer, {what}", words.percent(figures.agreement))
    made.add_row("verdict", tables.parity_text(parity))
    return made

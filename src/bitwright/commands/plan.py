"""`bitwright plan`: bits for every layer within limits, and the curve of what other limits would give."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright.bits import planning
from bitwright.bits.goal import Goal
from bitwright.bits.planning import Planning
from bitwright.commands import plans, tables
from bitwright.commands.sources import Settings as Preprocessing
from bitwright.commands.sources import absolute_reference, absolute_source, images_at, remove_empty
from bitwright.errors import UsageError
from bitwright.given.inputs import find_device
from bitwright.given.models import load_model
from bitwright.quant.scheme import Scheme
from bitwright.report import plan_page
from bitwright.run.files import write_text
from bitwright.run.folder import check_writable
from bitwright.run.result import environment, peak_memory_bytes
from bitwright.terminal import Terminal, quiet_libraries

FILES = ("plan.json", "pareto.json", "plan.html")
SHOWN = 12
"""Points of the curve in the table; the files hold all."""


@dataclass(frozen=True)
class Job:
    """The arguments of one plan, as the command line takes them."""

    model: str
    images: str
    scheme: Scheme
    goal: Goal
    recipe: str | None = None
    """That will quantize."""
    point: int | None = None
    by: str | None = None
    points: int = planning.POINTS
    samples: int | None = None
    cache: Path | None = None
    out: Path | None = None
    seed: int = 0
    device: str = "auto"
    output: str | None = None
    preprocessing: Preprocessing = field(default_factory=dict)
    skip_unreadable: bool = False
    force: bool = False

    @property
    def folder(self) -> Path:
        """Where files go."""
        return (self.out or Path("plan")).expanduser().absolute()

    @property
    def scores(self) -> Path:
        """Where measured losses are kept."""
        return plans.scores(self.cache)


def plan(job: Job, terminal: Terminal) -> tuple[Planning, dict[str, Any], list[Path]]:
    """Measures, plans and writes the three files.

    Returns:
        The plan and its curve, what ``pareto.json`` holds, and the paths.

    Raises:
        UsageError: the call is wrong, the limits cannot be met, or something is in the way in ``--out``.
    """
    planning.check(job.goal)
    find_device(job.device)
    if job.point is not None and job.goal.asked:
        raise UsageError("Expected --point or limits, found both.")
    _check_target(job.folder, job.force)
    until = next(p for p in (job.folder, *job.folder.parents) if p.exists())
    terminal.begin("Loading the network")
    network = load_model(job.model, **job.preprocessing)
    images = images_at(job.images, network, skip_unreadable=job.skip_unreadable, settings=job.preprocessing)
    try:
        with quiet_libraries():
            found = planning.plan_bits(
                network,
                images,
                job.recipe,
                goal=job.goal,
                scheme=job.scheme,
                by=job.by,
                points=job.points,
                samples=job.samples,
                seed=job.seed,
                device=job.device,
                output=job.output,
                cache=job.scores,
                progress=terminal.progress,
            )
        found = found if job.point is None else found.at(job.point)
        facts = {
            **environment(job.device, job.seed),
            "model": {"name": network.name},
            **found.to_dict(),
            "next": next_command(job),
            "sources": {
                "model": absolute_reference(job.model),
                "images": absolute_source(job.images),
                "preprocessing": job.preprocessing,
                "scores": str(job.scores.expanduser().absolute()),
            },
            "peak_memory_bytes": peak_memory_bytes(),
            "warnings": list(terminal.warnings),
        }
        terminal.begin("Drawing")
        paths = _write(found, facts, job.folder)
    except BaseException:
        remove_empty(job.folder, until)
        raise
    terminal.finish()
    return found, facts, paths


def _check_target(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"Expected a folder at {folder}, found a file. Choose another --out.")
    there = [p for name in FILES if (p := folder / name).exists()]
    if there and not force:
        raise UsageError(f"{there[0]} is there already. Choose another --out, or replace it with --force.")
    check_writable(folder)


def _write(found: Planning, facts: dict[str, Any], folder: Path) -> list[Path]:
    """The files; each is whole, or what it was before."""
    paths = [folder / name for name in FILES]
    texts = (
        found.plan.model_dump_json(exclude_none=True, indent=2) + "\n",
        json.dumps(facts, indent=2, allow_nan=False) + "\n",
        plan_page.plan_page(found, facts),
    )
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths


def next_command(job: Job) -> str:
    """The line that quantizes with the plan."""
    named = {"output": job.output, **job.preprocessing}
    flags = [part for name, value in named.items() if value is not None for part in (f"--{_dashed(name)}", str(value))]
    flags += [] if job.goal.activations else ["--activations", "float"]
    flags += [] if job.recipe is None else ["--recipe", job.recipe]
    flags += ["--skip-unreadable"] if job.skip_unreadable else []
    chosen = _short(job.folder / FILES[0])
    return shlex.join(["bitwright", "quantize", job.model, job.images, "--plan", chosen, *flags])


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def show(found: Planning, facts: dict[str, Any], paths: list[Path], terminal: Terminal) -> None:
    """The plan, the curve, what they say, the files, and what to run next."""
    layers = tables.table(*_columns(plan_page.LAYERS), title=f"{facts['model']['name']}: the plan")
    for row in plan_page.layer_rows(found):
        layers.add_row(*row)
    curve = tables.table(*_columns(plan_page.CURVE), title="What other limits give")
    points, uniform = plan_page.curve_rows(found, SHOWN)
    for point in sorted([*points, *uniform], key=lambda r: r.cost):
        curve.add_row(*point.cells, style="bold" if point.chosen else None)
    left = f"All {len(found.curve)} points, with their bits, are in pareto.json; --point N plans one of them."
    written = f"Written: {', '.join(_short(p) for p in paths)}"
    said = [*plan_page.verdict(found), plan_page.source(found, facts["sources"]["scores"]), left, written]
    terminal.show(layers, curve, *said, f"Next: {facts['next']}")


def _columns(headings: tuple[str, ...]) -> list[str]:
    return [h if h in {"layer", "operator", "which"} else f">{h}" for h in headings]

"""`bitwright plan`: bits for every layer within limits, and the curve of what other limits would give."""

from __future__ import annotations

import json
from pathlib import Path

from bitwright import together
from bitwright.bits import planning
from bitwright.bits.planned import Planning
from bitwright.cli import plans, tables
from bitwright.cli.calls import PlanCall
from bitwright.cli.sources import check_output, empty_removed, load_inputs, sources
from bitwright.errors import UsageError, quiet_libraries
from bitwright.given.images import Images
from bitwright.given.inputs import find_device
from bitwright.given.models import Model
from bitwright.report import plan_page
from bitwright.report.frame import versions
from bitwright.report.plan_page import PlannedNetwork
from bitwright.run.about import environment, peak_memory_bytes
from bitwright.run.files import write_text
from bitwright.terminal import Terminal
from bitwright.words import as_options, short_path, typed

FILES = ("plan.json", "pareto.json", "plan.html")
SHOWN = 12
"""Points of the curve in the table; the files hold all."""


def plan(call: PlanCall, terminal: Terminal) -> None:
    """Measures, plans, writes the three files, and shows what they say; processes share the measuring.

    Raises:
        UsageError: the call is wrong, the limits cannot be met, or something is in the way in ``--out``.
    """
    with together.shared_job():
        _plan(call, terminal)


def _plan(call: PlanCall, terminal: Terminal) -> None:
    planning.check_goal(call.goal)
    find_device(call.device)
    if call.point is not None and call.goal.asked:
        raise UsageError("Expected --point or limits, found both.")
    folder = (call.out or Path("plan")).expanduser().absolute()
    if together.is_first():
        check_output(folder, FILES, force=call.force)
    network, images = load_inputs(call.network, call.reading, terminal)
    with empty_removed(folder):
        found = _planned(network, images, call, terminal)
        if not together.is_first():
            return
        scores = str(plans.scores(call.cache).expanduser().absolute())
        about = PlannedNetwork(network.name, scores, next_command(call, folder))
        facts = {
            **environment(call.device, call.seed),
            "model": {"name": network.name},
            **found.to_dict(),
            "next": about.next,
            "sources": {**sources(call.network, call.reading), "scores": scores},
            "peak_memory_bytes": peak_memory_bytes(),
            "warnings": list(terminal.warnings),
        }
        terminal.begin("Drawing")
        texts = (
            found.plan.model_dump_json(exclude_none=True, indent=2) + "\n",
            json.dumps(facts, indent=2, allow_nan=False) + "\n",
            plan_page.plan_page(found, about, versions(facts)),
        )
        paths = [folder / name for name in FILES]
        for path, text in zip(paths, texts, strict=True):  # each is whole, or what it was before
            write_text(path, text)
    terminal.finish()
    terminal.result({**facts, "files": [str(p) for p in paths]})
    show(found, about, paths, terminal)


def _planned(network: Model, images: Images, call: PlanCall, terminal: Terminal) -> Planning:
    with quiet_libraries():
        found = planning.plan_bits(
            network,
            images,
            call.recipe,
            goal=call.goal,
            scheme=call.scheme,
            by=call.by,
            points=call.points,
            samples=call.samples,
            seed=call.seed,
            device=call.device,
            output=call.output,
            cache=plans.scores(call.cache),
            progress=terminal.progress,
        )
    return found if call.point is None else found.at(call.point)


def next_command(call: PlanCall, folder: Path) -> str:
    """The line that quantizes with the plan in the folder."""
    flags = as_options({"output": call.output, **call.reading.named})
    flags += [] if call.goal.activations else ["--activations", "float"]
    flags += [] if call.recipe is None else ["--recipe", call.recipe]
    flags += ["--skip-unreadable"] if call.reading.skip_unreadable else []
    chosen = short_path(folder / FILES[0])
    return typed("bitwright", "quantize", call.network.model, call.network.images, "--plan", chosen, *flags)


def show(found: Planning, about: PlannedNetwork, paths: list[Path], terminal: Terminal) -> None:
    """The plan, the curve, what they say, the files, and what to run next."""
    layers = tables.table(*plan_page.right(plan_page.LAYER_HEADINGS), title=f"{about.name}: the plan")
    for row in plan_page.layer_rows(found):
        layers.add_row(*row)
    curve = tables.table(*plan_page.right(plan_page.CURVE_HEADINGS), title="What other limits give")
    points, uniform = plan_page.curve_rows(found, SHOWN)
    for point in sorted([*points, *uniform], key=lambda r: r.cost):
        curve.add_row(*point.cells, style="bold" if point.chosen else None)
    left = f"All {len(found.curve)} points, with their bits, are in pareto.json; --point N plans one of them."
    written = f"Written: {', '.join(map(short_path, paths))}"
    said = [*plan_page.plan_verdict(found), plan_page.source(found, about.scores), left, written]
    terminal.show(layers, curve, *said, f"Next: {about.next}")

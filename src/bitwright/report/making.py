"""How a run was made and checked: optimisation, parity, time, what stayed float, and how to repeat it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from bitwright import words
from bitwright.export.verdict import OutputParity, Parity
from bitwright.graph.layer import Unquantized
from bitwright.report.charts import key, lengths
from bitwright.report.frame import Section, bullets, definitions, paragraph, shell
from bitwright.report.gap import gap
from bitwright.report.markup import Child, Markup, tag
from bitwright.report.panels import Panel, Series
from bitwright.report.shown import Shown
from bitwright.report.tables import page_table
from bitwright.report.verdict import runtime_name
from bitwright.run.result import SearchOutcome, Tuning

# ------------------------------------------------------------------------------------------------- optimisation


def training(run: Shown) -> Section | None:
    """Losses over the steps of what was optimised, stage by stage; nothing where nothing was."""
    tunings, searches = run.result.tunings, run.result.searches
    parts = [_reconstruction(t, _numbered("Reconstruction", i, tunings)) for i, t in enumerate(tunings, 1)]
    parts += [_evolution(s, _numbered("Evolution", i, searches)) for i, s in enumerate(searches, 1)]
    shown = [part for part in parts if part is not None]
    return Section("training", "Optimisation", shown) if shown else None


def _numbered(name: str, i: int, several: Sequence[object]) -> str:
    return name if len(several) == 1 else f"{name} {i}"


def _reconstruction(tuned: Tuning, name: str) -> Markup | None:
    loss = tuned.loss
    if loss is None:
        return None
    losses = (("the stage before it", tuned.before), ("this stage", loss.hard))
    stages = [[what, words.number(value)] for what, value in losses if value is not None]
    said = [f"{words.plural(tuned.steps, 'step')} of {words.plural(tuned.batch, 'image')}"] if tuned.batch else []
    each = tuned.seconds_per_step
    said += [f"{words.duration(each)} each"] if isinstance(each, float) and each else []
    said += [f"in {tuned.precision}"] if tuned.precision else []
    moved, stopped = tuned.left_nearest, tuned.stopped
    ended = (
        "" if moved is None else f" {words.percent(moved, 1)} of the weights ended at another integer than the nearest."
    )
    early = f" It stopped at step {stopped.step}, where {stopped.layer} was no longer finite." if stopped else ""
    if tuned.kept not in {None, next(reversed(loss.by_stage or {}), None)}:
        early += f" It did not lower the loss: what '{tuned.kept}' left is kept."
    text = ", ".join(said)
    text = text[:1].upper() + text[1:]
    curve = _curve(tuned.curve or [], "loss of a step's images", "step", "The optimisation's loss")
    return tag(
        "div",
        tag("h3", name),
        paragraph(f"{text}.{ended}{early}"),
        tag("figure", curve) if curve else None,
        page_table("Loss on the same calibration images", ["after", ">loss"], stages),
    )


def _evolution(evolved: SearchOutcome, name: str) -> Markup | None:
    fitness = evolved.fitness
    if fitness is None:
        return None
    text = (
        f"{words.plural(evolved.steps, 'child', 'children')}, {evolved.better:,} of them better than their "
        f"parents, judged by {fitness.measure} on {words.plural(evolved.images, 'image')}; "
        f"{words.percent(evolved.moved, 1)} of {evolved.scales:,} scales moved, by "
        f"{words.percent(evolved.mean_change)} on average."
    )
    curve = _curve(evolved.curve or [], f"fitness ({fitness.measure})", "children", "Fitness", fitness.teacher)
    values = {"before": fitness.before, "after": fitness.after, "the float network itself": fitness.teacher}
    rows = [[said, words.number(value, 5)] for said, value in values.items() if value is not None]
    return tag(
        "div",
        tag("h3", name),
        paragraph(text),
        tag("figure", curve, key(("mark", "the float network's own fitness"))) if curve else None,
        page_table("Fitness on calibration images, lower is better", ["", ">fitness"], rows),
    )


def _curve(
    points: Sequence[tuple[float, float]], y_name: str, x_name: str, what: str, floor: float | None = None
) -> Markup | None:
    """A line over the steps; on a logarithmic scale where it spans more than a decade."""
    if len(points) < 2:
        return None
    xs, ys = [float(p[0]) for p in points], [float(p[1]) for p in points]
    ends = [*ys, *([] if floor is None else [floor])]
    wide = min(ends) > 0 and max(ends) / min(ends) > 10
    summary = (
        f"{what}: {words.number(ys[0], 4)} at {x_name} {xs[0]:.0f}, {words.number(ys[-1], 4)} at {x_name} "
        f"{xs[-1]:.0f}, lowest {words.number(min(ys), 4)}."
    )
    line = Series(xs, ys, "quantized", ("line",))
    return Panel((line,), x_name, y_name, y_log=wide, level=floor, level_look="mark", summary=summary).markup()


# ------------------------------------------------------------------------------------------------------- parity


def exported_file(run: Shown) -> Section:
    """Whether the exported file computes what was measured."""
    found = run.result.parity
    if found is None:
        tried = "parity" in run.result.model_fields_set
        said = "model.onnx was not written; the warnings say why." if tried else "Not exported yet."
        return Section("parity", "The exported file", paragraph(said))
    name = runtime_name(found.runtime)
    lead = (
        f"model.onnx was run in {name} on {words.plural(found.images, 'image')} and compared with the network that "
        "was measured here, layer by layer and as a whole. "
    )
    lead += "It passed." if found.passed else f"It differs, first at {found.first_divergence}."
    rows = [["as written", *_outputs(found)]]
    if found.optimized is not None:
        rows.append([f"optimised by {name.rpartition(' ')[0] or name}", *_outputs(found.optimized)])
    heads = ["graph", ">same answer", ">mean difference", ">largest difference", ">range of outputs"]
    worst = found.worst_layer
    layer: str | None = None
    if worst is not None and worst.max_steps == 0:
        layer = "Fed the same input, every layer gives exactly the same integers."
    elif worst is not None:
        layer = (
            f"Fed the same input, the layer that differs most is {worst.name}: "
            f"{words.percent(worst.differing_fraction)} of its values, by at most "
            f"{words.plural(worst.max_steps, 'step')} of its grid. Sums of floats in another order tip a few values "
            "over a rounding boundary."
        )
    checked = page_table("Outputs in the runtime, when the file was written", heads, rows)
    body = [paragraph(lead), checked, layer and paragraph(layer), gap(run)]
    return Section("parity", "The exported file", body)


def _outputs(found: Parity | OutputParity) -> list[str]:
    same = words.NONE if found.agreement is None else words.percent(found.agreement)
    return [same, *map(words.number, (found.mean_abs, found.max_abs, found.range))]


# --------------------------------------------------------------------------------------------- time, floats, words


def time_and_memory(run: Shown) -> Section | None:
    """Seconds of each step, and memory."""
    seconds = {name: value for name, value in (run.result.seconds or {}).items() if value is not None}
    total = seconds.pop("total", None)
    if not seconds:
        return None
    bars = [(name, value, words.duration(value), "quantized") for name, value in seconds.items()]
    memory = run.result.peak_memory_bytes
    said = f"{words.duration(total)} in all" if total else f"{words.duration(sum(seconds.values()))} for these"
    said += f", and at most {words.size(memory)} of memory" if memory else ""
    said += f", on {run.result.device or 'cpu'}."
    summary = "Time: " + ", ".join(f"{name} {text}" for name, _, text, _ in bars) + "."
    return Section("time", "Time and memory", [paragraph(said), tag("figure", lengths(bars, summary))])


def floats(run: Shown) -> Section:
    """Tensors that were left in float, by reason; apart from them the values inside fused layers."""
    rows, names = run.result.unquantized or [], {r.name for r in run.layers}
    left, inside = [r for r in rows if not r.inside], [r for r in rows if r.inside]
    said = f"{words.plural(len(left), 'tensor')}, and why." if left else "Nothing."
    body: list[Child] = [paragraph(said), _by_reason(left, names)]
    if inside:
        body += [
            paragraph(
                f"Not counted: {words.plural(len(inside), 'value')} inside fused layers. A runtime computes the "
                "operators of such a layer at once, and only their last value is rounded and stored."
            ),
            _by_reason(inside, names),
        ]
    return Section("floats", "Left in float", body)


def _by_reason(rows: Sequence[Unquantized], names: set[str]) -> list[Markup]:
    """Their names below each reason, the most frequent one first; layers that a reason names are left out of it."""
    reasons: dict[str, list[Unquantized]] = {}
    for row in rows:
        general = " ".join(re.sub(r"^.*[^,]", "…", w) if w.rstrip(",") in names else w for w in row.reason.split())
        reasons.setdefault(general, []).append(row)
    found = []
    for reason, those in sorted(reasons.items(), key=lambda r: -len(r[1])):
        listed = tag("ul", (tag("li", tag("span", r.name, class_="layer"), f" ({r.op})") for r in those))
        found.append(tag("details", tag("summary", f"{reason}: {len(those)}"), listed))
    return found


def warnings(run: Shown) -> Section | None:
    """What the run warned of."""
    found = run.result.warnings or []
    return Section("warnings", "Warnings", bullets(found)) if found else None


def repeat(run: Shown) -> Section:
    """Everything that the result depends on."""
    result = run.result
    pairs: list[tuple[str, Child]] = [("seed", words.NONE if result.seed is None else str(result.seed))]
    versions = (("bitwright", result.bitwright), ("PyTorch", result.torch), ("Python", result.python))
    about = (*versions, ("platform", result.platform), ("device", result.device))
    pairs += [(name, value) for name, value in about if value]
    for name, some in (("calibration", result.calibrated_on), ("evaluation", result.evaluated_on)):
        if some.sha256:
            where = f" from {some.source}" if some.source else ""
            said = f"{words.plural(some.count or 0, 'image')}{where}"
            pairs.append((f"{name} images", [said, tag("br"), tag("code", f"sha256 {some.sha256}", class_="hash")]))
    settings = json.dumps(result.recipe.settings or {}, indent=2, ensure_ascii=False)
    body = [
        tag(
            "pre",
            shell(result.command or words.NONE),
            tabindex=0,
            role="region",
            aria_label="the command",
        ),
        definitions(pairs),
        tag("details", tag("summary", "All settings of the recipe"), tag("pre", settings, tabindex=0)),
    ]
    return Section("repeat", "To repeat it", body)

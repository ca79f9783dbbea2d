"""How a run was made and checked: optimisation, parity, time, what stayed float, and how to repeat it."""

from __future__ import annotations

import json
import re
from typing import Any

from bitwright import words
from bitwright.report.charts import key, lengths
from bitwright.report.frame import Section, bullets, definitions, paragraph, shell
from bitwright.report.gap import gap
from bitwright.report.markup import Child, Markup, tag
from bitwright.report.panels import Panel, Series
from bitwright.report.shown import Shown
from bitwright.report.tables import page_table
from bitwright.report.verdict import runtime_name
from bitwright.run.record import stages_of

# ------------------------------------------------------------------------------------------------- optimisation


def training(run: Shown) -> Section | None:
    """Losses over the steps of what was optimised, stage by stage; nothing where nothing was."""
    parts = []
    for kind, name, made in (("reconstruct", "Reconstruction", _reconstruction), ("evolve", "Evolution", _evolution)):
        rows = stages_of(run.result, kind)
        parts += [made(row, name if len(rows) == 1 else f"{name} {i}") for i, row in enumerate(rows, 1)]
    shown = [part for part in parts if part is not None]
    return Section("training", "Optimisation", shown) if shown else None


def _reconstruction(tuned: dict[str, Any], name: str) -> Markup | None:
    if "loss" not in tuned:
        return None
    losses = (("the stage before it", tuned.get("before")), ("this stage", tuned["loss"]["hard"]))
    stages = [[what, words.number(value)] for what, value in losses if value is not None]
    said = (
        [f"{words.plural(tuned['steps'], 'step')} of {words.plural(tuned['batch'], 'image')}"]
        if tuned.get("batch")
        else []
    )
    said += [f"{words.duration(tuned['seconds_per_step'])} each"] if tuned.get("seconds_per_step") else []
    said += [f"in {tuned['precision']}"] if tuned.get("precision") else []
    moved = tuned.get("left_nearest")
    ended = (
        "" if moved is None else f" {words.percent(moved, 1)} of the weights ended at another integer than the nearest."
    )
    stopped = tuned.get("stopped")
    early = f" It stopped at step {stopped['step']}, where {stopped['layer']} was no longer finite." if stopped else ""
    kept, own = tuned.get("kept"), next(reversed(tuned["loss"].get("by_stage") or {}), None)
    early += "" if kept in {None, own} else f" It did not lower the loss: what '{kept}' left is kept."
    text = ", ".join(said)
    text = text[:1].upper() + text[1:]
    curve = _curve(tuned.get("curve") or [], "loss of a step's images", "step", "The optimisation's loss")
    return tag(
        "div",
        tag("h3", name),
        paragraph(f"{text}.{ended}{early}"),
        tag("figure", curve) if curve else None,
        page_table("Loss on the same calibration images", ["after", ">loss"], stages),
    )


def _evolution(evolved: dict[str, Any], name: str) -> Markup | None:
    if "fitness" not in evolved:
        return None
    fitness = evolved["fitness"]
    text = (
        f"{words.plural(evolved['steps'], 'child', 'children')}, {evolved['better']:,} of them better than their "
        f"parents, judged by {fitness['measure']} on {words.plural(evolved['images'], 'image')}; "
        f"{words.percent(evolved['moved'], 1)} of {evolved['scales']:,} scales moved, by "
        f"{words.percent(evolved['mean_change'])} on average."
    )
    curve = _curve(
        evolved.get("curve") or [], f"fitness ({fitness['measure']})", "children", "Fitness", fitness.get("teacher")
    )
    rows = [[said, words.number(fitness[k], 5)] for k, said in
            (("before", "before"), ("after", "after"), ("teacher", "the float network itself"))
            if fitness.get(k) is not None]  # fmt: skip
    return tag(
        "div",
        tag("h3", name),
        paragraph(text),
        tag("figure", curve, key(("mark", "the float network's own fitness"))) if curve else None,
        page_table("Fitness on calibration images, lower is better", ["", ">fitness"], rows),
    )


def _curve(points: list[Any], y_name: str, x_name: str, what: str, floor: float | None = None) -> Markup | None:
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
    found = run.result.get("parity")
    if not found:
        said = "model.onnx was not written; the warnings say why." if "parity" in run.result else "Not exported yet."
        return Section("parity", "The exported file", paragraph(said))
    name = runtime_name(found["runtime"])
    passed = found.get("first_divergence") is None
    lead = (
        f"model.onnx was run in {name} on {words.plural(found['images'], 'image')} and compared with the network that "
        "was measured here, layer by layer and as a whole. "
    )
    lead += "It passed." if passed else f"It differs, first at {found['first_divergence']}."
    rows = [["as written", *_outputs(found)]]
    if found.get("optimized"):
        rows.append([f"optimised by {name.rpartition(' ')[0] or name}", *_outputs(found["optimized"])])
    heads = ["graph", ">same answer", ">mean difference", ">largest difference", ">range of outputs"]
    worst = found.get("worst_layer")
    layer: str | None = None
    if worst is not None and worst["max_steps"] == 0:
        layer = "Fed the same input, every layer gives exactly the same integers."
    elif worst is not None:
        layer = (
            f"Fed the same input, the layer that differs most is {worst['name']}: "
            f"{words.percent(worst['differing_fraction'])} of its values, by at most "
            f"{words.plural(worst['max_steps'], 'step')} of its grid. Sums of floats in another order tip a few values "
            "over a rounding boundary."
        )
    checked = page_table("Outputs in the runtime, when the file was written", heads, rows)
    body = [paragraph(lead), checked, layer and paragraph(layer), gap(run)]
    return Section("parity", "The exported file", body)


def _outputs(found: dict[str, Any]) -> list[str]:
    same = found.get("agreement")
    return [words.NONE if same is None else words.percent(same)] + [
        words.number(found.get(k)) for k in ("mean_abs", "max_abs", "range")
    ]


# --------------------------------------------------------------------------------------------- time, floats, words


def time_and_memory(run: Shown) -> Section | None:
    """Seconds of each step, and memory."""
    seconds = dict(run.result.get("seconds") or {})
    total = seconds.pop("total", None)
    if not seconds:
        return None
    bars = [(name, value, words.duration(value), "quantized") for name, value in seconds.items()]
    memory = run.result.get("peak_memory_bytes")
    said = f"{words.duration(total)} in all" if total else f"{words.duration(sum(seconds.values()))} for these"
    said += f", and at most {words.size(memory)} of memory" if memory else ""
    said += f", on {run.result.get('device', 'cpu')}."
    summary = "Time: " + ", ".join(f"{name} {text}" for name, _, text, _ in bars) + "."
    return Section("time", "Time and memory", [paragraph(said), tag("figure", lengths(bars, summary))])


def floats(run: Shown) -> Section:
    """Tensors that were left in float, by reason."""
    rows = run.result.get("unquantized") or []
    if not rows:
        return Section("floats", "Left in float", paragraph("Nothing: every tensor is quantized."))
    names = {r["name"] for r in run.layers}
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        general = " ".join(re.sub(r"^.*[^,]", "…", w) if w.rstrip(",") in names else w for w in row["reason"].split())
        reasons.setdefault(general, []).append(row)
    body: list[Child] = [paragraph(f"{words.plural(len(rows), 'tensor')}, and why.")]
    for reason, those in sorted(reasons.items(), key=lambda r: -len(r[1])):
        listed = tag("ul", (tag("li", tag("span", r["name"], class_="layer"), f" ({r['op']})") for r in those))
        body.append(tag("details", tag("summary", f"{reason}: {len(those)}"), listed))
    return Section("floats", "Left in float", body)


def warnings(run: Shown) -> Section | None:
    """What the run warned of."""
    found = run.result.get("warnings") or []
    return Section("warnings", "Warnings", bullets(found)) if found else None


def repeat(run: Shown) -> Section:
    """Everything that the result depends on."""
    result = run.result
    data = result.get("data") or {}
    pairs: list[tuple[str, Child]] = [("seed", str(result.get("seed", words.NONE)))]
    pairs += [(name, result[k]) for k, name in (("bitwright", "bitwright"), ("torch", "PyTorch"), ("python", "Python"),
              ("platform", "platform"), ("device", "device")) if result.get(k)]  # fmt: skip
    for name in ("calibration", "evaluation"):
        some = data.get(name)
        if some and some.get("sha256"):
            where = f" from {some['source']}" if some.get("source") else ""
            said = f"{words.plural(some['count'], 'image')}{where}"
            pairs.append((f"{name} images", [said, tag("br"), tag("code", f"sha256 {some['sha256']}", class_="hash")]))
    settings = json.dumps((result.get("recipe") or {}).get("settings") or {}, indent=2, ensure_ascii=False)
    body = [
        tag(
            "pre",
            shell(result.get("command", words.NONE)),
            tabindex=0,
            role="region",
            aria_label="the command",
        ),
        definitions(pairs),
        tag("details", tag("summary", "All settings of the recipe"), tag("pre", settings, tabindex=0)),
    ]
    return Section("repeat", "To repeat it", body)

"""`bitwright demo`: the whole job on the networks and images that ship with bitwright."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.table import Table

from bitwright import words, zoo
from bitwright.cli import quantize, tables
from bitwright.cli.calls import DemoCall, QuantizeCall
from bitwright.cli.options import BudgetOptions, DataOptions, NetworkOptions
from bitwright.errors import BitwrightError
from bitwright.given.arguments import one_of
from bitwright.measure.shown import named_figures, shown_figures
from bitwright.recipes import recipe as find_recipe
from bitwright.run.folder import STATE, check_target
from bitwright.run.result import RunResult
from bitwright.run.state import is_unfinished
from bitwright.terminal import Terminal
from bitwright.words import short_path

CALIBRATION, TEST = "zoo:fashion", "zoo:fashion-test"
SCENES = {
    "segmentation": ("fashion_segmenter", "zoo:scenes", "zoo:scenes-masks"),
    "detection": ("fashion_detector", "zoo:scenes", "zoo:scenes-boxes"),
}
"""The network of each task that has scenes, the images to calibrate it on, and those with truth."""
DEMO_STEPS = 200
KINDS = {
    "fashion_cnn": "a convolutional network",
    "fashion_vit": "a vision transformer",
    "fashion_segmenter": "a convolutional network that gives each pixel a class",
    "fashion_detector": "a convolutional network that gives boxes",
}


def demo(call: DemoCall, terminal: Terminal) -> None:
    """Quantizes the zoo networks of a task to 4-bit weights and 8-bit activations, without labels, and scores them.

    Raises:
        UsageError: there is no such task.
        BitwrightError: a network's ONNX file does not compute what was measured.
    """
    one_of("task", call.task, ("classification", *SCENES))
    names = [SCENES[call.task][0]] if call.task in SCENES else list(zoo.NETWORKS)
    calls = {name: _call(name, call) for name in names}
    for each in calls.values():
        assert each.out is not None
        check_target(each.out, force=call.force, resume=each.resume)
    results = {}
    for name, each in calls.items():
        terminal.say(f"{name}, {KINDS.get(name, 'a network')}:")
        before = len(terminal.warnings)
        results[name], _, failure = quantize.make_run(each, terminal)
        del terminal.warnings[:before]
        if failure is not None:
            raise BitwrightError(f"{name}: {failure}") from failure
    terminal.result({"out": str(call.out), "runs": results})
    show({name: RunResult.read(result) for name, result in results.items()}, call.out, terminal)


def _call(name: str, call: DemoCall) -> QuantizeCall:
    """One network's part of the demo; what an interrupted one left goes on."""
    out = (call.out / name).expanduser().absolute()
    _, calibration, test = SCENES.get(call.task, (name, CALIBRATION, TEST))
    return QuantizeCall(
        NetworkOptions(f"zoo:{name}", calibration),
        call.recipe,
        weights="4",
        data=DataOptions(evaluate=test),
        budget=BudgetOptions(str(DEMO_STEPS) if find_recipe(call.recipe).optimises else None),
        out=out,
        seed=call.seed,
        force=call.force,
        resume=not call.force and is_unfinished(out / STATE),
    )


def show(results: Mapping[str, RunResult], out: Path, terminal: Terminal) -> None:
    """One table for all, and how to read what was written."""
    some = next(iter(results.values()))
    bits = some.bits or {}
    terminal.show(
        "",
        f"Each network was turned into {bits.get('weights')}-bit weights and {bits.get('activations')}-bit "
        f"activations with recipe '{some.recipe.name}', from {some.calibrated_on.count} images without labels, and "
        f"scored on {some.evaluated_on.count} test images that it never saw.",
        "",
        _table(results),
        f"{_figure(some)} with its 95 % interval. 'same answer' compares the 4-bit network with the float one;",
        "'ONNX Runtime' compares the exported file, run by ONNX Runtime, with what was measured here.",
        "",
        "What was written, for each network:",
    )
    for name in results:
        folder = short_path((out / name).expanduser().absolute())
        terminal.show(f"  {folder}/report.html          the page to look at first, which opens offline in any browser")
        terminal.show(f"  {folder}/model.onnx           to deploy: onnxruntime.InferenceSession('{folder}/model.onnx')")
        terminal.show(f"  {folder}/model.safetensors    the packed integers: bitwright.load('{folder}')")
        terminal.show(
            f"  {folder}/result.json          every figure above, and one row per layer; plan.json has the bits"
        )
    first = next(iter(results))
    folder = short_path((out / first).expanduser().absolute())
    terminal.show(
        "",
        f"See every layer:   {words.typed('bitwright', 'inspect', folder)}",
        "Your own network:  bitwright quantize timm:NAME@weights.pt photos/ --weights 4 --activations 8",
    )


def _key(result: RunResult) -> str:
    """The figure that the networks are judged by."""
    assert result.reference is not None
    return next(iter(result.reference.values))


def _figure(result: RunResult) -> str:
    """The same in words."""
    return "Accuracy" if _key(result) == "top1" else named_figures(_key(result))


def _table(results: Mapping[str, RunResult]) -> Table:
    made, figure = tables.table("", *(f">{name}" for name in results)), _figure(next(iter(results.values())))
    what = figure.lower() if figure == "Accuracy" else figure
    rows: dict[str, Callable[[RunResult], str]] = {
        f"{what} in float": lambda r: shown_figures(_key(r), r.reference),
        f"{what} at 4 bits": lambda r: shown_figures(_key(r), r.quantized),
        "same answer as float": lambda r: words.percent(None if r.fidelity is None else r.fidelity.agreement),
        "size in float": lambda r: words.size(r.size.get("float_bytes")),
        "size at 4 bits": lambda r: words.size(r.size.get("packed_bytes")),
        "smaller by": lambda r: f"{r.times_smaller or 0.0:.1f} x",
        "ONNX Runtime": lambda r: tables.parity_text(r.parity),
        "seconds": lambda r: f"{(r.seconds or {}).get('total') or 0.0:.0f}",
    }
    for row, read in rows.items():
        made.add_row(row, *(read(r) for r in results.values()))
    return made

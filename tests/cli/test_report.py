"""`bitwright report`: pages made again, compared, and refused in one line."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import dataset, model

import bitwright as bw
from bitwright import report
from bitwright.cli import main
from bitwright.cli import report as command
from bitwright.report.comparison import Entry, comparison, figures_of, quality
from bitwright.report.kept import DifferingAnswers, PageFacts
from bitwright.report.run_page import run_page as page
from bitwright.report.shown import Shown
from bitwright.report.verdict import run_verdict
from bitwright.run.result import RunResult
from bitwright.words import plural

NET = """
import torch
from torch import nn

PREPROCESSING = {"input_size": (1, 28, 28), "mean": 0.286, "std": 0.353}


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(392, 10))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    (root / "net.py").write_text(NET)
    given = ["--recipe", "rtn", "--weights", "2", "--evaluate", "zoo:fashion-test[:60]", "--no-images"]
    assert main(["quantize", f"{root}/net.py:net", "zoo:fashion[:8]", *given, "--out", str(root / "one")]) == 0
    return root / "one"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "one")
    return tmp_path / "one"


def change(run: Path, **values: Any) -> None:
    path = run / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    return str(line)


def test_the_page_is_made_again_without_model_or_images(
    made: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "report.html").read_text().replace(str(made), str(run))  # in the commands that it shows
    for name in ("model.safetensors", "model.onnx", "report.html", "plan.json", "log.jsonl"):
        (run / name).unlink()
    assert main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (run / "report.html").read_text() == before
    assert found["page"] == str(run / "report.html")
    assert found["verdict"] in re.sub(r"<[^>]+>", "", before).replace("\u00a0", " ")


def test_commands_of_the_page_run_as_pasted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = run.rename(run.parent / "my run")
    monkeypatch.chdir(run.parent)
    assert main(["report", "my run"]) == 0
    text = html.unescape(re.sub(r"<[^>]+>", "", (spaced / "report.html").read_text()))
    for verb in ("bench", "parity"):
        assert f"bitwright {verb} 'my run'; bitwright report 'my run'" in text
    quoted = shlex.split(text[text.index("bitwright bench") :].partition(";")[0])
    assert quoted == ["bitwright", "bench", "my run"]


def test_values_inside_fused_layers_are_no_floats(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((run / "result.json").read_text())["unquantized"]
    inside = sum("inside the group" in row["reason"] for row in rows)
    assert 0 < inside < len(rows)
    text = re.sub(r"<[^>]+>", "", (run / "report.html").read_text())
    assert f"{plural(len(rows) - inside, 'tensor')}, and why." in text
    assert f"Not counted: {inside} values inside fused layers." in text
    assert main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"left in float +{len(rows) - inside} *\n", shown)
    assert re.search(rf"inside fused layers +{inside} *\n", shown)


def test_figures_on_the_page_are_those_of_the_result(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    text = (run / "report.html").read_text()
    for name in ("float", "quantized"):
        assert f"{100 * result[name]['top1']:.2f}\u00a0%" in text
    assert f"{result['size']['packed_bytes'] / 1000:.2f}\u00a0kB" in text
    assert "2-bit weights, 8-bit activations" in text
    assert text.count("<tr>") > len(result["layers"])
    assert "<img" not in text
    assert "Images were left out" in text


def test_an_older_run_has_a_page_too(run: Path) -> None:
    (run / "report.json").unlink()
    result = json.loads((run / "result.json").read_text())
    del result["schema"]
    for key in ("diagnosis", "parity", "seconds", "unquantized", "fidelity"):
        result.pop(key, None)
    result["data"]["evaluation"] = None
    (run / "result.json").write_text(json.dumps(result))
    text = report.write(run).read_text()
    assert "Every layer" in text
    assert "Where the answers differ" not in text


def test_a_run_saved_from_python_has_a_page(tmp_path: Path) -> None:
    bw.quantize(model("residual"), dataset(8), recipe="mse", weights=4).save(tmp_path / "run")
    text = report.write(tmp_path / "run").read_text()
    assert "not measured yet" in text
    assert "Not exported yet" in text


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no result": (lambda run: (run / "result.json").unlink(), "Expected result.json in"),
    "cut short": (
        lambda run: (run / "result.json").write_text((run / "result.json").read_text()[:500]), "It is damaged"
    ),
    "empty": (lambda run: (run / "result.json").write_text(""), "It is damaged"),
    "a list": (lambda run: (run / "result.json").write_text("[1, 2]"), "found something else"),
    "another file": (lambda run: (run / "result.json").write_text("{\"a\": 1}"), "found something else"),
    "newer": (lambda run: change(run, schema=2), "Update: pip install --upgrade bitwright"),
    "odd schema": (lambda run: change(run, schema="x"), "newer bitwright"),
    "layers gone": (lambda run: change(run, layers=[{"op": "conv2d"}]), "damaged: it has no 'name'"),
    "a model without a name": (lambda run: change(run, model={"a": 1}), "it has no 'name' in 'model'"),
    "seconds in a list": (lambda run: change(run, seconds=[1]), "'seconds' is something else"),
    "odd size": (lambda run: change(run, size={"float_bytes": "many", "packed_bytes": 3}), "something else"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_run_that_cannot_be_read_is_one_line(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = WRONG[name]
    before = (run / "report.html").read_bytes()
    spoil(run)
    assert main(["report", str(run)]) == 2
    assert expected in error(capsys)
    assert not run.exists() or (run / "report.html").read_bytes() == before


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "state").mkdir(parents=True)
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "unfinished: repeat its command with --resume" in error(capsys)


def test_wrong_calls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), str(run / ".." / "one")]) == 2
    assert "twice" in error(capsys)
    assert main(["report", str(run), "--out", str(run / "model.onnx")]) == 2
    assert "Expected an .html file" in error(capsys)
    assert main(["report", str(run), "--out", "/proc/nowhere/x.html"]) == 2
    assert "cannot be written" in error(capsys)


def test_damaged_extras_do_not_cost_the_page(run: Path) -> None:
    (run / "bench.json").write_text('{"rows": [{"runtime": 3}]}')
    (run / "report.json").write_text("{")
    assert "Not measured. On the machine where it matters" in report.write(run).read_text()


def test_latency_is_shown_once_it_was_measured(run: Path) -> None:
    spread = {"median": 0.0125, "low": 0.012, "high": 0.013, "count": 9, "images_per_second": 80.0}
    half = {"median": 0.00625, "low": 0.006, "high": 0.0065, "count": 9, "images_per_second": 160.0}
    bench = {
        "machine": {"cpu": "Some <CPU>", "cores": 2, "load": 9.0},
        "rows": [{"runtime": "onnxruntime", "threads": 1, "batch": 1, "float": spread, "quantized": half,
                  "ratio": {"median": 0.5, "low": 0.45, "high": 0.55, "count": 9}}],
    }  # fmt: skip
    (run / "bench.json").write_text(json.dumps(bench))
    text = report.write(run).read_text()
    assert "12.5\u00a0ms (12 to 13)" in text
    assert "2.00 times as fast" in text
    assert "Some &lt;CPU&gt;, 2 cores" in text
    assert "busy (load 9.0)" in text


# ------------------------------------------------------------------------------------------------------- several


def result(name: str, top1: float, size: int, **more: Any) -> Shown:
    base: dict[str, Any] = {
        "model": {"name": "net"},
        "recipe": {"name": name, "settings": {}},
        "bits": {"weights": 4, "activations": 8},
        "layers": [],
        "float": {"top1": 0.8, "top1_ci": [0.78, 0.82]},
        "quantized": {"top1": top1, "top1_ci": [top1 - 0.02, top1 + 0.02]},
        "fidelity": {"agreement": 0.9, "kl": 0.1, "sqnr_db": 12.0},
        "size": {"float_bytes": 4_000_000, "packed_bytes": size, "onnx_bytes": 2 * size},
        "data": {"evaluation": {"count": 100, "sha256": "e"}, "calibration": {"count": 9, "sha256": "c"}},
        "command": f"bitwright quantize net --recipe {name}",
    }
    return Shown(RunResult.read({**base, **more}), folder=name)


def entries(*places: tuple[str, float, int], **more: Any) -> list[Entry]:
    return [Entry(name, result(name, top1, size, **more)) for name, top1, size in places]


def test_the_front_is_what_brute_force_finds() -> None:
    some = entries(("a", 0.70, 500_000), ("b", 0.75, 700_000), ("c", 0.72, 900_000), ("d", 0.60, 400_000))
    rows = [figures_of(e).to_dict() for e in some]
    best = [
        r["run"]
        for r in rows
        if not any(o["top1"] >= r["top1"] and o["packed_bytes"] <= r["packed_bytes"] and o is not r for o in rows)
    ]
    text = comparison(some)
    said = re.search(r"in order of size: ([^.]*)\.", text)
    assert said is not None
    assert re.findall(r"\((\w)\)", said[1]) == sorted(
        best, key=lambda n: [r["packed_bytes"] for r in rows if r["run"] == n]
    )
    assert "b has the best top-1 accuracy, 75.00\u00a0%, at 700.0\u00a0kB" in text


def test_of_runs_that_are_equally_good_the_one_nearest_to_float_is_best() -> None:
    near = {"fidelity": {"agreement": 1.0, "kl": 0.001, "sqnr_db": 30.0}}
    some = [*entries(("a", 0.7, 400_000)), *entries(("b", 0.7, 600_000), ("c", 0.7, 500_000), **near)]
    assert "c has the best top-1 accuracy" in comparison(some)


def test_a_failed_run_is_shown_and_hostile_names_are_text() -> None:
    some = [*entries(("a", 0.7, 500_000)), Entry("<i>b</i>", error="no <such> thing")]
    text = comparison(some)
    assert "&lt;i&gt;b&lt;/i&gt;" in text
    assert "<i>b" not in text
    assert "no &lt;such&gt; thing" in text
    assert "1 run failed" in text


def test_runs_on_other_images_are_not_ranked() -> None:
    other = result("b", 0.8, 600_000, data={"evaluation": {"count": 5, "sha256": "other"}})
    some = [*entries(("a", 0.7, 500_000)), Entry("b", other)]
    text = comparison(some)
    assert "cannot tell which is better" in text
    assert "has the best" not in text


def test_without_labels_runs_are_compared_by_fidelity() -> None:
    places = (("a", 0.7, 500_000), ("b", 0.8, 600_000))
    assert quality(entries(*places, float={}, quantized={})) == "agreement"
    values = {"agreement": None, "kl": None, "sqnr_db": 12.0}
    some = entries(*places, float={}, quantized={}, fidelity=values)
    assert quality(some) == "sqnr_db"
    assert "12.0\u00a0dB" in comparison(some)


TWO = {
    "agreement": 0.31,
    "kl": 0.8,
    "sqnr_db": -1.5,
    "outputs": {
        "kind": {"agreement": 0.99, "kl": 1e-4, "sqnr_db": 31.0, "answers": 100},
        "colour": {"agreement": 0.31, "kl": 0.8, "sqnr_db": 2.5, "answers": 100},
        "place": {"agreement": None, "kl": None, "sqnr_db": -1.5, "note": "It has a single channel."},
    },
}


def test_the_verdict_is_that_of_the_worst_output() -> None:
    shown = result("a", 0.7, 500_000, fidelity=TWO, float={}, quantized={})
    said = run_verdict(shown.result, None)
    assert "with the same answer as the float network for 31.00 % of 100 images in output colour" in said
    assert "and with output place −1.5 dB above its error" in said
    judged = run_verdict(result("a", 0.7, 500_000, fidelity=TWO).result, None)
    assert "70.00 % top-1 accuracy" in judged
    assert "31.00 % in output colour, the worst of 3" in judged
    dense = {**TWO, "outputs": {"map": {**TWO["outputs"]["colour"], "answers": 6400}}}  # type: ignore[dict-item]
    only = run_verdict(result("a", 0.7, 500_000, fidelity=dense, float={}, quantized={}).result, PageFacts())
    assert "31.00 % of the answers of 100 images." in only


def test_every_output_has_a_row_on_both_pages() -> None:
    some = [Entry(n, result(n, 0.7, 500_000, fidelity=TWO)) for n in ("a", "b")]
    page_of_a, both = page(some[0].run), comparison(some)  # type: ignore[arg-type]
    for text in (page_of_a, both):
        for shown in ("kind", "colour", "place", "99.00\u00a0%", "31.00\u00a0%", "−1.5\u00a0dB"):
            assert shown in text, shown
    assert "It has a single channel." in page_of_a
    assert "Output by output" not in comparison(entries(("a", 0.7, 500_000), ("b", 0.8, 600_000)))


def test_several_runs_on_one_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "one", "two"]) == 0
    text = Path("comparison.html").read_text()
    assert "comparison of 2 runs" in text
    assert main(["report", "one", "two", "--out", "both.html"]) == 0
    assert Path("both.html").read_text() == text
    assert command.short_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    ("labelled", "expected"),
    [
        ({"both": 800, "only_float": 4, "only_quantized": 4, "neither": 192}, "with no measurable difference: 80.40 %"),
        ({"both": 800, "only_float": 4, "only_quantized": 5, "neither": 191}, "with no measurable difference: 80.50 %"),
        ({"both": 800, "only_float": 12, "only_quantized": 5, "neither": 183}, "with no measurable difference: "),
        ({"both": 700, "only_float": 100, "only_quantized": 10, "neither": 190}, "9.00 points worse"),
    ],
)
def test_the_verdict_tells_a_loss_from_what_these_images_cannot_show(labelled: dict[str, int], expected: str) -> None:
    count = sum(labelled.values())
    shown = result(
        "a",
        0.0,
        500_000,
        float={"top1": (labelled["both"] + labelled["only_float"]) / count},
        quantized={"top1": (labelled["both"] + labelled["only_quantized"]) / count},
    )
    assert expected in run_verdict(shown.result, PageFacts(answers=DifferingAnswers(labelled=labelled)))
    assert "8.0 times smaller" in run_verdict(shown.result, None)

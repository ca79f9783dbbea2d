"""`bitwright quantize`, called in this process through `main` and, where a process matters, in one of its own."""

from __future__ import annotations

import contextlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import NET, content_of, errors_in, figures_of, files_below, interrupt, result_of
from safetensors import safe_open

import bitwright
from bitwright.cli import main
from bitwright.errors import ParityError
from bitwright.run import job


def test_run_folder_holds_what_the_contract_says(here: Path) -> None:
    assert {p.name for p in Path("run").iterdir()} == {
        "model.safetensors", "model.onnx", "plan.json", "result.json", "log.jsonl", "report.html", "report.json",
    }  # fmt: skip
    result = json.loads(Path("run/result.json").read_text())
    for key in ("bitwright", "torch", "python", "platform", "device", "seed", "command", "peak_memory_bytes"):
        assert result[key] is not None, key
    assert result["bits"] == {"weights": 4, "activations": 8}
    assert result["recipe"]["name"] == "mse"
    assert result["data"]["calibration"]["count"] == 8
    evaluation = result["data"]["evaluation"]
    assert (evaluation["count"], evaluation["labelled"], evaluation["same_as_calibration"]) == (9, True, False)
    assert 0 <= result["float"]["top1_ci"][0] <= result["float"]["top1"] <= 1
    assert set(result["fidelity"]) == {"agreement", "kl", "sqnr_db", "outputs"}
    assert {"capture", "calibrate", "evaluate", "export", "total"} <= set(result["seconds"])
    size = result["size"]
    assert size["onnx_bytes"] == Path("run/model.onnx").stat().st_size
    assert size["packed_bytes"] == Path("run/model.safetensors").stat().st_size
    assert result["parity"]["first_divergence"] is None
    assert next(r["sqnr_db"] for r in result["layers"] if r["name"] == "stem") > 10
    assert result["unquantized"]
    assert result["warnings"] == []
    events = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "written"
    assert any(e.get("what") == "Calibrating" and e["total"] == 8 for e in events)


def test_json_is_alone_on_stdout_and_says_what_the_file_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "photos", "--json"]) == 0
    found = result_of(capsys)
    folder = Path(found.pop("run"))
    assert folder == here / "runs" / "Net-mse-w8a8"
    assert found == json.loads((folder / "result.json").read_text())
    assert found["data"]["evaluation"]["same_as_calibration"] is True
    assert found["float"] == {}
    assert found["fidelity"]["agreement"] is not None


def test_same_command_same_bits(here: Path) -> None:
    again = ["quantize", "models.py:Net", "photos", "--weights", "4", "--evaluate", "classes", "--out", "again"]
    assert main(again) == 0
    assert content_of("again") == content_of("run")


def test_settings_reach_the_quantizers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "photos", "--json", "--rule", "head=w3a16", "--granularity", "tensor", "--recipe", "rtn"]) == 0
    found = result_of(capsys)
    rows = {row["name"]: row for row in found["layers"]}
    assert (rows["head"]["weight_bits"], rows["stem"]["weight_bits"]) == (3, 8)
    assert rows["stem"]["granularity"] == "tensor"
    assert found["recipe"]["name"] == "rtn"


def test_fewer_images_than_asked_is_a_warning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "photos", "--samples", "100", "--out", "new", "--json"]) == 0
    out, err = capsys.readouterr()
    text = "100 images were asked for, there are 8; all are used."
    assert f"warning: {text}" in err.splitlines()
    assert json.loads(out)["warnings"] == [text]
    assert json.loads(Path("new/result.json").read_text())["warnings"] == [text]


def test_skip_unreadable_goes_on_and_names_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "corrupt", "--skip-unreadable", "--json"]) == 0
    found = result_of(capsys)
    assert found["data"]["calibration"]["count"] == 4
    assert "corrupt/a.jpg" in found["warnings"][0]


@pytest.mark.parametrize("model", ["Named", "Pair"])
def test_several_outputs_work(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", f"models.py:{model}", "photos", "--json"]) == 0
    assert result_of(capsys)["fidelity"]["agreement"] is not None


def test_one_output_is_kept_and_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["quantize", "models.py:Named", "photos", "--output", "scores", "--evaluate", "classes", "--out", "new"]
    assert main([*given, "--json"]) == 0
    found = result_of(capsys)
    assert found["model"]["output"] == "scores"
    assert main(["evaluate", "new", "classes", "--float", "models.py:Named", "--json"]) == 0
    again = result_of(capsys)
    assert again["quantized"] == found["quantized"]
    assert figures_of(again["fidelity"]) == pytest.approx(figures_of(found["fidelity"]), rel=1e-4)


def test_force_replaces_a_run_and_only_a_run(here: Path) -> None:
    before = content_of("run")
    assert main([*NET, "photos", "--out", "run", "--force"]) == 0
    assert content_of("run") != before
    Path("run/notes.txt").write_text("mine")
    assert main([*NET, "photos", "--out", "run", "--force"]) == 2
    assert Path("run/notes.txt").read_text() == "mine"


def test_interrupted_run_goes_on_to_the_same_bits(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "models.py:Net", "photos", "--weights", "4", "--evaluate", "classes", "--out", "new"]
    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluation_of", interrupt)
        assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert [p.name for p in Path("new").iterdir()] == ["state"]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # the finished stage must not run again
        patch.setattr("bitwright.pipeline._keep", interrupt)
        assert main([*command, "--resume"]) == 0
    assert not Path("new/state").exists()
    assert content_of("new") == content_of("run")


def test_interrupt_before_the_first_stage_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_below(here)
    monkeypatch.setattr("bitwright.stages.calibrate.Calibrate.run", interrupt)
    assert main([*NET, "photos", "--out", "deep/new"]) == 130
    assert files_below(here) == before


def _content_after(command: list[str], folder: str) -> Any:
    assert main(command) == 0
    return content_of(folder)


@pytest.mark.slow
def test_killed_while_optimising_goes_on_to_the_same_bits(here: Path) -> None:
    given = [*NET, "photos", "--weights", "3", "--recipe", "eptq", "--steps", "400", "--precision", "float32"]
    program = (
        "import sys, torch; torch.set_num_threads(1); from bitwright.stages import resume as r\n"
        "r.CHECKPOINT_SECONDS, r.CHECKPOINT_SHARE = 0.0, 1e9\n"
        "from bitwright.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    kept = Path("killed/state/reconstruct.safetensors")
    torch.set_num_threads(1)
    with subprocess.Popen([sys.executable, "-c", program, *given, "--out", "killed"], stderr=subprocess.DEVNULL) as job:
        while job.poll() is None:
            time.sleep(0.01)
            if kept.is_file():
                with contextlib.suppress(Exception), safe_open(kept, framework="pt") as file:
                    if int(file.metadata()["step"]) > 50:
                        break
        assert job.poll() is None, "it ended before it could be killed"
        job.kill()
    assert not Path("killed/result.json").exists()
    assert main([*given, "--out", "killed"]) == 2
    resumed = _content_after([*given, "--out", "killed", "--resume"], "killed")
    whole = _content_after([*given, "--out", "whole"], "whole")
    assert resumed == whole


def test_an_optimised_run_tells_what_it_did(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*NET, "photos", "--weights", "3", "--recipe", "eptq", "--steps", "30", "--out", "tuned"]
    assert main([*given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tuned = result["reconstruct"]
    assert tuned["steps"] == 30
    assert tuned["precision"] in {"float32", "bfloat16"}
    assert tuned["loss"]["hard"] == tuned["loss"]["by_stage"][tuned["kept"]]
    assert set(tuned["loss"]["by_stage"]) == {"calibrate", "optq", "cascade", "reconstruct"}
    assert 0 <= tuned["left_nearest"] <= 1
    assert all(set(v) == {"before", "after"} for v in tuned["sqnr_db"].values())
    assert set(result["seconds"]) >= {"capture", "calibrate", "optq", "scores", "reconstruct"}
    assert main([*given, "--force"]) == 0
    assert "30 steps, loss" in capsys.readouterr().out


@pytest.mark.real_default
def test_the_default_recipe_optimises(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)["recipes"] if r["default"]] == ["eptq"]
    assert main([*NET, "photos", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["name"] == "eptq"
    assert any(p.name.endswith("-eptq-w8a8") for p in Path("runs").iterdir())


def test_a_file_that_fails_its_check_is_left_out_and_the_rest_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: Any, path: Path, *_: Any, force: bool, **__: Any) -> None:
        path.write_text("half")
        assert not force
        raise ParityError("stem is the first to differ")

    monkeypatch.setattr(job, "export_checked", refuse)
    assert main([*NET, "photos", "--out", "new"]) == 1
    assert errors_in(capsys.readouterr().err) == ["error: stem is the first to differ"]
    assert "model.onnx" not in {p.name for p in Path("new").iterdir()}
    result = json.loads(Path("new/result.json").read_text())
    assert result["parity"] is None
    assert result["size"]["onnx_bytes"] is None
    assert result["warnings"] == ["stem is the first to differ"]
    assert bitwright.load("new").frozen


def test_dry_run_shows_everything_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_below(here)
    assert main([*NET, "photos", "--dry-run", "--weights", "4", "--out", "new", "--json"]) == 0
    planned = result_of(capsys)
    assert files_below(here) == before
    written = json.loads(Path("run/result.json").read_text())
    keys = ("name", "op", "weight_bits", "activation_bits", "granularity", "parameters", "macs")
    assert [[r[k] for k in keys] for r in planned["layers"]] == [[r[k] for k in keys] for r in written["layers"]]
    assert planned["unquantized"] == written["unquantized"]
    assert planned["size"]["expected_bytes"] == written["size"]["ideal_bytes"]
    assert planned["size"]["float_bytes"] == written["size"]["float_bytes"]
    assert main([*NET, "photos", "--dry-run"]) == 0
    assert "Nothing was calibrated or written" in capsys.readouterr().out


def test_parameters_of_norms_count_and_shared_ones_count_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "models.py:Normed", "photos", "--json"]) == 0
    assert result_of(capsys)["model"]["parameters"] == (3 * 4 * 9 + 4) + (4 * 3 + 3) + (4 + 4)


def test_a_dry_run_looks_at_the_target(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "photos", "--dry-run", "--out", "photos"]) == 2
    assert "not empty" in capsys.readouterr().err


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_examples_of_a_model_and_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"{EXAMPLES / 'own_model.py'}:small_net", "zoo:fashion", "--samples", "16", "--weights", "4"]
    assert main(["quantize", *given, "--recipe", str(EXAMPLES / "my_recipe.py"), "--json"]) == 0
    found = result_of(capsys)
    assert found["recipe"]["name"] == "percentile"
    assert {row["op"] for row in found["layers"]} >= {"conv2d", "hardswish", "linear"}


def test_contributing_shows_a_recipe_that_works(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES.parent / "CONTRIBUTING.md").read_text()
    Path("shown.py").write_text(text.split("```python\n")[1].split("```")[0])
    assert main([*NET, "photos", "--recipe", "shown.py", "--json"]) == 0
    assert result_of(capsys)["recipe"]["name"] == "percentile"


@pytest.mark.slow
def test_example_of_the_python_api(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "python_api.py"))["main"]("made", "zoo:fashion-test[:100]")
    assert "gives the same answer on 100.0% of" in capsys.readouterr().out

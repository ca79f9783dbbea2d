"""The command line, called in this process through `main` and, where a process matters, in one of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch import nn

import bitwright
from bitwright import doctor
from bitwright.cli import app, main
from bitwright.cli import demo as demo_command
from bitwright.cli import quantize as quantize_command
from bitwright.cli.sources import absolute_reference
from bitwright.errors import ParityError

MODELS = """
import torch
from torch import nn

print("hello from the user's own file")
PREPROCESSING = {"input_size": (3, 16, 16), "mean": 0.5, "std": 0.25}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def features(self, x):
        return torch.relu(self.bn(self.stem(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def nan_weights():
    model = Net()
    model.stem.weight.data[0, 0, 0, 0] = float("nan")
    return model


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        y = self.norm(self.features(x).mean((2, 3)))
        return self.head(y) + self.head(torch.relu(y))


class Rare(Net):  # divides by zero on a white image
    def forward(self, x):
        y = self.features(x) / (x.mean((1, 2, 3)) < 1.9).float().reshape(-1, 1, 1, 1)
        return self.head(y.mean((2, 3)))


class Named(Net):
    def forward(self, x):
        y = self.features(x)
        return {"scores": self.head(y.mean((2, 3))), "map": y}


class Pair(Net):
    def forward(self, x):
        y = self.features(x)
        return self.head(y.mean((2, 3))), self.head(y.amax((2, 3)))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 3)

    def forward(self, x):
        return self.head(x.flatten(1))
"""


class WantsToRunCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


def _write_images(folder: Path, count: int, classes: int = 0) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / (f"class{i % classes}" if classes else "") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 200, (18, 18, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that the tests read, and a finished run of `models.py:Net` in `run`."""
    root = tmp_path_factory.mktemp("cli")
    (root / "models.py").write_text(MODELS)
    _write_images(root / "photos", 8)
    _write_images(root / "classes", 9, classes=3)
    for name in ("corrupt", "text", "white"):
        _write_images(root / name, 4)
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "a.jpg")
    (root / "corrupt" / "a.jpg").write_bytes((root / "a.jpg").read_bytes()[:900])
    (root / "a.jpg").unlink()
    (root / "text" / "z.jpg").write_text("no image")
    Image.new("RGB", (18, 18), (255, 255, 255)).save(root / "white" / "z.png")
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "keep.txt").write_text("mine")
    (root / "note.txt").write_text("no folder")
    (root / "few.csv").write_text("00.png,0\n01.png,1\n")
    (root / "large.csv").write_text("".join(f"{i:02}.png,{100 * i}\n" for i in range(8)))
    torch.save({"stem.weight": torch.zeros(4, 3, 3, 3)}, root / "missing.pt")
    torch.save({"x": WantsToRunCode()}, root / "evil.pt")
    (root / "plain.pt").write_bytes(pickle.dumps(WantsToRunCode()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = Path.cwd()
    os.chdir(root)
    given = ["--recipe", "mse", "--weights", "4", "--evaluate", "classes", "--out", "run"]
    status = main(["quantize", "models.py:Net", "photos", *given])
    os.chdir(here)
    assert status == 0
    yield root
    torch.set_num_threads(threads)


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, as the current folder."""
    shutil.copytree(template, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("BITWRIGHT_DEBUG", raising=False)
    return tmp_path / "here"


def _files(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if "__pycache__" not in p.parts}


def _content(run: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """Everything in a run's model file; the order of its header's entries means nothing."""
    with safe_open(Path(run, "model.safetensors"), framework="np") as file:
        return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


def _errors(text: str) -> list[str]:
    """Lines of stderr that are not about progress."""
    return [line for line in text.splitlines() if "…" not in line]


NET = ("quantize", "models.py:Net")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "missing folder": ((*NET, "nowhere"), "'nowhere' does not exist"),
    "empty folder": ((*NET, "empty"), "expected images in empty, found none"),
    "corrupt image": ((*NET, "corrupt"), "cannot read corrupt/a.jpg"),
    "text as image": ((*NET, "text"), "cannot read text/z.jpg"),
    "text file": ((*NET, "note.txt"), "got the file note.txt"),
    "corrupt image to evaluate": ((*NET, "photos", "--evaluate", "corrupt"), "cannot read corrupt/a.jpg"),
    "labels of others": ((*NET, "photos", "--evaluate", "photos", "--labels", "few.csv"), "6 of 8 have none"),
    "labels too large": ((*NET, "photos", "--evaluate", "photos", "--labels", "large.csv"), "labels below 3"),
    "labels missing": ((*NET, "photos", "--evaluate", "photos", "--labels", "no.csv"), "cannot read no.csv"),
    "labels of nothing": ((*NET, "photos", "--labels", "few.csv"), "--evaluate"),
    "steps and minutes": ((*NET, "photos", "--steps", "5", "--minutes", "1"), "found both"),
    "negative steps": ((*NET, "photos", "--steps", "-1"), "at least 0 as --steps, found -1"),
    "no minutes": ((*NET, "photos", "--minutes", "0"), "positive number of minutes"),
    "unknown precision": ((*NET, "photos", "--precision", "half"), "auto, float32 or bfloat16, found 'half'"),
    "no samples": ((*NET, "photos", "--samples", "0"), "at least 1 as --samples, found 0"),
    "samples in words": ((*NET, "photos", "--samples", "many"), "'--samples'"),
    "weights of NaN": (("quantize", "models.py:nan_weights", "photos"), "stem.weight has NaN"),
    "activations of NaN": (("quantize", "models.py:Rare", "white"), "The output of div is not finite"),
    "wrong size": (("quantize", "models.py:Flat", "photos", "--input-size", "20"), "cannot run on images of 3x20x20"),
    "size in words": ((*NET, "photos", "--input-size", "big"), "'big'"),
    "1 bit": ((*NET, "photos", "--weights", "1"), "Expected 2 to 8 bits for weights (or 'float'), found '1'"),
    "9 bits": ((*NET, "photos", "--weights", "9"), "found '9'"),
    "x bits": ((*NET, "photos", "--activations", "x"), "Expected 2 to 8 or 16 bits for activations"),
    "rule without a layer": ((*NET, "photos", "--rule", "haed=w8"), "The closest are head"),
    "rule without bits": ((*NET, "photos", "--rule", "head"), "Expected a rule like"),
    "unknown recipe": ((*NET, "photos", "--recipe", "msee"), "Did you mean 'mse'?"),
    "unknown runtime": ((*NET, "photos", "--runtime", "trt"), "generic-pot, found 'trt'"),
    "unknown granularity": ((*NET, "photos", "--granularity", "row"), "channel, tensor, group, head, found 'row'"),
    "unknown device": ((*NET, "photos", "--device", "tpu"), "as --device, found 'tpu'"),
    "out is full": ((*NET, "photos", "--out", "full"), "is not empty"),
    "out is a run": ((*NET, "photos", "--out", "run"), "is not empty"),
    "out is no run": ((*NET, "photos", "--out", "full", "--force"), "found other files (keep.txt)"),
    "out is a file": ((*NET, "photos", "--out", "note.txt"), "found a file"),
    "out below a file": ((*NET, "photos", "--out", "note.txt/run"), "cannot be written"),
    "out in /proc": ((*NET, "photos", "--out", "/proc/bitwright"), "cannot be written"),
    "several scores": (("quantize", "models.py:Pair", "photos", "--evaluate", "classes"), "with --output"),
    "unknown output": (("quantize", "models.py:Named", "photos", "--output", "x"), "scores, map, found 'x'"),
    "keys missing": (("quantize", "models.py:Net@missing.pt", "photos"), "6 missing (bn.weight"),
    "pickle with code": (("quantize", "models.py:Net@evil.pt", "photos"), "wants to run code"),
    "plain pickle with code": (("quantize", "models.py:Net@plain.pt", "photos"), "plain.pt"),
    "pickle as model": (("quantize", "evil.pt", "photos"), "holds weights at most"),
    "unknown callable": (("quantize", "models.py:Nett", "photos"), "expected 'Nett' in models.py, it has Net"),
    "unknown zoo": (("quantize", "zoo:fashion_cn", "photos"), "did you mean fashion_cnn"),
    "no model": (("quantize", "thing", "photos"), "expected a model as"),
    "argument missing": (("quantize", "models.py:Net"), "See bitwright quantize --help"),
    "unknown option": ((*NET, "photos", "--nope"), "--nope"),
    "unknown verb": (("quantise", "x"), "Did you mean 'quantize'?"),
    "nothing to compare": (("evaluate", "models.py:Net", "photos"), "Give --labels"),
    "no run": (("inspect", "full"), "Expected a run folder"),
    "no ONNX": (("evaluate", "x.onnx", "photos"), "x.onnx does not exist"),
    "ONNX of another size": (
        ("evaluate", "run/model.onnx", "classes", "--input-size", "20"),
        "Expected images of 3x16x16 for run/model.onnx, found 3x20x20",
    ),
    "export of no run": (("export", "photos"), "Expected a run folder"),
    "export elsewhere": (("export", "run", "--to", "tflite"), "out of onnx, openvino, pt2, found 'tflite'"),
    "export to nowhere": (("export", "run", "--out", "no/model.onnx"), "existing folder"),
    "recipe to print": (("recipes", "rtnn"), "Did you mean 'rtn'?"),
    "demo on a file": (("demo", "--out", "note.txt"), "cannot be written"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_clear_line(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = WRONG[name]
    before = _files(here)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = (x for x in _errors(err) if not x.startswith("hello"))
    assert line.startswith("error: ")
    assert expected in line
    assert out.replace("hello from the user's own file\n", "") == ""
    assert _files(here) == before
    assert not (here / "ran").exists()


def _figures(fidelity: dict[str, Any]) -> dict[str, float | None]:
    """Of the worst output and of each."""
    each = {f"{name}/{k}": v for name, found in fidelity["outputs"].items() for k, v in found.items() if k != "note"}
    return {**each, **{k: v for k, v in fidelity.items() if k != "outputs"}}


def _result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_help_needs_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, bitwright.cli; assert bitwright.cli.main(['--help']) == 0;"
        "heavy = {'torch', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(verb in shown for verb in ("demo", "quantize", "evaluate", "inspect", "export", "recipes", "doctor"))


@pytest.mark.parametrize("verb", [c.callback.__name__ for c in app.registered_commands if c.callback])
def test_help_of_a_verb_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert f"bitwright {verb}" in shown.split("Example")[1]
    assert "--json" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitwright {bitwright.__version__}\n"


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
    found = _result(capsys)
    folder = Path(found.pop("run"))
    assert folder == here / "runs" / "Net-mse-w8a8"
    assert found == json.loads((folder / "result.json").read_text())
    assert found["data"]["evaluation"]["same_as_calibration"] is True
    assert found["float"] == {}
    assert found["fidelity"]["agreement"] is not None


def test_same_command_same_bits(here: Path) -> None:
    again = ["quantize", "models.py:Net", "photos", "--weights", "4", "--evaluate", "classes", "--out", "again"]
    assert main(again) == 0
    assert _content("again") == _content("run")


def test_settings_reach_the_quantizers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "photos", "--json", "--rule", "head=w3a16", "--granularity", "tensor", "--recipe", "rtn"]) == 0
    found = _result(capsys)
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
    found = _result(capsys)
    assert found["data"]["calibration"]["count"] == 4
    assert "corrupt/a.jpg" in found["warnings"][0]


@pytest.mark.parametrize("model", ["Named", "Pair"])
def test_several_outputs_work(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", f"models.py:{model}", "photos", "--json"]) == 0
    assert _result(capsys)["fidelity"]["agreement"] is not None


def test_one_output_is_kept_and_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["quantize", "models.py:Named", "photos", "--output", "scores", "--evaluate", "classes", "--out", "new"]
    assert main([*given, "--json"]) == 0
    found = _result(capsys)
    assert found["model"]["output"] == "scores"
    assert main(["evaluate", "new", "classes", "--float", "models.py:Named", "--json"]) == 0
    again = _result(capsys)
    assert again["quantized"] == found["quantized"]
    assert _figures(again["fidelity"]) == pytest.approx(_figures(found["fidelity"]), rel=1e-4)


def test_force_replaces_a_run_and_only_a_run(here: Path) -> None:
    before = _content("run")
    assert main([*NET, "photos", "--out", "run", "--force"]) == 0
    assert _content("run") != before
    Path("run/notes.txt").write_text("mine")
    assert main([*NET, "photos", "--out", "run", "--force"]) == 2
    assert Path("run/notes.txt").read_text() == "mine"


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_interrupted_run_goes_on_to_the_same_bits(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "models.py:Net", "photos", "--weights", "4", "--evaluate", "classes", "--out", "new"]
    with monkeypatch.context() as patch:
        patch.setattr(quantize_command, "evaluate", _interrupt)
        assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert [p.name for p in Path("new").iterdir()] == ["state"]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # the finished stage must not run again
        patch.setattr("bitwright.pipeline._keep", _interrupt)
        assert main([*command, "--resume"]) == 0
    assert not Path("new/state").exists()
    assert _content("new") == _content("run")


def test_interrupt_before_the_first_stage_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(here)
    monkeypatch.setattr("bitwright.stages.calibrate.Calibrate.run", _interrupt)
    assert main([*NET, "photos", "--out", "deep/new"]) == 130
    assert _files(here) == before


def _content_after(command: list[str], folder: str) -> Any:
    assert main(command) == 0
    return _content(folder)


@pytest.mark.slow
def test_killed_while_optimising_goes_on_to_the_same_bits(here: Path) -> None:
    given = [*NET, "photos", "--weights", "3", "--recipe", "eptq", "--steps", "400", "--precision", "float32"]
    program = (
        "import sys, torch; torch.set_num_threads(1); from bitwright.stages import reconstruct as r\n"
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
    assert tuned["loss"]["hard"] == min(tuned["loss"]["by_stage"].values())
    assert set(tuned["loss"]["by_stage"]) == {"calibrate", "optq", "reconstruct"}
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


def test_control_c_in_a_process(here: Path) -> None:
    command = [sys.executable, "-m", "bitwright.cli", *NET, "photos", "--out", "new"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Opening the images"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert "Interrupted" in rest
    assert not Path("new").exists()


def test_control_c_that_somebody_swallows_is_not_forgotten(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(*_: Any, **__: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    before = _files(here)
    monkeypatch.setattr(quantize_command, "check_labels", swallow)
    assert main([*NET, "photos", "--evaluate", "classes", "--out", "new"]) == 130
    assert _files(here) == before


def test_the_unexpected_is_one_line_too(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("thing")

    before = _files(here)
    monkeypatch.setattr("bitwright.stages.calibrate.Calibrate.run", fail)
    assert main([*NET, "photos", "--out", "new"]) == 1
    assert _errors(capsys.readouterr().err) == ["error: unexpected KeyError: 'thing'. BITWRIGHT_DEBUG=1 shows where."]
    assert _files(here) == before
    monkeypatch.setenv("BITWRIGHT_DEBUG", "1")
    assert main([*NET, "photos", "--out", "new"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debugging_shows_where_a_wrong_call_was_found(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITWRIGHT_DEBUG", "1")
    assert main([*NET, "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_a_file_that_fails_its_check_is_left_out_and_the_rest_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: Any, path: Path, *_: Any, force: bool, **__: Any) -> None:
        path.write_text("half")
        assert not force
        raise ParityError("stem is the first to differ")

    monkeypatch.setattr(quantize_command, "export_checked", refuse)
    assert main([*NET, "photos", "--out", "new"]) == 1
    assert _errors(capsys.readouterr().err) == ["error: stem is the first to differ"]
    assert "model.onnx" not in {p.name for p in Path("new").iterdir()}
    result = json.loads(Path("new/result.json").read_text())
    assert result["parity"] is None
    assert result["size"]["onnx_bytes"] is None
    assert result["warnings"] == ["stem is the first to differ"]
    assert bitwright.load("new").frozen


def test_evaluate_a_run_says_what_quantize_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads(Path("run/result.json").read_text())
    os.chdir("photos")
    assert main(["evaluate", "../run", "../classes", "--float", "../models.py:Net", "--json"]) == 0
    found = _result(capsys)
    assert found["quantized"] == written["quantized"]
    assert found["float"] == written["float"]
    assert _figures(found["fidelity"]) == pytest.approx(_figures(written["fidelity"]), rel=1e-4)


def test_evaluate_without_the_float_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(Path("run/result.json").read_text())
    result["model"]["reference"] = "gone.py:Net"
    Path("run/result.json").write_text(json.dumps(result))
    assert main(["evaluate", "run", "classes", "--json"]) == 0
    found = _result(capsys)
    assert found["quantized"] == result["quantized"]
    assert "fidelity" not in found
    assert "Give it with --float" in found["warnings"][0]
    assert main(["evaluate", "run", "photos"]) == 2
    assert main(["evaluate", "run", "photos", "--float", "models.py:Net", "--json"]) == 0
    capsys.readouterr()


def test_a_run_runs_no_python_file_by_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(Path("run/result.json").read_text())
    Path("run/net.py").write_text("open('ran', 'w').close()\nfrom models import Net\n")
    result["model"]["reference"] = str(Path("run/net.py:Net").absolute())
    Path("run/result.json").write_text(json.dumps(result))
    for command in ("evaluate", "parity"):
        main([command, "run", "classes", "--json"])
        assert "Python code" in capsys.readouterr().out
    assert not Path("ran").exists()


@pytest.mark.parametrize("given", [[], ["--float", "models.py:Net"]])
def test_evaluate_an_onnx_file(given: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run/model.onnx", "classes", "--json", *given]) == 0
    found = _result(capsys)
    assert found["model"]["kind"] == "onnx"
    assert found["quantized"] == json.loads(Path("run/result.json").read_text())["quantized"]
    assert ("fidelity" in found) == bool(given)


def test_evaluate_a_float_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "models.py:Net", "classes", "--json"]) == 0
    found = _result(capsys)
    assert found["float"] == json.loads(Path("run/result.json").read_text())["float"]
    assert "quantized" not in found
    assert main(["evaluate", "models.py:Net", "photos", "--float", "models.py:Net", "--json"]) == 0
    assert _result(capsys)["fidelity"]["agreement"] == 1


def test_dry_run_shows_everything_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(here)
    assert main([*NET, "photos", "--dry-run", "--weights", "4", "--out", "new", "--json"]) == 0
    planned = _result(capsys)
    assert _files(here) == before
    written = json.loads(Path("run/result.json").read_text())
    keys = ("name", "op", "weight_bits", "activation_bits", "granularity", "parameters", "macs")
    assert [[r[k] for k in keys] for r in planned["layers"]] == [[r[k] for k in keys] for r in written["layers"]]
    assert planned["unquantized"] == written["unquantized"]
    assert planned["size"]["expected_bytes"] == written["size"]["ideal_bytes"]
    assert planned["size"]["float_bytes"] == written["size"]["float_bytes"]
    assert main([*NET, "photos", "--dry-run"]) == 0
    assert "Nothing was calibrated or written" in capsys.readouterr().out


def test_inspect_a_run_and_its_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads(Path("run/result.json").read_text())
    assert main(["inspect", "run", "--json"]) == 0
    run = _result(capsys)
    assert run["layers"] == written["layers"]
    assert run["model"]["parameters"] == written["model"]["parameters"] == 3 * 4 * 9 + 4 + 4 * 3 + 3
    assert main(["inspect", "models.py:Net", "--weights", "4", "--json"]) == 0
    network = _result(capsys)
    assert network["unquantized"] == run["unquantized"]
    assert network["model"]["macs"] == run["model"]["macs"] == 8 * 8 * 27 * 4 + 12
    for given in ("run", "models.py:Net"):
        assert main(["inspect", given]) == 0
        shown = capsys.readouterr().out
        assert "stem" in shown
        assert "output of the network, left in float" in shown


def test_parameters_of_norms_count_and_shared_ones_count_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "models.py:Normed", "photos", "--json"]) == 0
    assert _result(capsys)["model"]["parameters"] == (3 * 4 * 9 + 4) + (4 * 3 + 3) + (4 + 4)


def test_export_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("run/model.onnx").stat().st_size
    Path("run/model.onnx").unlink()
    assert main(["export", "run", "--json"]) == 0
    found = _result(capsys)
    assert found["parity"]["first_divergence"] is None
    assert found["onnx_bytes"] == Path("run/model.onnx").stat().st_size == pytest.approx(before, rel=0.05)
    assert main(["export", "run", "--out", "elsewhere.onnx", "--images", "photos"]) == 0
    assert Path("elsewhere.onnx").is_file()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("run/model.safetensors", "ends in .onnx"),
        ("models.py", "ends in .onnx"),
        ("theirs.onnx", "is there already"),
        ("pipe.onnx", "found something else"),
        ("full.onnx", "Expected a file"),
        ("to_theirs.onnx", "theirs.onnx is there already"),
    ],
)
def test_export_replaces_no_file_of_others(here: Path, capsys: pytest.CaptureFixture[str], out: str, said: str) -> None:
    Path("theirs.onnx").write_bytes(b"theirs")
    Path("to_theirs.onnx").symlink_to("theirs.onnx")
    os.mkfifo("pipe.onnx")
    Path("full.onnx").mkdir()
    before = _files(here)
    assert main(["export", "run", "--out", out]) == 2
    assert said in capsys.readouterr().err
    assert _files(here) == before
    assert Path("theirs.onnx").read_bytes() == b"theirs"
    with pytest.raises(bitwright.UsageError):
        bitwright.load("run").export(out, np.zeros((2, 3, 16, 16), np.float32))
    assert _files(here) == before


def test_export_replaces_its_own_file_and_with_force_any(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.onnx").write_bytes(b"theirs")
    assert main(["export", "run", "--out", "theirs.onnx", "--force"]) == 0
    assert main(["export", "run", "--out", "theirs.onnx"]) == 0
    assert Path("theirs.onnx").stat().st_size > 1000


@pytest.mark.parametrize("content", ['{"a":' * 100_000, '{"model": NaN, "recipe": 1, "layers": [], "size": {}}', "[1]"])
@pytest.mark.parametrize("verb", [["inspect", "run"], ["report", "run"], ["export", "run"], ["parity", "run"]])
def test_a_result_that_is_no_json(
    here: Path, capsys: pytest.CaptureFixture[str], content: str, verb: list[str]
) -> None:
    Path("run/result.json").write_text(content)
    assert main(verb) == 2
    (line,) = _errors(capsys.readouterr().err)
    assert "result.json" in line
    assert "unexpected" not in line


@pytest.mark.parametrize("verb", ["inspect", "export", "report", "evaluate"])
@pytest.mark.parametrize("change", [{"unfolded": -1}, {"layers": "abc"}, {"layers": [{"name": 5}]}, {"size": None}])
def test_a_result_with_other_types(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], verb: str
) -> None:
    result = json.loads(Path("run/result.json").read_text())
    Path("run/result.json").write_text(json.dumps(result | change))
    assert main([verb, "run", *["classes"] * (verb == "evaluate")]) == 2
    (line,) = _errors(capsys.readouterr().err)
    assert "damaged" in line


def test_a_pipe_that_is_closed_is_no_fault(here: Path) -> None:
    command = [sys.executable, "-m", "bitwright.cli", "quantize", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert "Python file" not in process.stderr.read()


def test_it_runs_as_a_module() -> None:
    ran = subprocess.run([sys.executable, "-m", "bitwright", "--version"], capture_output=True, text=True, check=True)
    assert bitwright.__version__ in ran.stdout


def test_a_saved_program_knows_its_size(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = nn.Sequential(nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 6, 2)).eval()
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 5, 6, 8),), dynamic_shapes=any_batch), "net.pt2")
    assert main(["inspect", "net.pt2", "--json"]) == 0
    assert [x["name"] for x in json.loads(capsys.readouterr().out)["layers"]][1:] == ["0", "2"]


def test_a_dry_run_looks_at_the_target(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "photos", "--dry-run", "--out", "photos"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_export_of_a_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "--to", "pt2", "--out", "run/model.onnx"]) == 2
    assert "ends in .pt2" in capsys.readouterr().err
    assert main(["export", "run", "--to", "pt2", "--json"]) == 0
    found = _result(capsys)
    assert found["parity"]["max_abs"] == 0
    assert found["bytes"] == Path("run/model.pt2").stat().st_size
    result = json.loads(Path("run/result.json").read_text())
    assert result["size"]["pt2_bytes"] == found["bytes"]
    assert result["exports"]["pt2"]["parity"] == found["parity"]
    assert result["parity"]["runtime"].startswith("onnxruntime")  # that of model.onnx stays


def test_export_asks_for_images_that_are_gone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(Path("run/result.json").read_text())
    result["data"]["evaluation"]["source"] = str(here / "gone")
    Path("run/result.json").write_text(json.dumps(result))
    assert main(["export", "run"]) == 2
    assert "Give others with --images" in capsys.readouterr().err


def test_recipes_are_listed_and_read_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert "mse" in shown
    assert "rtn" in shown
    assert main(["recipes", "rtn"]) == 0
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    settings["name"] = "mine"
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert main([*NET, "photos", "--recipe", "mine.yaml", "--json"]) == 0
    assert _result(capsys)["recipe"]["settings"]["stages"] == settings["stages"]
    Path("mine.yaml").write_text(text.replace("weights: minmax", "weights: sideways"))
    assert main([*NET, "photos", "--recipe", "mine.yaml", "--out", "other"]) == 2
    assert "weights" in capsys.readouterr().err


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = _result(capsys)
    assert found["ok"] is True
    assert found["devices"][0]["device"] == "cpu"
    original = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name in {"scipy", "timm"}:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "For scipy:  pip install --upgrade bitwright" in shown
    assert "For timm:  pip install 'bitwright[models]'" in shown


def test_demo_ends_by_naming_its_files(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_command, "CALIBRATION", "zoo:fashion[:32]")
    monkeypatch.setattr(demo_command, "TEST", "zoo:fashion-test[:64]")
    monkeypatch.setattr(demo_command, "DEMO_STEPS", 4)
    assert main(["demo", "--out", "show"]) == 0
    shown = capsys.readouterr().out
    for name in ("fashion_cnn", "fashion_vit"):
        result = json.loads((here / "show" / name / "result.json").read_text())
        assert result["bits"] == {"weights": 4, "activations": 8}
        assert f"{100 * result['quantized']['top1']:.2f} %" in shown
        assert f"show/{name}/model.onnx" in shown
    assert main(["demo", "--out", "show"]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("timm:resnet18@w/a.pt", "timm:resnet18@{}/w/a.pt"),
        ("a/b.py:make", "{}/a/b.py:make"),
        ("a/b.py:make@w.pt", "{0}/a/b.py:make@{0}/w.pt"),
        ("net@2.pt2", "{}/net@2.pt2"),
        ("/x/y.pt2", "/x/y.pt2"),
    ],
)
def test_references_hold_from_any_folder(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_reference(given) == expected.format(tmp_path)


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_examples_of_a_model_and_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"{EXAMPLES / 'own_model.py'}:small_net", "zoo:fashion", "--samples", "16", "--weights", "4"]
    assert main(["quantize", *given, "--recipe", str(EXAMPLES / "my_recipe.py"), "--json"]) == 0
    found = _result(capsys)
    assert found["recipe"]["name"] == "percentile"
    assert {row["op"] for row in found["layers"]} >= {"conv2d", "hardswish", "linear"}


def test_contributing_shows_a_recipe_that_works(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES.parent / "CONTRIBUTING.md").read_text()
    Path("shown.py").write_text(text.split("```python\n")[1].split("```")[0])
    assert main([*NET, "photos", "--recipe", "shown.py", "--json"]) == 0
    assert _result(capsys)["recipe"]["name"] == "percentile"


@pytest.mark.slow
def test_example_of_the_python_api(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "python_api.py"))["main"]("made", "zoo:fashion-test[:100]")
    assert "gives the same answer on 100.0% of" in capsys.readouterr().out

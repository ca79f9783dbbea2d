"""The job of a network that is there already, beside the command that quantizes it."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import dataset, make

import bitwright as bw
from bitwright.cli import main
from bitwright.errors import ParityError, UsageError
from bitwright.given.arguments import as_flags
from bitwright.graph import work
from bitwright.run import job

RECIPE, CALIBRATION, TEST = "eptq", "zoo:fashion[:64]", "zoo:fashion-test[:16]"
NETWORK = f"{Path(__file__).parents[2] / 'examples' / 'own_model.py'}:small_net"
OF_THE_MOMENT = {
    "diagnosis",
    "seconds",
    "peak_memory_bytes",
    "command",
    "seconds_per_step",
    "step_seconds",
    "time",
    "files",
}
"""Keys whose values differ from call to call: times, and what the time that is left decides."""


def steady(value: Any) -> Any:
    """Without what differs from call to call, whose keys are kept."""
    if isinstance(value, dict):
        return {
            k: sorted(v) if k in OF_THE_MOMENT and isinstance(v, dict) else None if k in OF_THE_MOMENT else steady(v)
            for k, v in value.items()
        }
    return [steady(v) for v in value] if isinstance(value, list) else value


def result_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def model() -> bw.QuantizedModel:
    return bw.quantize(make("residual"), dataset(8), "rtn")


@pytest.mark.filterwarnings("always:The optimisation did not lower")
def test_a_saved_network_leaves_what_the_command_leaves(tmp_path: Path) -> None:
    command, library = tmp_path / "command", tmp_path / "library"
    given = [NETWORK, CALIBRATION, "--recipe", RECIPE, "--samples", "2", "--steps", "2", "--evaluate", TEST]
    assert main(["quantize", *given, "--precision", "float32", "--weights", "4", "--out", str(command)]) == 0
    made = bw.quantize(NETWORK, CALIBRATION, RECIPE, weights=4, samples=2, steps=2, precision="float32")
    assert made.save(library, evaluate=TEST, diagnosis=True, onnx=True, report=True) == library

    assert {p.name for p in library.iterdir()} == {p.name for p in command.iterdir()}
    ours, theirs = result_in(library), result_in(command)
    ours["warnings"] = [as_flags(line) for line in ours["warnings"]]
    assert steady(ours) == steady(theirs)
    assert ours["model"]["reference"] == NETWORK
    sources = {name: found["source"] for name, found in ours["data"].items()}
    assert sources == {"calibration": CALIBRATION, "evaluation": TEST}
    assert (library / "model.safetensors").read_bytes() == (command / "model.safetensors").read_bytes()
    assert sorted(json.loads((library / "report.json").read_text())) == sorted(
        json.loads((command / "report.json").read_text())
    )
    assert "KL divergence" in (library / "report.html").read_text()


def test_what_is_not_asked_for_costs_nothing(
    model: bw.QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("evaluation_of", "LayerNoise", "export_checked"):
        monkeypatch.setattr(job, step, lambda *_, **__: pytest.fail("nobody asked for it"))
    model.save(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"model.safetensors", "plan.json", "result.json"}
    found = result_in(tmp_path / "run")
    assert found["data"]["evaluation"] is None
    assert not {"quantized", "diagnosis", "parity"} & set(found)
    assert "total" not in found["seconds"]


def test_true_measures_on_the_calibration_images(tmp_path: Path) -> None:
    made = bw.quantize(make("residual"), dataset(8), "rtn")
    told: list[str] = []
    made.save(tmp_path / "run", evaluate=True, progress=lambda what, *_, **__: told.append(what))
    found = result_in(tmp_path / "run")
    evaluation = found["data"]["evaluation"]
    assert (evaluation["count"], evaluation["same_as_calibration"]) == (8, True)
    assert found["fidelity"] == made.evaluate(dataset(8))["fidelity"]
    assert all(row["sqnr_db"] is not None for row in found["layers"] if row["weight_bits"])
    assert "Evaluating" in told
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [e["what"] for e in events if e["event"] == "done"] == ["Evaluating"]


def test_a_large_network_is_measured_and_compared_on_fewer_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bw.quantize(make("residual"), dataset(40), "rtn")
    monkeypatch.setattr(work, "MODEST", 1.0)
    made.save(tmp_path / "run", onnx=True, report=True)
    found = result_in(tmp_path / "run")
    assert found["data"]["evaluation"]["count"] == 32
    assert found["parity"]["images"] == 8
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    said = [e["what"] for e in events if e["event"] == "done"]
    assert "Evaluating on 32 images instead of 40, since the network is large" in said
    assert "Writing ONNX and checking it in ONNX Runtime on 8 images instead of 32, since the network is large" in said
    made.save(tmp_path / "others", evaluate=dataset(35))
    assert result_in(tmp_path / "others")["data"]["evaluation"]["count"] == 35, "all of those that are given"


def test_a_file_that_fails_its_check_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, path: Path, *_: Any, **__: Any) -> None:
        path.write_text("half")
        raise ParityError("stem is the first to differ")

    made = bw.quantize(make("residual"), dataset(8), "rtn")
    monkeypatch.setattr(job, "export_checked", refuse)
    with pytest.raises(ParityError, match="stem is the first"):
        made.save(tmp_path / "run", onnx=True)
    found = result_in(tmp_path / "run")
    assert "model.onnx" not in {p.name for p in (tmp_path / "run").iterdir()}
    assert (found["parity"], found["size"]["onnx_bytes"]) == (None, None)
    assert found["warnings"][-1] == "stem is the first to differ"
    assert bw.load(tmp_path / "run").frozen


def test_a_warning_on_the_way_is_in_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("at last")

    made = bw.quantize(make("residual"), dataset(8), "rtn")
    monkeypatch.setattr(job.diagnosis, "diagnose", fail)
    with pytest.warns(UserWarning, match="could not be found out"):
        made.save(tmp_path / "run", diagnosis=True)
    found = result_in(tmp_path / "run")
    assert found["diagnosis"] is None
    assert "ZeroDivisionError: at last" in found["warnings"][-1]


def test_a_loaded_network_is_measured_without_its_float_one(model: bw.QuantizedModel, tmp_path: Path) -> None:
    loaded = bw.load(model.save(tmp_path / "run"))
    loaded.save(tmp_path / "again", evaluate=dataset(6), labels=[0, 1, 2, 0, 1, 2])
    found = result_in(tmp_path / "again")
    assert set(found["quantized"]) == {"top1", "top1_ci"}  # top-5 of few classes says nothing
    assert "fidelity" not in found
    for wanted, said in (({"report": True}, "report=True"), ({"diagnosis": True}, "diagnosis=True")):
        with pytest.raises(UsageError, match=said):
            loaded.save(tmp_path / "third", evaluate=dataset(6), **wanted)
    with pytest.raises(UsageError, match="evaluate="):
        loaded.save(tmp_path / "third", onnx=True)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_a_pickle_is_refused_with_what_replaces_it(
    model: bw.QuantizedModel, write: Callable[[bw.QuantizedModel], Any]
) -> None:
    with pytest.raises(UsageError, match=r"Expected q.save\('run'\) .* bitwright.load\('run'\)"):
        write(model)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_as_good(
    model: bw.QuantizedModel, tmp_path: Path, copied: Callable[[bw.QuantizedModel], bw.QuantizedModel]
) -> None:
    made = copied(model)
    assert torch.equal(made(dataset(8).batch([0, 1])), model(dataset(8).batch([0, 1])))
    assert (made.graph is model.graph) == (copied is copy.copy)
    made.save(tmp_path / "run")
    assert torch.equal(bw.load(tmp_path / "run")(dataset(8)[0][None]), model(dataset(8)[0][None]))


def test_warnings_of_the_quantization_are_in_the_result() -> None:
    with pytest.warns(UserWarning, match="100 images were asked for"):
        found = bw.quantize(make("residual"), dataset(8), "rtn", samples=100).result
    assert any(line.startswith("100 images were asked for") for line in found["warnings"])


@pytest.mark.parametrize("name", ["force", "diagnosis", "onnx", "report", "pictures"])
def test_what_is_not_true_or_false_is_refused(model: bw.QuantizedModel, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"Expected True or False as {name}=, found 'no'"):
        model.save(tmp_path / "run", **{name: "no"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("evaluate", [None, True, False])
def test_labels_are_of_images_that_are_given(model: bw.QuantizedModel, tmp_path: Path, evaluate: bool | None) -> None:
    with pytest.raises(UsageError, match="Expected images as evaluate= beside labels="):
        model.save(tmp_path / "run", evaluate=evaluate, labels=[1] * 8)


def test_a_result_tells_of_its_own_folder(model: bw.QuantizedModel, tmp_path: Path) -> None:
    before = json.dumps(model.result, default=str)
    model.save(tmp_path / "first")
    model.save(tmp_path / "second", evaluate=True, onnx=True)
    assert result_in(tmp_path / "second")["parity"]["images"]
    assert json.dumps(model.result, default=str) == before
    model.save(tmp_path / "third")
    first, third = (result_in(tmp_path / name) for name in ("first", "third"))
    assert set(first) == set(third)
    assert first["size"] == third["size"]
    bw.load(tmp_path / "second").save(tmp_path / "again")
    assert "parity" not in result_in(tmp_path / "again")
    assert "onnx_bytes" not in result_in(tmp_path / "again")["size"]


@pytest.mark.filterwarnings("ignore:.*treespec")
def test_what_quantize_returns_can_be_copied(model: bw.QuantizedModel) -> None:
    x = dataset(3).batch(range(3))
    assert torch.equal(copy.deepcopy(model)(x), model(x))

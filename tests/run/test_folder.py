import json

import cases
import pytest
import torch

import bitwright as bw
from bitwright.run.folder import check_target


@pytest.fixture
def model():
    return bw.quantize(cases.model("residual"), cases.dataset(), recipe="rtn", weights=4)


def test_a_run_folder_holds_what_the_contract_says(model, tmp_path):
    model.save(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"model.safetensors", "plan.json", "result.json"}
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["layers"]
    assert plan["stem"]["weight"] == {"bits": 4, "granularity": "channel", "symmetric": True}
    assert torch.equal(bw.load(tmp_path / "run")(cases.images()), model(cases.images()))


def test_result_has_the_contracts_keys(model, tmp_path):
    model.save(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for key in (
        "bitwright",
        "torch",
        "python",
        "platform",
        "device",
        "seed",
        "command",
        "model",
        "data",
        "recipe",
        "bits",
    ):
        assert key in result
    assert result["size"]["packed_bytes"] == (tmp_path / "run" / "model.safetensors").stat().st_size
    assert {"name", "op", "weight_bits", "activation_bits", "granularity", "parameters", "macs", "sqnr_db"} == set(
        result["layers"][0]
    )
    parameters = sum(p.numel() for n, p in cases.prepared("residual").graph.named_buffers())
    assert result["model"]["parameters"] == parameters


def test_loading_an_unfinished_run_says_what_to_do(tmp_path):
    (tmp_path / "run" / "state").mkdir(parents=True)
    with pytest.raises(bw.UsageError, match=r"found none in .*It is unfinished: repeat its command with --resume\."):
        bw.load(tmp_path / "run")
    with pytest.raises(bw.UsageError, match=r"Give a run's folder\."):
        bw.load(tmp_path)


def test_a_filled_folder_is_refused_and_left_alone(model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(bw.UsageError, match="not empty"):
        model.save(tmp_path / "run")
    with pytest.raises(bw.UsageError, match="other files"):
        model.save(tmp_path / "run", force=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_run_is_replaced_by_force_alone(model, tmp_path):
    model.save(tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(bw.UsageError, match="not empty"):
        model.save(tmp_path / "run")
    model.save(tmp_path / "run", force=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_loaded_run_can_be_saved_again(model, tmp_path):
    model.save(tmp_path / "run")
    bw.load(tmp_path / "run").save(tmp_path / "again")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_nothing_half_written_stays(model, tmp_path, monkeypatch):
    from bitwright.run import folder as run_folder

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(run_folder, "write_result", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(bw.UsageError, match="found a file"):
        check_target(tmp_path / "run")

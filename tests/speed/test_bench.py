"""`bitwright bench`: what it writes and refuses; times are made up, never asserted."""

from __future__ import annotations

import json
import shutil
import statistics
from contextlib import nullcontext
from dataclasses import replace

import cases
import onnx
import pytest
from onnx import TensorProto, helper

import bitwright as bw
from bitwright import cli, runtimes
from bitwright.errors import BitwrightError, UsageError
from bitwright.runtimes.onnxruntime import ONNXRUNTIME
from bitwright.runtimes.openvino import OPENVINO
from bitwright.speed import bench as module
from bitwright.speed.memory import peak_memory
from bitwright.speed.timing import Spread


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = bw.quantize(cases.model("conv_bn_relu6"), cases.dataset(), recipe="mse")
    model.save(folder)
    model.export(folder / "model.onnx")
    return folder


FLOAT = [0.004, 0.002, 0.008, 0.004]
QUANTIZED = [0.002, 0.002, 0.002, 0.003]


def made_up(calls):
    for call in calls:
        call()
    return [FLOAT, QUANTIZED]


def no_memory(*_):
    return {"peak_bytes": 7, "above_start_bytes": 5}


def quick(run, **options):
    options = {"runtimes": ("onnxruntime",), "batches": (1, 3), "threads": (1,), **options}
    return bw.bench(run, measure=made_up, memory=no_memory, **options)


def test_rows_hold_medians_quartiles_and_ratios_of_rounds(run):
    found = quick(run)
    assert [(r["runtime"], r["threads"], r["batch"]) for r in found["rows"]] == [
        ("onnxruntime", 1, 1),
        ("onnxruntime", 1, 3),
    ]
    row = found["rows"][1]
    low, middle, high = statistics.quantiles(FLOAT, n=4, method="inclusive")
    assert [row["float"][k] for k in ("low", "median", "high", "count")] == pytest.approx([low, middle, high, 4])
    assert row["quantized"]["images_per_second"] == pytest.approx(3 / statistics.median(QUANTIZED))
    by_round = [q / f for q, f in zip(QUANTIZED, FLOAT, strict=True)]
    assert row["ratio"]["median"] == pytest.approx(statistics.median(by_round))
    assert row["float"]["peak_bytes"] == 7


def test_the_file_beside_the_run_is_what_is_returned(run):
    found = quick(run)
    assert json.loads((run / "bench.json").read_text()) == found
    products = found["runtimes"][0]["products"]
    assert products == {"float": {"integer": 0, "float": 2}, "quantized": {"integer": 2, "float": 0}}
    listed = [(x["operator"], x["count"]) for x in found["runtimes"][0]["float_operators"]]
    assert listed == [("QuantizeLinear", 1)]  # of the images; the last layer gives floats itself
    bw.load(run).save(run.parent / "copy")  # and the folder is still one that can be replaced
    (run.parent / "copy" / "bench.json").write_text("{}")
    bw.load(run).save(run.parent / "copy", force=True)


def test_a_file_runs_at_every_batch_in_the_real_runtime(run):
    found = bw.bench(
        run, runtimes=["onnxruntime"], batches=(2,), threads=(1,), seconds=0.01,
    )  # fmt: skip
    (row,) = found["rows"]
    assert row["float"]["count"] == row["quantized"]["count"] >= 5
    assert row["quantized"]["peak_bytes"] > row["quantized"]["above_start_bytes"] > 0


def test_memory_is_that_of_the_file_alone(run):
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    found = peak_memory(ONNXRUNTIME, run / "model.onnx", {"images": (1, 3, 8, 8)}, 1)
    assert found["peak_bytes"] < 300_000_000
    del ballast


@pytest.mark.filterwarnings("error")
def test_runtimes_that_do_not_read_the_integers_of_a_file_are_left_out_and_told_of(tmp_path, monkeypatch):
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", there := replace(OPENVINO, package="onnx"))
    everywhere = [ONNXRUNTIME, there]
    for kind, expected in ((TensorProto.INT2, [ONNXRUNTIME]), (TensorProto.INT4, everywhere)):
        stored = helper.make_tensor("w", kind, [4], [0, 1, 1, 0])
        graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("w", kind, [4])], [stored])
        onnx.save(helper.make_model(graph), path := tmp_path / "model.onnx")
        left = expected != everywhere
        said = pytest.warns(UserWarning, match="OpenVINO is left out, .* 2 bits, which model.onnx holds")
        with said if left else nullcontext():
            assert runtimes.chosen(None, path) == expected
        assert runtimes.chosen(["openvino"], path) == [there]  # whoever asks for it gets its own line


def test_a_file_that_does_not_load_is_named(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(BitwrightError, match=r"broken\.onnx"):
        peak_memory(ONNXRUNTIME, tmp_path / "broken.onnx", {"images": (1, 3, 8, 8)}, 1)
    with pytest.raises(BitwrightError, match=r"does not run broken\.onnx"):
        ONNXRUNTIME.loaded(tmp_path / "broken.onnx", 1, {})


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(run, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UsageError, match=r"tiny cannot be written \(Permission denied\)\. Copy the run"):
        bw.bench(run, runtimes=["onnxruntime"], measure=lambda _: pytest.fail("measured"))


ABSENT = replace(OPENVINO, package="no_such_package_anywhere")


def test_a_runtime_that_is_not_there_is_named_with_its_line(run, monkeypatch):
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", ABSENT)
    found = quick(run, runtimes=None)
    assert found["absent"] == [{"runtime": "openvino", "install": "pip install no_such_package_anywhere"}]
    assert {r["runtime"] for r in found["rows"]} == {"onnxruntime"}
    with pytest.raises(UsageError, match=r"OpenVINO is not installed\. Install it with: pip install no_such"):
        quick(run, runtimes=["openvino"])
    monkeypatch.setitem(runtimes.RUNTIMES, "onnxruntime", replace(ONNXRUNTIME, package="no_such_package_anywhere"))
    with pytest.raises(UsageError, match="ONNX Runtime is not installed"):
        quick(run, runtimes=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": ["tensorrt"]}, "Expected a runtime out of onnxruntime, openvino, found 'tensorrt'"),
        ({"batches": (0,)}, "Expected a batch of at least 1, found 0"),
        ({"batches": ()}, "found none"),
        ({"threads": (-1, 2)}, "Expected a number of threads of at least 1"),
        ({"seconds": 0.0}, "Expected a positive number of seconds"),
        ({"seconds": float("nan")}, "Expected a positive number of seconds"),
    ],
)
def test_wrong_arguments(run, options, message):
    with pytest.raises(UsageError, match=message):
        quick(run, **options)


def test_wrong_folders(run, tmp_path):
    with pytest.raises(UsageError, match="Expected a run folder, found none at"):
        quick(tmp_path / "none")
    with pytest.raises(UsageError, match=r"Expected a run folder with result\.json"):
        quick(tmp_path)
    (tmp_path / "state").mkdir()
    with pytest.raises(UsageError, match=r"unfinished\. Repeat its command with --resume"):
        quick(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UsageError, match=r"Expected model\.onnx in .* bitwright export"):
        quick(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UsageError, match="not a file that bitwright exported"):
        quick(tmp_path)
    assert not (tmp_path / "bench.json").exists()


@pytest.fixture
def made_up_times(monkeypatch):
    monkeypatch.setattr(module, "in_turn", lambda calls, seconds: made_up(calls))
    monkeypatch.setattr(module, "peak_memory", no_memory)


def test_command_prints_a_table_or_json(run, made_up_times, capsys):
    arguments = ["bench", str(run), "--batch", "1,2", "--threads", "1", "--runtime", "onnxruntime"]
    assert cli.main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "computes 2 of 2 convolutions and matrix products in integers" in text
    assert "without its quantizers" in text
    assert "QuantizeLinear 1 the images become codes" in text
    assert cli.main([*arguments, "--json"]) == 0
    assert [r["batch"] for r in json.loads(capsys.readouterr().out)["rows"]] == [1, 2]


def test_several_runs_are_timed_each_for_itself(run, made_up_times, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    arguments = ["--batch", "1", "--threads", "1", "--runtime", "onnxruntime"]
    assert cli.main(["bench", str(run), str(other), *arguments, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["runs"]
    assert [r["run"] for r in records] == [str(run), str(other)]
    assert json.loads((other / "bench.json").read_text())["run"] == str(other)
    assert cli.main(["bench", str(run), str(other), *arguments]) == 0
    assert capsys.readouterr().out.count("Written: bench.json in") == 2


def test_several_runs_are_looked_at_before_one_is_timed(run, made_up_times, capsys, tmp_path):
    other = tmp_path / "mine"
    shutil.copytree(run, other)
    (other / "bench.json").unlink(missing_ok=True)
    for second, why in (
        (tmp_path / "none", "Expected a run folder"),
        (other / ".." / "mine", "found one of them twice"),
    ):
        assert cli.main(["bench", str(other), str(second)]) == 2
        assert why in capsys.readouterr().err
    assert not (other / "bench.json").exists()


@pytest.mark.parametrize("given", [["--batch", "1,x"], ["--threads", "0"], ["--runtime", "tvm"], ["--seconds", "-1"]])
def test_command_refuses_wrong_options(run, given, capsys):
    assert cli.main(["bench", str(run), *given]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2


def test_a_speed_is_claimed_only_where_the_spread_allows_it():
    for low, median, high in ((0.9, 0.95, 1.0), (0.5, 1.2, 1.4), (1.0, 1.0, 1.0)):
        assert Spread(median, low, high, 5).verdict == "no clear difference"
    for factor in (1.5, 4.0):
        assert Spread(factor, factor, factor, 5).verdict == f"{factor:.2f} times as slow"
        assert Spread(*[1 / factor] * 3, 5).verdict == f"{factor:.2f} times as fast"

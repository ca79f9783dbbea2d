"""Every format from Python: checked, whole or not at all, and refused in one line."""

from dataclasses import replace
from pathlib import Path

import cases
import pytest

import bitwright as bw
from bitwright.errors import ParityError, UsageError
from bitwright.export import formats
from bitwright.export.formats import FORMATS
from bitwright.quantized import QuantizedModel

HERE = ("onnx", "pt2", "tables", "encodings", "tensorrt")


def quantized(runtime: str = "onnxruntime") -> QuantizedModel:
    return bw.quantize(cases.model("residual"), cases.dataset(8), "rtn", runtime=runtime, device="cpu")


@pytest.mark.parametrize("to", HERE)
def test_every_format_is_written_and_checked(to: str, tmp_path: Path) -> None:
    model = quantized("tensorrt" if to == "tensorrt" else "onnxruntime")
    files = [tmp_path / name for name in FORMATS[to].files]
    assert model.export(files[0], to=to).passed
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_formats_and_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(UsageError, match=r"Expected a format out of onnx, .*, found 'tflite'"):
        model.export(tmp_path / "m.tflite", to="tflite")
    with pytest.raises(UsageError, match=r"\.pt2"):
        model.export(tmp_path / "m.onnx", to="pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_fails_its_check_is_not_left_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = quantized(), FORMATS["pt2"]
    assert made.write is not None
    write = made.write
    failing = replace(made, write=lambda *given: replace(write(*given), first_divergence="stem"))
    monkeypatch.setitem(formats.FORMATS, "pt2", failing)
    with pytest.raises(ParityError, match="stem is the first to differ"):
        model.export(tmp_path / "m.pt2", to="pt2")
    assert not list(tmp_path.iterdir())
    assert not model.export(tmp_path / "m.pt2", to="pt2", force=True).passed
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]

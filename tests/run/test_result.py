"""``result.json`` read back: the types say what was written, whatever an older run lacks, and name what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cases import dataset, model

import bitwright as bw
from bitwright.errors import UsageError
from bitwright.run.result import RunResult


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    made = bw.quantize(model("residual"), dataset(8), "mse", weights=3)
    made.save(folder, evaluate=True, diagnosis=True, onnx=True)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_the_types_hold_what_was_written(written: dict[str, Any]) -> None:
    found = RunResult.read(written)
    for part in ("diagnosis", "parity"):
        assert json.loads(json.dumps(asdict(getattr(found, part)))) == written[part]
    for part in ("layers", "unquantized", "unfolded"):
        assert [asdict(row) for row in getattr(found, part)] == written[part]
    assert found.evaluation.to_dict() == {k: written[k] for k in ("quantized", "float", "fidelity")}
    for part in ("size", "bits", "seconds", "warnings", "files", "seed", "command", "peak_memory_bytes"):
        assert getattr(found, part) == written[part]
    assert found.evaluated_on.sha256 == found.calibrated_on.sha256 == written["data"]["calibration"]["sha256"]
    assert found.times_smaller == written["size"]["float_bytes"] / written["size"]["packed_bytes"]


def test_a_result_may_lack_any_key(written: dict[str, Any]) -> None:
    for key in written:
        RunResult.read({k: v for k, v in written.items() if k != key})
    assert RunResult.read({}).evaluation.outputs == {}


KNOWN = sorted({f.validation_alias or name for name, f in RunResult.model_fields.items()} - {"evolve", "reconstruct"})


@pytest.mark.parametrize("key", KNOWN)
def test_another_type_is_named_in_one_line(key: Any, written: dict[str, Any]) -> None:
    wrong = {**written, key: 1.5 if isinstance(written.get(key), str | int) else "abc"}
    with pytest.raises(UsageError, match=rf"^here is damaged: '{key}' is something else than a run writes\. Quantize"):
        RunResult.read(wrong, Path("here"))


def test_a_row_without_its_name_is_told() -> None:
    with pytest.raises(UsageError, match="it has no 'name' in 'layers'"):
        RunResult.read({"layers": [{"op": "conv2d"}]})

"""Sessions of ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path

import bitwright
from bitwright.runtimes.onnxruntime import patient_options

SOURCES = Path(bitwright.__file__).parent


def test_threads_that_wait_take_no_processor_time() -> None:
    assert patient_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_every_session_is_a_patient_one_or_a_timed_one() -> None:
    own = {f.relative_to(SOURCES).as_posix() for f in SOURCES.rglob("*.py") if "SessionOptions(" in f.read_text()}
    assert own == {"runtimes/onnxruntime.py"}
    for file in SOURCES.rglob("*.py"):
        calls = re.split(r"onnxruntime\.InferenceSession\((?!')", file.read_text())[1:]
        assert all("options" in call.split("providers=")[0] for call in calls), file

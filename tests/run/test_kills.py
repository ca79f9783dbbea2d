"""Runs that are killed at random moments end, resumed, in the file of a run that nobody disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def kills(*more: str) -> dict:
    program = [sys.executable, "-m", "benchmarks.kills", *more]
    done = subprocess.run(program, cwd=ROOT, check=False, capture_output=True, text=True)
    found = json.loads(done.stdout[done.stdout.rindex("\n{") :])
    assert (done.returncode == 0) == (not found["wrong"])
    return found


def test_a_few_kills() -> None:
    found = kills("--moments", "2", "--recipes", "eptq", "--seed", "1", "--steps", "8")
    assert not found["wrong"]


@pytest.mark.slow
def test_a_hundred_kills() -> None:
    found = kills("--moments", "100")
    assert not found["wrong"]
    assert min(found["left"].values()) > 0, "a kind of moment was never met"

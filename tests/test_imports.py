"""Old addresses of modules, and what an import must not bring."""

import importlib
import subprocess
import sys

import pytest

from bitwright import _imports


@pytest.mark.parametrize(("old", "new"), _imports.ADDRESSES.items())
def test_an_old_address_is_the_same_module(old: str, new: str) -> None:
    moved, at_home = importlib.import_module(f"bitwright.{old}"), importlib.import_module(f"bitwright.{new}")
    assert moved is at_home
    assert at_home.__spec__ is not None
    assert at_home.__spec__.name == at_home.__name__ == f"bitwright.{new}"


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("bitwright.nothing")


def test_a_run_without_a_plan_does_not_wait_for_the_solver() -> None:
    seen = "import sys, bitwright.run.job, bitwright.bits.planning; print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", seen], check=True, capture_output=True, text=True).stdout == "False\n"

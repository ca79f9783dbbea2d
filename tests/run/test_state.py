"""Who may go on with an unfinished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitwright.errors import UsageError
from bitwright.run.state import begin, claim, is_unfinished, leave

SETTINGS = {"seed": 0, "scheme": {"weights": 4, "rules": ("head=w8",)}}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    begin(tmp_path / "state", "bitwright quantize net photos", SETTINGS, resume=False)
    assert not is_unfinished(tmp_path / "state")
    (tmp_path / "state" / "checkpoint-0.safetensors").write_text("kept")
    return tmp_path / "state"


def test_the_same_settings_go_on(state: Path) -> None:
    begin(state, "the same", SETTINGS, resume=True)
    assert leave(state)
    assert (state / "checkpoint-0.safetensors").read_text() == "kept"


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"seed": 1}, r"seed: 0, now 1"), ({"scheme": {"weights": 5, "rules": ["head=w8"]}}, "weights: 4, now 5")],
)
def test_other_settings_are_named_with_the_command_and_nothing_is_lost(state: Path, changed: dict, said: str) -> None:
    with pytest.raises(UsageError, match=rf"{said}\)\. Repeat its command \(bitwright quantize net photos\)"):
        begin(state, "another", SETTINGS | changed, resume=True)
    assert (state / "checkpoint-0.safetensors").read_text() == "kept"


@pytest.mark.parametrize(("version", "said"), [("0.0.1", "bitwright 0.0.1"), (None, "an older bitwright")])
def test_a_state_of_another_version_says_so(state: Path, version: str | None, said: str) -> None:
    about = json.loads((state / "run.json").read_text())
    (state / "run.json").write_text(json.dumps({**about, "bitwright": version}))
    with pytest.raises(UsageError, match=rf"was begun by {said}, and this is .*force=True without --resume"):
        begin(state, "another", {**SETTINGS, "unheard_of": 1}, resume=True)
    assert leave(state)


def test_begun_again_nothing_of_before_is_used(state: Path) -> None:
    begin(state, "another", SETTINGS, resume=False)
    assert not is_unfinished(state)
    assert not leave(state)
    assert not state.exists()


def test_checkpoints_of_another_run_are_refused_before_they_are_overwritten(state: Path) -> None:
    claim(state, "mine")
    claim(state, "mine")
    with pytest.raises(UsageError, match="had other settings"):
        claim(state, "yours")
    assert leave(state)

"""`bitwright doctor`."""

from __future__ import annotations

import pytest
from command_line import result_of

from bitwright import doctor
from bitwright.cli import main


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = result_of(capsys)
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

"""`bitwright recipes`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line import NET, result_of

from bitwright.cli import main


def test_recipes_are_listed_and_read_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert "mse" in shown
    assert "rtn" in shown
    assert main(["recipes", "rtn"]) == 0
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    settings["name"] = "mine"
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert main([*NET, "photos", "--recipe", "mine.yaml", "--json"]) == 0
    assert result_of(capsys)["recipe"]["settings"]["stages"] == settings["stages"]
    Path("mine.yaml").write_text(text.replace("weights: minmax", "weights: sideways"))
    assert main([*NET, "photos", "--recipe", "mine.yaml", "--out", "other"]) == 2
    assert "weights" in capsys.readouterr().err

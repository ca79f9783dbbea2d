"""`bitwright inspect`: what is quantized of a run, and what would be of a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import result_of
from torch import nn

from bitwright.cli import main


def test_inspect_a_run_and_its_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads(Path("run/result.json").read_text())
    assert main(["inspect", "run", "--json"]) == 0
    run = result_of(capsys)
    assert run["layers"] == written["layers"]
    assert run["model"]["parameters"] == written["model"]["parameters"] == 3 * 4 * 9 + 4 + 4 * 3 + 3
    assert main(["inspect", "models.py:Net", "--weights", "4", "--json"]) == 0
    network = result_of(capsys)
    assert network["unquantized"] == run["unquantized"]
    assert network["model"]["macs"] == run["model"]["macs"] == 8 * 8 * 27 * 4 + 12
    for given in ("run", "models.py:Net"):
        assert main(["inspect", given]) == 0
        shown = capsys.readouterr().out
        assert "stem" in shown
        assert "output of the network, left in float" in shown


def test_a_saved_program_knows_its_size(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = nn.Sequential(nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 6, 2)).eval()
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 5, 6, 8),), dynamic_shapes=any_batch), "net.pt2")
    assert main(["inspect", "net.pt2", "--json"]) == 0
    assert [x["name"] for x in json.loads(capsys.readouterr().out)["layers"]][1:] == ["0", "2"]

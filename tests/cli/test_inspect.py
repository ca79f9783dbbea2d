"""`bitwright inspect`: what is quantized of a run, and what would be of a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import dataset, make
from command_line import result_of
from torch import nn

import bitwright
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


def test_blocks_of_a_float_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "zoo:fashion_vit", "--blocks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    blocks = found["blocks"]
    assert [b["kind"] for b in blocks] == ["chain", *["attention", "mlp"] * 4, "chain"]
    assert blocks[1]["name"] == "blocks.0.attn"
    assert blocks[1]["layers"] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    rows = {r["name"]: r for r in found["layers"]}
    for block in blocks:
        assert block["parameters"] == sum(rows[n]["parameters"] for n in block["layers"])
        assert block["macs"] == sum(rows[n]["macs"] for n in block["layers"])


def test_blocks_are_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "zoo:fashion_cnn", "--blocks"]) == 0
    shown = capsys.readouterr().out
    assert "Blocks" in shown
    assert "stage1.1 " in shown
    assert "residual" in shown


def test_blocks_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(bitwright.quantize(make("transformer"), dataset(), recipe="rtn").save(tmp_path / "run"))
    assert main(["inspect", run, "--blocks", "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert [(b["kind"], b["layers"]) for b in blocks] == [
        ("chain", ["patches"]),
        ("attention", ["attention.qkv", "attention.proj"]),
        ("mlp", ["mlp.0", "mlp.2"]),
        ("chain", ["head"]),
    ]
    assert blocks[2]["parameters"] == (8 * 12 + 12) + (12 * 8 + 8)
    assert blocks[2]["macs"] == 5 * (8 * 12 + 12 * 8)
    assert main(["inspect", run, "--json"]) == 0
    assert "blocks" not in json.loads(capsys.readouterr().out)

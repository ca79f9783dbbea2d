"""Arguments of calls: one line names the wrong one before anything is done, in the words of the caller."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import typer
from torch import nn

import bitwright as bw
from bitwright.bits.goal import Goal
from bitwright.cli import app, main
from bitwright.errors import UsageError
from bitwright.given.arguments import OPTIONS, as_flags, as_rules
from bitwright.given.inputs import find_device
from bitwright.quant.scheme import Scheme

CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "half"}, "'float32', 'bfloat16' as precision=, found 'half'"),
    "samples": ({"samples": "4"}, "samples=, found '4'"),
    "no sample": ({"samples": 0}, "samples=, found 0"),
    "yes samples": ({"samples": True}, "samples=, found True"),
    "minutes": ({"minutes": "x"}, "minutes=, found 'x'"),
    "minutes beyond numbers": ({"minutes": float("nan")}, "minutes=, found nan"),
    "steps": ({"steps": 2.5}, "steps=, found 2.5"),
    "text of steps": ({"steps": "300"}, "steps=, found '300'"),
    "steps among steps": ({"steps": (3, "4")}, "steps=, found '4'"),
    "both": ({"steps": 3, "minutes": 1}, "Expected steps= or minutes=, found both"),
    "device": ({"device": torch.device("cpu")}, "device=, found device(type='cpu')"),
    "seed": ({"seed": 2**64}, "seed=, found 18446744073709551616"),
    "rules": ({"rules": "head=w8"}, "as rules=, found str"),
    "a rule": ({"rules": [8]}, "found int"),
    "scheme and weights": ({"scheme": Scheme(), "weights": 4}, "scheme= or weights=, found both"),
    "scheme and activations": ({"scheme": Scheme(), "activations": 4}, "scheme= or activations="),
    "scheme and rules": ({"scheme": Scheme(), "rules": ["2=w4"]}, "scheme= or rules="),
    "scheme and runtime": ({"scheme": Scheme(), "runtime": "openvino"}, "scheme= or runtime="),
    "goal and size": ({"goal": Goal.parse(compression=4), "target_size": "12kB"}, "goal= or target_size="),
    "goal and drop": ({"goal": Goal.parse(compression=4), "max_drop": 0.01}, "goal= or max_drop="),
    "goal and bits": ({"goal": Goal.parse(compression=4), "weights": (2, 4)}, "goal= or weights="),
    "sizes": ({"compression": 4, "max_drop": 0.1}, "Expected one of compression= and max_drop=, found both"),
    "a list as size": ({"target_size": [1]}, "as target_size=, found [1]"),
    "a dict as latency": ({"max_latency": {}}, "as max_latency=, found {}"),
    "goal": ({"goal": 3}, "Expected a Goal as goal=, found 3"),
    "scheme": ({"scheme": 3}, "Expected a Scheme as scheme=, found 3"),
    "progress": ({"progress": 3}, "as progress=, found 3"),
    "state": ({"state": 3}, "as state=, found 3"),
    "cache": ({"cache": 3}, "as cache=, found 3"),
    "measure": ({"measure": "zz"}, "as measure=, found 'zz'"),
    "preprocessing": ({"preprocessing": 3}, "as preprocessing=, found 3"),
    "skipping": ({"skip_unreadable": "x"}, "as skip_unreadable=, found 'x'"),
    "no steps": ({"steps": []}, "steps=, found none"),
    "recipe": ({"recipe": " "}, "recipe=, found an empty text"),
    "plan and size": ({"plan": "plan.json", "target_size": "12kB"}, "plan= or target_size="),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_argument_is_refused_by_name(case: str) -> None:
    given, expected = CALLS[case]
    given = {"recipe": "rtn", **given}
    with pytest.raises(bw.UsageError) as refused:
        bw.quantize(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(4, 3, 2, 2), **given)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    "case", [c for c in CALLS if "goal and" in c or c in {"scheme and rules", "samples", "a list as size"}]
)
def test_planning_refuses_the_same(case: str) -> None:
    given, expected = CALLS[case]
    if "max_drop" in given:
        given = {"goal": given["goal"], "max_bops": "1G"}
        expected = "goal= or max_bops="
    with pytest.raises(bw.UsageError) as refused:
        bw.plan_bits(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(4, 3, 2, 2), "rtn", **given)
    assert expected in str(refused.value)


def test_the_command_line_names_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "zoo:fashion_cnn", "zoo:fashion[:4]", "--steps", "3", "--minutes", "1"]) == 2
    assert "Expected --steps or --minutes, found both." in capsys.readouterr().err


OURS = Path(bw.__file__).parent
LIBRARY = [
    path
    for path in sorted(OURS.rglob("*.py"))
    if path.relative_to(OURS).parts[0] not in {"cli", "report", "zoo", "doctor.py", "__main__.py"}
]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(OURS)))
def test_the_library_names_arguments(path: Path) -> None:
    spoken = [
        text.value
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and re.search(r"(Error|warn)$", ast.unparse(call.func))
        for text in ast.walk(call)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    ]
    flags = [
        text
        for text in spoken
        if re.search(r"(?<!\w)--[a-z]", re.sub(r"(bitwright|pip|zoo.train) .*|--resume", "", text))
    ]
    assert not flags


def test_rules_are_said_as_each_caller_gives_them() -> None:
    said = f"With {as_rules(['a=a16', 'b.*[0-9]=w8'])} weights=4 and activations='auto' it is better; or force=True."
    assert "rules=['a=a16', 'b.*[0-9]=w8']" in said
    flags = as_flags(said)
    assert flags == (
        "With --rule 'a=a16' --rule 'b.*[0-9]=w8' --weights 4 and --activations auto it is better; or --force."
    )


@pytest.mark.parametrize(
    "text",
    [
        "the rule 'head=w8a8' is",
        "savez(path, images=..., labels=...)",
        "NAME=AXIS or",
        "Such as classes map=3",
        "Given groups=1, weight",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert as_flags(text) == text


def test_the_options_are_those_of_the_command_line() -> None:
    verbs = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {flag for verb in verbs for each in verb.params for flag in each.opts if flag.startswith("--")}
    assert known - {as_flags(f"{name}=") for name in OPTIONS} == {
        "--json",
        "--no-images",
        "--no-report",
        "--no-diagnosis",
    }
    assert {as_flags(f"{name}=") for name in OPTIONS} <= known


def test_no_bits_are_no_bits(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--weights", "--activations"):
        assert main(["quantize", "zoo:fashion_cnn", "zoo:fashion[:4]", option, "", "--dry-run"]) == 2
        assert "found ''" in capsys.readouterr().err


def test_an_argument_that_no_function_has_is_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="granularity"):
        bw.quantize(nn.Flatten(), torch.rand(4, 3, 8, 8), granularity="channel")  # type: ignore[call-arg]


@pytest.mark.parametrize("given", [None, 3, b"x", ""])
def test_what_is_no_path_is_said(given: Any) -> None:
    model = bw.quantize(cases.model("residual"), cases.images(4), "rtn")
    for call in (bw.load, model.save, model.export):
        with pytest.raises(UsageError, match="Expected a path as"):
            call(given)


def test_images_of_another_shape_are_one_line() -> None:
    model = bw.quantize(cases.model("residual"), cases.images(4), "rtn")
    with pytest.raises(UsageError, match="as many channels as it takes") as caught:
        model.evaluate(torch.zeros(2, 1, 16, 16))
    assert "fx" not in str(caught.value)


WRONG: dict[str, Callable[[], object]] = {
    "name=": lambda: bw.study(3),  # type: ignore[arg-type]
    "model=": lambda: bw.evaluate(nn.Flatten(), torch.zeros(2, 3, 2, 2)),  # type: ignore[arg-type]
    "example=": lambda: bw.capture(nn.Flatten(), 3),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_other_calls_name_their_arguments(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        WRONG[name]()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    for name in ("mps", "xpu:0"):
        with pytest.raises(UsageError, match=f"found '{name}': .* float64"):
            find_device(name)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="There is no CUDA device here"):
            find_device(name)
    for name in ("gpu", "cuda:", "cuda:-1", 0, None):
        with pytest.raises(UsageError, match="Expected one of 'auto', 'cpu', 'cuda' as device="):
            find_device(name)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto").type == find_device("cuda").type == "cuda"
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="found device='cuda:2'"):
        find_device("cuda:2")

"""What every verb shares: help, wrong calls in one line, interrupts, and the unexpected."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import NET, errors_in, files_below

import bitwright
from bitwright.cli import app, main
from bitwright.cli import quantize as quantize_command
from bitwright.cli.sources import absolute_reference

COMPARE = ("compare", *NET[1:], "photos", "--recipes", "rtn,mse")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "missing folder": ((*NET, "nowhere"), "'nowhere' does not exist"),
    "empty folder": ((*NET, "empty"), "Expected images in empty, found none"),
    "corrupt image": ((*NET, "corrupt"), "cannot read corrupt/a.jpg"),
    "text as image": ((*NET, "text"), "cannot read text/z.jpg"),
    "text file": ((*NET, "note.txt"), "found the file note.txt"),
    "corrupt image to evaluate": ((*NET, "photos", "--evaluate", "corrupt"), "cannot read corrupt/a.jpg"),
    "labels of others": ((*NET, "photos", "--evaluate", "photos", "--labels", "few.csv"), "6 of 8 have none"),
    "labels too large": ((*NET, "photos", "--evaluate", "photos", "--labels", "large.csv"), "labels below 3"),
    "labels missing": ((*NET, "photos", "--evaluate", "photos", "--labels", "no.csv"), "found no file no.csv"),
    "labels of nothing": ((*NET, "photos", "--labels", "few.csv"), "--evaluate"),
    "steps and minutes": ((*NET, "photos", "--steps", "5", "--minutes", "1"), "found both"),
    "negative steps": ((*NET, "photos", "--steps", "-1"), "at least 0 as --steps, found -1"),
    "no minutes": ((*NET, "photos", "--minutes", "0"), "positive number of minutes"),
    "unknown precision": ((*NET, "photos", "--precision", "half"), "'bfloat16' as --precision, found 'half'"),
    "no samples": ((*NET, "photos", "--samples", "0"), "at least 1 as --samples, found 0"),
    "samples in words": ((*NET, "photos", "--samples", "many"), "'--samples'"),
    "weights of NaN": (("quantize", "models.py:nan_weights", "photos"), "stem.weight has NaN"),
    "activations of NaN": (("quantize", "models.py:Rare", "white"), "The output of div is not finite"),
    "wrong size": (("quantize", "models.py:Flat", "photos", "--input-size", "20"), "cannot run on images of 3x20x20"),
    "size in words": ((*NET, "photos", "--input-size", "big"), "'big'"),
    "1 bit": (
        (*NET, "photos", "--weights", "1"),
        "Expected 2 to 8 bits for weights (or 'float') as --weights, found '1'",
    ),
    "9 bits": ((*NET, "photos", "--weights", "9"), "as --weights, found '9'"),
    "x bits": (
        (*NET, "photos", "--activations", "x"),
        "Expected 2 to 8 or 16 bits for activations (or 'float') as --activations, found 'x'",
    ),
    "rule with 9 bits": ((*NET, "photos", "--rule", "head=w9"), "(or 'float') in --rule 'head=w9', found '9'"),
    "no points": (("plan", "models.py:Net", "photos", "--points", "0"), "at least 2 as --points, found 0."),
    "one point": (("plan", "models.py:Net", "photos", "--points", "1"), "at least 2 as --points, found 1."),
    "fewer points": (("plan", "models.py:Net", "photos", "--points", "-1"), "at least 2 as --points, found -1."),
    "unknown measure without a limit": ((*NET, "photos", "--measure", "foo"), "as --measure, found 'foo'"),
    "measure without a limit": (
        (*NET, "photos", "--measure", "trace"),
        "Expected a limit such as --target-size beside --measure, found none.",
    ),
    "cache without a limit": (
        (*NET, "photos", "--cache", "scores"),
        "Expected a limit such as --target-size beside --cache, found none.",
    ),
    "comparison of no samples": ((*COMPARE, "--samples", "0"), "at least 1 as --samples, found 0."),
    "comparison of a negative seed": ((*COMPARE, "--seed", "-1"), "as --seed, found -1."),
    "comparison in no time": ((*COMPARE, "--minutes", "0"), "minutes as --minutes, found 0.0."),
    "comparison of negative steps": ((*COMPARE, "--steps", "-1"), "at least 0 as --steps, found -1."),
    "comparison on an unknown device": ((*COMPARE, "--device", "tpu"), "as --device, found 'tpu'"),
    "comparison with labels of nothing": ((*COMPARE, "--labels", "few.csv"), "--evaluate"),
    "size of nothing": ((*NET, "photos", "--input-size", "0x3"), "width as --input-size, found '0x3'."),
    "deviation of 0": ((*NET, "photos", "--std", "0"), "Expected numbers above 0 as --std, found 0."),
    "groups of nothing": (
        (*NET, "photos", "--granularity", "group", "--group-size", "0"),
        "at least 1 as --group-size, found 0.",
    ),
    "steps in words": ((*NET, "photos", "--steps", "x"), "300,500, as --steps, found 'x'."),
    "steps for no stage": (
        (*NET, "photos", "--recipe", "optq", "--steps", "1,2,3"),
        "steps, found 3 numbers as --steps. Give one number.",
    ),
    "compression to nothing": ((*NET, "photos", "--compression", "0"), "above 0, as --compression, found '0'."),
    "drop of 2": ((*NET, "photos", "--max-drop", "2"), "or 1%, as --max-drop, found '2'."),
    "no latency": ((*NET, "photos", "--max-latency", "0"), "above 0, as --max-latency, found '0'."),
    "operations in X": ((*NET, "photos", "--max-bops", "2X"), "above 0, as --max-bops, found '2X'."),
    "size without unit": ((*NET, "photos", "--target-size", "5"), "3MiB, as --target-size, found '5'."),
    "curvature of no samples": (
        ("sensitivity", "models.py:Net", "photos", "--samples", "0"),
        "at least 1 as --samples, found 0.",
    ),
    "no probes": (("sensitivity", "models.py:Net", "photos", "--probes", "0"), "at least 2 as --probes, found 0."),
    "check on no samples": (("export", "run", "--samples", "0"), "at least 1 as --samples, found 0."),
    "parity on no samples": (("parity", "run", "--samples", "0"), "at least 1 as --samples, found 0."),
    "timing in no time": (("bench", "run", "--seconds", "0"), "number of seconds as --seconds, found 0.0."),
    "export of an ONNX file": (
        ("export", "run/model.onnx", "--to", "tables"),
        "Expected a run folder or its model.safetensors, found the ONNX file run/model.onnx. Give run.",
    ),
    "rule without a layer": ((*NET, "photos", "--rule", "haed=w8"), "The closest are head"),
    "rule without bits": ((*NET, "photos", "--rule", "head"), "Expected a rule like"),
    "unknown recipe": ((*NET, "photos", "--recipe", "msee"), "Did you mean 'mse'?"),
    "unknown runtime": ((*NET, "photos", "--runtime", "trt"), "generic-pot, found 'trt'"),
    "unknown granularity": ((*NET, "photos", "--granularity", "row"), "channel, tensor, group, head, found 'row'"),
    "unknown device": ((*NET, "photos", "--device", "tpu"), "as --device, found 'tpu'"),
    "out is full": ((*NET, "photos", "--out", "full"), "is not empty"),
    "out is a run": ((*NET, "photos", "--out", "run"), "is not empty"),
    "out is no run": ((*NET, "photos", "--out", "full", "--force"), "found other files (keep.txt)"),
    "out is a file": ((*NET, "photos", "--out", "note.txt"), "found a file"),
    "out below a file": ((*NET, "photos", "--out", "note.txt/run"), "cannot be written"),
    "out in /proc": ((*NET, "photos", "--out", "/proc/bitwright"), "cannot be written"),
    "several scores": (("quantize", "models.py:Pair", "photos", "--evaluate", "classes"), "with --output"),
    "unknown output": (("quantize", "models.py:Named", "photos", "--output", "x"), "scores, map, found 'x'"),
    "keys missing": (("quantize", "models.py:Net@missing.pt", "photos"), "6 missing (bn.weight"),
    "pickle with code": (("quantize", "models.py:Net@evil.pt", "photos"), "wants to run code"),
    "plain pickle with code": (("quantize", "models.py:Net@plain.pt", "photos"), "plain.pt"),
    "pickle as model": (("quantize", "evil.pt", "photos"), "holds weights at most"),
    "unknown callable": (("quantize", "models.py:Nett", "photos"), "Expected 'Nett' in models.py, it has Net"),
    "unknown zoo": (("quantize", "zoo:fashion_cn", "photos"), "Did you mean fashion_cnn"),
    "no model": (("quantize", "thing", "photos"), "Expected a model as"),
    "argument missing": (("quantize", "models.py:Net"), "See bitwright quantize --help"),
    "unknown option": ((*NET, "photos", "--nope"), "--nope"),
    "unknown verb": (("quantise", "x"), "Did you mean 'quantize'?"),
    "nothing to compare": (("evaluate", "models.py:Net", "photos"), "Give --labels"),
    "no run": (("inspect", "full"), "Expected a run folder"),
    "no ONNX": (("evaluate", "x.onnx", "photos"), "x.onnx does not exist"),
    "ONNX of another size": (
        ("evaluate", "run/model.onnx", "classes", "--input-size", "20"),
        "Expected images of 3x16x16 for run/model.onnx, found 3x20x20",
    ),
    "export of no run": (("export", "photos"), "Expected a run folder"),
    "export elsewhere": (("export", "run", "--to", "tflite"), "tables, encodings, found 'tflite'"),
    "export to nowhere": (("export", "run", "--out", "no/model.onnx"), "existing folder"),
    "recipe to print": (("recipes", "rtnn"), "Did you mean 'rtn'?"),
    "demo on a file": (("demo", "--out", "note.txt"), "cannot be written"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_clear_line(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = WRONG[name]
    before = files_below(here)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = (x for x in errors_in(err) if not x.startswith("hello"))
    assert line.startswith("error: ")
    assert expected in line
    assert out.replace("hello from the user's own file\n", "") == ""
    assert files_below(here) == before
    assert not (here / "ran").exists()


def test_help_needs_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, bitwright.cli; assert bitwright.cli.main(['--help']) == 0;"
        "heavy = {'torch', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(verb in shown for verb in ("demo", "quantize", "evaluate", "inspect", "export", "recipes", "doctor"))


@pytest.mark.parametrize("verb", [c.callback.__name__ for c in app.registered_commands if c.callback])
def test_help_of_a_verb_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert f"bitwright {verb}" in shown.split("Example")[1]
    assert "--json" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitwright {bitwright.__version__}\n"


def test_a_shell_completes_verbs_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_BITWRIGHT_COMPLETE", "source_bash")  # as --show-completion does, which looks for the shell
    assert main([]) == 0
    assert "complete -o default -F _bitwright_completion bitwright" in capsys.readouterr().out
    monkeypatch.setenv("_BITWRIGHT_COMPLETE", "complete_bash")
    for words, position, expected in (
        ("bitwright quan", "1", "quantize"),
        ("bitwright plan --targ", "2", "--target-size"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", position)
        assert main([]) == 0
        assert capsys.readouterr().out.split() == [expected]


def test_it_runs_as_a_module() -> None:
    ran = subprocess.run([sys.executable, "-m", "bitwright", "--version"], capture_output=True, text=True, check=True)
    assert bitwright.__version__ in ran.stdout


def test_a_pipe_that_is_closed_is_no_fault(here: Path) -> None:
    command = [sys.executable, "-m", "bitwright.cli", "quantize", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert "Python file" not in process.stderr.read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_standard_output_on_a_full_disk_is_said(here: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "bitwright", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: What is printed, or ")
    assert len(ended.stderr.splitlines()) == 1


def test_closed_standard_output_is_no_fault(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["inspect", "run"]) == 0
    assert main(["inspect", "nowhere"]) == 2
    for stream in (sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_output_cannot_write_ends_no_command(
    encoding: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"run-\xff-\xe2\x80\xa6")
    (here / "run").rename(here / name)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding, write_through=True))
    assert main(["report", name]) == 0
    assert b"report.html" in shown.getvalue()
    assert main(["inspect", name]) == 0
    assert b"stem" in shown.getvalue()


ENDED = pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)


@ENDED
def test_control_c_and_kill_in_a_process(sent: signal.Signals, code: int, said: str, here: Path) -> None:
    command = [sys.executable, "-m", "bitwright.cli", *NET, "photos", "--out", "new"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Opening the images"):
                break
        process.send_signal(sent)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == code
    assert "Traceback" not in rest
    assert said in rest
    assert not Path("new").exists()


def test_worker_that_the_users_code_forks_and_terminates_ends_without_a_word(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def work(*_: Any, **__: Any) -> None:
        there, tells = os.pipe()
        worker = os.fork()
        if not worker:
            os.write(tells, b"!")
            time.sleep(20)
            os._exit(0)
        os.read(there, 1)
        os.kill(worker, signal.SIGTERM)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))

    monkeypatch.setattr(quantize_command, "check_truth", work)
    assert main([*NET, "photos", "--evaluate", "classes", "--out", "new"]) == 0
    assert ended == [-signal.SIGTERM]
    assert "Terminated" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@ENDED
def test_control_c_that_somebody_swallows_is_not_forgotten(
    sent: signal.Signals, code: int, said: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(*_: Any, **__: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(sent)

    before = files_below(here)
    monkeypatch.setattr(quantize_command, "check_truth", swallow)
    assert main([*NET, "photos", "--evaluate", "classes", "--out", "new"]) == code
    assert files_below(here) == before


class Odd(BaseException):
    pass


@pytest.mark.parametrize("kind", [Odd, GeneratorExit, asyncio.CancelledError])
def test_what_is_no_exception_is_one_line_too(
    kind: type[BaseException], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("thing")

    monkeypatch.setattr("bitwright.stages.calibrate.Calibrate.run", fail)
    assert main([*NET, "photos", "--out", "new"]) == 1
    said = errors_in(capsys.readouterr().err)
    assert said == [f"error: unexpected {kind.__name__}: thing. BITWRIGHT_DEBUG=1 shows where."]


def test_the_unexpected_is_one_line_too(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("thing")

    before = files_below(here)
    monkeypatch.setattr("bitwright.stages.calibrate.Calibrate.run", fail)
    assert main([*NET, "photos", "--out", "new"]) == 1
    assert errors_in(capsys.readouterr().err) == ["error: unexpected KeyError: 'thing'. BITWRIGHT_DEBUG=1 shows where."]
    assert files_below(here) == before
    monkeypatch.setenv("BITWRIGHT_DEBUG", "1")
    assert main([*NET, "photos", "--out", "new"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debugging_shows_where_a_wrong_call_was_found(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITWRIGHT_DEBUG", "1")
    assert main([*NET, "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("content", ['{"a":' * 100_000, '{"model": NaN, "recipe": 1, "layers": [], "size": {}}', "[1]"])
@pytest.mark.parametrize("verb", [["inspect", "run"], ["report", "run"], ["export", "run"], ["parity", "run"]])
def test_a_result_that_is_no_json(
    here: Path, capsys: pytest.CaptureFixture[str], content: str, verb: list[str]
) -> None:
    Path("run/result.json").write_text(content)
    assert main(verb) == 2
    (line,) = errors_in(capsys.readouterr().err)
    assert "result.json" in line
    assert "unexpected" not in line


@pytest.mark.parametrize("verb", ["inspect", "export", "report", "evaluate"])
@pytest.mark.parametrize("change", [{"unfolded": -1}, {"layers": "abc"}, {"layers": [{"name": 5}]}, {"size": None}])
def test_a_result_with_other_types(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], verb: str
) -> None:
    result = json.loads(Path("run/result.json").read_text())
    Path("run/result.json").write_text(json.dumps(result | change))
    assert main([verb, "run", *["classes"] * (verb == "evaluate")]) == 2
    (line,) = errors_in(capsys.readouterr().err)
    assert "damaged" in line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("timm:resnet18@w/a.pt", "timm:resnet18@{}/w/a.pt"),
        ("a/b.py:make", "{}/a/b.py:make"),
        ("a/b.py:make@w.pt", "{0}/a/b.py:make@{0}/w.pt"),
        ("net@2.pt2", "{}/net@2.pt2"),
        ("/x/y.pt2", "/x/y.pt2"),
    ],
)
def test_references_hold_from_any_folder(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_reference(given) == expected.format(tmp_path)

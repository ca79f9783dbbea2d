"""Kills runs at random moments and goes on: is the file that comes out the one of a run that nobody disturbed?

    python -m benchmarks.kills --moments 100

A moment is a time between the start and the end of an undisturbed run, or one of its file operations (a sync, a rename)
before which the process dies; half of the kills are of each kind. Every second run replaces an older one, so that the
replacement is among the moments. After the kill, the folder holds the old run, the new run or an unfinished one, and
``--resume`` (or the command itself, where nothing was kept) must end with the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

RECIPES = {"eptq": ("--steps", "60"), "evolq": ("--steps", "120")}
NETWORK = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
FILES = ("model.safetensors", "model.onnx")
ENDING = 40
"""File operations from the last checkpoint on: files, swap, report."""
OPERATIONS = ("fsync", "rename", "replace")


def main() -> int:
    """Kills, goes on, and prints what came out as JSON; 1 if a file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of every run, instead of its own")
    given = parser.parse_args()
    if given.steps is not None:
        RECIPES.update({name: ("--steps", str(given.steps)) for name in RECIPES})
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        found = kills(given.recipes.split(","), given.moments, given.seed)
    print(json.dumps(found, indent=2))
    return 1 if found["wrong"] else 0


def kills(recipes: list[str], moments: int, seed: int) -> dict:
    """How many kills there were, where, and those after which the file differed or the command did not end well."""
    import numpy as np

    Path("net.py").write_text(NETWORK)
    pixels = np.random.default_rng(0).standard_normal((16, 3, 10, 10)).astype(np.float32)
    np.savez("images.npz", images=pixels)
    chance, started = random.Random(seed), time.perf_counter()
    status = call("rtn", "old")()  # in this process, so that the others find all modules loaded
    assert status == 0
    whole = {recipe: undisturbed(recipe) for recipe in recipes}
    wrong, kept = [], {"unfinished": 0, "finished": 0, "nothing": 0}
    for number in range(moments):
        recipe = recipes[number % len(recipes)]
        replaces, timed = number // len(recipes) % 2 == 0, number // len(recipes) // 2 % 2 == 1
        expected, seconds, operations = whole[recipe]
        moment = chosen(chance, seconds, operations, timed=timed)
        left, problem = one(recipe, moment, expected, replaces=replaces)
        kept[left] += 1
        if problem:
            wrong.append({"recipe": recipe, "moment": moment, "replaces": replaces, "problem": problem})
    return {
        "kills": moments,
        "left": kept,
        "wrong": wrong,
        "undisturbed": {r: {"seconds": round(s, 2), "file_operations": n} for r, (_, s, n) in whole.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def chosen(chance: random.Random, seconds: float, operations: int, *, timed: bool) -> float:
    """A moment; every second one is where a run begins or ends, which is short beside the stages."""
    ends = chance.random() < 0.5
    if timed:
        return chance.uniform(0, 0.2 * seconds if ends else seconds)
    return chance.randrange(operations - ENDING if ends else 0, operations)


def one(recipe: str, moment: float, expected: dict[str, str], *, replaces: bool) -> tuple[str, str]:
    """What a kill left, and what was wrong afterwards."""
    for path in Path().glob("*killed*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if replaces:
        shutil.copytree("old", "killed")
    force = ["--force"] if replaces else []
    child(call(recipe, "killed", *force), moment)
    folder = Path("killed")
    unfinished = bool(list(folder.glob("state/*.safetensors")))
    if child(check) not in {0, 3} or (replaces and child(check) != 0):
        return "nothing", "neither the old run nor the new one is there"
    left = "unfinished" if unfinished else "finished" if (folder / "result.json").exists() else "nothing"
    if sums(folder) == expected:
        return left, ""
    status = child(call(recipe, "killed", *(["--resume"] if unfinished else force)))
    if status != 0:
        return left, f"exit code {status}: {Path('log.txt').read_text()[-300:]}"
    stray = [p.name for p in (*Path().glob(".killed*"), *folder.rglob(".*"), *folder.glob("state"))]
    if stray:
        return left, f"left behind: {stray}"
    return left, "" if sums(folder) == expected else "the file differs"


def check() -> int:
    """0 if the folder can be loaded, 3 if no run is there."""
    import warnings

    import bitwright as bw

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bw.load("killed")
        except bw.UsageError:
            hidden = [p.name for p in Path().glob(".killed*") if not p.name.endswith((".lock", ".partial"))]
            return 1 if Path("killed/result.json").exists() or hidden else 3
    return 0


def undisturbed(recipe: str) -> tuple[dict[str, str], float, int]:
    """Checksums, seconds, and file operations of a run that replaces an older one."""
    folder, counted = Path(f"whole-{recipe}"), Path("counted.txt")
    shutil.copytree("old", folder)
    started = time.perf_counter()
    status = child(lambda: counting(call(recipe, str(folder), "--force"), counted))
    assert status == 0, Path("log.txt").read_text()
    return sums(folder), time.perf_counter() - started, int(counted.read_text())


def call(recipe: str, out: str, *more: str) -> Callable[[], int]:
    """A command of bitwright."""

    def run() -> int:
        from bitwright.cli import main
        from bitwright.stages import evolve, reconstruct

        for stage in (reconstruct, evolve):  # checkpoints at every step, not every few seconds
            stage.CHECKPOINT_SECONDS, stage.CHECKPOINT_SHARE = 0.0, 1e9
        given = [
            "quantize",
            "net.py:net",
            "images.npz",
            "--recipe",
            recipe,
            *RECIPES.get(recipe, ()),
            "--precision",
            "float32",
        ]
        return main([*given, "--weights", "4", "--out", out, *more])

    return run


def counting(run: Callable[[], int], file: Path) -> int:
    """The command; how many file operations it made goes into a file."""
    done = []
    watch(lambda: done.append(1))
    status = run()
    file.write_text(str(len(done)))
    return status


def watch(each: Callable[[], object]) -> None:
    """Calls ``each`` before every file operation."""
    for name in OPERATIONS:
        original = getattr(os, name)

        def watched(*args, original=original, **more):
            each()
            return original(*args, **more)

        setattr(os, name, watched)


def child(run: Callable[[], int], moment: float | None = None) -> int:
    """Runs in a process of its own, which dies at the moment: seconds, or the number of a file operation."""
    number = os.fork()
    if not number:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        if isinstance(moment, int):
            left = iter(range(moment))
            watch(lambda: next(left, None) is None and os._exit(9))
        status = run()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(number, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def sums(folder: Path) -> dict[str, str]:
    """The checksums of a run's files."""
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in FILES if (folder / n).is_file()}


if __name__ == "__main__":
    sys.exit(main())

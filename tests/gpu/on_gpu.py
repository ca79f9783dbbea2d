"""Everything that a run does, on a GPU that is pretended or there; says as JSON what went wrong, by case.

A program of its own, since the stub that autograd needs has to be loaded before torch is. Usage: on_gpu.py STUB
[CASES], with ``real`` for the stub where there is a GPU: its kernels are not the CPU's, so that outputs are close and
not equal.
"""

from __future__ import annotations

import ctypes
import sys

if __name__ == "__main__" and sys.argv[1] != "real":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import contextlib
import copy
import json
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cases
import pretended
import torch
from pretended import OnGpu, launches, waits
from torch import nn

import bitwright as bw
from bitwright import api, pipeline, transfer
from bitwright.curvature import label_free
from bitwright.given import preprocessing
from bitwright.graph import points
from bitwright.graph.devices import place_on
from bitwright.graph.student import Student, moved_to
from bitwright.measure import evaluation
from bitwright.recipes import Recipe
from bitwright.run import job
from bitwright.sensitivity import MEASURES, Choices, diagnosis
from bitwright.stages import calibrate, optq, tuning
from bitwright.stages.augment import Views
from bitwright.stages.base import Run, Stage
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.evolve import Evolve
from bitwright.stages.optq import Optq
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Anneal, Gradual, Learn
from bitwright.stages.targets import OnDevice, held_on

REAL = __name__ == "__main__" and sys.argv[1] == "real"
GPU = torch.device("cuda", 0)
alone: Any = partial(mock.patch.dict, os.environ, LEFT="1") if REAL else pretended.alone
pretended_gpu: Any = contextlib.nullcontext if REAL else pretended.pretended_gpu
COUNT = 8
_prepare, _shapes, _export = api.prepare_teacher, points._shapes, job.export_checked
_finite, _finish = pipeline._check_finite, tuning.Tuner.finish


def on_gpu(tensor: Any) -> bool:
    return tensor.is_cuda if REAL else isinstance(tensor, OnGpu)


def one_device(what: str, tensors: dict[str, Any]) -> None:
    """Every tensor must be on the GPU; where there is one."""
    if not torch.cuda.is_available() or "LEFT" in os.environ:
        return
    elsewhere = [name for name, t in tensors.items() if isinstance(t, torch.Tensor) and not on_gpu(t)]
    if elsewhere:
        raise AssertionError(f"{what}: not on the GPU: {elsewhere[:4]}")


def _after_a_stage(student: Student, teacher: Any) -> None:
    for name, graph in (("student", student.graph), ("teacher", teacher.graph)):
        one_device(name, {**dict(graph.named_buffers()), **dict(graph.named_parameters())})
    _finite(student, teacher)


def _after_steps(tuner: tuning.Tuner) -> None:
    one_device("variables", {**dict(tuner.learner.named_parameters()), **dict(tuner.learner.named_buffers())})
    one_device("optimizer", {n: t for n, t in tuner.state().items() if not n.endswith("/step")})
    _finish(tuner)


_known: dict[type, Any] = {}


def _captured(network: Any, *rest: Any, **named: Any) -> Any:
    """Once for each network: on the CPU, since PyTorch's exporter has modes of its own."""
    kind = type(network.module)
    if kind not in _known:
        with alone():
            _known[kind] = _prepare(network, *rest, **named)
    return copy.deepcopy(_known[kind])


def _shapes_of(graph: Any, example: Any, names: Any) -> Any:
    twin = copy.deepcopy(graph)
    place_on(twin, "cpu")
    with alone():
        return _shapes(twin, example.cpu(), names)


class Squash(nn.Module):
    """A normalisation that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = nn.functional.normalize(self.conv(x).flatten(2).transpose(1, 2), dim=-1)
        return self.head((keys @ keys.transpose(1, 2) @ keys).mean(1))


def images(seed: int = 1) -> Any:
    return cases.dataset(COUNT, seed).labelled([i % 4 for i in range(COUNT)])


def quantized(network: nn.Module, method: Any, device: str = "cuda", **said: Any) -> Any:
    said = {"weights": 4, "activations": 8, "seed": 0, "precision": "float32"} | said
    return bw.quantize(network, images(), method, device=device, **said)


def same_integers(make: Callable[[], nn.Module], method: Any, **said: Any) -> None:
    """The GPU computes with the CPU's own kernels here: what is rounded in closed form is the same to the last bit."""
    torch.manual_seed(0)
    network = make().eval()
    found = quantized(network, method, **said)
    with alone():
        expected = quantized(network, method, device="cpu", **said)
    ours, theirs = (dict(q.graph.named_buffers()) for q in (found, expected))
    if REAL:
        return close(network, found, expected)
    wrong = [n for n in theirs if not torch.equal(ours[n], theirs[n])]
    if wrong:
        raise AssertionError(f"other numbers than on the CPU: {wrong[:4]}")


def close(network: nn.Module, found: Any, expected: Any) -> None:
    """Sums in another order tip a rounding here and there: the network loses as much on either device."""
    with torch.no_grad():
        given = [f(cases.images(64)) for f in (network, found, expected)]
    ours, theirs = (float((g - given[0]).square().mean()) for g in given[1:])
    if not 0.5 < (ours + 1e-9) / (theirs + 1e-9) < 2:
        raise AssertionError(f"another error than on the CPU: {ours:.3g} for {theirs:.3g}")


def runs(make: Callable[[], nn.Module], method: Any, **said: Any) -> None:
    torch.manual_seed(0)
    found = quantized(make().eval(), method, **said)
    assert not any(on_gpu(t) for t in found.graph.buffers()), "the result is not back on the CPU"


def follows(make: Callable[[], nn.Module], method: Any, **said: Any) -> None:
    """Steps are computed by other operators than on the CPU, and lead where its steps lead."""
    torch.manual_seed(0)
    network = make().eval()
    found = quantized(network, method, **said)
    assert not any(on_gpu(t) for t in found.graph.buffers()), "the result is not back on the CPU"
    with alone():
        expected = quantized(network, method, device="cpu", **said)
    ours, theirs = ([loss for _, loss in q.result["reconstruct"]["curve"]] for q in (found, expected))
    near = 0.1 if "precision" in said else 0.02  # a code that tips moves the next losses by some tenths of a percent
    if len(ours) != len(theirs) or any(abs(a - b) > near * abs(b) for a, b in zip(ours, theirs, strict=True)):
        raise AssertionError(f"other losses than on the CPU: {ours} for {theirs}")


def stages(*some: Stage) -> Recipe:
    return Recipe(name="own", summary="", paper="", stages=(Calibrate(bias_correction="analytic"), *some))


def measured(name: str) -> None:
    """One sensitivity measure, of weights and activations."""
    with alone():
        teacher = copy.deepcopy(cases.prepared("residual"))
    place_on(teacher.graph, GPU)
    choices = Choices(weights=(3, 8), activations=(8,), refine=(Optq(),))
    MEASURES[name]().measure(teacher, cases.dataset(COUNT), choices, Run(device=GPU))
    one_device("teacher", dict(teacher.graph.named_buffers()))


def evaluated() -> None:
    """Evaluation, noise and diagnosis of a network that its user moved; files are written from the CPU."""
    torch.manual_seed(0)
    made = quantized(cases.Residual().eval(), "rtn", weights=2)
    first = made(cases.images(2))
    made.to(GPU)
    one_device("student", dict(made.graph.named_buffers()))
    there = made(cases.images(2).to(GPU))
    near = torch.allclose(there.cpu(), first, rtol=0.1, atol=0.1 * float(first.std()))
    assert near if REAL else torch.equal(there.cpu(), first), "another answer on the GPU"
    assert made.evaluate(images())["quantized"]["top1"] >= 0
    with moved_to(made, GPU):
        evaluation.layer_sqnr(made, cases.images(4))
    diagnosis.diagnose(made, cases.dataset(COUNT), device=GPU)
    one_device("student", dict(made.graph.named_buffers()))
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "run", evaluate=images(), diagnosis=True)
        with mock.patch.object(job, "export_checked", _exported):
            made.export(Path(folder) / "file.onnx", cases.dataset(4))
        assert bw.load(Path(folder) / "run").result["device"] == "cuda"
    one_device("student", dict(made.graph.named_buffers()))


def _exported(model: Student, *rest: Any, **named: Any) -> Any:
    assert not any(on_gpu(t) for t in model.graph.buffers()), "files are written from the CPU"
    with alone():
        return _export(model, *rest, **named)


@contextlib.contextmanager
def errors_where_it_waits() -> Iterator[None]:
    """On a GPU that is there, PyTorch itself refuses to wait."""
    if REAL:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if REAL:
            torch.cuda.set_sync_debug_mode("default")


def patient(method: str, **said: Any) -> None:
    """No step waits for the device: its loss, and whether that is finite, are looked at later."""
    own, seen = tuning.Tuner.advance, []

    def advance(tuner: tuning.Tuner) -> None:
        before = waits.copy()
        with errors_where_it_waits():
            assert own(tuner) is None
        seen.append(waits - before)

    with mock.patch.object(tuning.Tuner, "advance", advance):
        runs(cases.SqueezeExcite, method, **said)
    assert len(seen) == said["steps"], len(seen)
    assert not any(seen), f"steps wait: {seen}"


def frugal(method: str, each: int, **said: Any) -> None:
    """A step takes so many operators for each quantizer of a weight or an activation, those of the networks with it."""
    own, seen, quantizers = tuning.Tuner.advance, [], []

    def advance(tuner: tuning.Tuner) -> Any:
        before = launches.total()
        found = own(tuner)
        seen.append(launches.total() - before)
        quantizers.append(len(tuner.learner.weights) + len(tuner.learner.activations))
        return found

    with mock.patch.object(tuning.Tuner, "advance", advance):
        runs(cases.Transformer, method, **said)
    if not REAL and max(seen) > each * quantizers[0]:
        raise AssertionError(f"{max(seen)} operators for {quantizers[0]} quantizers")


def awaited() -> None:
    """Calibration waits once for each batch, and scores once for a probe: not once for each tensor."""
    if REAL:
        return
    batches, counts = COUNT // 2, dict[str, list[int]]()

    def counted(where: Any, name: str, what: str) -> Any:
        own = getattr(where, name)

        def call(*args: Any, **named: Any) -> Any:
            before = waits.total()
            try:
                return own(*args, **named)
            finally:
                counts.setdefault(what, []).append(waits.total() - before)

        return mock.patch.object(where, name, call)

    with (
        mock.patch.object(api, "images_in_pass", return_value=COUNT // batches),
        counted(calibrate, "sum_up", "ranges"),
        counted(optq, "sum_up", "layer inputs"),
        counted(label_free._Batch, "add", "a probe"),
        counted(label_free, "_join", "scores"),
        counted(pipeline, "_check_finite", "what a stage leaves"),
    ):
        ranges = Calibrate(bias_correction="analytic")
        scored = Reconstruct(weigh="lfh", over="mean", score_probes=6, **_SOFT)
        for make in (cases.SqueezeExcite, cases.Transformer):
            runs(make, Recipe(name="own", summary="", paper="", stages=(ranges, Optq(), scored)), steps=2)
            runs(make, Recipe(name="own", summary="", paper="", stages=(ranges, Optq(views=2))), weights=3)
    allowed = {"ranges": batches, "layer inputs": 0, "a probe": 0, "scores": 1, "what a stage leaves": 1}
    for what, most in allowed.items():
        if max(counts[what]) > most:
            raise AssertionError(f"{what}: waits {max(counts[what])} times")


def pictures() -> None:
    """Pictures come to the GPU as bytes and stay there as bytes; the floats that they become are the CPU's."""
    how = bw.Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    same("every byte", how.normalize(every.to(GPU)), how.normalize(every))
    pixels = torch.randint(0, 256, (COUNT, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made, sizes = bw.load_images(pixels.numpy(), how), list[int]()

    def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sizes.append(tensor.nbytes if device == GPU and tensor.dim() > 1 else 0)
        return transfer.sent(tensor, device)

    with mock.patch.object(preprocessing, "sent", sent):
        same("a batch", made.batch([3, 1], GPU), made.batch([3, 1]))
        same("batches", torch.cat(list(made.batches(3, GPU))), made.batch(range(COUNT)))
    if sum(sizes) != (2 + COUNT) * pixels[0].numel():
        raise AssertionError(f"sent {sum(sizes)} bytes")
    for draws, kept in ((1, torch.uint8), (2, torch.float32)):
        views = Views(made, draws)
        last = views.compact([len(views) - 1]).values.nbytes
        held = held_on(views, GPU, last * len(views))
        assert isinstance(held, OnDevice)
        assert held.whole.values.dtype == kept
        same("held", held.batch(torch.tensor([7, 0]), GPU), views.batch([7, 0]))
        assert held_on(views, GPU, last * len(views) - 1) is views
    with mock.patch.dict(globals(), images=lambda: made):
        same_integers(cases.SqueezeExcite, "optq")
        runs(cases.Residual, "eptq", steps=3)


def same(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """On the GPU, to the last bit."""
    if not on_gpu(found) or not torch.equal(found.cpu(), expected):
        raise AssertionError(f"{what}: not on the GPU, or other numbers than on the CPU")


def recorded(make: Callable[[], nn.Module], method: Any, **said: Any) -> None:
    """Steps that are played from a recording lead where the same steps lead operator by operator."""
    if not REAL:
        return
    play, played, curves = tuning.Recording.play, list[bool](), []

    def spy(*args: Any) -> Any:
        found = play(*args)
        played.append(found is not None)
        return found

    for can in (lambda _: True, lambda _: False):
        with mock.patch.object(tuning, "can_record", can), mock.patch.object(tuning.Recording, "play", spy):
            torch.manual_seed(0)
            made = quantized(make().eval(), method, **said)
            curves.append([loss for _, loss in made.result["reconstruct"]["curve"]])
    if len(played) < said["steps"] // 2 or not all(played):
        raise AssertionError(f"played {sum(played)} of {len(played)} steps")
    if any(abs(a - b) > 0.02 * abs(b) for a, b in zip(*curves, strict=True)):
        raise AssertionError(f"other losses: {curves}")


def planned() -> None:
    """Bits chosen under a limit, from measured losses."""
    torch.manual_seed(0)
    quantized(cases.Residual().eval(), "optq", weights=(2, 4, 8), target_size=1850)


_EVOLVE = {"passes": 1, "batch": 4}
_SOFT = {"rounding": "soft", "decide": Anneal(), "codes": Learn(rate=1e-2, optimizer="radam")}
_WIDE = Calibrate(weights="percentile", activations="percentile", match_spread=True, bias_correction="analytic")
_SCORED = Calibrate(weights="hmse", activations="mse", bias_correction="sequential", score_probes=2)
_SEARCH = Evolve(meaning="keep", fitness="mse", held_out=0.25, **_EVOLVE)
_LFH = Reconstruct(weigh="lfh", over="mean", gradual=Gradual(how="drop"), **_SOFT)
_VIEWS = Reconstruct(weigh="sla-log", views=2, **_SOFT)
_SGD = Reconstruct(weigh="ones", codes=Learn(rate=1e-2, optimizer="sgd"))
CLOSED: dict[str, Any] = {
    "rtn": partial(same_integers, cases.Residual, "rtn", weights=8),
    "mse with squeeze and excite": partial(same_integers, cases.SqueezeExcite, "mse"),
    "optq": partial(same_integers, cases.SqueezeExcite, "optq"),
    "optq at 2 bits, attention": partial(same_integers, cases.Transformer, "optq", weights=2),
    "obq": partial(same_integers, cases.Residual, "obq"),
    "zeros made on the way": partial(same_integers, cases.PartialWrites, "mse"),
    "few bits of activations": partial(same_integers, cases.Transformer, "mse", activations=4),
    "activations auto": partial(same_integers, cases.SqueezeExcite, "mse", weights=8, activations="auto"),
    "short rows": partial(same_integers, Squash, "mse", weights=8),
    "powers of two": partial(same_integers, cases.Residual, "optq", runtime="generic-pot"),
    "percentile, spread": partial(same_integers, cases.Residual, stages(_WIDE)),
    "hmse, sequential": partial(same_integers, cases.Residual, stages(_SCORED)),
    "ptf": partial(same_integers, cases.Transformer, stages(Calibrate(weights="mse", norm_inputs="ptf"))),
    "evolq": partial(same_integers, cases.Residual, stages(Evolve(**_EVOLVE))),
    "evolve, integers kept": partial(same_integers, cases.Transformer, stages(_SEARCH)),
}
OPTIMISED: dict[str, Any] = {
    "eptq": partial(follows, cases.SqueezeExcite, "eptq", steps=8),
    "eptq of attention, bfloat16": partial(follows, cases.Transformer, "eptq", steps=8, precision="bfloat16"),
    "eptq, coarse biases": partial(follows, cases.Residual, "eptq", steps=8, activations=4),
    "soft, lfh, gradual": partial(follows, cases.Residual, stages(_LFH), steps=8),
    "soft, sla-log, views": partial(follows, cases.Residual, stages(_VIEWS), steps=8),
    "sgd, ones": partial(follows, cases.Residual, stages(_SGD), steps=8),
    "adaround": partial(follows, cases.Residual, "adaround", steps=8),
    "brecq": partial(runs, cases.Transformer, "brecq", steps=[3, 2]),
    "qdrop": partial(runs, cases.Residual, "qdrop", steps=3),
    "qkd": partial(runs, cases.Residual, "qkd", steps=5),
}
MEASURED: dict[str, Any] = {f"sensitivity {name}": partial(measured, name) for name in MEASURES}
REST: dict[str, Any] = {
    "a step waits for nothing": partial(patient, "eptq", steps=3),
    "a step of soft roundings waits for nothing": partial(patient, "eptq-paper", steps=3),
    "a step takes few operators": partial(frugal, "eptq", 20, steps=3),
    "a step of soft roundings takes few operators": partial(frugal, "eptq-paper", 28, steps=3),
    "calibration and scores wait for no tensor": awaited,
    "pictures": pictures,
    "recorded steps": partial(recorded, cases.SqueezeExcite, "eptq", steps=12),
    "recorded steps, bfloat16": partial(recorded, cases.Transformer, "eptq", steps=12, precision="bfloat16"),
    "recorded steps of soft roundings": partial(recorded, cases.Residual, stages(_VIEWS), steps=12),
    "recorded steps that drop": partial(recorded, cases.Residual, stages(_LFH), steps=12),
    "recorded steps of the paper": partial(recorded, cases.Residual, "eptq-paper", steps=12),
    "recorded steps, sgd": partial(recorded, cases.Residual, stages(_SGD), steps=12),
    "evaluation, diagnosis, export": evaluated,
    "planned": planned,
}
CASES = CLOSED | OPTIMISED | MEASURED | REST


def main(wanted: list[str]) -> dict[str, str]:
    """What went wrong in each case; nothing where all is well."""
    said: dict[str, str] = {}
    with (
        mock.patch.object(api, "prepare_teacher", _captured),
        mock.patch.object(points, "_shapes", _shapes_of),
        mock.patch.object(pipeline, "_check_finite", _after_a_stage),
        mock.patch.object(tuning.Tuner, "finish", _after_steps),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for name in wanted or CASES:
            try:
                with pretended_gpu():
                    CASES[name]()
            except Exception as error:
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "/bitwright/" in f.filename]
                at = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])
                said[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]} ({at})"
    return said


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[2:])))

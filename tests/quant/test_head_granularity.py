"""One scale per head of attention, from the plan to the file: against the weights' own slices, and the runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.bits import Losses, problem_of, solution_of, variables_of
from bitwright.bits.plan import Plan, insert_plan, plan_of
from bitwright.cli import main
from bitwright.export.onnx import to_onnx
from bitwright.export.packed import ideal_bytes
from bitwright.export.parity import check_parity
from bitwright.given import inputs
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.ranges import weight_scale
from bitwright.quant.scheme import Scheme
from bitwright.run.folder import write_files


class Separate(nn.Module):
    """Attention in windows of 2 x 2 pixels, with a projection each for queries, keys and values, and a convolution."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.patches, self.head = nn.Conv2d(3, width, 2, stride=2), nn.Linear(width, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        b, _, _, c = x.shape
        tokens = x.reshape(b, 2, 2, 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = (f(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return self.head((tokens + self.o(y.transpose(1, 2).flatten(2))).mean(1).reshape(b, 4, c).mean(1))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Separate().eval() if name == "separate" else cases.model(name)


NETWORKS = ("separate", "transformer", "multi_head")
PROJECTIONS = {
    "separate": {"q": (3, 0), "k": (3, 0), "v": (3, 0), "o": (3, 1)},
    "transformer": {"attention.qkv": (6, 0), "attention.proj": (2, 1)},
    "multi_head": {"attention.in_proj_weight": (6, 0), "attention.out_proj": (2, 1)},
}
"""For each: into how many parts heads cut its weight, and along which axis."""


def quantized(name: str, method: Any = "rtn", **settings: Any) -> bw.QuantizedModel:
    scheme = Scheme(**{"weights": 4, "granularity": "head", **settings})
    return bw.quantize(network(name), cases.dataset(), recipe=method, scheme=scheme)


def weights(model: bw.QuantizedModel) -> dict[str, Quantizer]:
    return {x.name: model.quantizer(x.weight) for x in model.layers if x.weight}


def granularities(model: bw.QuantizedModel) -> dict[str, str]:
    return {name: quantizer.granularity for name, quantizer in weights(model).items()}


def stored(name: str, layer: str) -> Tensor:
    values = network(name).state_dict()
    return values[layer] if layer in values else values[f"{layer}.weight"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [3, 8])
def test_scales_are_those_of_each_heads_slice(name: str, bits: int) -> None:
    model = quantized(name, weights=bits)
    for layer, quantizer in weights(model).items():
        weight = stored(name, layer)
        parts, axis = PROJECTIONS[name].get(layer, (len(weight), 0))
        assert quantizer.granularity == ("head" if layer in PROJECTIONS[name] else "channel")
        slices = weight.tensor_split(parts, dim=axis)
        expected = [float(s.abs().max()) / ((2**bits - 1) / 2) for s in slices]
        assert quantizer.scale.tolist() == pytest.approx(expected, rel=1e-6)
        rounded = [
            (s / e).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * e
            for s, e in zip(slices, quantizer.scale, strict=True)
        ]
        assert torch.equal(quantizer(weight), torch.cat(rounded, dim=axis))


@pytest.mark.parametrize("size", [None, 1, 2, 3, 4])
def test_heads_are_cut_into_equal_parts(size: int | None) -> None:
    """Heads of four channels; three do not divide it."""
    for layer, quantizer in weights(quantized("separate", group_size=size)).items():
        if layer in PROJECTIONS["separate"]:
            assert quantizer.group_size == {None: 4, 1: 1, 2: 2, 3: 2, 4: 4}[size]
            assert quantizer.scale.numel() == 12 // quantizer.group_size


def test_finer_scales_lose_less() -> None:
    """Tensor, head, half a head, channel: each cuts what the one before shares."""
    weight = stored("transformer", "attention.qkv")
    errors = []
    for settings in ({"granularity": "tensor"}, {}, {"group_size": 2}, {"granularity": "channel"}):
        made = weights(quantized("transformer", **settings))["attention.qkv"]
        assert made.block is not None
        made.set_range(weight_scale(weight, made.grid, made.block, power=2.0))
        errors.append(float((made(weight) - weight).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [2, 8])
def test_a_saved_model_is_the_same_bit_for_bit(name: str, bits: int, tmp_path: Path) -> None:
    model = quantized(name, weights=bits)
    model.save(tmp_path / "run")
    loaded = bw.load(tmp_path / "run")
    assert torch.equal(loaded(cases.images()), model(cases.images()))
    assert granularities(loaded) == granularities(model)
    assert plan_of(loaded) == plan_of(model) == Plan.read(tmp_path / "run")
    rows = {r["name"]: r["granularity"] for r in loaded.result["layers"]}
    assert {n for n, g in rows.items() if g == "head"} == set(PROJECTIONS[name])


@pytest.mark.parametrize(
    ("name", "bits", "size"),
    [
        ("transformer", 8, None),
        ("separate", 3, 2),
        *(pytest.param(name, bits, None, marks=pytest.mark.slow) for name in NETWORKS for bits in (4, 8)),
        pytest.param("transformer", 8, 1, marks=pytest.mark.slow),
    ],
)
def test_the_runtime_computes_the_same(name: str, bits: int, size: int | None) -> None:
    model = quantized(name, "mse", weights=bits, group_size=size)
    parity = check_parity(model, to_onnx(model), cases.images(12))
    assert parity.passed, parity
    assert parity.worst_layer.max_steps <= 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_the_runtime_computes_the_same_on_a_trained_network(bits: int) -> None:
    scheme = Scheme(weights=bits, granularity="head")
    model = bw.quantize("zoo:fashion_vit", "zoo:fashion[:16]", "rtn", scheme=scheme)
    program = to_onnx(model)
    assert check_parity(model, program, model.calibration.batch(range(12))).passed
    scales = {k: v.const_value.size for k, v in program.graph.initializers.items() if k.endswith("/scale")}
    attention = {k: v for k, v in scales.items() if "quantizer_weight" in k and ("qkv" in k or "proj" in k)}
    assert set(attention.values()) == {288, 96}  # one for each row of qkv; for each column of proj; the patches


def test_biases_of_heads_stay_float_and_say_so() -> None:
    why = {u.name: u.reason for u in quantized("transformer", weights=8).unquantized}
    assert why["attention.qkv.bias"] == why["attention.proj.bias"] == "its layer's weight has scales of heads"
    assert "mlp.0.bias" not in why


@pytest.mark.filterwarnings("ignore:The optimisation did not lower")
@pytest.mark.parametrize("method", ["optq", "eptq", "evolq", "eptq+evolq"])
def test_stages_keep_the_scales_of_heads(method: str, tmp_path: Path) -> None:
    """What each of them yields lies on the grid of its heads: codes times one number a head."""
    steps = {"eptq": 24, "evolq": 4, "eptq+evolq": (24, 4)}.get(method)
    scheme = Scheme(weights=3, granularity="head")
    model = bw.quantize(network("separate"), cases.dataset(), recipe=method, scheme=scheme, steps=steps)
    assert {n for n, g in granularities(model).items() if g == "head"} == set(PROJECTIONS["separate"])
    for layer, (parts, axis) in PROJECTIONS["separate"].items():
        key = next(x.weight for x in model.layers if x.name == layer)
        frozen = model.graph.get_submodule(str(key).replace("quantizer_", "frozen_", 1))
        assert frozen.quantizer.scale.numel() == parts
        values = zip(frozen().tensor_split(parts, axis), frozen.codes.tensor_split(parts, axis), strict=True)
        for scale, (value, codes) in zip(frozen.quantizer.scale, values, strict=True):
            assert torch.equal(value, codes * scale)
            assert -4 <= int(codes.min()) <= int(codes.max()) <= 3
    model.save(tmp_path / "run")
    assert torch.equal(bw.load(tmp_path / "run")(cases.images()), model(cases.images()))


def test_closed_form_roundings_beat_nearest_ones_on_the_outputs() -> None:
    x, expected = cases.images(12, seed=1), network("separate")(cases.images(12, seed=1)).detach()
    errors = [
        float((quantized("separate", method, weights=2, activations="float")(x) - expected).square().sum())
        for method in ("rtn", "optq")
    ]
    assert errors[1] < errors[0]


def test_bytes_of_scales_are_counted(tmp_path: Path) -> None:
    """A channel's scale is four bytes: 36 + 12 of them by channel, 9 + 3 by head; codes and the rest stay."""
    by_channel, by_head = quantized("separate", granularity="channel"), quantized("separate")
    assert ideal_bytes(by_channel) - ideal_bytes(by_head) == 4 * (4 * 12 - 4 * 3)


def test_the_file_has_the_bytes_that_a_plan_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.outliers.balance.ROUNDS", 0)  # factors of channels are bytes that no plan counts
    torch.manual_seed(0)
    wide, scheme = Separate(96, 4).eval(), Scheme(granularity="head")
    student = bw.api.preview(wide, cases.dataset(), scheme=scheme)
    variables = variables_of(student)
    even: dict[str, dict[str, dict[int, float]]] = {"weight": {}, "activation": {}}
    for v in variables.values():
        even[v.kind][v.name] = dict.fromkeys(v.options, 1.0)
    found = problem_of(student, Losses(even["weight"], even["activation"]))
    bits = {key: v.options[i % len(v.options)] for i, (key, v) in enumerate(variables.items())}
    made = bw.quantize(wide, cases.dataset(), recipe="rtn", plan=plan_of(student, bits), scheme=scheme)
    write_files(made, tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert written == pytest.approx(solution_of(found, bits).costs["weight_bytes"], rel=0.02)


# ------------------------------------------------------------------------------------------------- plans and calls


def test_a_plan_gives_one_layer_heads(tmp_path: Path) -> None:
    plan = Plan.model_validate({"layers": {"q": {"weight": {"bits": 4, "granularity": "head", "group_size": 2}}}})
    plan.write(tmp_path / "plan.json")
    model = bw.quantize(network("separate"), cases.dataset(), recipe="rtn", plan=tmp_path / "plan.json")
    assert {n: g for n, g in granularities(model).items() if g != "channel"} == {"q": "head"}
    assert weights(model)["q"].scale.numel() == 6
    assert plan_of(model).layers["q"].weight.group_size == 2  # type: ignore[union-attr]


def test_a_plan_takes_heads_from_one_layer() -> None:
    plan = Plan.model_validate({"layers": {"o": {"weight": {"bits": 4, "granularity": "channel"}}}})
    teacher = inputs.prepare_teacher(inputs.as_model(network("separate")), cases.dataset())
    found = granularities(insert_plan(teacher, plan, Scheme(granularity="head")))
    assert (found["q"], found["o"], found["head"]) == ("head", "channel", "channel")


@pytest.mark.parametrize("layer", ["patches", "head"])
def test_a_plan_cannot_give_heads_to_what_has_none(layer: str) -> None:
    plan = Plan.model_validate({"layers": {layer: {"weight": {"bits": 4, "granularity": "head"}}}})
    with pytest.raises(
        bw.UsageError, match=f"a scale per head in the weight of '{layer}', which can only have one per ch"
    ):
        bw.api.preview(network("separate"), cases.dataset(), plan=plan)


@pytest.mark.parametrize("name", ["residual", "mixer"])
def test_a_network_without_heads_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(bw.UsageError, match="Expected attention with heads") as caught:
        quantized(name)
    assert "\n" not in str(caught.value)


def test_the_command_line_refuses_a_network_without_heads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "zoo:fashion_cnn", "--granularity", "head"]) == 2
    assert "Expected attention with heads" in capsys.readouterr().err


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *arguments, "--json"]) == 0
    return {r["name"]: r for r in json.loads(capsys.readouterr().out)["layers"]}


def test_inspect_shows_what_a_plan_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [f"blocks.{i}.attn.{layer}" for i in range(4) for layer in ("qkv", "proj")]
    rows = inspected(capsys, "zoo:fashion_vit", "--granularity", "head", "--weights", "3")
    assert [n for n, r in rows.items() if r["granularity"] == "head"] == blocks
    plan = {"layers": {"head": {"weight": {"bits": 6, "granularity": "tensor"}}, "input": {"activation": {"bits": 16}}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    rows = inspected(capsys, "zoo:fashion_vit", "--plan", str(tmp_path / "plan.json"), "--weights", "4")
    assert (rows["head"]["weight_bits"], rows["head"]["granularity"]) == (6, "tensor")
    assert rows["input"]["activation_bits"] == 16
    assert {r["weight_bits"] for n, r in rows.items() if r["op"] in {"linear", "conv2d"} and n != "head"} == {4}


def test_a_plan_of_another_network_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text('{"layers": {"blocks.0.conv": {"weight": {"bits": 6}}}}')
    assert main(["inspect", "zoo:fashion_vit", "--plan", str(tmp_path / "plan.json")]) == 2
    assert "The plan has a layer 'blocks.0.conv', the network none" in capsys.readouterr().err


def test_a_run_is_not_inspected_with_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = quantized("separate").save(tmp_path / "run")
    assert main(["inspect", str(run), "--plan", str(run)]) == 2
    assert "is a run, which has its bits already" in capsys.readouterr().err

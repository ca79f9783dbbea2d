"""What targets lack is refused with the nearest that they have; scales of generic-pot are powers of two."""

import cases
import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.bits.plan import Plan, plan_of
from bitwright.export.onnx import to_onnx
from bitwright.export.parity import check_parity
from bitwright.graph.student import insert_quantizers
from bitwright.quant import affine, shifts
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Quantizer
from bitwright.quant.scheme import Rule, Scheme
from bitwright.quant.statistics import Statistics
from bitwright.runtimes import RUNTIMES, target
from bitwright.runtimes.target import FAMILIES, nearest_bits
from bitwright.stages.reconstruct import Reconstruct


def student(name="transformer", **settings):
    return insert_quantizers(cases.prepared(name), Scheme(**settings))


@pytest.mark.parametrize(
    ("settings", "found", "nearest"),
    [
        ({"weights": 3}, "weights of 2, 4 or 8 bits, found 3 in 'patches'", "weights=4"),
        ({"weights": 5, "activations": 6}, "found 5", "weights=8 activations=8"),
        ({"activations": 2}, "activations of 8 or 16 bits, found 2", "activations=8"),
        ({"rules": (Rule.parse("attention.*=w7"),)}, "found 7 in 'attention.qkv'", "rules=['attention.*=w8']"),
        ({"rules": (Rule.parse("head=w3"), Rule.parse("h*=w5"))}, "found 5 in 'head'", "rules=['h*=w8']"),
        (
            {"granularity": "group", "group_size": 2},
            "per tensor or channel, found one per group",
            "granularity='channel'",
        ),
        (
            {"activation_grid": "affine"},
            "symmetric activations only",
            "activation_grid='symmetric' (\"symmetric\": true in a plan)",
        ),
        ({"parameter_bits": 4}, "found 4 in", "parameter_bits=8"),
    ],
)
def test_what_a_target_lacks_is_refused_with_the_nearest(settings, found, nearest):
    with pytest.raises(bw.UsageError) as caught:
        student(runtime="generic-pot", **settings)
    assert found in str(caught.value)
    assert str(caught.value).endswith(f"The nearest that it runs: {nearest}")
    assert "\n" not in str(caught.value)


def test_what_the_error_names_is_then_taken():
    with pytest.raises(bw.UsageError, match=r"weights=4 rules=\['head=w8'\] activations=8$"):
        student(runtime="generic-pot", weights=3, activations=4, rules=(Rule.parse("head=w6"),))
    student(runtime="generic-pot", weights=4, rules=(Rule.parse("head=w6"), Rule.parse("head=w8")))


def test_heads_are_refused_where_there_are_none():
    with pytest.raises(bw.UsageError, match=r"found one per head in 'attention.qkv'.*granularity='channel'$"):
        student(runtime="generic-pot", granularity="head")


def test_a_plan_that_the_target_lacks_is_refused_with_its_layer():
    made = plan_of(student(runtime="generic-pot"))
    layers = dict(made.layers)
    weight = layers["head"].weight.model_copy(update={"granularity": "group", "group_size": 2})
    layers["head"] = layers["head"].model_copy(update={"weight": weight})
    with pytest.raises(bw.UsageError, match=r"one per group in 'head'.*\"granularity\": \"channel\" for 'head'"):
        student(**Plan(runtime="generic-pot", layers=layers).scheme().model_dump())


def test_openvino_takes_groups_that_divide_the_channels_only():
    student(runtime="openvino", granularity="group", group_size=4)
    with pytest.raises(bw.UsageError, match=r"groups of 3 for 8 in 'attention.qkv'"):
        student(runtime="openvino", granularity="group", group_size=3)
    with pytest.raises(bw.UsageError, match=r"found 16 in .*activations=8$"):
        student(runtime="openvino", activations=16)


@pytest.mark.parametrize("name", RUNTIMES)
def test_targets_are_consistent(name):
    able = target(name)
    for family in FAMILIES:
        weights = able.weights(family)
        assert set(weights.integer) <= set(weights.bits)
        assert "channel" in weights.granularities  # the nearest that errors name
    assert nearest_bits(8, able.weight_bits) == 8
    student(runtime=name)


def powers(model):
    found = [m for m in model.graph.modules() if isinstance(m, Quantizer | BiasQuantizer)]
    scales = torch.cat([m.scale.reshape(-1) for m in found])
    return torch.log2(scales.double())


@pytest.mark.filterwarnings("ignore:The optimisation did not lower")
@pytest.mark.parametrize("name", ["rtn", "optq", "eptq"])
def test_every_scale_stays_a_power_of_two(name):
    steps = 4 if name == "eptq" else None
    made = bw.quantize(cases.model("transformer"), cases.dataset(), name, weights=4, runtime="generic-pot", steps=steps)
    exponents = powers(made)
    assert torch.equal(exponents, exponents.round())
    assert all(m.zero_point.eq(0).all() for m in made.graph.modules() if isinstance(m, Quantizer))
    assert check_parity(made, to_onnx(made), cases.images(6)).passed


def test_an_optimisation_leaves_powers_of_two_where_they_are():
    for runtime, free in (("generic-pot", False), ("generic", True)):
        variables = Reconstruct()._variables(student(runtime=runtime))
        assert (variables.weight_steps, variables.activation_steps) == (free, free)


def test_other_targets_do_not_round_scales():
    exponents = powers(bw.quantize(cases.model("residual"), cases.dataset(), "rtn", runtime="generic"))
    assert not torch.equal(exponents, exponents.round())


@pytest.mark.parametrize("name", ["evolq", "evolq-paper"])
def test_stages_that_move_scales_are_refused_before_the_first_begins(name):
    def began(stage, done, total, detail=""):
        pytest.fail(f"{stage} began")

    with pytest.raises(bw.UsageError, match="powers of two only"):
        bw.quantize(cases.model("transformer"), cases.dataset(), name, runtime="generic-pot", progress=began)


def test_a_scale_that_is_set_becomes_the_next_power_of_two():
    quantizer = Quantizer("a", Grid(8), "activation", power_of_two=True)
    quantizer.set_range(torch.tensor(0.3), torch.tensor(0.0))
    assert quantizer.scale.tolist() == [0.5]
    quantizer.set_range(quantizer.scale, quantizer.zero_point)
    assert quantizer.scale.tolist() == [0.5]
    quantizer.scale = torch.tensor([0.3])
    with pytest.raises(bw.UsageError, match="powers of two, found"):
        quantizer.validate()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_of_two_powers_the_one_of_less_error_is_taken(bits):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(40, 9)) * np.exp(generator.normal(size=(40, 1)))
    scale = np.abs(weight).max(1) / (2 ** (bits - 1) - 0.5)
    found = shifts.nearest_power_scale(
        torch.tensor(weight, dtype=torch.float32), torch.tensor(scale).float(), Grid(bits, True), (1, 9)
    ).numpy()
    grid = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    for row, s, ours in zip(weight, scale, found, strict=True):
        options = 2.0 ** np.array([np.floor(np.log2(s)), np.ceil(np.log2(s))])
        errors = [((row[:, None] - grid * o) ** 2).min(1).sum() for o in options]  # the nearest of all grid points
        assert ours in options
        assert errors[list(options).index(ours)] <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, True)])
def test_activations_take_the_power_of_less_error(grid):
    generator = torch.Generator().manual_seed(0)
    for width in (0.6, 0.75, 1.0, 1.3):
        values = torch.randn(20000, generator=generator) * width
        seen = Statistics("a")
        seen.update(values.reshape(4, -1))
        low, high = -3.0 * width, 3.0 * width
        scale, zero = shifts.activation_parameters(low, high, seen, grid)
        exponent = torch.log2(scale)
        assert torch.equal(exponent, exponent.round())
        wide, _ = shifts.activation_parameters(low, high, seen, grid, cover=True)
        assert float(wide) * grid.qmax * (2 if grid.symmetric else 1) >= (high - low) * 0.9
        errors = {}
        for step in (float(wide), float(wide) / 2):
            z = torch.tensor(0.0) if grid.symmetric else torch.round(torch.tensor(-low / step)).clamp(0, grid.qmax)
            kept = affine.fake_quantize(values, torch.tensor(step), z, grid.qmin, grid.qmax)
            errors[step] = float((kept - values).square().sum())
        assert errors[float(scale)] <= 1.01 * min(errors.values())
        assert float(zero) == 0 or not grid.symmetric

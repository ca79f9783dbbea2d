"""Costs of real graphs against counting by hand, and against the files that are written."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.bits import costs_of, problem_of, residual_ties, solution_of, variables_of
from bitwright.bits.allocate import Losses
from bitwright.bits.plan import plan_of
from bitwright.errors import UsageError
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Rule, Scheme
from bitwright.run.folder import write_files


def student(name, *rules, **settings):
    scheme = Scheme(rules=tuple(map(Rule.parse, rules)), **settings)
    return insert_quantizers(cases.prepared(name), scheme)


def even_losses(model, **settings):
    """Equal losses of everything."""
    tables = {"weight": {}, "activation": {}}
    for v in variables_of(model, **settings).values():
        tables[v.kind][v.name] = dict.fromkeys(v.options, 1.0)
    return Losses(tables["weight"], tables["activation"])


def problem(model, **settings):
    return problem_of(model, even_losses(model, **settings), **settings)


def costs_at(model, bits):
    """Costs with the given bits of variables by name, 8 elsewhere."""
    found = problem(model)
    names = variables_of(model)
    chosen = {key: bits.get((v.kind, v.name), 8) for key, v in names.items()}
    return solution_of(found, chosen).costs


def test_variables_are_tensors_not_layers():
    found = {(v.kind, v.name): v for v in variables_of(student("tied_weights")).values()}
    assert found["weight", "first"].layers == ("first", "second")
    assert ("weight", "second") not in found
    assert found["activation", "input"].options == (4, 8, 16)
    assert found["weight", "stem"].options == (2, 3, 4, 5, 6, 8)


def test_a_concatenation_on_one_grid_is_one_variable():
    generic = [v for v in variables_of(student("dense", runtime="generic")).values() if v.kind == "activation"]
    apart = [v for v in variables_of(student("dense")).values() if v.kind == "activation"]
    joined = max(generic, key=lambda v: len(v.layers))
    assert {"cat", "cat_1", "input"} <= set(joined.layers)
    assert len(apart) > len(generic)


def test_rules_fix_bits_and_targets_limit_them():
    model = student("residual", "stem=w7a8", "head=wfloat")
    found = {(v.kind, v.name): v for v in variables_of(model, weights=(3, 8, 12)).values()}
    assert found["weight", "stem"].options == (7,)
    assert ("weight", "head") not in found
    assert found["weight", "conv"].options == (3, 8)
    relu = next(v for v in found.values() if v.kind == "activation" and "stem" in v.layers)
    assert relu.options == (8,)
    with pytest.raises(UsageError, match="onnxruntime has 2, 3, 4, 5, 6, 7, 8 bits for weights"):
        variables_of(model, weights=(12,))


def test_bit_operations_are_counted_by_hand():
    # residual: stem 3->4 3x3 on 8x8, conv 4->4 3x3 on 8x8, head 4->4
    stem, conv, head = 64 * 4 * 27, 64 * 4 * 36, 16
    model = student("residual")
    relu = next(v.name for v in variables_of(model).values() if v.kind == "activation" and "stem" in v.layers)
    costs = costs_at(model, {("weight", "stem"): 2, ("activation", "input"): 16, ("activation", relu): 4})
    assert costs["bit_operations"] == stem * 2 * 16 + conv * 8 * 4 + head * 8 * 8


def test_products_of_activations_and_float_operands_count_too():
    model = student("transformer", "head=wfloat")
    # attention of 2 heads, 5 tokens, 4 channels a head: q k^T and the product with v
    linears = 4 * 8 * 48 + 5 * 8 * 24 + 5 * 8 * 8 + 5 * 8 * 12 * 2
    products = 2 * (2 * 5 * 5 * 4)
    head = 8 * 4
    assert costs_at(model, {})["bit_operations"] == (linears + products) * 64 + head * 32 * 8


def test_peak_memory_is_counted_by_hand():
    # image 192 values; stem+relu 256; conv 256 (onnxruntime rounds it); add+relu 256; mean 4
    model = student("residual")
    bits = {(v.kind, v.name): v for v in variables_of(model).values()}
    relu = next(n for k, n in bits if k == "activation" and "stem" in bits[k, n].layers)
    conv = "conv"
    assert costs_at(model, {})["activation_bytes"] == 3 * 256  # add: relu, conv and the sum
    assert costs_at(model, {("activation", relu): 4, ("activation", conv): 4})["activation_bytes"] == 128 + 128 + 256
    assert costs_at(model, {("activation", "input"): 16})["activation_bytes"] == 768  # image and stem: 384 + 256
    fused = student("residual", runtime="generic")
    assert costs_at(fused, {("activation", "input"): 16})["activation_bytes"] == 640  # conv+add+relu: two live


def test_views_are_no_memory_and_pools_are():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(128, 4)

        def forward(self, x):
            return self.b(torch.max_pool2d(torch.relu(self.a(x)), 2).flatten(1))

    model = bw.api.preview(Net().eval(), cases.dataset())
    # image 192, relu 512, pooled 128, output 4 float: relu and pool live together
    assert costs_at(model, {})["activation_bytes"] == 192 + 512


def test_memory_lives_as_long_as_its_last_view():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(512, 4)

        def forward(self, x):
            x = torch.relu(self.a(x))
            view = x.flatten(1)
            y = torch.relu(self.b(torch.max_pool2d(x, 3, 1, 1)))
            return self.c(view) + y.mean((2, 3))[:, :4]

    model = bw.api.preview(Net().eval(), cases.dataset())
    assert costs_at(model, {})["activation_bytes"] == 512 + 512 + 1024  # x for its view, pooled, and relu


def test_total_is_the_sum_and_latency_comes_from_its_table():
    model = student("residual")
    costs = costs_at(model, {})
    assert costs["total_bytes"] == costs["weight_bytes"] + costs["activation_bytes"]
    variables = variables_of(model, (4, 8), (8, 16))
    table = {n: {(w, a): w * a * (i + 1) for w in (4, 8) for a in (8, 16)} for i, n in enumerate(["stem", "conv"])}
    with pytest.raises(UsageError, match="lacks head"):
        costs_of(model, variables, table)
    table["head"] = {(w, a): 0.0 for w in (4, 8) for a in (8, 16)}
    found = problem_of(
        model, even_losses(model, weights=(4, 8), activations=(8, 16)), weights=(4, 8), activations=(8, 16),
        latency=table,
    )  # fmt: skip
    chosen = {key: 4 if v.name == "stem" else 8 for key, v in variables.items()}
    assert solution_of(found, chosen).costs["latency"] == 4 * 8 * 1 + 8 * 8 * 2


def test_operands_of_additions_can_be_tied():
    model = student("residual")
    (tie,) = residual_ties(model, variables_of(model))
    names = [set(variables_of(model)[key].layers) for key in tie]
    assert any("stem" in n for n in names)
    assert any("conv" in n for n in names)
    assert residual_ties(student("conv_bn_relu6"), variables_of(student("conv_bn_relu6"))) == []


def test_a_frozen_network_is_refused():
    model = bw.quantize(cases.model("conv1d"), cases.dataset(), recipe="rtn")
    with pytest.raises(UsageError, match="not frozen"):
        variables_of(model)


class Sized(nn.Module):
    """Large enough that two percent are more than a few bytes of text."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=2)
        self.c, self.d = nn.Linear(32 * 16, 40), nn.Linear(40, 40)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x)))).flatten(1)
        return self.d(torch.relu(self.c(x)))


@pytest.mark.parametrize("runtime", ["onnxruntime", "generic"])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_the_file_has_the_bytes_that_were_counted(runtime, granularity, tmp_path):
    torch.manual_seed(0)
    network = Sized().eval()
    scheme = Scheme(runtime=runtime, granularity=granularity, group_size=16 if granularity == "group" else None)
    model = bw.api.preview(network, cases.dataset(), scheme=scheme)
    found, variables = problem(model), variables_of(model)
    for shift in range(3):
        bits = {key: v.options[(i + shift) % len(v.options)] for i, (key, v) in enumerate(variables.items())}
        plan = plan_of(model, bits)
        made = bw.quantize(network, cases.dataset(), recipe="rtn", plan=plan, scheme=scheme)
        write_files(made, tmp_path)
        written = (tmp_path / "model.safetensors").stat().st_size
        assert written == pytest.approx(solution_of(found, bits).costs["weight_bytes"], rel=0.02)

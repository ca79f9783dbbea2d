import json

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitwright as bw
from bitwright.errors import UsageError
from bitwright.export.packed import ideal_bytes, load_packed, pack_bits, save_packed, unpack_bits
from bitwright.graph.student import insert_quantizers
from bitwright.quant.quantizer import Quantizer


def quantized(name, **settings):
    return bw.quantize(cases.model(name), cases.dataset(), recipe="rtn", **settings)


@pytest.mark.parametrize("bits", [*range(2, 9), 16])
def test_packing_is_exact_and_dense(bits):
    codes = torch.randint(0, 2**bits, (1001,), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-1001 * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, 1001).long(), codes)


def test_packing_puts_the_lowest_bit_first():
    # 0b101, 0b011 -> bits 1 0 1 1 1 0 from the low end
    assert pack_bits(torch.tensor([5, 3]), 3).tolist() == [0b011101]


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("bits", [3, 8])
def test_loading_gives_the_same_outputs_bit_for_bit(name, bits, tmp_path):
    model = quantized(name, weights=bits)
    save_packed(model, tmp_path / "model.safetensors", {"note": 1})
    loaded, extra = load_packed(tmp_path / "model.safetensors")
    x = cases.images(5)
    assert extra == {"note": 1}
    assert loaded.outputs == model.outputs
    for a, b in zip(model.flat(x), loaded.flat(x), strict=True):
        assert torch.equal(a, b)
    assert [vars(u) for u in loaded.unquantized] == [vars(u) for u in model.unquantized]


@pytest.mark.parametrize("settings", [{"granularity": "group", "group_size": 3}, {"granularity": "tensor"}])
def test_other_granularities_survive(settings, tmp_path):
    scheme = bw.Scheme(weights=4, activation_grid="symmetric", **settings)
    model = bw.quantize(cases.model("transposed"), cases.dataset(), recipe="mse", scheme=scheme)
    save_packed(model, tmp_path / "m.safetensors")
    loaded, _ = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(model.flat(cases.images())[0], loaded.flat(cases.images())[0])


@pytest.mark.parametrize("runtime", ["generic-pot", "generic"])
def test_quantizers_whose_scales_are_powers_of_two_stay_so(runtime, tmp_path):
    model = bw.quantize(cases.model("residual"), cases.dataset(), recipe="mse", weights=4, runtime=runtime)
    model.save(tmp_path / "run")
    loaded = bw.load(tmp_path / "run")
    theirs, ours = ([m for m in x.graph.modules() if isinstance(m, Quantizer)] for x in (model, loaded))
    assert {q.power_of_two for q in theirs} == {runtime == "generic-pot"}
    assert [q.power_of_two for q in ours] == [q.power_of_two for q in theirs]
    assert all(torch.equal(a.scale, b.scale) for a, b in zip(ours, theirs, strict=True))
    ours[0].set_range(torch.full_like(ours[0].scale, 0.3), torch.zeros_like(ours[0].zero_point))
    expected = 0.5 if runtime == "generic-pot" else 0.3
    assert ours[0].scale.tolist() == pytest.approx([expected] * ours[0].scale.numel())


@pytest.mark.parametrize("activations", [8, None])
def test_a_network_whose_weights_stay_float_is_written_as_it_is(activations, tmp_path):
    model = quantized("residual", scheme=bw.Scheme(weights=None, activations=activations))
    save_packed(model, tmp_path / "a.safetensors")
    loaded, _ = load_packed(tmp_path / "a.safetensors")
    x = cases.images(5)
    assert all(torch.equal(a, b) for a, b in zip(model.flat(x), loaded.flat(x), strict=True))


def test_a_network_that_is_not_frozen_is_refused(tmp_path):
    model = insert_quantizers(cases.prepared("residual"), bw.Scheme())
    with pytest.raises(UsageError, match="Expected a frozen model"):
        save_packed(model, tmp_path / "a.safetensors")


def test_stored_operands_of_sixteen_bits_survive(tmp_path):
    model = quantized("transformer", activations=16, runtime="generic")
    save_packed(model, tmp_path / "m.safetensors")
    loaded, _ = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(model.flat(cases.images())[0], loaded.flat(cases.images())[0])


def test_outputs_keep_their_structure(tmp_path):
    model = quantized("dict_output")
    save_packed(model, tmp_path / "m.safetensors")
    loaded, _ = load_packed(tmp_path / "m.safetensors")
    expected = cases.model("dict_output")(cases.images())
    assert list(loaded(cases.images())) == list(expected)


def test_ideal_size_counts_bits_scales_and_biases():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5)
    )
    model = bw.quantize(network, cases.dataset(), recipe="rtn", weights=3)
    codes = -(-(8 * 27) * 3 // 8) + -(-(5 * 288) * 3 // 8)
    scales = 4 * (8 + 5)
    biases = 4 * (8 + 5)
    activations = 2 * 8  # input and ReLU: scale and zero point each; the output stays float
    assert ideal_bytes(model) == codes + scales + biases + activations


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_file_is_within_two_percent_of_its_ideal_size(bits, tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64 * 36, 300)
    )
    model = bw.quantize(network, cases.dataset(), recipe="rtn", weights=bits)
    path = tmp_path / "m.safetensors"
    save_packed(model, path)
    assert ideal_bytes(model) <= path.stat().st_size <= 1.02 * ideal_bytes(model)


def test_two_runs_write_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        model = bw.quantize(cases.make("squeeze_excite"), cases.dataset(), recipe="mse", weights=4)
        save_packed(model, tmp_path / folder)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_damaged_and_foreign_files_are_one_clear_line(tmp_path):
    model = quantized("conv1d")
    path = tmp_path / "m.safetensors"
    save_packed(model, path)
    whole = path.read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "newer", metadata={"bitwright": "99"})
    for name, expected in (
        ("none", "found none"),
        ("short", "damaged"),
        ("foreign", "not written by"),
        ("newer", "99"),
    ):
        with pytest.raises(UsageError, match=expected) as caught:
            load_packed(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_cannot_name_operators_of_other_libraries(tmp_path):
    from bitwright.graph.store import load_graph

    evil = [
        ["call_function", "x", "os.system", ["true"], {"d": {}}, None],
        ["output", "output", "output", [[]], {"d": {}}, None],
    ]
    with pytest.raises(UsageError, match=r"os\.system"):
        load_graph(json.loads(json.dumps(evil)), torch.nn.Module())

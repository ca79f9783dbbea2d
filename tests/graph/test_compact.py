"""Values on a grid held as codes of a byte: the same bits again, in a quarter of the memory."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, images, prepared
from torch import fx

from bitwright.graph.compact import HeldCodes, Room, grid_of
from bitwright.graph.student import insert_quantizers
from bitwright.quant import affine
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme

GRIDS = [Grid(bits, symmetric) for bits in (2, 4, 8) for symmetric in (False, True)]


def quantizer(grid: Grid) -> Quantizer:
    made = Quantizer("layer", grid, "activation")
    made.set_range(torch.tensor([0.0137]), torch.tensor([0.0 if grid.symmetric else float(grid.qmax // 3)]))
    return made


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.description)
@pytest.mark.parametrize("piece", [7, 1 << 16])
def test_the_same_bits_in_the_same_memory_order(grid: Grid, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine, "PIECE", piece)
    on_it, x = quantizer(grid), images(3)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x.flatten(1), x.new_empty(0, 3)):
        value = on_it(given)
        held = HeldCodes.of(value, on_it)
        assert held is not None
        assert held.codes.nbytes * 4 == value.nbytes
        found = held.values()
        assert torch.equal(found.view(torch.int32), value.view(torch.int32))
        assert found.stride() == value.stride()


def test_a_value_off_the_grid_is_not_held_as_a_code() -> None:
    on_it = quantizer(Grid(8))
    value = on_it(images(2))
    for wrong in (value.max() + on_it.scale[0], value.min() + on_it.scale[0] / 3, torch.nan, torch.inf):
        off = value.clone()
        off.view(-1)[-1] = wrong
        assert HeldCodes.of(off, on_it) is None


def test_what_lies_on_which_grid() -> None:
    graph, quantizers = fx.Graph(), torch.nn.ModuleDict()
    x = graph.placeholder("x")
    for name, bits in (("eight", 8), ("nine", 9), ("empty", 8)):
        quantizers[name] = quantizer(Grid(bits)) if name != "empty" else Quantizer(name, Grid(bits), "activation")
    quantizers["spread"] = quantizer(Grid(8))
    quantizers["spread"].scale = torch.tensor([0.5, 1.0])
    ends = {name: graph.call_module(name, (x,)) for name in quantizers}
    moved = graph.call_function(torch.ops.aten.flatten.using_ints, (ends["eight"], 1))
    changed = graph.call_function(torch.ops.aten.relu.default, (ends["eight"],))
    graph.output([moved, changed, *ends.values()])
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(2, 3)
    module = fx.GraphModule(dict(quantizers), graph)
    found = {node.name: grid_of(module, node) for node in module.graph.nodes if node.op.startswith("call")}
    assert {name for name, grid in found.items() if grid is not None} == {"eight", moved.name}
    assert found[moved.name] is module.get_submodule("eight")


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_value_that_is_said_to_lie_on_a_grid_does(name: str) -> None:
    student = insert_quantizers(prepared(name), Scheme())
    for module in student.graph.children():
        if isinstance(module, Quantizer) and module.role == "activation":
            module.set_range(torch.tensor([0.05]), module.grid.middle)
    seen = 0
    runner = fx.Interpreter(student.graph)
    runner.args_iter = iter([images(2)])
    with torch.no_grad():
        for node in student.graph.graph.nodes:
            runner.env[node] = value = runner.run_node(node)
            grid = grid_of(student.graph, node)
            if grid is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
                held, seen = HeldCodes.of(value, grid), seen + 1
                assert held is not None, node.name
                assert torch.equal(held.values(), value)
    assert seen > 0


def test_tensors_of_batches_lie_in_one_piece() -> None:
    room, own = Room(3), [torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    own.append(torch.rand(1, 3, 4, 5))
    taken = [room.take(tensor) for tensor in own]
    assert len({t.untyped_storage().data_ptr() for t in taken}) == 1
    for found, tensor in zip(taken, own, strict=True):
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
        assert found.data_ptr() != tensor.data_ptr()


def test_tensors_that_find_no_place_stay_as_they_are() -> None:
    room, whole = Room(1), torch.rand(4, 4)
    assert room.take(whole[:2]).data_ptr() == whole.data_ptr()  # a part of another
    assert room.take(whole).data_ptr() != whole.data_ptr()
    assert room.take(whole) is whole  # there is no more
    assert Room(1).take(expanded := torch.rand(4, 1).expand(4, 4)) is expanded

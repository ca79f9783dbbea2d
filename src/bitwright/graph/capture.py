"""From any ``nn.Module`` to a graph of ATen operators that computes the same, with a free batch size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from bitwright.collector import imports_stay
from bitwright.errors import ModelError, cause, lacks_memory
from bitwright.given import several
from bitwright.given.arguments import of_kind
from bitwright.given.several import InputPart
from bitwright.graph import aliases, canonical, constants, explain, ops, rewrite
from bitwright.graph.devices import device_of
from bitwright.graph.free_sizes import free_sizes
from bitwright.graph.layer import Unfolded
from bitwright.graph.names import legible
from bitwright.graph.outputs import arrange, names, tensors
from bitwright.graph.plain import in_float32, unwrapped
from bitwright.graph.products import run_graph
from bitwright.graph.program import flat_graph, input_shapes, join_inputs
from bitwright.graph.quiet import quiet
from bitwright.graph.watch import watch

TOLERANCE = 1e-5
COARSE_TOLERANCE = 0.05
"""Tolerance of a network that computes in float16 or bfloat16 itself, which has three digits."""

WHOLE = "bitwright.onnx_in.network."
"""Modules of which each is one operator to its user: what is left of one takes its path, whatever it is made of."""

APART = 1e-3
"""Share of an output's range by which an image may come out otherwise when it is alone: kernels add in other orders."""


@dataclass
class Captured:
    """A float network as a graph.

    Invariants: ``graph(images)`` returns a flat list of tensors; every parameter is a ``get_attr`` node whose
    target is the path the user knows it by; a parameter shared by several modules is one target; every
    operator's ``meta["layer"]`` names it by module path.
    """

    graph: fx.GraphModule
    example: Tensor
    """Two images, [2, C, H, W]."""
    outputs: tuple[str, ...]
    """A name for each tensor that the graph returns."""
    structure: pytree.TreeSpec
    """How the user's model arranged them."""
    unfolded: list[Unfolded] = field(default_factory=list)
    """Batch norms that could not be folded, with the reason."""

    def flat(self, images: Tensor) -> list[Tensor]:
        """Outputs in the order of ``outputs``, for images [B, C, H, W] on the graph's device."""
        return run_graph(self.graph, images)


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example: Tensor,
    parts: Sequence[InputPart] = (),
    output: str | None = None,
) -> Captured:
    """Captures the model in evaluation mode and checks that the graph computes what the model computes.

    Args:
        model: any module of one image tensor, or a saved export program with a dynamic batch. Not changed.
        example: a few real images, [N >= 1, C, H, W].
        parts: inputs of a saved program of several, which the images hold side by side.
        output: name of the one to keep, where there are several; nothing is asked of the others.

    Raises:
        ModelError: the model cannot run on the images, cannot be captured, or the graph disagrees with it.
    """
    of_kind("model", model, (nn.Module, torch.export.ExportedProgram), "a module or a saved program")
    of_kind("example", example, Tensor, "images in a tensor")
    images = torch.cat([example, example])[:2] if len(example) < 2 else example[:2]
    images = images.contiguous().float() if images.is_floating_point() else images.contiguous()
    if isinstance(model, torch.export.ExportedProgram):
        _check_program(model, parts)
        program, reference = model, _run_program(model, images, parts)
    else:
        with imports_stay():
            from torch import _dynamo  # noqa: F401 - reasons of errors come from it; no start-up waits for it

        model = unwrapped(model)
        with _evaluation_mode(model), in_float32(model), _without_autocast():
            returned = _run(model, images)
            reference = _arranged(model, returned)
            program = _tensors_alone(_export(model, images, returned))
            _check_values_of_constants(program)
            _check_constants(program, model, images)
    if _writes(program):
        if not aliases.are_seen_elsewhere(program.graph):
            with suppress(ModelError):  # in-place activations, as most networks have them
                return _checked(program, images, reference, parts, output)
        program = _without_writes(program)  # writes into parts of tensors
    return _checked(program, images, reference, parts, output, copies=not getattr(model, "never_changes", False))


def _tensors_alone(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program in operators of PyTorch, without the steps of ``torch.vmap`` and the like."""
    known = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
    others = [n.target for n in program.graph.nodes if n.op == "call_function" and not isinstance(n.target, known)]
    functorch = any(str(getattr(t, "__module__", "")).startswith("torch._functorch") for t in others)
    return _without_writes(program) if functorch else program


def _checked(
    program: torch.export.ExportedProgram,
    images: Tensor,
    reference: Any,
    parts: Sequence[InputPart],
    output: str | None,
    *,
    copies: bool = True,
) -> Captured:
    graph, coarse = _to_graph(program, parts, copies=copies)
    captured = Captured(graph, images, names(reference), pytree.tree_structure(reference))
    expected = dict(zip(captured.outputs, tensors(reference), strict=True))
    captured = captured if output is None else _with_one_output(captured, output)
    _check_single_input(graph)
    _check_norms(graph.graph)
    _check_values(graph.graph)
    _check_batch_axis(captured)
    _check_equal(captured, [expected[name] for name in captured.outputs], COARSE_TOLERANCE if coarse else TOLERANCE)
    if coarse:
        kinds = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in coarse))
        warnings.warn(f"The model computes a part in {kinds}. In float32 it is quantized.", stacklevel=2)
    return captured


def _check_values_of_constants(program: torch.export.ExportedProgram) -> None:
    """Each must have some: what is read past a parameter has none while the network is captured."""
    from torch._subclasses import FakeTensor

    fake = [name for name, value in program.constants.items() if isinstance(value, FakeTensor)]
    stored = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        if node.op == "placeholder" and stored.get(node.name) in fake:
            line = next(filter(None, map(explain.recorded_line, node.users)), "")
            raise ModelError(
                f"The model cannot be captured: the values of a parameter are read past it{line}, as by .data. Use "
                ".detach() there."
            )


def _check_constants(program: torch.export.ExportedProgram, model: nn.Module, images: Tensor) -> None:
    """What is returned without having looked at the images must not have as many rows as there were."""
    _, graph = flat_graph(program, copies=False)
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not seen.isdisjoint(node.all_input_nodes):
            seen.add(node)
    returned: Any = graph.output_node().args[0]
    rows = {i: ops.shape(n) for i, n in enumerate(returned) if n not in seen and ops.shape(n)[:1] == (len(images),)}
    one = tensors(_arranged(model, _run(model, images[:1]))) if rows else []
    if any(one[i].shape != shape for i, shape in rows.items()):
        raise ModelError(
            "The model returns a constant with as many rows as there were images, which is a plain number while it "
            "runs. Use x.shape[0] as it is, not int(x.shape[0])."
        )


def _writes(program: torch.export.ExportedProgram) -> bool:
    return any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in program.graph.nodes)


def _without_writes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in operators that return their result; PyTorch follows the views that were written through."""
    with quiet(printing=True):
        functional: torch.export.ExportedProgram = program.run_decompositions({})
    return functional


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode again after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _without_autocast() -> Iterator[None]:
    """``torch.autocast`` changes nothing inside, whether it is switched on or off."""
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__
    kind.__enter__, kind.__exit__ = lambda self: self, lambda self, *error: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]


def _run(model: nn.Module, images: Tensor) -> Any:
    try:
        with torch.no_grad(), quiet():
            return model(images.clone())
    except (Exception, SystemExit) as error:
        raise explain.cannot_run(error, images) from cause(error)


def _arranged(model: nn.Module, returned: Any) -> Any:
    if explain.detects(returned):
        raise ModelError(f"Expected the same tensors for any image, found boxes. {explain.without_boxes(model)}.")
    return arrange(returned)


def _run_program(program: torch.export.ExportedProgram, images: Tensor, parts: Sequence[InputPart]) -> Any:
    """What the saved program returns, arranged as its user's model did."""
    graph, given = fx.GraphModule(*flat_graph(program)).eval(), [images.clone()]
    if parts:
        by_name = {part.name: part.of(images).clone() for part in parts}
        given = [by_name[name] for name in program.graph_signature.user_inputs]
    try:
        with torch.no_grad(), quiet():
            found = iter(graph(*given))
    except Exception as error:
        raise explain.cannot_run(error, images) from cause(error)
    specs = program.graph_signature.output_specs
    leaves = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else next(found)
        for spec in specs
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    return arrange(pytree.tree_unflatten(leaves, program.call_spec.out_spec))


def _export(model: nn.Module, images: Tensor, returned: Any) -> torch.export.ExportedProgram:
    """Non-strict capture, which runs the model's own Python; the strict one where that fails."""
    first: Exception | None = None
    flat = model.register_forward_hook(lambda module, inputs, output: tuple(tensors(arrange(output))))
    try:
        for strict in (False, True):
            for batch in (torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO):
                try:
                    program = _export_with(model, images.clone(), batch, strict)
                except ModelError:
                    raise
                except Exception as error:
                    first = first or error
                    continue
                if _batch_is_dynamic(program):
                    return program
    finally:
        flat.remove()
    raise explain.cannot_capture(first, model, returned) from (None if first is None else cause(first))


def _export_with(model: nn.Module, images: Tensor, batch: Any, strict: bool) -> torch.export.ExportedProgram:
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    shapes[images] = {0: batch}
    sizes = nullcontext() if strict else free_sizes()
    with quiet(printing=True), sizes:
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=strict)


def _batch_is_dynamic(program: torch.export.ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor):
            return isinstance(node.meta["val"].shape[0], torch.SymInt)
    return False


def _check_program(program: torch.export.ExportedProgram, parts: Sequence[InputPart]) -> None:
    inputs = list(map(str, program.graph_signature.user_inputs))
    if len(inputs) != max(1, len(parts)):
        raise explain.several_inputs(inputs)
    if parts and {part.name for part in parts} != set(inputs):
        raise several.other_names(inputs, [part.name for part in parts])
    if len({str(shape[:1]) for shape in input_shapes(program).values()}) > 1:
        raise ModelError(
            f"Expected inputs of one number of images, found several in {', '.join(inputs)}. Export it with one "
            "torch.export.Dim for all."
        )
    if not _batch_is_dynamic(program):
        raise ModelError(
            "The saved program has a fixed batch size. Export it with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)."
        )


def _to_graph(
    program: torch.export.ExportedProgram, parts: Sequence[InputPart], *, copies: bool
) -> tuple[fx.GraphModule, set[torch.dtype]]:
    """The program as a graph module with parameters of its own, or the program's, and a flat list as output.

    Returns:
        The module, in float32, and the coarser types that parts of the program are in.
    """
    root, graph = flat_graph(program, copies=copies)
    join_inputs(graph, parts)
    coarse = canonical.compute_in_float32(root, graph)
    canonical.fill_empties(graph)
    canonical.spell_shapes(graph)
    canonical.restore_batch_norms(graph)
    canonical.remove_dropout(graph)
    constants.fold_constants(root, graph)
    constants.spell_picks(root, graph)
    canonical.spell_einsums(graph)
    canonical.functionalize(graph)
    rewrite.prune(graph)
    _name_layers(graph)
    return fx.GraphModule(root, graph).eval(), coarse


def _name_layers(graph: fx.Graph) -> None:
    """Gives every operator the name its user would look for.

    An operator that is all of a standard layer takes the layer's path; others take the path of the innermost
    module and the operator's name; repeated names are numbered, past the names that others have.
    """
    _mark_parts(graph)
    found = {n: legible(_layer_name(n)) for n in graph.nodes if n.op == "call_function" and ops.is_float_tensor(n)}
    own, counts, taken = set(found.values()), {"input": 0}, {"input"}
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["layer"] = "input"
        if node not in found:
            continue
        name = base = found[node]
        if base in counts:
            while name in taken or name in own:
                counts[base] += 1
                name = f"{base}_{counts[base]}"
        counts.setdefault(base, 0)
        taken.add(name)
        node.meta["layer"] = name


def _mark_parts(graph: fx.Graph) -> None:
    """Every input of a network of several is a source of values, where the tensor that holds all of them ends."""
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if not stack or str(stack[-1][1]) != ops.PART_MODULE or node.op != "call_function":
            continue
        if not any(_innermost(user) == stack[-1][0] for user in node.users):
            node.meta[ops.PART] = str(stack[-1][0]).removeprefix("input_")


def _layer_name(node: fx.Node) -> str:
    if ops.PART in node.meta:
        return str(node.meta[ops.PART])
    operator = ops.base_name(node).rstrip("_")
    stack = [entry for entry in (node.meta.get("nn_module_stack") or {}).values() if entry[0]]
    if ops.kind(node) == "linear":
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if stack and _kind(stack[-1]).startswith(("torch.nn.modules.conv", "torch.nn.modules.linear", WHOLE)):
            return str(stack[-1][0])
        return constants.known_as(str(weight.target)).removesuffix(".weight")
    if not stack:
        return operator
    path, kind = stack[-1][0], _kind(stack[-1])
    if kind.startswith(WHOLE):
        inside = any(_innermost(user) == path for user in node.users)
        return f"{path}.{operator}" if inside else path
    standard = kind.startswith("torch.nn.modules") and "container" not in kind
    return path if standard and ops.kind(node) != "move" else f"{path}.{operator}"


def _kind(entry: tuple[str, Any]) -> str:
    """The class of a module by its full name; that which ``torch.nn.utils.parametrize`` derived a class from."""
    kind = str(entry[1])
    derived = kind.removeprefix("torch.nn.utils.parametrize.Parametrized")
    return getattr(nn, derived).__module__ if derived != kind and hasattr(nn, derived) else kind


def _innermost(node: fx.Node) -> str:
    stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    return str(stack[-1]) if stack else ""


def _check_single_input(graph: fx.GraphModule) -> None:
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise explain.several_inputs([n.name for n in inputs])


def _check_norms(graph: fx.Graph) -> None:
    for node in canonical.norms_of_a_batch(graph):
        raise ModelError(
            f"Expected stored statistics in the batch norm '{legible(_layer_name(node))}', found those of the batch: "
            "the answer depends on the other images. Train it with track_running_stats=True and call eval()."
        )


def _check_values(graph: fx.Graph) -> None:
    """No number and no shape may be computed from the values of the images."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and _reads_values(node, set(node.target.tags)):
            tail = "Keep all rows, and mark those that count with torch.where."
            if ops.base_name(node) == "nms":
                tail = "Let forward end before its box decoding, and give what makes boxes of its outputs as decode=."
            raise ModelError(
                f"The model cannot be captured: a number or a shape that depends on the values of a tensor"
                f"{explain.recorded_line(node)}. {tail}"
            )


FINDING = frozenset({"where", "argwhere", "nonzero_numpy"})
"""Operators without a tag that list the places of what is not zero, ``where`` if it is given nothing else."""


def _reads_values(node: fx.Node, tags: set[torch.Tag]) -> bool:
    if ops.base_name(node) == "index":
        picks = [ops.value(n) for n in node.all_input_nodes[1:]]
        return any(isinstance(v, Tensor) and v.dtype in {torch.bool, torch.uint8} for v in picks)
    tagged = tags & {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    foreign = getattr(node.target, "namespace", "aten") != "aten"  # torchvision's nms has no tag
    if not (tagged or foreign or ops.base_name(node) in FINDING) or not node.users:
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # sympy takes a second to import

    val = ops.value(node)
    if val is None:
        return bool(tagged)
    return bool(free_unbacked_symbols(val))  # F.one_hot with its number of classes has a fixed shape


def _check_batch_axis(captured: Captured) -> None:
    """The images must be along the first axis of every output; blames the first operator that fixes that axis."""
    (end,) = (n for n in captured.graph.graph.nodes if n.op == "output")
    for node in end.all_input_nodes:
        blamed, source = None, node
        while source.op == "call_function" and not _has_batch(source):
            inputs = [n for n in source.all_input_nodes if isinstance(ops.value(n), (Tensor, list, tuple))]
            if not inputs:
                break
            blamed, source = source, inputs[0]
        if blamed is None or source.op == "get_attr":
            continue
        _blame_batch(captured, blamed)


def _has_batch(node: fx.Node) -> bool:
    val = ops.value(node)
    return not isinstance(val, Tensor) or (val.dim() > 0 and isinstance(val.shape[0], torch.SymInt))


def _check_equal(captured: Captured, expected: list[Tensor], tolerance: float) -> None:
    """The graph must compute what the model computed on the same images."""
    with torch.no_grad():
        found = captured.graph(captured.example)
    if not all(bool(torch.isfinite(o).all()) for o in found):
        raise ModelError(
            f"The output of {_first_not_finite(captured)} is not finite on the first images. "
            "Check the preprocessing (mean, std) and the weights before it."
        )
    assert_outputs_equal(expected, found, captured.outputs, "the captured graph", tolerance)
    _check_apart(captured, found, max(tolerance, APART))


def _check_apart(captured: Captured, of_both: list[Tensor], tolerance: float) -> None:
    """The answer to an image must not depend on the others of its batch."""
    alone = _answers_alone(captured)
    if not any(_differs(a, b, tolerance) for a, b in zip(of_both, alone, strict=True)):
        return
    rows: dict[str, Tensor] = {}
    mixing: list[fx.Node] = []

    def keep(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor):
            rows[node.name] = value

    def compare(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor) and node.name in rows and _differs(rows[node.name], value, tolerance):
            mixing.append(node)

    names = [n.name for n in captured.graph.graph.nodes if n.op == "call_function"]
    watch(captured.graph, captured.example, dict.fromkeys(names, keep))
    watch(captured.graph, captured.example[:1], dict.fromkeys(names, compare))
    where = explain.recorded_line(mixing[0]) if mixing else ""
    raise ModelError(
        f"The answer to an image depends on the other images of its batch{where}. Take means and products over an "
        "image's own axes, not over the first."
    )


def _answers_alone(captured: Captured) -> list[Tensor]:
    """What the graph gives for the first image without the second."""
    done: set[str] = set()
    steps = [n for n in captured.graph.graph.nodes if n.op == "call_function"]
    try:
        with torch.no_grad():
            return list(captured.graph.forward(captured.example[:1]))  # called itself, it would print a traceback
    except (IndexError, RuntimeError) as error:
        if lacks_memory(error):
            raise
        with suppress(IndexError, RuntimeError):
            watch(captured.graph, captured.example[:1], {n.name: lambda node, _: done.add(node.name) for n in steps})
    _blame_batch(captured, next((n for n in steps if n.name not in done), None))


def _blame_batch(captured: Captured, node: fx.Node | None) -> NoReturn:
    returned: Any = captured.graph.graph.output_node().args[0]
    whole = [name for name, each in zip(captured.outputs, returned, strict=True) if _has_batch(each)]
    several = f", or keep one output by its name, such as output='{whole[0]}'" if len(returned) > 1 and whole else ""
    raise ModelError(
        f"The model mixes the images of a batch, or fixes its size{explain.recorded_line(node) if node else ''}. "
        f"Reshape with x.shape[0] or -1, and keep the images along the first axis{several}."
    )


def _differs(of_both: Tensor, alone: Tensor, tolerance: float) -> bool:
    """Whether the first of two images gives something else when it is alone."""
    if not of_both.is_floating_point() or (*of_both.shape[:1], *alone.shape[:1]) != (2, 1):
        return False
    return not relative_difference(of_both[:1], alone) <= tolerance


def _first_not_finite(captured: Captured) -> str:
    """The layer where values stop being finite; masks inside attention may hold infinities."""
    nan: list[str] = []
    infinite: list[str] = []

    def look(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            kind = nan if bool(torch.isnan(value).any()) else infinite
            kind.append(str(node.meta.get("layer", node.name)))

    names = [n.name for n in captured.graph.graph.nodes if n.op == "call_function"]
    watch(captured.graph, captured.example, dict.fromkeys(names, look))
    if nan or infinite:
        return (nan or infinite)[0]
    return "the model"


def assert_outputs_equal(
    expected: list[Tensor],
    found: list[Tensor],
    names: tuple[str, ...],
    what: str,
    tolerance: float = TOLERANCE,
) -> None:
    """Raises unless all outputs agree to the tolerance, relative to their range.

    Raises:
        ModelError: naming the output, the difference and what was compared.
    """
    for name, a, b in zip(names, expected, found, strict=True):
        if not bool(torch.isfinite(a).all()):
            raise ModelError(f"The model returns values that are not finite in '{name}'. Check its weights and input.")
        difference = relative_difference(a, b)
        if difference > tolerance:
            raise ModelError(
                f"Output '{name}' of {what} differs from the model by {difference:.2g} of its range. "
                "The model may be random, keep state, or write into part of a tensor: make its forward a pure function."
            )


def with_graph(captured: Captured, graph: fx.GraphModule, what: str) -> Captured:
    """The same network with a changed graph, which is made ready to run.

    Raises:
        ModelError: it does not compute the same on the example.
    """
    graph.graph.lint()
    graph.recompile()
    example = captured.example.to(device_of(graph))
    with torch.no_grad():
        expected, found = captured.graph(example), graph(example)
    assert_outputs_equal(expected, found, captured.outputs, what, TOLERANCE)
    return replace(captured, graph=graph)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest magnitude of ``a``."""
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max()) / max(float(a.abs().max()), 1e-6)


def _with_one_output(captured: Captured, name: str) -> Captured:
    """Keeps one output of a model that returns several.

    Raises:
        ModelError: there is no output of that name; lists those that exist.
    """
    if name not in captured.outputs:
        raise ModelError(f"Expected an output out of {', '.join(captured.outputs)}, found '{name}'.")
    (end,) = (n for n in captured.graph.graph.nodes if n.op == "output")
    end.args = ([end.args[0][captured.outputs.index(name)]],)
    rewrite.prune(captured.graph.graph)
    captured.graph.recompile()
    return replace(captured, outputs=(name,), structure=pytree.tree_structure(0))

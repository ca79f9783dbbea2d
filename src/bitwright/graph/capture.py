"""From any ``nn.Module`` to a graph of ATen operators that computes the same, with a free batch size."""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bitwright.errors import ModelError
from bitwright.graph import ops, rewrite
from bitwright.graph.fold import Unfolded
from bitwright.graph.watch import watch

TOLERANCE = 1e-5


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


def capture(model: nn.Module | torch.export.ExportedProgram, example: Tensor) -> Captured:
    """Captures the model in evaluation mode and checks that the graph computes what the model computes.

    Args:
        model: any module of one image tensor, or a saved export program with a dynamic batch. Not changed.
        example: a few real images, [N >= 1, C, H, W].

    Raises:
        ModelError: the model cannot run on the images, cannot be captured, or the graph disagrees with it.
    """
    images = torch.cat([example, example])[:2].contiguous() if len(example) < 2 else example[:2].contiguous()
    if isinstance(model, torch.export.ExportedProgram):
        _check_program(model)
        program, reference = model, _run(model.module(), images)
    else:
        with _evaluation_mode(model):
            reference = _run(model, images)
            program = _export(model, images)
    if not _writes(program):
        return _checked(program, images, reference)
    try:  # in-place activations, as most networks have them
        return _checked(program, images, reference)
    except ModelError:  # writes into parts of tensors
        return _checked(_without_writes(program), images, reference)


def _checked(program: torch.export.ExportedProgram, images: Tensor, reference: object) -> Captured:
    graph = _to_graph(program, images)
    leaves, structure = pytree.tree_flatten(reference)
    captured = Captured(graph, images, _output_names(reference), structure)
    _check_single_input(graph)
    _check_batch_axis(graph.graph)
    _check_equal(captured, leaves)
    return captured


def _writes(program: torch.export.ExportedProgram) -> bool:
    return any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in program.graph.nodes)


def _without_writes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in operators that return their result; PyTorch follows the views that were written through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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


def _run(model: nn.Module, images: Tensor) -> object:
    try:
        with torch.no_grad():
            return model(images)
    except Exception as error:
        if isinstance(error, TypeError) and "positional argument" in str(error):
            raise ModelError(f"Expected a model of one image tensor ({_first_line(error)}). Wrap it.") from error
        shape = "x".join(str(d) for d in images.shape[1:])
        raise ModelError(
            f"The model cannot run on images of {shape} ({_first_line(error)}){_where(error)}. "
            "Give the size it was trained with, for instance --input-size 224."
        ) from error


def _export(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Non-strict capture, which runs the model's own Python; the strict one where that fails."""
    first: Exception | None = None
    for strict in (False, True):
        for batch in (torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=strict)
                if _batch_is_dynamic(program):
                    return program
            except Exception as error:
                first = first or error
    raise ModelError(_explain(first)) from first


def _batch_is_dynamic(program: torch.export.ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor):
            return isinstance(node.meta["val"].shape[0], torch.SymInt)
    return False


def _check_program(program: torch.export.ExportedProgram) -> None:
    inputs = program.graph_signature.user_inputs
    if len(inputs) != 1:
        raise ModelError(_several_inputs(list(map(str, inputs))))
    if not _batch_is_dynamic(program):
        raise ModelError(
            "The saved program has a fixed batch size. Export it with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)."
        )


def _explain(error: Exception | None) -> str:
    """One line: the user's source line, the construct, one remedy."""
    if error is None:
        return (
            "The model fixes its batch size while it runs (a shape taken as a plain number). "
            "Use x.shape[0] or -1 where it reshapes."
        )
    text = str(error)
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        construct, remedy = (
            "a decision that depends on the values of a tensor",
            "Use torch.where or torch.cond",
        )
    elif "specializ" in text.lower() or "constraints violated" in text.lower() or "dynamic" in text.lower():
        construct, remedy = "a batch size that is fixed while the model runs", "Reshape with x.shape[0] or -1"
    else:
        construct, remedy = _first_line(error), "Rewrite the line with tensor operators of PyTorch"
    return f"The model cannot be captured: {construct}{_where(error)}. {remedy}, or give a saved .pt2 program."


def _where(error: BaseException) -> str:
    """The innermost source line of the user's own code, as `` at file:line: code``."""
    own = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    cause = error.__cause__ or error.__context__
    if cause is not None:
        frames = traceback.StackSummary.from_list([*frames, *traceback.extract_tb(cause.__traceback__)])
    torch_home = str(Path(torch.__file__).parent)
    users = [f for f in frames if not f.filename.startswith((own, torch_home, "<"))]
    users = [f for f in users if f.name == "forward"] or users
    if not users or users[-1].filename.endswith(("__main__.py", "/bitwright")):
        return ""
    frame = users[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f" at {frame.filename}:{frame.lineno}: {line}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _to_graph(program: torch.export.ExportedProgram, images: Tensor) -> fx.GraphModule:
    """The program as a graph module with its own copies of the parameters and a flat list as output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = program.module(check_guards=False)
    graph, root = fx.Graph(), nn.Module()
    returned = graph.graph_copy(module.graph, {})
    _share_parameters(module, graph, root)
    graph.output(pytree.tree_leaves(returned))
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        graph.erase_node(node)  # checks of the input's shape
    rewrite.spell_shapes(graph)
    rewrite.restore_batch_norms(graph)
    rewrite.remove_dropout(graph)
    rewrite.fold_constants(root, graph)
    rewrite.functionalize(graph)
    rewrite.prune(graph)
    _name_layers(graph)
    return fx.GraphModule(root, graph).eval()


def _share_parameters(module: nn.Module, graph: fx.Graph, root: nn.Module) -> None:
    """Copies what the graph reads into ``root``; one target for each distinct tensor."""
    targets: dict[int, str] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = rewrite.get_tensor(module, str(node.target))
        if id(tensor) not in targets:
            targets[id(tensor)] = str(node.target)
            rewrite.set_tensor(root, str(node.target), tensor.detach().clone())
        node.target = targets[id(tensor)]
        node.meta.setdefault("val", tensor.detach())


def _name_layers(graph: fx.Graph) -> None:
    """Gives every operator the name its user would look for.

    An operator that is all of a standard layer takes the layer's path; others take the path of the innermost
    module and the operator's name; repeated names are numbered, past the names that others have.
    """
    found = {n: _layer_name(n) for n in graph.nodes if n.op == "call_function" and ops.is_float_tensor(n)}
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


def _layer_name(node: fx.Node) -> str:
    operator = ops.base_name(node).rstrip("_")
    stack = [entry for entry in (node.meta.get("nn_module_stack") or {}).values() if entry[0]]
    if ops.kind(node) == "linear":
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if stack and str(stack[-1][1]).startswith(("torch.nn.modules.conv", "torch.nn.modules.linear")):
            return str(stack[-1][0])
        return str(weight.target).removesuffix(".weight")
    if not stack:
        return operator
    path, kind = stack[-1][0], str(stack[-1][1])
    standard = kind.startswith("torch.nn.modules") and "container" not in kind
    return path if standard and ops.kind(node) != "move" else f"{path}.{operator}"


def _check_single_input(graph: fx.GraphModule) -> None:
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise ModelError(_several_inputs([n.name for n in inputs]))


def _several_inputs(names: list[str]) -> str:
    return f"Expected a model of one image tensor, found {len(names)} inputs ({', '.join(names)}). Wrap it."


def _check_batch_axis(graph: fx.Graph) -> None:
    """The images must be along the first axis of every output; blames the first operator that fixes that axis."""
    (end,) = (n for n in graph.nodes if n.op == "output")
    for node in end.all_input_nodes:
        blamed, source = None, node
        while source.op == "call_function" and not _has_batch(source):
            inputs = [n for n in source.all_input_nodes if isinstance(ops.value(n), Tensor)]
            if not inputs:
                break
            blamed, source = source, inputs[0]
        if blamed is None or source.op == "get_attr":
            continue
        raise ModelError(
            f"The model mixes the images of a batch, or fixes its size{_recorded_line(blamed)}. "
            "Reshape with x.shape[0] or -1, and keep the images along the first axis."
        )


def _has_batch(node: fx.Node) -> bool:
    val = ops.value(node)
    return not isinstance(val, Tensor) or (val.dim() > 0 and isinstance(val.shape[0], torch.SymInt))


def _recorded_line(node: fx.Node) -> str:
    """The source line that made the operator, as `` at file:line: code``."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not places:
        return ""
    file, line = lines[places[-1]].removeprefix('File "').split('", line ')
    return f" at {file}:{line.split(',')[0]}: {' '.join(lines[places[-1] + 1 : places[-1] + 2])}"


def _output_names(output: object) -> tuple[str, ...]:
    """Names of the leaves: keys of a dict, fields, or positions."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    if len(leaves) == 1 and not leaves[0][0] and isinstance(leaves[0][1], Tensor):
        return ("output",)
    names = []
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ModelError(f"Expected tensors in the model's output, found {type(leaf).__name__}. Wrap the model.")
        names.append("_".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path))
    return tuple(f"output_{n}" if n.isdigit() else n for n in names)


def _check_equal(captured: Captured, expected: list[Tensor]) -> None:
    """The graph must compute what the model computed on the same images."""
    with torch.no_grad():
        found = captured.graph(captured.example)
    if not all(bool(torch.isfinite(o).all()) for o in found):
        raise ModelError(
            f"The output of {_first_not_finite(captured)} is not finite on the first images. "
            "Check the preprocessing (mean, std) and the weights before it."
        )
    assert_outputs_equal(expected, found, captured.outputs, "the captured graph")


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


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest magnitude of ``a``."""
    if not a.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max()) / max(float(a.double().abs().max()), 1e-6)


def select_output(captured: Captured, name: str) -> Captured:
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

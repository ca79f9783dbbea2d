"""The student with variables in place of its quantizers: what a reconstruction optimises."""

from __future__ import annotations

import contextlib
from collections.abc import Container
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from bitwright.graph import ops, rewrite
from bitwright.graph.points import Point, expose
from bitwright.graph.student import Student
from bitwright.quant.learned import LearnedActivation, LearnedBias, LearnedWeight, RoundedBias, Rounding, one_pass
from bitwright.quant.quantizer import BiasQuantizer, Quantizer
from bitwright.runtimes.target import FINE
from bitwright.stages.depthwise import speed_up_depthwise


@dataclass(frozen=True)
class Variables:
    """Which of them are learned, and how weights are parametrised."""

    rounding: Rounding = "soft"
    codes: bool = True
    weight_steps: bool = True
    biases: bool = True
    activation_steps: bool = True


class Learner(nn.Module):
    """A copy of the student's graph, or of a part, that returns its outputs and the values at the points.

    It shares the student's tensors; the student is unchanged until :meth:`absorb`.

    Args:
        student: calibrated.
        points: what is compared.
        variables: what is learned.
        part: of the student's graph, which returns ``([], values at the points)``; the whole if not given.
        layers: outputs of its linear operators; the points if not given.
        fixed: keys of quantizers that stay as they are.

    Attributes:
        weights: by the path of the stored tensor.
        biases: by the path of the stored tensor.
        activations: by the key of the quantizer.
    """

    def __init__(
        self,
        student: Student,
        points: list[Point],
        variables: Variables,
        part: fx.GraphModule | None = None,
        layers: list[Point] | None = None,
        fixed: Container[str] = (),
    ) -> None:
        super().__init__()
        self.points, self.layers, self._fixed = points, points if layers is None else layers, fixed
        self.graph = expose(student.graph, [p.node for p in points]) if part is None else part
        self.weights: dict[str, LearnedWeight] = {}
        self.biases: dict[str, LearnedBias] = {}
        self.activations: dict[str, LearnedActivation] = {}
        self._keys: dict[str, str] = {}
        self._coarse: dict[str, tuple[str, BiasQuantizer]] = {}
        for node in list(self.graph.graph.nodes):
            if node.op == "call_module":
                self._replace(node, variables)
        self._round_biases()
        self._find_biases(variables)
        speed_up_depthwise(self.graph.graph)
        self._holding = [m for m in self.graph.modules() if isinstance(m, LearnedWeight | RoundedBias)]
        self.graph.graph.lint()
        self.graph.recompile()

    def _replace(self, node: fx.Node, variables: Variables) -> None:
        key = str(node.target)
        quantizer = self.graph.get_submodule(key)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if isinstance(quantizer, BiasQuantizer):
            self._learn_bias(node, str(source.target), quantizer, variables)
        elif not isinstance(quantizer, Quantizer) or not quantizer.calibrated:
            return
        elif quantizer.role == "weight":
            stored = str(source.target)
            if key in self._fixed or any(user.op != "call_module" for user in source.users):
                return  # another operator reads it in float, so that it must stay as it is
            if stored not in self.weights:
                tensor = rewrite.get_tensor(self.graph, stored)
                self.weights[stored] = LearnedWeight(tensor, quantizer, variables.rounding)
                self.weights[stored].codes.requires_grad_(variables.codes)
                self.weights[stored].step.requires_grad_(variables.weight_steps)
                self._keys[stored] = key
            setattr(self.graph, key, self.weights[stored])
        elif quantizer.role == "activation":
            learn = variables.activation_steps and key not in self._fixed
            self.activations[key] = LearnedActivation(quantizer, learn=learn)
            setattr(self.graph, key, self.activations[key])

    def _learn_bias(self, node: fx.Node, stored: str, quantizer: BiasQuantizer, variables: Variables) -> None:
        if stored not in self.biases:
            self.biases[stored] = LearnedBias(rewrite.get_tensor(self.graph, stored), learn=variables.biases)
        if quantizer.calibrated and quantizer.bits < FINE:
            self._coarse[str(node.target)] = (stored, quantizer)
        setattr(self.graph, str(node.target), self.biases[stored])

    def _round_biases(self) -> None:
        """Biases whose step is coarse are learned on it, from the steps of input and weight as they are."""
        inputs = {m.name: m for m in self.activations.values()}
        weights = {m.name: m for m in self.weights.values()}
        for place, (stored, bias) in self._coarse.items():
            given, weight = inputs.get(bias.source.name, bias.source), weights.get(bias.weight.name, bias.weight)
            step = partial(_bias_step, given, weight, bias.weight.shift)
            setattr(self.graph, place, RoundedBias(self.biases[stored], step))

    def _find_biases(self, variables: Variables) -> None:
        """Biases that stay float are variables as well."""
        for node in list(self.graph.graph.nodes):
            if node.op != "call_function" or ops.base_name(node) not in ops.LINEAR:
                continue
            bias = node.args[2] if len(node.args) > 2 else None
            if not isinstance(bias, fx.Node) or bias.op != "get_attr":
                continue
            stored = str(bias.target)
            if stored not in self.biases:
                self.biases[stored] = LearnedBias(rewrite.get_tensor(self.graph, stored), learn=variables.biases)
            key = f"learned_bias_{stored.replace('.', '/')}"
            if not hasattr(self.graph, key):
                self.graph.add_module(key, self.biases[stored])
            with self.graph.graph.inserting_before(node):
                call = self.graph.graph.call_module(key, (bias,))
            node.args = (*node.args[:2], call, *node.args[3:])

    def forward(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and values at the points, [B, ...] each.

        Args:
            inputs: images [B, C, H, W], or the tensors that the part reads.
        """
        compiled = torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiled else one_pass(self._holding, self.activations.values()):
            outputs, values = self.graph(*inputs)
        return list(outputs), list(values)

    def set_mix(self, mix: float | Tensor, drop: float | Tensor = 0.0) -> None:
        """How far activations are on their grids.

        Args:
            mix: the share of float in every activation, 0 to 1.
            drop: the share of its elements that stay float.
        """
        for activation in self.activations.values():
            activation.mix, activation.drop = mix, drop

    def set_share(self, share: float) -> None:
        """What part of a batch's samples the next pass has, above 0 and up to 1."""
        for activation in self.activations.values():
            activation.share = share

    def of_point(self) -> list[LearnedWeight | None]:
        """The weight of each linear operator; None where it is float."""
        by_name = {n.name: n for n in self.graph.graph.nodes}
        found = []
        for point in self.layers:
            weight = by_name[point.node].args[1]
            assert isinstance(weight, fx.Node)
            stored = str(weight.args[0].target) if weight.op == "call_module" and weight.args else ""  # type: ignore[union-attr]
            found.append(self.weights.get(stored))
        return found

    def measure_outputs(self, values: list[Tensor]) -> None:
        """Tells every bias how large the output is that it is added to.

        Args:
            values: the float network's, [B, ...] of each layer.
        """
        by_name = {n.name: n for n in self.graph.graph.nodes}
        for point, value in zip(self.layers, values, strict=True):
            call = by_name[point.node].args[2]
            if isinstance(call, fx.Node) and call.op == "call_module":
                bias = self.graph.get_submodule(str(call.target))
                bias = bias.learned if isinstance(bias, RoundedBias) else bias
                if isinstance(bias, LearnedBias):
                    bias.size = float(value.float().std())

    def share_decided(self) -> float:
        """Share of all roundings that are up or down."""
        total = sum(w.codes.numel() for w in self.weights.values())
        return sum(w.decided() for w in self.weights.values()) / max(total, 1)

    def not_finite(self) -> str | None:
        """The layer (of a bias, the stored tensor) of a variable that is not finite; None where all are."""
        named = [(w.name, w) for w in self.weights.values()] + [(a.name, a) for a in self.activations.values()]
        each = [(name, p) for name, module in [*named, *self.biases.items()] for p in module.parameters()]
        finite = torch.stack([torch.isfinite(p).all() for _, p in each]).tolist() if each else []  # one wait for a GPU
        return next((name for (name, _), fine in zip(each, finite, strict=True) if not fine), None)

    def absorb(self, student: Student) -> None:
        """Writes integers times steps, biases and steps into the student."""
        for stored, weight in self.weights.items():
            student.quantizer(self._keys[stored]).set_range(weight.scale())
            hard = weight.hard()
            if hard.dim() == 4:
                hard = hard.contiguous(memory_format=torch.channels_last)
            rewrite.set_tensor(student.graph, stored, hard)
        for stored, bias in self.biases.items():
            rewrite.set_tensor(student.graph, stored, bias.bias.detach().clone())
        for key, activation in self.activations.items():
            quantizer = student.quantizer(key)
            quantizer.set_range(activation.scale().reshape(quantizer.scale.shape), quantizer.zero_point)


def _bias_step(given: LearnedActivation | Quantizer, weight: LearnedWeight | Quantizer, shift: int) -> Tensor:
    """Of a bias, [C_out] or [1]."""
    steps = (m.scale if isinstance(m, Quantizer) else m.scale() for m in (given, weight))
    return next(steps) * next(steps) * 2.0**-shift

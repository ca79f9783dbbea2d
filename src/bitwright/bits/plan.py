"""``plan.json``: how many bits each layer gets, for people to read and edit, and for ``--plan`` to read back."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from bitwright.errors import UsageError
from bitwright.given.text import read_json
from bitwright.quant.scheme import Choice, Granularity, Scheme
from bitwright.run.files import write_text
from bitwright.runtimes import target

if TYPE_CHECKING:
    from torch import fx

    from bitwright.graph.capture import Captured
    from bitwright.graph.layer import Layer
    from bitwright.graph.student import Student

FILE = "plan.json"
Width = StrictInt | Literal["float"]


class WeightPlan(BaseModel):
    """The weight of a layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Width
    granularity: Granularity | None = None
    """What shares a scale; the scheme's if not given."""
    group_size: StrictInt | None = Field(default=None, ge=1)
    symmetric: StrictBool = True


class ActivationPlan(BaseModel):
    """What the group of a layer yields; of a stored operand of activations, the operand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Width
    symmetric: StrictBool | None = None
    """Signed codes around zero, or unsigned ones from zero where nothing is negative; otherwise a zero point."""
    granularity: Literal["tensor", "channel"] | None = None
    """For reading: channels have scales of their own where the recipe gives them some."""
    shares_scale_with: tuple[str, ...] | None = None
    """For reading: the layers whose quantizer it uses. They must have the same bits."""


class LayerPlan(BaseModel):
    """One layer; what is not said, the command line or the call decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: WeightPlan | None = None
    activation: ActivationPlan | None = None


class Plan(BaseModel):
    """Bits by layer name.

    Example:
        >>> plan = Plan(layers={"head": LayerPlan(weight=WeightPlan(bits=8))})
        >>> plan.scheme(Scheme(weights=4)).weight_bits(["head"])
        8
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str | None = None
    """Fingerprint of the names and shapes of the layers with weights (not of the weights); None fits any network."""
    runtime: str = "onnxruntime"
    predicted: dict[str, float] | None = None
    """Loss and costs that the plan was made for; for reading."""
    layers: dict[str, LayerPlan]

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a file, or of a run folder.

        Raises:
            UsageError: there is none, or the file does not hold a plan; one line says where.
        """
        file = Path(path).expanduser()
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise UsageError(f"Expected a plan at {file}, found none.")
        try:
            return cls.model_validate(read_json(file, _once))
        except ValidationError as error:
            raise UsageError(f"{file}: {_first_problem(error)}") from error

    def write(self, path: str | Path) -> None:
        """Writes it as :meth:`read` reads it."""
        write_text(Path(path), self.model_dump_json(exclude_none=True, indent=2) + "\n")

    def scheme(self, base: Scheme | None = None) -> Scheme:
        """The scheme that does what the plan says; for layers that the plan leaves open, what ``base`` says.

        Rules of ``base`` come after the plan.

        Raises:
            UsageError: the runtime lacks a bit-width of the plan, or the plan asks for what there is not.
        """
        base = base or Scheme()
        if base.runtime not in {self.runtime, Scheme().runtime}:
            raise UsageError(f"The plan is for the runtime {self.runtime}, found runtime='{base.runtime}'.")
        self._check_bits()
        grids = {a.symmetric for x in self.layers.values() if (a := x.activation) and a.symmetric is not None}
        if len(grids) > 1:
            raise UsageError("Expected activations that are all symmetric, or none of them, found both in the plan.")
        update: dict[str, Any] = {"runtime": self.runtime, "plan": {n: _choice(x) for n, x in self.layers.items()}}
        if grids:
            update["activation_grid"] = "symmetric" if grids.pop() else "affine"
        return base.model_copy(update=update)

    def _check_bits(self) -> None:
        runtime = target(self.runtime)
        for name, layer in self.layers.items():
            for what, part, possible in (
                ("weights", layer.weight, runtime.weight_bits),
                ("activations", layer.activation, runtime.activation_bits),
            ):
                if part is not None and part.bits != "float" and part.bits not in possible:
                    raise UsageError(
                        f"The plan gives '{name}' {what} of {part.bits} bits, {runtime.name} has "
                        f'{", ".join(map(str, possible))} (or "float").'
                    )
            if layer.weight is not None and not layer.weight.symmetric:
                raise UsageError(f"The plan asks for asymmetric weights of '{name}'; weights are always symmetric.")

    def check_network(self, graph: fx.GraphModule) -> None:
        """Refuses a network that the plan was not made for.

        Raises:
            UsageError: the fingerprints differ.
        """
        if self.network is None:
            return
        found = structure_digest(graph)
        if found == self.network:
            return
        names = {str(n.meta.get("layer", n.target)) for n in graph.graph.nodes} | {"input"}
        unknown = [n for n in self.layers if n not in names]
        why = (
            f"{len(unknown)} of its {len(self.layers)} layers are not in this one, such as '{unknown[0]}'"
            if unknown
            else "layers or shapes of weights differ"
        )
        raise UsageError(
            f"The plan was made for another network ({self.network}, this one is {found}): {why}. Plan again, or take "
            'the line "network" out of the plan if its layers are meant.'
        )

    def check_obeyed(self, student: Student) -> None:
        """Makes sure that every layer has become what the plan says, unless a rule of the scheme overrides it.

        Raises:
            UsageError: one has not, because the network cannot have it so.
        """
        made, scheme = plan_of(student), student.scheme
        sharing: dict[str, list[str]] = defaultdict(list)
        for layer in student.layers:
            if layer.activation is not None:
                sharing[layer.activation].append(layer.name)
        keys = {layer.name: layer for layer in student.layers}
        for name, asked in self.layers.items():
            got = made.layers.get(name, LayerPlan())
            if asked.weight is not None and not scheme.rules_weights(_readers(student.layers, name)):
                _check_weight(name, asked.weight, got.weight, keys.get(name))
            key = keys[name].activation if name in keys else None
            members = [name] if key is None else sharing[key]
            if asked.activation is not None and not scheme.rules_activations(members):
                _check_activation(name, asked.activation, got.activation, members)


def insert_plan(teacher: Captured, plan: Plan, base: Scheme | None = None) -> Student:
    """The student with quantizers as the plan says.

    Raises:
        UsageError: the plan was made for another network, names a layer that there is not, or asks for what this
            network or the runtime cannot have.
    """
    from bitwright.graph.student import insert_quantizers

    scheme = plan.scheme(base)
    plan.check_network(teacher.graph)
    student = insert_quantizers(teacher, scheme)
    plan.check_obeyed(student)
    return student


def plan_of(model: Student, bits: Mapping[str, int] | None = None) -> Plan:
    """The plan that describes a model: before and after calibration, frozen or loaded.

    Args:
        model: with quantizers.
        bits: in place of those it has, by the key of a quantizer.
    """
    return plans_of(model, [bits or {}])[0]


def plans_of(model: Student, several: Sequence[Mapping[str, int]]) -> list[Plan]:
    """The same with each of several choices of bits; the model is read once, and plans share what is alike in them."""
    network, parts = structure_digest(model.graph), _Parts(model)
    return [Plan(network=network, runtime=model.scheme.runtime, layers=parts.layers(bits)) for bits in several]


class _Parts:
    """The layers of a plan, each made once for each of its bits."""

    def __init__(self, model: Student) -> None:
        self.model = model
        self.ends: dict[str, list[str]] = defaultdict(list)
        for layer in model.layers:
            if layer.activation is not None and layer.end == layer.node:
                self.ends[layer.activation].append(layer.name)
        self.made: dict[tuple[int, int | None, int | None], LayerPlan] = {}

    def layers(self, bits: Mapping[str, int]) -> dict[str, LayerPlan]:
        """By name."""
        from bitwright.graph.place import FLOAT_ACTIVATIONS, FLOAT_BY_RULE

        layers: dict[str, LayerPlan] = {}
        for position, layer in enumerate(self.model.layers):
            wanted = (position, bits.get(layer.weight or ""), bits.get(layer.activation or ""))
            if wanted not in self.made:
                self.made[wanted] = self._layer(layer, bits)
            layers[layer.name] = self.made[wanted]
        for left in self.model.unquantized:
            if left.reason in {FLOAT_ACTIVATIONS, FLOAT_BY_RULE} and left.op != "weight":
                known = layers.get(left.name, LayerPlan())
                layers[left.name] = known.model_copy(update={"activation": ActivationPlan(bits="float")})
        return layers

    def _layer(self, layer: Layer, bits: Mapping[str, int]) -> LayerPlan:
        from bitwright.graph import ops

        weight = activation = None
        if layer.weight is not None:
            weight = _weight_plan(self.model, layer.weight, bits)
        elif layer.op in ops.LINEAR:
            weight = WeightPlan(bits="float")
        if layer.activation is not None:
            others = tuple(n for n in self.ends[layer.activation] if n != layer.name)
            activation = _activation_plan(self.model, layer.activation, others, bits)
        return LayerPlan(weight=weight, activation=activation)


def _weight_plan(model: Student, key: str, bits: Mapping[str, int]) -> WeightPlan:
    quantizer = model.quantizer(key)
    return WeightPlan(
        bits=bits.get(key, quantizer.grid.bits),
        granularity=quantizer.granularity,  # type: ignore[arg-type]
        group_size=quantizer.group_size,
    )


def _activation_plan(model: Student, key: str, others: tuple[str, ...], bits: Mapping[str, int]) -> ActivationPlan:
    quantizer = model.quantizer(key)
    return ActivationPlan(
        bits=bits.get(key, quantizer.grid.bits),
        symmetric=model.scheme.activation_grid == "symmetric",
        granularity="channel" if quantizer.granularity == "channel" else None,
        shares_scale_with=others or None,
    )


def structure_digest(graph: fx.GraphModule) -> str:
    """16 digits that tell networks apart: names, operators and weight shapes of the layers with weights."""
    from torch import fx

    from bitwright.graph import ops

    found = []
    for node in graph.graph.nodes:
        stored = node.args[1] if ops.base_name(node) in ops.LINEAR else None
        if isinstance(stored, fx.Node) and stored.op in {"get_attr", "call_module"}:
            found.append([node.meta.get("layer"), ops.base_name(node), [int(s) for s in ops.shape(stored)]])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- details


def _choice(layer: LayerPlan) -> Choice:
    activations = None if layer.activation is None else layer.activation.bits
    if layer.weight is None:
        return Choice(activations=activations)
    return Choice(
        weights=layer.weight.bits,
        activations=activations,
        granularity=layer.weight.granularity,
        group_size=layer.weight.group_size,
    )


def _readers(layers: list[Layer], name: str) -> list[str]:
    """The layers that read the weight that this one reads."""
    key = next((x.weight for x in layers if x.name == name), None)
    return [name] if key is None else [x.name for x in layers if x.weight == key]


def _check_weight(name: str, asked: WeightPlan, got: WeightPlan | None, layer: Layer | None) -> None:
    from bitwright.graph import ops

    if got is None:
        raise UsageError(f"The plan gives '{name}' bits of weights, but it has no weight.")
    wide = asked.granularity == "tensor" and got.granularity != "tensor"
    narrow = asked.granularity == "channel" and got.granularity == "group"
    groups = asked.granularity == "group" and layer is not None and layer.op in ops.CONV_TRANSPOSE
    heads = asked.granularity == "head" and got.granularity != "head"
    if asked.bits != "float" and (wide or narrow or groups or heads):
        raise UsageError(
            f"The plan asks for a scale per {asked.granularity} in the weight of '{name}', which can only have one per "
            f"{got.granularity}."
        )


def _check_activation(name: str, asked: ActivationPlan, got: ActivationPlan | None, members: list[str]) -> None:
    if got is None and asked.bits == "float":
        return
    if got is None:
        raise UsageError(
            f"The plan gives '{name}' bits of activations, but nothing is quantized there; "
            "`bitwright inspect` says where and why."
        )
    if asked.bits != got.bits:
        others = [n for n in members if n != name]
        shared = f"it shares its scale with '{others[0]}'" if others else "it can only have others"
        raise UsageError(
            f"The plan gives '{name}' {asked.bits} bits of activations, but {shared}, at {got.bits}. "
            "Give both the same."
        )
    if asked.shares_scale_with and set(asked.shares_scale_with) != set(got.shares_scale_with or ()):
        raise UsageError(
            f"The plan lets '{name}' share its scale with {', '.join(asked.shares_scale_with)}; in this network and "
            f"runtime it shares it with {', '.join(got.shares_scale_with or ['none'])}."
        )
    if asked.granularity == "channel" and got.granularity != "channel":
        warnings.warn(
            f"Scales per channel of activations, as the plan has them for '{name}', are for the recipe to choose.",
            stacklevel=5,
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which each name may stand once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(f"'{name}' stands twice in the same object.")
        found[name] = value
    return found


def _first_problem(error: ValidationError) -> str:
    """Where the first problem is and what it is."""
    first = error.errors(include_url=False)[0]
    where = " > ".join(str(part) for part in first["loc"] if part not in {"int", "literal['float']"})
    found = "" if first["type"] in {"missing", "extra_forbidden"} else f", found {first['input']!r}"
    if first["type"] == "int_type":
        return f'{where}: expected a whole number or "float"{found}.'
    return f"{where or 'the file'}: {first['msg'][0].lower()}{first['msg'][1:]}{found}."

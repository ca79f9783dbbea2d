"""The options of the command line that several verbs have; options that belong together form one record.

Nothing here imports PyTorch or pydantic before a value is asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bitwright.cli.signature import argument, option
from bitwright.errors import UsageError
from bitwright.given.arguments import a_time, one_of, whole_number

if TYPE_CHECKING:
    from bitwright.bits.goal import Goal
    from bitwright.bits.plan import Plan
    from bitwright.given.models import Model
    from bitwright.measure.tasks import Scoring
    from bitwright.quant.scheme import Scheme
    from bitwright.stages.base import Precision

bits_option = partial(option, panel="What is quantized, and how")
planning_option = partial(option, panel="Bits layer by layer, planned within limits")
reading_option = partial(option, panel="How image files become the network's input")
budget_option = partial(option, panel="How long the optimisation may take")

model_argument = partial(
    argument,
    "MODEL",
    "zoo:NAME, timm:NAME@weights, torchvision:NAME@weights, path/to/file.py:callable, model.pt2 or model.onnx",
)
images_argument = partial(
    argument,
    "IMAGES",
    "A folder, an .npz, .npy, .tar or .parquet file or zoo:NAME, with an optional slice as in 'photos[0::2]'",
)
run_argument = partial(argument, "RUN", "A run folder with a model.onnx in it")
recipe_option = partial(
    bits_option,
    "Recipe: a name that `bitwright recipes` lists, or a .yaml or .py file  [default: marked there]",
)
weights_option = partial(bits_option, "Bits of weights: 2 to 8, or float", "8")
rule_option = partial(
    bits_option, "Exception for some layers, such as 'head=w8a8' or 'blocks.*=w3'; the last rule that matches decides"
)
measure_option = partial(
    planning_option, "Measure that predicts losses: loss, trace, distance, quadratic, eigenvalue or q-bert", "loss"
)
cache_option = partial(
    planning_option, "Folder where measured losses are kept  [default: BITWRIGHT_CACHE, or ~/.cache/bitwright]"
)
precision_option = partial(
    budget_option,
    "Number format of the optimisation: float32, bfloat16, or auto for the faster one on this machine",
    "auto",
)
labels_option = partial(option, "CSV file of labels (file,class_index); class folders and .npz files bring their own")
truth_option = partial(
    option,
    "CSV file of labels (file,class_index), a folder of masks, YOLO text or VOC XML, or a COCO file; class folders and "
    ".npz files bring their own",
)
scoring_option = partial(option, panel="How outputs are compared with labels")
output_option = partial(option, "Name of the output to keep, if the model returns several")
input_size_option = partial(reading_option, "Size of the network's input: 224, 224x320 (height x width) or 1x28x28")
seed_option = partial(option, "Seed of all random choices", 0)
device_option = partial(option, "Device to compute on: auto, cpu, cuda or cuda:N", "auto")
runtime_option = partial(option, "Runtime: onnxruntime or openvino; may be repeated  [default: all that are installed]")
batch_option = partial(option, "Images per call of the file; several batch sizes are measured one by one")
no_images_option = partial(option, "Do not show the images whose answers differ in the report", False)
force_files_option = partial(option, "Replace the files that an earlier call wrote into --out", False)


@dataclass(frozen=True)
class NetworkOptions:
    """A network and the images it is given."""

    model: str = model_argument()
    images: str = images_argument()


@dataclass(frozen=True)
class GridOptions:
    """Which weights share a scale, and in which runtime the result will run."""

    runtime: str = bits_option(
        "Where the result will run: onnxruntime, openvino, tensorrt, executorch, generic or generic-pot", "onnxruntime"
    )
    granularity: str = bits_option(
        "Weights that share one scale: channel, tensor, group, or head (of attention; other weights per channel)",
        "channel",
    )
    group_size: int | None = bits_option(
        "Input channels per scale with --granularity group  [default: 64]; with head, the most channels per scale  "
        "[default: the whole head]"
    )

    def scheme(self, weights: str, activations: str, rule: list[str] | None) -> Scheme:
        """The scheme of these bits.

        Raises:
            UsageError: the granularity, the runtime or the bits do not exist.
        """
        from bitwright.quant.scheme import GRANULARITIES, Rule, Scheme

        if self.granularity not in GRANULARITIES:
            raise UsageError(f"Expected a granularity out of {', '.join(GRANULARITIES)}, found '{self.granularity}'.")
        if self.group_size is not None:
            whole_number("group_size", self.group_size, least=1)
        if self.group_size is not None and self.granularity not in {"group", "head"}:
            raise UsageError("Expected --granularity group or head beside --group-size, found neither. Leave it out.")
        rules = tuple(Rule.parse(text) for text in rule or ())
        found = Scheme.model_validate({"weights": weights, "activations": activations, "rules": rules, **asdict(self)})
        _ = found.target
        return found


@dataclass(frozen=True)
class BitOptions:
    """Bits of everything but the weights, for which each verb has an option of its own."""

    activations: str = bits_option(
        "Bits of activations: 2 to 8, 16, float, or auto (8, and 16 for the few that need them)", "8"
    )
    rule: list[str] | None = rule_option()
    plan: Path | None = bits_option(
        "Bits layer by layer, from a plan.json or a run with one; --weights and --activations fill what it leaves open"
    )
    grid: GridOptions = GridOptions()

    @cached_property
    def planned(self) -> Plan | None:
        """The plan, read once.

        Raises:
            UsageError: the file cannot be read, or holds no plan.
        """
        if self.plan is None:
            return None
        from bitwright.bits.plan import Plan

        return Plan.read(self.plan)

    def scheme(self, weights: str, activations: str | None = None) -> Scheme:
        """The scheme, with the plan in it.

        Args:
            weights: bits.
            activations: bits instead of those that were given.
        """
        found = self.grid.scheme(weights, self.activations if activations is None else activations, self.rule)
        return found if self.planned is None else self.planned.scheme(found)


@dataclass(frozen=True)
class LimitOptions:
    """Limits within which bits are planned."""

    target_size: str | None = planning_option("Largest size of model.safetensors: 3500000B, 100kB, 3.5MB or 3MiB")
    compression: str | None = planning_option(
        "How many times smaller than the float parameters model.safetensors must be, such as 6"
    )
    max_bops: str | None = planning_option("Most bit operations (MACs x bits of both operands), such as 2e9 or 2G")
    max_latency: str | None = planning_option("Most milliseconds per image", metavar="MS")
    max_drop: str | None = planning_option(
        "Share of answers that may change, such as 0.01; finds the smallest network that is estimated to keep it. With "
        "--task or --metric the share of its figure that may be lost, the float network's answers being the truth"
    )

    @property
    def given(self) -> list[str]:
        """Names of the limits that were given."""
        return [name for name, value in asdict(self).items() if value is not None]

    def goal(self, weights: str, activations: str, measure: str, scored: Scoring | None) -> Goal:
        """The limits, with the bits to choose among, what predicts losses, and whose figure may drop."""
        from bitwright.bits.goal import Goal

        said = {} if scored is None else {"task": scored.task, "metric": scored.metric, "decode": scored.decode}
        return Goal.parse(weights=weights, activations=activations, measure=measure, **said, **asdict(self))


@dataclass(frozen=True)
class PlanLimitOptions(LimitOptions):
    """Limits of a plan."""

    max_activation_size: str | None = planning_option(
        "Most memory of the activations of one image together, such as 64kB"
    )
    max_total_size: str | None = planning_option(
        "Most bytes of model.safetensors and activations together, such as 3MB"
    )


@dataclass(frozen=True)
class FigureOptions:
    """Which figure outputs are compared by."""

    task: str | None = scoring_option("classification, segmentation or detection  [default: that of the labels]")
    metric: str | None = scoring_option(
        "Metric of your own instead of the task's: a function of outputs and truth in file.py:function"
    )
    decode: str | None = scoring_option(
        "Function in file.py:function that turns outputs into boxes, scores and labels, or into maps of classes"
    )

    @property
    def named(self) -> bool:
        """Whether a task or a metric was named."""
        return self.task is not None or self.metric is not None

    @cached_property
    def scoring(self) -> Scoring:
        """The same with the functions, for which their files are run.

        Raises:
            UsageError: there is no such task or function.
        """
        from bitwright.given.scripts import load_function
        from bitwright.measure.tasks import Scoring

        named = {"metric": self.metric, "decode": self.decode}
        found = {k: None if text is None else load_function(text, k) for k, text in named.items()}
        made = Scoring(self.task, found["metric"], found["decode"])
        made.check()
        return made

    def beside(self, network: Model | None) -> Scoring:
        """The same with the decoding function that a network brings."""
        from dataclasses import replace

        return self.scoring if network is None else replace(self.scoring, beside=network.decode)


@dataclass(frozen=True)
class ScoringOptions(FigureOptions):
    """How outputs are compared with labels."""

    class_map: str | None = scoring_option(
        "JSON or CSV file of classes by the numbers or names in masks and boxes; ids keeps the numbers of a COCO file  "
        "[default: classes.json or classes.csv beside the labels]"
    )


@dataclass(frozen=True)
class DataOptions:
    """Images to calibrate and to measure on."""

    samples: int | None = option("Number of images to calibrate on, spread evenly over IMAGES  [default: at most 512]")
    evaluate: str | None = option("Images to measure on  [default: the calibration images]")
    labels: str | None = truth_option()
    compared: ScoringOptions = ScoringOptions()


@dataclass(frozen=True)
class ImageOptions:
    """How image files are read."""

    input_size: str | None = input_size_option()
    mean: str | None = reading_option("Mean to subtract from pixel values in 0..1: one number, or one per channel")
    std: str | None = reading_option("Standard deviation to divide by: one number above 0, or one per channel")
    interpolation: str | None = reading_option("Method of resizing: nearest, bilinear, bicubic or lanczos")
    crop_pct: float | None = reading_option(
        "Share of the resized image that the centre crop keeps, such as 0.875; above 1, it is padded"
    )
    crop_mode: str | None = reading_option(
        "How an image of other sides fits: center (cut), squash (stretched) or border (filled)"
    )
    channel_order: str | None = reading_option("Order of the channels that the network takes: rgb or bgr")
    pixel_bits: int | None = reading_option(
        "Bits of the values of grey images whose files hold 16, such as 12 for those of many cameras and scanners"
    )
    preprocess: str | None = reading_option(
        "Function that makes the network's input of an image, instead of all these: file.py:function, which is run"
    )
    input_key: str | None = option(
        "Where several entries could be the image, its name: a column of a .parquet file, an ending of a .tar file's "
        "members, or an array of an .npz file"
    )
    skip_unreadable: bool = option("Leave out images that cannot be decoded", False)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The settings of preprocessing that were given, by name."""
        return {k: v for k, v in asdict(self).items() if v is not None and k not in {"input_key", "skip_unreadable"}}

    @property
    def named(self) -> dict[str, Any]:
        """These settings, and the name of the images where it was given."""
        return self.preprocessing | ({} if self.input_key is None else {"input_key": self.input_key})


@dataclass(frozen=True)
class BudgetOptions:
    """How long an optimisation may take."""

    steps: str | None = budget_option(
        "Steps of the optimisation instead of the recipe's; 300,500 for a recipe with two such stages", metavar="N[,N]"
    )
    minutes: float | None = budget_option(
        "Minutes for the whole optimisation instead of --steps; the result says how many steps they allowed"
    )
    precision: str = precision_option()

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """Steps of each stage that optimises.

        Raises:
            UsageError: the text is no list of whole numbers.

        Example:
            >>> BudgetOptions("300").numbers, BudgetOptions("300,500").numbers
            ((300,), (300, 500))
        """
        try:
            return None if self.steps is None else tuple(int(part) for part in self.steps.split(","))
        except ValueError:
            raise UsageError(
                f"Expected a number of steps such as 300, or 300,500, as steps=, found '{self.steps}'."
            ) from None

    def check(self) -> None:
        """Reads all of it.

        Raises:
            UsageError: a number is out of range, both budgets are given, or there is no such format.
        """
        for number in self.numbers or ():
            whole_number("steps", number, least=0)
        if self.minutes is not None:
            if self.steps is not None:
                raise UsageError("Expected steps= or minutes=, found both.")
            a_time("minutes", self.minutes)
        _ = self.number_format

    @property
    def number_format(self) -> Precision:
        """Number format of the optimisation.

        Raises:
            UsageError: there is no format of this name.
        """
        return cast("Precision", one_of("precision", self.precision, ("auto", "float32", "bfloat16")))

"""bitwright: low-bit vision networks from a trained model and a few unlabelled images.

Names are imported when they are first used, so that ``bitwright --help`` need not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitwright import _imports
from bitwright._version import __version__

if TYPE_CHECKING:
    from bitwright.api import quantize
    from bitwright.bits.plan import Plan
    from bitwright.bits.planning import plan_bits
    from bitwright.errors import BitwrightError, DataError, ModelError, ParityError, UsageError
    from bitwright.given.images import Images, load_images
    from bitwright.given.models import load_model
    from bitwright.given.preprocessing import Preprocessing
    from bitwright.graph.capture import capture
    from bitwright.measure.evaluation import evaluate
    from bitwright.quant.scheme import Rule, Scheme
    from bitwright.quantized import QuantizedModel, load
    from bitwright.recipes import Recipe
    from bitwright.speed.bench import bench
    from bitwright.studies import study

_HOMES = {
    "api": ["quantize"],
    "graph.capture": ["capture"],
    "given.images": ["Images", "load_images"],
    "errors": ["BitwrightError", "DataError", "ModelError", "ParityError", "UsageError"],
    "measure.evaluation": ["evaluate"],
    "given.models": ["load_model"],
    "bits.plan": ["Plan"],
    "bits.planning": ["plan_bits"],
    "given.preprocessing": ["Preprocessing"],
    "quant.scheme": ["Rule", "Scheme"],
    "quantized": ["QuantizedModel", "load"],
    "recipes": ["Recipe"],
    "speed.bench": ["bench"],
    "studies": ["study"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "BitwrightError",
    "DataError",
    "Images",
    "ModelError",
    "ParityError",
    "Plan",
    "Preprocessing",
    "QuantizedModel",
    "Recipe",
    "Rule",
    "Scheme",
    "UsageError",
    "__version__",
    "bench",
    "capture",
    "evaluate",
    "load",
    "load_images",
    "load_model",
    "plan_bits",
    "quantize",
    "study",
]  # fmt: skip


_imports.install()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bitwright.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bitwright' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

"""EPTQ: the whole network optimised at once, guided by a label-free Hessian."""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.optq import Optq
from bitwright.stages.reconstruct import Reconstruct

START = (Calibrate(weights="mse", activations="mse", bias_correction="analytic"), Optq())

RECIPES = (
    Recipe(
        name="eptq",
        summary="Closed-form roundings, then the whole network optimised at once, each sample and layer weighted.",
        paper="arXiv:2309.11531v2",
        stages=(*START, Reconstruct(weigh="sla")),
    ),
)

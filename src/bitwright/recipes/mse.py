"""Ranges of least error, then bias correction: what needs no optimisation, and where optimisation starts."""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate

RECIPE = Recipe(
    name="mse",
    summary="Ranges of least error, then analytic bias correction.",
    paper="arXiv:1906.04721 (bias correction, section 4.2)",
    stages=(Calibrate(weights="mse", activations="mse", bias_correction="analytic"),),
)

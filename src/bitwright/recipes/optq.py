"""OPTQ: roundings in closed form, each making up for the ones before it."""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.optq import Optq

RECIPE = Recipe(
    name="optq",
    summary="Ranges of least error, roundings in closed form, then analytic bias correction; no optimisation.",
    paper="arXiv:2210.17323",
    stages=(Calibrate(weights="mse", activations="mse"), Optq()),
)

"""OPTQ: roundings in closed form, each making up for the ones before it.

Layers of 2 and 3 bits, and all where activations have at most 4, follow once more, in order, from what the quantized
layers before them give.
"""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.cascade import Cascade
from bitwright.stages.optq import Optq

RECIPE = Recipe(
    name="optq",
    summary="Ranges of least error, roundings in closed form, then analytic bias correction; no optimisation.",
    paper="arXiv:2210.17323",
    stages=(Calibrate(weights="mse", activations="mse"), Optq(), Cascade()),
)

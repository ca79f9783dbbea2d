"""Round to nearest: the baseline that every paper starts from."""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate

RECIPE = Recipe(
    name="rtn",
    summary="Min-max ranges, rounding to nearest; nothing is corrected.",
    stages=(Calibrate(weights="minmax", activations="minmax"),),
)

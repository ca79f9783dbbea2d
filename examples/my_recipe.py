"""A recipe of your own: name the file.

bitwright quantize zoo:fashion_cnn zoo:fashion --weights 4 --recipe examples/my_recipe.py
"""

from bitwright.recipes import Recipe
from bitwright.stages.calibrate import Calibrate

RECIPE = Recipe(
    name="percentile",
    summary="Ranges that cut off one value in ten thousand, then bias correction layer after layer.",
    stages=(Calibrate(weights="mse", activations="percentile", percentile=0.9999, bias_correction="sequential"),),
)

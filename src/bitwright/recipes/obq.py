"""OBQ (arXiv:2208.11580): each layer's weights rounded element by element, each time the one that costs least.

The exact form of what ``optq`` does column by column, for layers that are small enough (docs/methods/obq.md).
"""

from bitwright.recipes import Recipe
from bitwright.recipes.eptq import CALIBRATED
from bitwright.stages.optq import Optq

RECIPE = Recipe(
    name="obq",
    summary="Ranges of least error, then roundings in closed form, element by element; for small networks.",
    paper="arXiv:2208.11580",
    stages=(CALIBRATED[0], Optq(exact=True)),
)

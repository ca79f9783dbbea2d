"""QKD (arXiv:1911.12491): quantization-aware training with labels, and a float network that learns along, then tutors.

It shows what labels and a training set are worth beside recipes that need neither. The paper trains for 120 epochs on
ImageNet.
"""

from bitwright.recipes import Recipe
from bitwright.recipes.eptq import CALIBRATED
from bitwright.stages.finetune import Finetune

RECIPE = Recipe(
    name="qkd",
    summary="Training with labels, in three phases with the float network as teacher. Needs labelled images.",
    paper="arXiv:1911.12491",
    stages=(*CALIBRATED, Finetune()),
)

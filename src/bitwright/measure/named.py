"""What the figures of tasks are called for people, by their keys in ``result.json``: read where nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping

TASK_FIGURES: Mapping[str, Mapping[str, str]] = {
    "classification": {"top1": "top-1 accuracy", "top5": "top-5 accuracy"},
    "segmentation": {"miou": "mean IoU of classes", "pixel_accuracy": "accuracy of pixels"},
    "detection": {
        "map": "AP, IoU 0.50 to 0.95",
        "map50": "AP, IoU 0.50",
        "map75": "AP, IoU 0.75",
        "map_small": "AP of small objects",
        "map_medium": "AP of medium objects",
        "map_large": "AP of large objects",
    },
}
"""By task, in the order in which tasks are tried; the first of each is the one to judge by."""

"""HAP: which output channels the loss would not miss (arXiv:2101.08940; methods, section 11). An analysis, no measure.

To second order, setting the weights ``w_c`` of a channel to zero costs ``1/2 w_c^T H w_c``, which is estimated by
``Tr(H_c) / (2 p_c) ||w_c||^2`` with p_c weights in the channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.curvature.hessian import Curvature, traces, weight_groups
from bitwright.errors import UsageError
from bitwright.progress import Progress, silent

CAP = 0.95
"""The most of a layer's channels that may go, as in the paper's code."""


def channel_scores(
    curvature: Curvature,
    *,
    probes: int = 32,
    tolerance: float = 0.05,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """The predicted loss of pruning each output channel, [C] for each layer by name.

    Args:
        curvature: of the float network's weights.
        probes: the most for each batch.
        tolerance: the relative standard error of the layers' traces that ends the probing.
        seed: of the probes.
        progress: called as it goes.
    """
    layers = [g for g in weight_groups(curvature.graph) if g.kind == "layer"]
    found = traces(curvature, layers, probes=probes, tolerance=tolerance, seed=seed, progress=progress)
    scores = {}
    for layer in layers:
        (path,) = layer.weights
        weight = curvature.weights[path].detach()
        norms = curvature.channels(path, weight.double().square()).cpu()
        trace = found.channels.get(path, torch.zeros_like(norms))
        scores[layer.name] = trace * norms * len(norms) / (2 * layer.parameters)
    return scores


def pruning_mask(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The channels that stay when that share of all of them goes, those of the least score first.

    Args:
        scores: for each layer, [C]; the last one's channels are the network's outputs, and all of them stay.
        ratio: of the channels of layers that may be pruned, 0 to 1; less where the cap of each layer stops it.

    Returns:
        For each layer, [C], true for what stays.

    Raises:
        UsageError: the ratio is not within 0 and 1.

    Example:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5]), "head": torch.tensor([0.1])}
        >>> {k: v.tolist() for k, v in pruning_mask(scores, 0.5).items()}
        {'a': [True, False], 'b': [True, False], 'head': [True]}
    """
    if not 0 <= ratio <= 1:
        raise UsageError(f"Expected a ratio of channels to prune between 0 and 1, found {ratio}.")
    last = tuple(scores)[-1:]
    masks = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}
    room = {name: int(CAP * len(s)) for name, s in scores.items() if name not in last}
    order = sorted((float(x), name, i) for name in room for i, x in enumerate(scores[name]))
    left = int(ratio * len(order))
    for _, name, channel in order:
        if left == 0:
            break
        if room[name] > 0:
            masks[name][channel] = False
            room[name], left = room[name] - 1, left - 1
    return masks

"""Layer weights on a log scale, spread over the images."""

from __future__ import annotations

import torch

from bitwright.curvature.label_free import HessianScores


def scores(trace: torch.Tensor, attention: torch.Tensor) -> HessianScores:
    layers = [str(i) for i in range(trace.shape[1])]
    return HessianScores(layers, 10, trace, attention, torch.zeros(trace.shape[1]), 4)


def test_the_mean_over_images_is_the_layers_log_weight() -> None:
    torch.manual_seed(0)
    found = scores(torch.rand(7, 4) + 0.1, torch.rand(7, 4))
    assert torch.allclose(found.log_attention().mean(0), found.log_weights(), atol=1e-6)


def test_images_are_weighted_in_proportion_to_their_attention() -> None:
    torch.manual_seed(0)
    found = scores(torch.rand(5, 3) + 0.1, torch.rand(5, 3) + 0.1)
    weights = found.log_attention()
    for layer in range(3):
        if float(found.log_weights()[layer]) > 0:
            ratios = weights[:, layer] / found.attention[:, layer]
            assert torch.allclose(ratios, ratios[:1].expand(5))


def test_a_layer_without_attention_weighs_the_same_for_all_images() -> None:
    trace = torch.tensor([[1.0, 100.0, 0.0], [1.0, 100.0, 0.0]])
    attention = torch.tensor([[0.5, 2.0, 0.0], [1.5, 4.0, 0.0]])
    weights = scores(trace, attention).log_attention()
    assert torch.equal(weights[0, 2], weights[1, 2])
    assert bool(torch.isfinite(weights).all())

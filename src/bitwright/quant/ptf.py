"""Power-of-two factors: a scale for each channel of an activation, one of four around the scale of the whole tensor.

FQ-ViT, arXiv:2111.13824, section 3.2 (methods, section 13.1): channels of a transformer's residual stream differ in
range by orders of magnitude, and normalisations, which read it, can shift each channel's integers by its factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.quant.quantizer import Quantizer

EXPONENTS = 4
"""How many factors a channel chooses from: ``2^alpha / 8`` with alpha in 0..3."""


class FactorErrors:
    """Squared error of every channel under every factor, summed up over a stream of tensors.

    Args:
        quantizer: calibrated, with the one scale ``s`` of the whole tensor; it is not changed.

    Channels are the last axis: of a stream of [..., C] it remembers [4, C] numbers.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.grid, self.zero_point = quantizer.grid, quantizer.zero_point.reshape(())
        self.scales = quantizer.scale.reshape(()) * 2.0 ** torch.arange(
            1 - EXPONENTS, 1, device=quantizer.scale.device, dtype=quantizer.scale.dtype
        )
        self.errors: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Adds a batch, [..., C]."""
        rows = x.detach().float().reshape(-1, x.shape[-1])
        found = torch.stack([self._error(rows, scale) for scale in self.scales])
        self.errors = found if self.errors is None else self.errors + found

    def _error(self, rows: Tensor, scale: Tensor) -> Tensor:
        return self.grid.nearest(rows, scale, self.zero_point).sub_(rows).square_().sum(0, dtype=torch.float64)

    @property
    def exponents(self) -> Tensor:
        """``alpha`` of least error for each channel, [C]; the largest of those that are equal, which clips least."""
        assert self.errors is not None
        return EXPONENTS - 1 - self.errors.flip(0).argmin(0)

    @property
    def scale(self) -> Tensor:
        """``s / 8 * 2^alpha``, [C]; for alpha = 3 the scale of the whole tensor exactly."""
        return self.scales[self.exponents]

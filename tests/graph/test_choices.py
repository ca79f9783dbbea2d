"""Values that only choose others stay in float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.errors import ParityError
from bitwright.graph.choices import REASON


class Kept(nn.Module):
    """Works on the tokens with the largest scores, or weighs them with these scores as well."""

    def __init__(self, *, weighs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.score, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1), nn.Linear(8, 5)
        self.weighs = weighs

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.conv(x))
        values, places = self.score(tokens).flatten(1).topk(16)
        kept = tokens.flatten(2).gather(2, places.unsqueeze(1).expand(-1, 8, -1))
        kept = kept * values.unsqueeze(1) if self.weighs else kept
        return self.head(torch.relu(kept).mean(-1))


@pytest.mark.parametrize("weighs", [False, True])
def test_scores_that_only_choose_stay_in_float(*, weighs: bool) -> None:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = bw.quantize(Kept(weighs=weighs).eval(), images, "rtn", weights=8)
    reasons = {u.name: u.reason for u in model.unquantized}
    assert (reasons.get("score") == REASON) != weighs


def test_a_file_that_takes_others_of_equal_values_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Ties(Kept):
        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.relu(self.conv(x))
            places = (torch.round(tokens.mean(1).flatten(1)) * 1e-3).topk(16)[1]
            return self.head(tokens.flatten(2).gather(2, places.unsqueeze(1).expand(-1, 8, -1)).mean(-1))

    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = bw.quantize(Ties(weighs=False).eval(), images, "rtn", weights=8)
    with pytest.raises(ParityError, match="'topk' chooses among values"):
        model.export(tmp_path / "m.onnx", images)

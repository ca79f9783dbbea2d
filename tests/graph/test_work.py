"""On how many images a network is looked at: decided by its work, not by a clock."""

from __future__ import annotations

import pytest
from cases import prepared

from bitwright.graph import work
from bitwright.graph.student import insert_quantizers
from bitwright.graph.work import how_many
from bitwright.quant.scheme import Scheme


@pytest.mark.parametrize(
    ("times", "wanted", "least", "expected"),
    [
        (0.5, 32, 8, 32),  # of half the work that is modest: all
        (1.0, 32, 8, 32),
        (2.0, 32, 8, 16),
        (3.0, 32, 8, 10),
        (100.0, 32, 8, 8),
        (100.0, 5, 8, 5),  # no more than are wanted
    ],
)
def test_images_become_fewer_as_the_work_grows(
    times: float, wanted: int, least: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = insert_quantizers(prepared("residual"), Scheme())
    macs = sum(layer.macs for layer in model.layers)
    assert macs
    monkeypatch.setattr(work, "MODEST", macs / times)
    assert how_many(model, wanted, least) == expected

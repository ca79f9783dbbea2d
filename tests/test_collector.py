"""The collector of cycles waits where it is asked to."""

from __future__ import annotations

import gc

import pytest

from bitwright.collector import imports_stay, uncollected


def test_the_collector_waits_inside_and_is_as_it_was_behind() -> None:
    @uncollected()
    def inside(fails: bool) -> bool:
        if fails:
            raise ValueError
        return gc.isenabled()

    assert (inside(False), gc.isenabled()) == (False, True)
    with pytest.raises(ValueError, match=r"^$"):
        inside(True)
    assert gc.isenabled()
    gc.disable()
    try:
        assert (inside(False), gc.isenabled()) == (False, False)  # whoever turned it off turns it on
    finally:
        gc.enable()


@pytest.mark.parametrize("before", [0, 9])
def test_imports_are_frozen_where_those_before_were(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: before)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    with imports_stay():
        assert not gc.isenabled()
    assert (gc.isenabled(), bool(frozen)) == (True, bool(before))

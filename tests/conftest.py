"""Lets the tests in the folders below import ``cases``: pytest puts this file's folder on the path."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from chromium import PROGRAM, Page, chromium


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What takes microseconds loses far more to threads that wait for each other, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_networks(request: pytest.FixtureRequest) -> None:
    module = getattr(request.node, "module", None)
    if module and any(getattr(v, "__module__", None) == "cases" for v in vars(module).values()):
        request.getfixturevalue("one_thread")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page in a real browser."""
    if PROGRAM is None:
        pytest.skip("there is no Chromium on this machine")
    with chromium() as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def _translations_are_read_once() -> Iterator[None]:
    """PyTorch's exporter reads the source of all its translations for every file: more work than a small network is."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(autouse=True)
def _quick_recipe_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests are not about optimisation; those that are name their recipe, or are marked ``real_default``."""
    if request.node.get_closest_marker("real_default") is None:
        monkeypatch.setattr("bitwright.recipes.DEFAULT", "mse")

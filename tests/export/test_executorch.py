"""ExecuTorch's program, run in ExecuTorch where it is installed; what it lacks is refused."""

import importlib.util

import cases
import pytest

import bitwright as bw
from bitwright.export.executorch import check_executorch, write_executorch
from bitwright.runtimes import EXECUTORCH

installed = importlib.util.find_spec("executorch") is not None


@pytest.mark.skipif(not installed, reason="pip install executorch")
@pytest.mark.parametrize("name", ["residual", "transformer"])
@pytest.mark.filterwarnings("default")
def test_the_program_equals_the_simulation(name, tmp_path):
    model = bw.quantize(cases.model(name), cases.dataset(), "rtn", runtime="executorch")
    parity = write_executorch(model, tmp_path / "m.pte", cases.images(6))
    assert parity.passed
    assert parity.mean_abs < 1e-3 * parity.range
    assert b"XnnpackBackend" in (tmp_path / "m.pte").read_bytes()


@pytest.mark.skipif(installed, reason="it is installed")
def test_without_it_the_line_that_installs_it_is_given():
    model = bw.quantize(cases.model("residual"), cases.dataset(), "rtn")
    with pytest.raises(bw.UsageError, match=r"ExecuTorch is not installed. Install it with: pip install executorch"):
        check_executorch(model)


def test_other_bits_are_refused(monkeypatch):
    monkeypatch.setattr(type(EXECUTORCH), "installed", True)
    model = bw.quantize(cases.model("residual"), cases.dataset(), "rtn", weights=4)
    with pytest.raises(bw.UsageError, match=r"executorch has weights of 8 bits, found 4.*weights=8$"):
        check_executorch(model)

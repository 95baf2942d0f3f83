"""Products of less than float32: what is rounded, and that derivatives are such products again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from imaml_ext.errors import ConfigError
from imaml_ext.losses import TaskLoss
from imaml_ext.models import MLP, Conv4
from imaml_ext.models.products import product, rounded
from imaml_ext.recipes import glyphs_5w1s
from imaml_ext.settings import changed
from imaml_ext.train.legacy import config_from_old

FRACTION = {"tf32": 10, "bfloat16": 7}


@pytest.mark.parametrize("precision", FRACTION)
def test_rounding_is_to_the_nearest_with_ties_to_even(precision):
    bits = FRACTION[precision]
    exponent = torch.randint(-30, 30, (4096,))
    whole = torch.randint(2**bits, 2 ** (bits + 1), (4096,))  # a fraction that is there already
    sign = 1 - 2 * torch.randint(2, (4096,))
    exact = torch.ldexp((sign * whole).double(), exponent - bits)
    step = torch.ldexp(torch.ones(4096, dtype=torch.float64), exponent - bits)

    def round_once(x):
        assert (x.float().double() == x).all()
        return rounded(x.float(), precision).double()

    assert torch.equal(round_once(exact), exact)
    assert torch.equal(round_once(exact + sign * step * 0.4375), exact)
    assert torch.equal(round_once(exact + sign * step * 0.5625), exact + sign * step)
    tie = exact + sign * step * 0.5
    assert torch.equal(round_once(tie), torch.where(whole % 2 == 0, exact, exact + sign * step))


@pytest.mark.parametrize("precision", FRACTION)
def test_what_is_not_finite_stays(precision):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    assert torch.equal(rounded(x, precision).isnan(), x.isnan())
    assert torch.equal(rounded(x, precision).nan_to_num(5.0).signbit(), x.nan_to_num(5.0).signbit())
    assert rounded(x, precision)[:2].tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("precision", ["float32", *FRACTION])
def test_derivatives_are_products_of_the_same_precision(precision):
    a, b = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 7, 4, requires_grad=True)
    u, v = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 7)

    def expected(x, y):
        return torch.bmm(rounded(x, precision), rounded(y, precision))

    c = product(a, b, precision)
    assert torch.equal(c, expected(a, b))
    by_a, by_b = torch.autograd.grad(c, (a, b), u, create_graph=True)
    assert torch.equal(by_a, expected(u, b.mT))
    assert torch.equal(by_b, expected(a.mT, u))
    by_u, twice = torch.autograd.grad(by_a, (u, b), v)  # v · (u bᵀ)
    torch.testing.assert_close(by_u, expected(v, b))
    torch.testing.assert_close(twice, expected(v.mT, u))


@pytest.mark.parametrize("make", [lambda **p: Conv4(3, filters=8, **p), lambda **p: MLP(784, [16], 3, **p)])
def test_a_model_of_less_precision_is_close_and_not_the_same(make):
    x, y = torch.rand(2, 6, 1, 28, 28), torch.randint(3, (2, 6))

    class Data:
        pass

    Data.x, Data.y = x, y
    outputs = {}
    for precision in ("float32", *FRACTION):
        model = make(precision=precision)
        params = model.init(seed=1).expand(2, -1).contiguous()
        outputs[precision] = model(params, x)
        losses = TaskLoss(model, "cross_entropy").gradient(params, Data)
        assert losses.gradient.isfinite().all()
    apart = {p: float((outputs[p] - outputs["float32"]).norm() / outputs["float32"].norm()) for p in FRACTION}
    assert 1e-6 < apart["tf32"] < 1e-2
    assert 1e-5 < apart["bfloat16"] < 1e-1
    assert apart["tf32"] < apart["bfloat16"]


def test_errors_name_the_precision():
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'tf32', 'bfloat16', got 'half'"):
        Conv4(5, precision="half")
    model = MLP(2, [], 1, precision="tf32")
    params, x = model.init(seed=0, dtype=torch.float64).unsqueeze(0), torch.zeros(1, 3, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"params must be float32 with precision='tf32', got torch\.float64"):
        model(params, x)
    with pytest.raises(ValueError, match="engine must be 'auto' or 'torch' for a MLP of precision 'tf32'"):
        TaskLoss(MLP(2, [], 1, precision="tf32"), "mse", engine="native")
    config = glyphs_5w1s.recipe.config
    with pytest.raises(ConfigError, match=r"model\.precision must be 'float32' with run\.dtype 'float64'"):
        changed(config, {"model.precision": "bfloat16", "run.dtype": "float64"})


def test_a_configuration_from_before_there_was_a_precision_is_of_float32():
    recorded = Path(__file__).with_name("old_runs") / "gradient-descent" / "config.json"
    old = json.loads(recorded.read_text())["config"]
    assert old["model"]["precision"] == "float32"
    config = config_from_old(old)
    del old["model"]["precision"]
    assert config_from_old(old) == config
    assert changed(config, {"model.precision": "tf32"}) != config

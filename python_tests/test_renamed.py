"""Old names and keywords keep working, warn, and name what took their place."""

import subprocess
import sys

import pytest
import torch
from meta_tasks import regression

import imaml_ext
from imaml_ext import CG, IMAML, MAML, GradientDescent, NewtonCG, Solution, SolveError, SolveStatus, prox_solve
from imaml_ext.batch import TaskData
from imaml_ext.data import Omniglot
from imaml_ext.errors import ConfigError
from imaml_ext.losses import TaskLoss
from imaml_ext.settings import from_json, to_json
from imaml_ext.solvers import FixedPoint
from imaml_ext.train import load_recipe


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("solvers", "CGError", SolveError),
        ("solvers", "CGResult", Solution),
        ("solvers", "CGStatus", SolveStatus),
        ("inner", "HessianFree", NewtonCG),
        ("models", "TaskLoss", TaskLoss),
        ("models", "TaskData", TaskData),
    ],
)
def test_names(module: str, old: str, new: type) -> None:
    home = getattr(__import__(f"imaml_ext.{module}"), module)
    with pytest.warns(DeprecationWarning, match=rf"imaml_ext.{module}.{old} is now imaml_ext.*{new.__name__}"):
        assert getattr(home, old) is new
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        home.nothing  # noqa: B018


def test_keywords_of_a_linear_solver() -> None:
    with pytest.warns(DeprecationWarning, match=r"a keyword of IMAML is now .*linear_solver=CG\(max_iterations=3"):
        assert IMAML(cg_steps=3) == IMAML(linear_solver=CG(max_iterations=3))
    with pytest.warns(DeprecationWarning, match="on_breakdown='skip'"):
        old = IMAML(solver="fixed_point", solver_lr=0.1, cg_rtol=1e-3, negative_curvature="skip")
    assert old == IMAML(linear_solver=FixedPoint(lr=0.1, rtol=1e-3), on_breakdown="skip")
    with pytest.warns(DeprecationWarning, match="NewtonCG"):
        assert NewtonCG(cg_steps=1) == NewtonCG(linear_solver=CG(max_iterations=1, rtol=0.0))
    with pytest.warns(DeprecationWarning, match="proximal='after'"):
        assert GradientDescent(proximal="pullback") == GradientDescent(proximal="after")
    loss, theta, episodes = regression(2)
    theta.requires_grad_()
    exact = CG(max_iterations=30, rtol=1e-9)
    inner = GradientDescent(steps=20)
    with pytest.warns(DeprecationWarning, match="prox_solve"):
        old_phi = prox_solve(loss, theta, 5.0, episodes.support, inner=inner, cg_steps=30, cg_rtol=1e-9)
    new_phi = prox_solve(loss, theta, 5.0, episodes.support, inner=inner, linear_solver=exact)
    gradients = [torch.autograd.grad(phi.square().sum(), theta)[0] for phi in (old_phi, new_phi)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("algorithm", [IMAML, MAML])
@pytest.mark.parametrize("sharing", ["global", "layer", "parameter"])
def test_a_learnable_lam(algorithm: type, sharing: str) -> None:
    """As it was documented: given as `lam`, its `log` beside theta in an optimiser."""
    loss, theta, episodes = regression(2)
    with pytest.warns(DeprecationWarning, match="LearnableLam is now the setting learn"):
        from imaml_ext.meta import LearnableLam
    lam = LearnableLam(loss.model, 0.5, sharing=sharing, dtype=theta.dtype)
    with pytest.warns(DeprecationWarning, match="learn="):
        old = algorithm(loss, lam=lam)
    with torch.no_grad():
        lam.log += 0.1
    meta = old.meta_gradient(theta, episodes)
    new = algorithm(loss, lam=0.5, learn={"lam": "tensor" if sharing == "layer" else sharing})
    params = new.initial(theta)
    params["log_lam"] = params["log_lam"] + 0.1
    expected = new.meta_gradient(params, episodes)
    with pytest.warns(DeprecationWarning, match="log_lam"):
        found = lam.log_gradient(meta.lam_gradient)
    torch.testing.assert_close(found, expected.gradients["log_lam"])
    torch.testing.assert_close(meta.gradient, expected.gradient)
    assert found.shape == lam.log.shape


def test_operators() -> None:
    loss, theta, episodes = regression(2)
    phi = theta.expand(2, -1)
    p = torch.randn_like(phi)
    for old, kind in (("hessian_operator", "hessian"), ("gauss_newton_operator", "gauss_newton")):
        with pytest.warns(DeprecationWarning, match="linearize"):
            operator = getattr(imaml_ext.meta, old)(loss, phi, episodes.support)
        assert torch.equal(operator(p), loss.linearize(phi, episodes.support, kind)(p))


@pytest.mark.parametrize(("old", "new"), [("training", "train"), ("reproduce", "reproduction")])
def test_packages(old: str, new: str) -> None:
    """In a process of its own: a module warns when it is imported first."""
    code = f"import imaml_ext.{old} as old, imaml_ext.{new} as new; assert old is new"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert f"imaml_ext.{old} is now imaml_ext.{new}" in done.stderr


def test_omniglot_keywords() -> None:
    with pytest.warns(DeprecationWarning, match=r"split='vinyals', orientations='classes'"):
        assert Omniglot(split_protocol="vinyals", rotations=True) == Omniglot(split="vinyals", orientations="classes")
    with pytest.warns(DeprecationWarning, match=r"orientations='upright'"):
        assert Omniglot(rotations=False) == Omniglot(orientations="upright")
    recorded = to_json(Omniglot(validation=3, split="vinyals", orientations="classes"))
    del recorded["split"], recorded["orientations"]
    old = recorded | {"split_protocol": "vinyals", "rotations": True}
    assert from_json(Omniglot, old) == Omniglot(validation=3, split="vinyals", orientations="classes")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("omniglot-5w1s-gd", "omniglot-5w1s"),
        ("omniglot-5w1s-hf-longer", "omniglot-5w1s-newton"),
        ("omniglot-20w5s-hf", "omniglot-20w5s-newton"),
        ("omniglot-5w1s-1000", "omniglot-5w1s"),
        ("omniglot-vinyals-20w1s-gd", "omniglot-20w1s --data.split vinyals --data.validation 0"),
        ("sinusoid-10shot", "sinusoid --tasks.shots 10"),
        ("mini-imagenet-5w5s", "mini-imagenet --tasks.shots 5"),
    ],
)
def test_recipes_of_old_names(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"^the recipe {old} is now {new}$"):
        load_recipe(old)
    assert load_recipe(new.partition(" ")[0]).stages or "omniglot" not in new

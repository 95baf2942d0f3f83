"""Old public names and keywords, which keep working for one release. Each use warns and names what took its place."""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def warn(old: str, new: str, *, stacklevel: int = 3) -> None:
    warnings.warn(f"{old} is now {new}; the old name will be removed", DeprecationWarning, stacklevel=stacklevel)


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a module's `__getattr__` for {old name: "module.name"}, or "module.name = what took its place"."""

    def getattr_of_module(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        path, _, said = names[name].partition(" = ")
        warn(f"{module}.{name}", said or path)
        home, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(home), attribute)

    return getattr_of_module


def old_module(old: str, new: str) -> None:
    """Makes a module of an old name, while it is imported, stand for the new one and for all that is in it."""
    warn(f"the module {old}", new, stacklevel=4)
    sys.modules[old] = importlib.import_module(new)


def old_keywords(translate: Callable[[dict[str, Any]], str]) -> Callable[[T], T]:
    """Decorates a function or a class: `translate` puts new keywords for old ones, and says which, "" where none."""

    def decorate(target: Any) -> Any:
        function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]

        @functools.wraps(function)
        def accepting(*args: Any, **keywords: Any) -> Any:
            new = translate(keywords)
            if new:
                warn(f"a keyword of {target.__name__}", new)
            return function(*args, **keywords)

        if not isinstance(target, type):
            return accepting
        target.__init__ = accepting  # type: ignore[misc]
        return target

    return decorate


def solver_keywords(keywords: dict[str, Any], *, max_iterations: int = 5, rtol: float = 1e-5) -> str:
    """solver, cg_steps, cg_rtol, solver_lr → linear_solver; negative_curvature → on_breakdown; a learnable lam."""
    new = []
    if "negative_curvature" in keywords:
        keywords["on_breakdown"] = keywords.pop("negative_curvature")
        new.append(f"on_breakdown={keywords['on_breakdown']!r}")
    given = {name: keywords.pop(name) for name in ("solver", "cg_steps", "cg_rtol", "solver_lr") if name in keywords}
    if given:
        from imaml_ext.solvers import LinearSolver

        settings = {"max_iterations": given.get("cg_steps", max_iterations), "rtol": given.get("cg_rtol", rtol)}
        if given.get("solver_lr") is not None:
            settings["lr"] = given["solver_lr"]
        name = given.get("solver", "cg")
        if not isinstance(name, str):
            raise TypeError(f"a linear solver is given as linear_solver=…, got solver={name!r}")
        keywords["linear_solver"] = LinearSolver.kind(name)(**settings)
        new.append(f"linear_solver={keywords['linear_solver']!r}")
    if isinstance(keywords.get("lam"), LearnableLam):
        lam = keywords["lam"]
        keywords |= {"lam": lam.initial, "learn": {"lam": lam.sharing}, "_given": {"log_lam": lam.log}}
        new.append(f"lam={lam.initial}, learn={keywords['learn']}")
    return ", ".join(new)


def proximal_keyword(keywords: dict[str, Any]) -> str:
    """proximal="pullback" → "after"."""
    if keywords.get("proximal") != "pullback":
        return ""
    keywords["proximal"] = "after"
    return "proximal='after'"


def omniglot_keywords(keywords: dict[str, Any]) -> str:
    """split_protocol → split; rotations → orientations."""
    new = {}
    if "split_protocol" in keywords:
        new["split"] = keywords.pop("split_protocol")
    if "rotations" in keywords:
        new["orientations"] = "classes" if keywords.pop("rotations") else "upright"
    keywords |= new
    return ", ".join(f"{name}={value!r}" for name, value in new.items())


_OF_OMNIGLOT = re.compile(r"omniglot-(vinyals-)?(5w1s|5w5s|20w1s|20w5s|start)(-gd|-hf)?(-longer|-shared|-1000)?")
_OTHERS = {
    "sinusoid-5shot": "sinusoid",
    "sinusoid-10shot": "sinusoid --tasks.shots 10",
    "cifar-fs-5w1s": "cifar-fs",
    "fc100-5w1s": "fc100",
    "mini-imagenet-5w1s": "mini-imagenet",
    "mini-imagenet-5w5s": "mini-imagenet --tasks.shots 5",
}


def recipe_of_today(name: str) -> str | None:
    """Returns what took the place of a recipe, or of weights, of an old name; None where there was no such name."""
    found = _OF_OMNIGLOT.fullmatch(name)
    if found is None:
        return _OTHERS.get(name)
    vinyals, tasks, solver, _ = found.groups()
    new = f"omniglot-{'5w1s' if tasks == 'start' else tasks}{'-newton' if solver == '-hf' else ''}"
    return f"{new} --data.split vinyals --data.validation 0" if vinyals else new


def hessian_operator(loss: Any, phi: Any, data: Any, kind: str = "hessian") -> Any:
    from imaml_ext.losses import as_loss

    return as_loss(loss).linearize(phi, data, kind)


gauss_newton_operator = functools.partial(hessian_operator, kind="gauss_newton")


class LearnableLam:
    """The λ that was given as `lam`; now `learn={"lam": …}`, and "log_lam" in the dictionary of meta-parameters."""

    def __init__(self, model: Any, initial: float, *, sharing: str = "global", dtype: Any = None, device: Any = "cpu"):
        import torch

        self.initial, self.sharing = initial, "tensor" if sharing == "layer" else sharing
        groups = {"global": 1, "tensor": len(model.layout.sizes), "parameter": model.num_parameters}[self.sharing]
        dtype = dtype or torch.float32
        self.log = torch.full((groups,), math.log(initial), dtype=dtype, device=device, requires_grad=True)

    @property
    def values(self) -> Any:
        return self.log.detach().exp()

    def log_gradient(self, lam_gradient: Any) -> Any:
        """The gradient as it is: `MetaGradient.lam_gradient` is the one in log λ now."""
        return lam_gradient

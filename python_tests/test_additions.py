"""Each kind of thing is added by one file and one entry of a registry, and is then known to the command line and files.

The files here are written as a user would write them, into a folder of their own; a run with all of them is trained by
`imaml train FILE.py` and continued.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from training_tools import imaml

from imaml_ext.data import DataSource, Sinusoid
from imaml_ext.inner import InnerSolver
from imaml_ext.models import MLP, TaskModel
from imaml_ext.settings import from_json, to_json
from imaml_ext.train import TrainConfig, load_recipe

FILES = {
    "my_inner.py": '''
from dataclasses import dataclass
from typing import Annotated
import torch
from imaml_ext.inner import InnerResult, InnerSolver
from imaml_ext.ops import prox_gradient_
from imaml_ext.settings import COUNT, POSITIVE

@dataclass(frozen=True)
class SignDescent(InnerSolver):
    """Steps of one length along the signs of the proximal gradient."""
    steps: Annotated[int, COUNT] = 3  # Steps per task.
    length: Annotated[float, POSITIVE] = 0.01  # Length of a step in every parameter.

    def _minimise(self, loss, phi, center, data, lam):
        losses = []
        for _ in range(self.steps):
            here, _, gradient = loss.gradient(phi, data)
            phi = phi - self.length * prox_gradient_(gradient, phi, center, lam).sign()
            losses.append(here)
        return InnerResult(phi, torch.stack(losses), torch.full((len(phi),), self.steps))
''',
    "my_model.py": '''
from dataclasses import dataclass, replace
from functools import cached_property
import torch
from imaml_ext.models import ParameterLayout, TaskModel

@dataclass(frozen=True)
class Cubic(TaskModel):
    """a + b x + c x² + d x³ of one number."""
    scale: float = 5.0  # What inputs are divided by.

    @cached_property
    def layout(self):
        return ParameterLayout.of({"coefficients": (4,)})

    def fitted(self, input_shape, outputs):
        return self

    def _initial(self, seed):
        return {"coefficients": torch.zeros(4, dtype=torch.float64)}

    def _outputs(self, params, inputs):
        powers = (inputs / self.scale) ** torch.arange(4, dtype=inputs.dtype)
        return (powers * params[:, None, :]).sum(2, keepdim=True)
''',
    "my_data.py": '''
from dataclasses import dataclass
from imaml_ext.data import DataSource
from imaml_ext.data.sinusoid import Sinusoid

@dataclass(frozen=True)
class Steeper(Sinusoid):
    """Sinusoids with targets some times as large."""
    factor: float = 2.0  # What targets are multiplied by.

    def load(self):
        dataset, factor = super().load(), self.factor
        sampler_of = dataset.sampler

        def sampler(split, **sizes):
            inner = sampler_of(split, **sizes)
            sample = inner.sample
            def larger(step, **shard):
                batch = sample(step, **shard)
                return type(batch)(batch.support_x, factor * batch.support_y, batch.query_x, factor * batch.query_y)
            inner.sample = larger
            return inner

        dataset.sampler = sampler
        return dataset
''',
    "my_recipe.py": '''
"""Steeper sinusoids by a cubic polynomial.

Command: imaml train my_recipe.py
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from imaml_ext.data import DataSource
from imaml_ext.inner import InnerSolver
from imaml_ext.models import TaskModel
DataSource.kinds["steeper"] = "my_data.Steeper"
InnerSolver.kinds["sign_descent"] = "my_inner.SignDescent"
TaskModel.kinds["cubic"] = "my_model.Cubic"
from my_data import Steeper
from my_inner import SignDescent
from my_model import Cubic
from imaml_ext.meta import IMAML
from imaml_ext.train.config import EvaluationSettings, Outer, Tasks, TrainConfig
from imaml_ext.train.recipe import Recipe
recipe = Recipe(TrainConfig(
    data=Steeper(), tasks=Tasks(shots=6), model=Cubic(), algorithm=IMAML(lam=1.0, inner=SignDescent()),
    outer=Outer(steps=40, meta_batch=8, lr=0.05), evaluation=EvaluationSettings(tasks=16),
))
''',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.lstrip())
    monkeypatch.syspath_prepend(str(tmp_path))
    for family in (DataSource, InnerSolver, TaskModel):
        monkeypatch.setattr(family, "kinds", dict(family.kinds))
    yield tmp_path
    for name in ("my_inner", "my_model", "my_data"):
        sys.modules.pop(name, None)


def test_they_are_written_read_and_chosen_by_name(folder: Path) -> None:
    config = load_recipe(folder / "my_recipe.py").config
    values = json.loads(json.dumps(to_json(config)))
    assert values["algorithm"]["inner"] == {"kind": "sign_descent", "steps": 3, "length": 0.01}
    assert (values["data"]["kind"], values["model"]["kind"]) == ("steeper", "cubic")
    assert from_json(TrainConfig, values) == config
    with pytest.raises(ValueError, match=r"SignDescent\.length must be above 0, got -1"):
        InnerSolver.kind("sign_descent")(length=-1)


def test_a_run_with_all_of_them(folder: Path) -> None:
    run = folder / "run"
    arguments = ("train", str(folder / "my_recipe.py"), "--run-dir", str(run), "--run.threads", "1")
    done = imaml(*arguments, "--inner.steps", "4", "--data.factor", "3", "--model.scale", "4")
    assert done.returncode == 0, done.stderr
    recorded = json.loads((run / "config.json").read_text())["config"]
    assert (recorded["algorithm"]["inner"]["steps"], recorded["data"]["factor"]) == (4, 3.0)
    first = json.loads((run / "result.json").read_text())["test"]["loss"]
    again = imaml(*arguments, "--resume", "--evaluation.tasks", "16")
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "result.json").read_text())["test"]["loss"] == first
    other = ("--run-dir", str(folder / "other"), "--outer.steps", "2", "--evaluation.tasks", "4")
    chosen = imaml("train", "sinusoid", "--model", "cubic", "--model.scale", "2", *other)
    assert chosen.returncode == 0, chosen.stderr
    recorded = json.loads((folder / "other" / "config.json").read_text())["config"]
    assert recorded["model"] == {"kind": "cubic", "scale": 2.0}


def test_a_cubic_is_what_it_says(folder: Path) -> None:
    """The written model is the polynomial that its docstring states."""
    load_recipe(folder / "my_recipe.py")  # which registers it
    cubic = TaskModel.kind("cubic")(scale=1.0)
    x = torch.tensor([[[2.0]]])
    assert cubic(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), x).item() == 1 + 20 + 400 + 8000
    assert isinstance(cubic, TaskModel)
    assert not isinstance(cubic, MLP)
    assert isinstance(Sinusoid(), DataSource)

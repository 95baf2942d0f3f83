"""What test_ranks.py runs on every rank, under torchrun: `ranks_worker.py FOLDER` leaves FOLDER/rank-R.pt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training_tools import small_config

from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import FOMAML, IMAML, MAML, MetaAlgorithm, Reptile
from imaml_ext.settings import changed
from imaml_ext.train import Recipe, Stage, TrainConfig, build, evaluate, train, train_recipe
from imaml_ext.train.job import joined
from imaml_ext.train.ranks import Ranks

TASKS = 5  # over 2 ranks: 2 and 3; over 3: 1, 2 and 2

_INNER = GradientDescent(steps=3, lr=0.02)
_IMAML = IMAML(lam=1.0, inner=_INNER, curvature="gauss_newton")

ALGORITHMS: dict[str, MetaAlgorithm] = {  # in float64
    "imaml": _IMAML,
    "imaml, lambda learnt": replace(_IMAML, learn={"lam": "tensor"}),
    "imaml, a task left out": _IMAML,
    "maml": MAML(inner=_INNER),
    "maml, lambda and rates learnt": MAML(lam=1.0, inner=_INNER, learn={"lam": "global", "lr": "tensor"}),
    "fomaml": FOMAML(inner=_INNER),
    "reptile": Reptile(inner=_INNER),
    "reptile, moments kept": Reptile(inner=replace(_INNER, optimizer="adam"), keep_moments=True),
    "newton-cg": replace(_IMAML, inner=NewtonCG(steps=2, curvature="gauss_newton")),
}


def config_of(name: str) -> TrainConfig:
    changes = {"algorithm": ALGORITHMS[name], "run.dtype": "float64"}
    return changed(small_config(meta_batch=TASKS), changes)


def trained_config(steps: int = 200) -> TrainConfig:
    """Smooth and damped: rounding differences grow little."""
    return changed(
        small_config(steps=steps, meta_batch=TASKS, lr=3e-3, average=0.9, learnt_lr=0.01),
        {
            "model.activation": "tanh",
            "algorithm.damping": 1.0,
            "algorithm.learn": {"lam": "tensor"},
            "evaluation.every": 100,
            "evaluation.validation_tasks": 10,
            "evaluation.meta_batch": 3,
            "run.checkpoint_every": 100,
        },
    )


def staged(folder: Path) -> dict[str, Any]:
    """Two stages of a few steps; the result of the second."""
    recipe = Recipe(trained_config(steps=5), (Stage("first"), Stage("second", {"run.seed": 1})))
    return train_recipe(recipe, folder / "stages", name="staged")


def best_of(folder: Path) -> list[dict[str, Any]]:
    """A run that keeps its best and stops early; and the same, stopped on the way by a function and continued."""
    evaluation = {"every": 2, "validation_tasks": 10, "keep_best": True, "patience": 3, "meta_batch": 3}
    config = small_config(steps=40, meta_batch=TASKS, lr=0.2, schedule="constant")
    config = changed(config, {f"evaluation.{name}": value for name, value in evaluation.items()})
    straight = train(config, folder / "best")
    stopped = train(config, folder / "best-stopped", on_log=lambda row: row["step"] == 6)
    assert stopped["steps"] == 6
    return [straight, train(config, folder / "best-stopped", resume=True)]


def meta_gradient(name: str, ranks: Ranks) -> dict[str, Any]:
    """The meta-gradient of step 7."""
    experiment = build(config_of(name))
    episodes = experiment.sampler("train", tasks=TASKS, seed=0).sample(7, shard=ranks.shard)
    if name == "imaml, a task left out" and ranks.first:
        episodes.support_y[0] = float("nan")  # over 3 ranks the only task of one of them
    meta = experiment.algorithm.meta_gradient(experiment.initial_params(), episodes)
    return vars(ranks.mean_over_tasks(meta, tasks=episodes.num_tasks))


def evaluation(ranks: Ranks) -> dict[str, Any]:
    """20 tasks, 3 at a time: a number of batches that neither 2 nor 3 ranks divide."""
    experiment = build(changed(small_config(), {"evaluation.meta_batch": 3}))
    told: list[int] = []
    params = experiment.initial_params()
    result = evaluate(experiment, params, split="test", tasks=20, seed=0, progress=told.append, ranks=ranks)
    assert told == sorted(told)
    assert told[-1] == 20
    return result.to_json()


def failure(action: Callable[[], object]) -> tuple[str, str]:
    """The type and the words of the error that an action ends with."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _only_on(rank: int, ranks: Ranks) -> None:
    if ranks.rank == rank:
        raise ValueError(f"rank {rank} cannot")


def main(folder: Path) -> None:
    with joined() as ranks:
        found = {
            "meta": {name: meta_gradient(name, ranks) for name in ALGORITHMS},
            "evaluation": evaluation(ranks),
            "maximum": ranks.maximum(ranks.rank * 10),
            "failures": {
                "first": failure(lambda: ranks.on_first(_only_on, 0, ranks)),
                "one": failure(lambda: ranks.on_all(_only_on, 1, ranks)),
                "settings": failure(lambda: train(small_config(lr=0.1 * (1 + ranks.rank)), folder / "none")),
                "tasks": failure(lambda: train(small_config(meta_batch=1), folder / "none")),
            },
            "on first": ranks.on_first(lambda: ranks.rank),
            "result": train(trained_config(), folder / "straight"),
            "staged": staged(folder),
            "best": best_of(folder),
            "resumed": train(trained_config(), folder / "of-one-process", resume=True),
        }
    found["threads"] = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    torch.save(found, folder / f"rank-{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

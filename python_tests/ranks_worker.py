"""What test_ranks.py runs on every rank, under torchrun: `ranks_worker.py FOLDER` leaves FOLDER/rank-R.pt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training_tools import small_config

from imaml_ext.training import InnerConfig, MetaConfig, TrainConfig, build, evaluate, train
from imaml_ext.training.ranks import Ranks, joined

TASKS = 5  # over 2 ranks: 2 and 3; over 4: 1, 1, 1 and 2

# name: (knobs of meta, knobs of inner); in float64
ALGORITHMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "imaml": ({"curvature": "gauss_newton"}, {}),
    "imaml, lambda learnt": ({"curvature": "gauss_newton", "learn_lam": "layer"}, {}),
    "imaml, a task left out": ({"curvature": "gauss_newton"}, {}),
    "maml": ({"algorithm": "maml"}, {"lam": 0.0}),
    "maml, lambda learnt": ({"algorithm": "maml", "learn_lam": "global"}, {}),
    "fomaml": ({"algorithm": "fomaml"}, {"lam": 0.0}),
    "reptile": ({"algorithm": "reptile"}, {"lam": 0.0}),
    "hessian-free": ({"curvature": "gauss_newton"}, {"solver": "hessian_free", "steps": 2}),
}


def config_of(name: str) -> TrainConfig:
    meta, inner = ALGORITHMS[name]
    config = small_config(meta_batch=TASKS)
    inner_config = InnerConfig(**{"lam": 1.0, "steps": 3, "lr": 0.02, **inner})
    return replace(config, meta=MetaConfig(**meta), inner=inner_config, run=replace(config.run, dtype="float64"))


def trained_config(steps: int = 200) -> TrainConfig:
    """Smooth and damped: rounding differences grow little."""
    config = small_config(steps=steps, meta_batch=TASKS, lr=3e-3, average=0.9, lam_lr=0.01)
    run = replace(config.run, checkpoint_every=100)
    evaluation = replace(config.evaluation, every=100, validation_tasks=10, meta_batch=3)
    meta = MetaConfig(curvature="gauss_newton", damping=1.0, learn_lam="layer")
    model = replace(config.model, activation="tanh")
    return replace(config, model=model, meta=meta, run=run, evaluation=evaluation)


def meta_gradient(name: str, ranks: Ranks) -> dict[str, Any]:
    """The meta-gradient of step 7."""
    experiment = build(config_of(name))
    episodes = experiment.sampler("train", tasks=TASKS, seed=0).sample(7, shard=ranks.shard)
    if name == "imaml, a task left out" and ranks.first:
        episodes.support_y[0] = float("nan")  # over 4 ranks the only task of one of them
    meta = experiment.algorithm.meta_gradient(experiment.initial_theta(), episodes)
    return vars(ranks.mean_over_tasks(meta, tasks=episodes.num_tasks))


def evaluation(ranks: Ranks) -> dict[str, Any]:
    """20 tasks, 3 at a time: a number of batches that neither 2 nor 4 ranks divide."""
    config = small_config()
    experiment = build(replace(config, evaluation=replace(config.evaluation, meta_batch=3)))
    told: list[int] = []
    theta = experiment.initial_theta()
    result = evaluate(experiment, theta, split="test", tasks=20, seed=0, progress=told.append, ranks=ranks)
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
            "greatest": ranks.greatest(ranks.rank * 10),
            "failures": {
                "first": failure(lambda: ranks.on_first(_only_on, 0, ranks)),
                "one": failure(lambda: ranks.together(_only_on, 1, ranks)),
                "settings": failure(lambda: train(small_config(lr=0.1 * (1 + ranks.rank)), folder / "none")),
                "tasks": failure(lambda: train(small_config(meta_batch=1), folder / "none")),
            },
            "on first": ranks.on_first(lambda: ranks.rank),
            "result": train(trained_config(), folder / "straight"),
            "resumed": train(trained_config(), folder / "of-one-process", resume=True),
        }
    found["threads"] = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    torch.save(found, folder / f"rank-{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

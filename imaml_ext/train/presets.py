"""Named configurations. Each states its command, and its run time and accuracy where they have been measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from imaml_ext.training.config import (
    AugmentConfig,
    DataConfig,
    DatasetName,
    EvaluationConfig,
    InnerConfig,
    MetaConfig,
    ModelConfig,
    OuterConfig,
    RunConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Preset:
    """A configuration with the words that describe it.

    `measured` states run time and test result, from a result file in docs/results/; it is left out rather than guessed.
    """

    summary: str
    config: TrainConfig
    measured: str | None = None

    @property
    def description(self) -> str:
        return self.summary if self.measured is None else f"{self.summary} {self.measured}"


def _omniglot(*, ways: int, shots: int, inner_steps: int) -> TrainConfig:
    """The paper's settings (section 4 and appendix): lambda 2, 16 or 25 gradient steps, 5 CG steps, Adam.

    The curvature is the Gauss-Newton matrix: with the Hessian they get worse as they train (docs/algorithms.md).
    """
    return TrainConfig(
        data=DataConfig(name="omniglot", ways=ways, shots=shots, queries=5),
        model=ModelConfig(name="conv4"),
        inner=InnerConfig(lam=2.0, steps=inner_steps, lr=0.1),
        meta=MetaConfig(cg_steps=5, curvature="gauss_newton"),
        outer=OuterConfig(steps=20_000, meta_batch=16, lr=1e-3),
        evaluation=EvaluationConfig(tasks=1000),
        run=RunConfig(log_every=20, checkpoint_every=500),
    )


def _omniglot_tuned(*, ways: int, shots: int, newton: bool, steps: int) -> TrainConfig:
    """The same algorithm with numbers that learn more from a task and from an hour (docs/reproduction.md).

    The outer rate belongs to the inner solver. 20-way tasks are dear and tell much each, so that few make a meta-step;
    Newton's then want a lower rate, and large meta-gradients cut, or one of them undoes the training.
    """
    few = ways > 5
    descent = InnerConfig(lam=0.1, steps=8, lr=0.4)
    directions = InnerConfig(lam=0.1, solver="hessian_free", steps=8, cg_steps=1)
    rate = (5e-3 if few else 1e-2) if newton else 4e-3
    return TrainConfig(
        data=DataConfig(name="omniglot", ways=ways, shots=shots, queries=5),
        model=ModelConfig(name="conv4"),
        inner=directions if newton else descent,
        meta=MetaConfig(cg_steps=5 if newton else 3, curvature="gauss_newton"),
        outer=OuterConfig(
            steps=steps,
            meta_batch=4 if few else 16,
            lr=rate,
            schedule="cosine",
            clip_norm=0.3 if few and newton else None,
        ),
        evaluation=EvaluationConfig(tasks=2000),
        run=RunConfig(log_every=100, checkpoint_every=1000),
    )


def _from_weights(weights: str, config: TrainConfig) -> TrainConfig:
    """The same from published weights, with a last layer that the classes share, on images shifted by a pixel.

    At such parameters support sets keep a curvature that the implicit gradient can use: CG takes five steps for it, and
    gradient descent smaller ones where the ways are few.
    """
    smaller = config.inner.solver == "gradient_descent" and config.data.ways <= 5
    return replace(
        config,
        augment=AugmentConfig(crop_padding=1),
        model=replace(config.model, weights=weights, head="shared"),
        inner=replace(config.inner, lr=0.2) if smaller else config.inner,
        meta=replace(config.meta, cg_steps=5),
        outer=replace(config.outer, lr=2e-3),
        run=replace(config.run, seed=1),  # other tasks than those that the weights have seen
    )


def _finished(weights: str, *, ways: int = 5, shots: int = 1, newton: bool, steps: int) -> TrainConfig:
    """The end of a training by larger inner steps, which overshoot at what they have made of the parameters.

    Hessian-free takes fewer Newton steps then, each of more CG iterations.
    """
    config = _from_weights(weights, _omniglot_tuned(ways=ways, shots=shots, newton=newton, steps=steps))
    finer = {"steps": 5, "cg_steps": 2} if newton else {"steps": 16, "lr": 0.1}
    return replace(
        config,
        inner=replace(config.inner, **finer),
        outer=replace(config.outer, lr=2e-3 if newton else 1e-3),
        run=replace(config.run, seed=2),
    )


def _larger_features(config: TrainConfig) -> TrainConfig:
    """The same with features three times as large, by which the last layer has lambda / 9 for its own.

    Hessian-free's steps stand that; gradient descent would run away. Weights trained so have the scale in them.
    """
    return replace(config, model=replace(config.model, feature_scale=3.0))


def _vinyals(config: TrainConfig) -> TrainConfig:
    """The same on Vinyals' split; the classes share the last layer from the start."""
    return replace(
        config,
        data=replace(config.data, split_protocol="vinyals"),
        model=replace(config.model, head="shared"),
        meta=replace(config.meta, cg_steps=5),
    )


def _watched(config: TrainConfig) -> TrainConfig:
    """The same with a look at the validation classes now and then."""
    every = min(500, config.outer.steps // 2)
    return replace(config, evaluation=replace(config.evaluation, every=every, validation_tasks=600))


def _brought_over(weights: str, *, ways: int, shots: int, newton: bool, steps: int) -> TrainConfig:
    """From weights of 5-way 1-shot tasks, by a few tasks of the kind: a shared head makes them good ones of any.

    Those tasks are dear: one of 20 ways and 5 shots costs as much as forty of 5 ways and 1 shot. Four make a meta-step.
    """
    config = _finished(weights, ways=ways, shots=shots, newton=newton, steps=steps)
    return replace(
        config,
        outer=replace(config.outer, meta_batch=4),
        evaluation=replace(config.evaluation, tasks=1000 if ways <= 5 else 500 if shots == 1 else 200),
        run=replace(config.run, log_every=20, checkpoint_every=100, seed=3),
    )


def _photographs(name: DatasetName, *, shots: int) -> TrainConfig:
    """The paper's settings for mini-ImageNet (lambda 0.5, 10 gradient steps, 5 CG steps), for all photographs.

    On 32 × 32 pixels an outer rate of 3e-3 learns faster than 1e-3 from the first meta-steps on, and from random
    parameters inner steps of 0.1 descend where those of 0.2 and 0.4 first climb.
    """
    large = name == "mini-imagenet"
    return TrainConfig(
        data=DataConfig(name=name, ways=5, shots=shots, queries=15 if large else 5),
        model=ModelConfig(name="conv4", filters=32, pooling="max"),
        inner=InnerConfig(lam=0.5, steps=10, lr=0.1),
        meta=MetaConfig(cg_steps=5, curvature="gauss_newton"),
        outer=OuterConfig(steps=20_000 if large else 5000, meta_batch=4, lr=1e-3 if large else 3e-3, schedule="cosine"),
        evaluation=EvaluationConfig(tasks=1000, every=1000),
        run=RunConfig(log_every=50, checkpoint_every=500),
    )


def _sinusoid(*, shots: int) -> TrainConfig:
    """tanh and the Gauss-Newton matrix: inner problems that gradient descent does not run away from."""
    return TrainConfig(
        data=DataConfig(name="sinusoid", shots=shots, queries=10),
        model=ModelConfig(name="mlp", hidden=(40, 40), activation="tanh"),
        inner=InnerConfig(lam=0.1, steps=20, lr=0.01),
        meta=MetaConfig(cg_steps=5, damping=1.0, curvature="gauss_newton"),
        outer=OuterConfig(steps=3000, meta_batch=25, lr=3e-3, schedule="cosine"),
        evaluation=EvaluationConfig(tasks=1000, meta_batch=250, every=300),
        run=RunConfig(log_every=50, checkpoint_every=1000),
    )


PRESETS: dict[str, Preset] = {
    # imaml train glyphs-5w1s
    "glyphs-5w1s": Preset(
        summary="5-way 1-shot on the built-in glyphs: no download, made for two CPU cores.",
        measured="Test accuracy 96.7 ± 0.3 % on 1,000 tasks of scripts never seen, after 2 minutes on two CPU cores.",
        config=TrainConfig(
            data=DataConfig(name="glyphs", ways=5, shots=1, queries=10),
            model=ModelConfig(name="conv4", filters=32),
            inner=InnerConfig(lam=0.1, steps=5, lr=0.4),
            meta=MetaConfig(cg_steps=5, curvature="gauss_newton"),
            outer=OuterConfig(steps=1500, meta_batch=16, lr=3e-3, schedule="cosine"),
            evaluation=EvaluationConfig(tasks=1000, every=250),
            run=RunConfig(log_every=25, checkpoint_every=250),
        ),
    ),
    # imaml train omniglot-5w1s --data.root FOLDER
    "omniglot-5w1s": Preset(
        summary="Omniglot, 5-way 1-shot, 1,200 / 423 characters.",
        config=_omniglot(ways=5, shots=1, inner_steps=16),
    ),
    # imaml train omniglot-5w1s-1000 --data.root FOLDER
    "omniglot-5w1s-1000": Preset(
        summary="Omniglot, 5-way 1-shot, in 1,000 meta-steps of 8 tasks: settings that learn fast.",
        measured="Test accuracy 90.0 ± 0.6 % on 600 tasks, after 17 minutes on two CPU cores with other work on them.",
        config=TrainConfig(
            data=DataConfig(name="omniglot", ways=5, shots=1, queries=10),
            model=ModelConfig(name="conv4"),
            inner=InnerConfig(lam=0.1, steps=16, lr=0.4),
            meta=MetaConfig(cg_steps=5, curvature="gauss_newton"),
            outer=OuterConfig(steps=1000, meta_batch=8, lr=3e-3, schedule="cosine"),
            evaluation=EvaluationConfig(tasks=600),
            run=RunConfig(log_every=20, checkpoint_every=200),
        ),
    ),
    # imaml train omniglot-5w1s-gd --data.root FOLDER
    "omniglot-5w1s-gd": Preset(
        summary="Omniglot, 5-way 1-shot, 1,200 / 423 characters: the published weights of that name.",
        measured="Test accuracy 98.42 ± 0.14 % on 2,000 tasks, after 80 minutes on one CPU core.",
        config=_omniglot_tuned(ways=5, shots=1, newton=False, steps=36_000),
    ),
    # imaml train omniglot-5w1s-gd-shared --data.root FOLDER
    "omniglot-5w1s-gd-shared": Preset(
        summary="Omniglot, 5-way 1-shot, 1,200 / 423 characters: 112,000 tasks more from the weights omniglot-5w1s-gd.",
        measured="Test accuracy 98.49 ± 0.17 % on 2,000 tasks, after 53 minutes on one CPU core.",
        config=_from_weights("omniglot-5w1s-gd", _omniglot_tuned(ways=5, shots=1, newton=False, steps=7000)),
    ),
    # imaml train omniglot-5w1s-gd-longer --data.root FOLDER
    "omniglot-5w1s-gd-longer": Preset(
        summary="Omniglot, 5-way 1-shot, 1,200 / 423 characters: from omniglot-5w1s-gd-shared, 16 inner steps of 0.1.",
        measured="Test accuracy 98.88 ± 0.12 % on 2,000 tasks, after 8 minutes on one CPU core.",
        config=_finished("omniglot-5w1s-gd-shared", newton=False, steps=800),
    ),
    # imaml train omniglot-5w1s-hf --data.root FOLDER
    "omniglot-5w1s-hf": Preset(
        summary="Omniglot, 5-way 1-shot, 1,200 / 423 characters, Hessian-free: the published weights of that name.",
        measured="Test accuracy 97.76 ± 0.26 % on 1,000 tasks, after 58 minutes on one busy CPU core.",
        config=_omniglot_tuned(ways=5, shots=1, newton=True, steps=5000),
    ),
    # imaml train omniglot-5w1s-hf-longer --data.root FOLDER
    "omniglot-5w1s-hf-longer": Preset(
        summary="Omniglot, 5-way 1-shot, 1,200 / 423 characters, Hessian-free: from omniglot-5w1s-gd-shared.",
        measured="Test accuracy 99.10 ± 0.11 % on 2,000 tasks, after 82 minutes on one CPU core.",
        config=_larger_features(_finished("omniglot-5w1s-gd-shared", newton=True, steps=4000)),
    ),
    # imaml train omniglot-5w5s --data.root FOLDER
    "omniglot-5w5s": Preset(
        summary="Omniglot, 5-way 5-shot, 1,200 / 423 characters.",
        config=_omniglot(ways=5, shots=5, inner_steps=16),
    ),
    # imaml train omniglot-5w5s-gd --data.root FOLDER
    "omniglot-5w5s-gd": Preset(
        summary="Omniglot, 5-way 5-shot, 1,200 / 423 characters: 1,600 tasks from omniglot-5w1s-gd-longer.",
        measured="Test accuracy 99.73 ± 0.08 % on 1,000 tasks, after 5 minutes on one CPU core.",
        config=_brought_over("omniglot-5w1s-gd-longer", ways=5, shots=5, newton=False, steps=400),
    ),
    # imaml train omniglot-5w5s-hf --data.root FOLDER
    "omniglot-5w5s-hf": Preset(
        summary="Omniglot, 5-way 5-shot, 1,200 / 423, Hessian-free: 1,200 tasks from omniglot-5w1s-hf-longer.",
        measured="Test accuracy 99.75 ± 0.08 % on 1,000 tasks, after 5 minutes on one CPU core.",
        config=_brought_over("omniglot-5w1s-hf-longer", ways=5, shots=5, newton=True, steps=300),
    ),
    # imaml train omniglot-20w1s --data.root FOLDER
    "omniglot-20w1s": Preset(
        summary="Omniglot, 20-way 1-shot, 1,200 / 423 characters.",
        config=_omniglot(ways=20, shots=1, inner_steps=25),
    ),
    # imaml train omniglot-20w1s-gd --data.root FOLDER
    "omniglot-20w1s-gd": Preset(
        summary="Omniglot, 20-way 1-shot, 1,200 / 423 characters: 2,400 tasks from omniglot-5w1s-gd-longer.",
        measured="Test accuracy 94.97 ± 0.28 % on 500 tasks, after 9 minutes on one CPU core.",
        config=_brought_over("omniglot-5w1s-gd-longer", ways=20, shots=1, newton=False, steps=600),
    ),
    # imaml train omniglot-20w1s-hf --data.root FOLDER
    "omniglot-20w1s-hf": Preset(
        summary="Omniglot, 20-way 1-shot, 1,200 / 423 characters, Hessian-free: the published weights of that name.",
        measured="Test accuracy 93.77 ± 0.16 % on 2,000 tasks, after 82 minutes on one busy CPU core.",
        config=_omniglot_tuned(ways=20, shots=1, newton=True, steps=7000),
    ),
    # imaml train omniglot-20w1s-hf-longer --data.root FOLDER
    "omniglot-20w1s-hf-longer": Preset(
        summary="Omniglot, 20-way 1-shot, 1,200 / 423, Hessian-free: 3,200 tasks from omniglot-5w1s-hf-longer.",
        measured="Test accuracy 95.66 ± 0.25 % on 500 tasks, after 13 minutes on one CPU core.",
        config=_brought_over("omniglot-5w1s-hf-longer", ways=20, shots=1, newton=True, steps=800),
    ),
    # imaml train omniglot-20w5s --data.root FOLDER
    "omniglot-20w5s": Preset(
        summary="Omniglot, 20-way 5-shot, 1,200 / 423 characters.",
        config=_omniglot(ways=20, shots=5, inner_steps=25),
    ),
    # imaml train omniglot-20w5s-gd --data.root FOLDER
    "omniglot-20w5s-gd": Preset(
        summary="Omniglot, 20-way 5-shot, 1,200 / 423 characters: 320 tasks from omniglot-5w1s-gd-longer.",
        measured="Test accuracy 98.59 ± 0.21 % on 200 tasks, after 5 minutes on one CPU core.",
        config=_brought_over("omniglot-5w1s-gd-longer", ways=20, shots=5, newton=False, steps=80),
    ),
    # imaml train omniglot-20w5s-hf --data.root FOLDER
    "omniglot-20w5s-hf": Preset(
        summary="Omniglot, 20-way 5-shot, 1,200 / 423, Hessian-free: 240 tasks from omniglot-5w1s-hf-longer.",
        measured="Test accuracy 98.78 ± 0.20 % on 200 tasks, after 5 minutes on one CPU core.",
        config=_brought_over("omniglot-5w1s-hf-longer", ways=20, shots=5, newton=True, steps=60),
    ),
    # imaml train omniglot-vinyals-start --data.root FOLDER
    "omniglot-vinyals-start": Preset(
        summary="Omniglot, 5-way 1-shot, Vinyals' split: what the other presets of this split begin with.",
        measured="Test accuracy 96.69 ± 0.25 % on 2,000 tasks, after 54 minutes on one CPU core.",
        config=_watched(_vinyals(_omniglot_tuned(ways=5, shots=1, newton=False, steps=5500))),
    ),
    # imaml train omniglot-vinyals-5w1s-gd --data.root FOLDER
    "omniglot-vinyals-5w1s-gd": Preset(
        summary="Omniglot, 5-way 1-shot, Vinyals' split: 6,400 tasks from omniglot-vinyals-start.",
        measured="Test accuracy 97.44 ± 0.20 % on 2,000 tasks, after 5 minutes on one CPU core.",
        config=_watched(_vinyals(_finished("omniglot-vinyals-start", newton=False, steps=400))),
    ),
    # imaml train omniglot-vinyals-5w1s-hf --data.root FOLDER
    "omniglot-vinyals-5w1s-hf": Preset(
        summary="Omniglot, 5-way 1-shot, Vinyals' split, Hessian-free: 48,000 tasks from omniglot-vinyals-start.",
        measured="Test accuracy 97.97 ± 0.17 % on 2,000 tasks, after 64 minutes on one CPU core.",
        config=_watched(_vinyals(_larger_features(_finished("omniglot-vinyals-start", newton=True, steps=3000)))),
    ),
    # imaml train omniglot-vinyals-5w5s-gd --data.root FOLDER
    "omniglot-vinyals-5w5s-gd": Preset(
        summary="Omniglot, 5-way 5-shot, Vinyals' split: 1,600 tasks from omniglot-vinyals-5w1s-gd.",
        measured="Test accuracy 99.12 ± 0.13 % on 1,000 tasks, after 6 minutes on one CPU core.",
        config=_vinyals(_brought_over("omniglot-vinyals-5w1s-gd", ways=5, shots=5, newton=False, steps=400)),
    ),
    # imaml train omniglot-vinyals-5w5s-hf --data.root FOLDER
    "omniglot-vinyals-5w5s-hf": Preset(
        summary="Omniglot, 5-way 5-shot, Vinyals' split, Hessian-free: 1,200 tasks from omniglot-vinyals-5w1s-hf.",
        measured="Test accuracy 99.20 ± 0.13 % on 1,000 tasks, after 5 minutes on one CPU core.",
        config=_vinyals(_brought_over("omniglot-vinyals-5w1s-hf", ways=5, shots=5, newton=True, steps=300)),
    ),
    # imaml train omniglot-vinyals-20w1s-gd --data.root FOLDER
    "omniglot-vinyals-20w1s-gd": Preset(
        summary="Omniglot, 20-way 1-shot, Vinyals' split: 2,400 tasks from omniglot-vinyals-5w1s-gd.",
        measured="Test accuracy 90.65 ± 0.37 % on 500 tasks, after 10 minutes on one CPU core.",
        config=_vinyals(_brought_over("omniglot-vinyals-5w1s-gd", ways=20, shots=1, newton=False, steps=600)),
    ),
    # imaml train omniglot-vinyals-20w1s-hf --data.root FOLDER
    "omniglot-vinyals-20w1s-hf": Preset(
        summary="Omniglot, 20-way 1-shot, Vinyals' split, Hessian-free: 3,200 tasks from omniglot-vinyals-5w1s-hf.",
        measured="Test accuracy 92.73 ± 0.32 % on 500 tasks, after 13 minutes on one CPU core.",
        config=_vinyals(_brought_over("omniglot-vinyals-5w1s-hf", ways=20, shots=1, newton=True, steps=800)),
    ),
    # imaml train omniglot-vinyals-20w5s-gd --data.root FOLDER
    "omniglot-vinyals-20w5s-gd": Preset(
        summary="Omniglot, 20-way 5-shot, Vinyals' split: 320 tasks from omniglot-vinyals-5w1s-gd.",
        measured="Test accuracy 96.77 ± 0.30 % on 200 tasks, after 5 minutes on one CPU core.",
        config=_vinyals(_brought_over("omniglot-vinyals-5w1s-gd", ways=20, shots=5, newton=False, steps=80)),
    ),
    # imaml train omniglot-vinyals-20w5s-hf --data.root FOLDER
    "omniglot-vinyals-20w5s-hf": Preset(
        summary="Omniglot, 20-way 5-shot, Vinyals' split, Hessian-free: 240 tasks from omniglot-vinyals-5w1s-hf.",
        measured="Test accuracy 97.43 ± 0.29 % on 200 tasks, after 5 minutes on one CPU core.",
        config=_vinyals(_brought_over("omniglot-vinyals-5w1s-hf", ways=20, shots=5, newton=True, steps=60)),
    ),
    # imaml train mini-imagenet-5w1s --data.root FOLDER
    "mini-imagenet-5w1s": Preset(
        summary="mini-ImageNet, 5-way 1-shot.",
        config=_photographs("mini-imagenet", shots=1),
    ),
    # imaml train mini-imagenet-5w5s --data.root FOLDER
    "mini-imagenet-5w5s": Preset(
        summary="mini-ImageNet, 5-way 5-shot.",
        config=_photographs("mini-imagenet", shots=5),
    ),
    # imaml train cifar-fs-5w1s --data.root FOLDER
    "cifar-fs-5w1s": Preset(
        summary="CIFAR-FS, 5-way 1-shot.",
        measured="Test accuracy 47.5 ± 0.9 % from 100 of the 600 images a class, 35 minutes on a busy core.",
        config=_photographs("cifar-fs", shots=1),
    ),
    # imaml train cifar-fs-5w5s --data.root FOLDER
    "cifar-fs-5w5s": Preset(
        summary="CIFAR-FS, 5-way 5-shot.",
        config=_photographs("cifar-fs", shots=5),
    ),
    # imaml train fc100-5w1s --data.root FOLDER
    "fc100-5w1s": Preset(
        summary="FC100, 5-way 1-shot: test classes unlike those of training.",
        config=_photographs("fc100", shots=1),
    ),
    # imaml train sinusoid-5shot
    "sinusoid-5shot": Preset(
        summary="Sinusoid regression from 5 points.",
        measured="Mean squared error 0.74 ± 0.12 on 1,000 tasks, after 75 seconds on one CPU core.",
        config=_sinusoid(shots=5),
    ),
    # imaml train sinusoid-10shot
    "sinusoid-10shot": Preset(
        summary="Sinusoid regression from 10 points.",
        measured="Mean squared error 0.27 ± 0.06 on 1,000 tasks, after 97 seconds on one CPU core.",
        config=_sinusoid(shots=10),
    ),
}

"""From a configuration to the objects that train: data set, model, loss, meta-gradient algorithm."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from imaml_ext.data import Augmentation, Dataset, Sampler, dataset_options, load_dataset
from imaml_ext.errors import CheckpointError, ConfigError, RunError
from imaml_ext.inner import GradientDescent, HessianFree, InnerSolver
from imaml_ext.meta import FOMAML, IMAML, MAML, LearnableLam, MetaAlgorithm, Reptile
from imaml_ext.models import MLP, Conv4, ParameterLayout, TaskLoss, TaskModel
from imaml_ext.training.config import AugmentConfig, SourceConfig, TrainConfig


@dataclass(frozen=True)
class Learner:
    """What a configuration describes but for its data, on its device."""

    config: TrainConfig
    loss: TaskLoss
    algorithm: MetaAlgorithm
    test_algorithm: MetaAlgorithm  # the same, with the inner steps of the evaluation
    lam: LearnableLam | None  # of both, where it is learnt
    device: torch.device
    dtype: torch.dtype

    @property
    def model(self) -> TaskModel:
        return self.loss.model

    def initial_theta(self) -> Tensor:
        """theta [N]: random, the same bits for a seed on every machine, or what `model.weights` names; with a shared
        head, the mean over the classes for each; the features that the last layer reads times `model.feature_scale`.

        Raises:
            WeightsError: there are no such weights, or the file is damaged.
            ConfigError: they are another model's.
        """
        theta = self.shared_(self._random_or_given())
        if isinstance(self.model, Conv4):
            self.model.scale_features_(theta, self.config.model.feature_scale)
        return theta

    def _random_or_given(self) -> Tensor:
        source = self.config.model.weights
        if source is None:
            return self.model.init(seed=self.config.run.seed, dtype=self.dtype, device=self.device)
        from imaml_ext.pretrained.weights import read_weights  # which is built on this module

        weights = read_weights(source)
        parameters = weights.parameters(ways=self.config.data.ways if self.config.model.head == "shared" else None)
        ours = self.model.layout
        theirs = ParameterLayout.of({name: value.shape for name, value in parameters.items()})
        if theirs != ours:
            raise ConfigError(
                f"model.weights must have the parameters of the model, {_described(ours)}, got {_described(theirs)}"
            )
        return ours.flatten(parameters).to(self.device, self.dtype)

    def shared_(self, vector: Tensor) -> Tensor:
        """theta [N], or a gradient of it, as all classes share it where the head is a shared one; in place.

        Labels are dealt to the classes of a task at random, so that what theta tells of one class and not of another
        is noise (Ye and Chao, How to Train Your MAML to Excel in Few-Shot Classification, ICLR 2022).
        """
        return self.model.layout.share_last_layer_(vector) if self.config.model.head == "shared" else vector

    def empty_theta(self) -> Tensor:
        """Room for theta [N]."""
        return torch.empty(self.model.num_parameters, dtype=self.dtype, device=self.device)

    def restore_lam(self, saved: Tensor | None) -> None:
        """Put a saved log λ [G] into the algorithms, where λ is learnt.

        Raises:
            CheckpointError: none was saved, or of another shape.
        """
        if self.lam is None:
            return
        log = self.lam.log.detach()
        if saved is None or saved.shape != log.shape:
            found = "no lambda was" if saved is None else f"{saved.numel()} values of lambda were"
            raise CheckpointError(f"{found} saved, the model needs {log.numel()}")
        log.copy_(saved)


@dataclass(frozen=True)
class Experiment(Learner):
    """A learner and its data."""

    dataset: Dataset

    @property
    def classification(self) -> bool:
        return self.dataset.kind == "classification"

    def shots(self, split: str) -> int:
        """Examples a class (or points of a function) that a task of the split is learnt from."""
        data = self.config.data
        return data.train_shots if split == "train" and data.train_shots is not None else data.shots

    def sampler(self, split: str, *, tasks: int, seed: int, augmented: bool = False) -> Sampler:
        """Batches of `tasks` tasks of a split; batch t is a function of (seed, split, t) alone.

        `augmented`: images are changed as the configuration says for training, if it does.

        Raises:
            ConfigError: the data set has no such split, or its classes do not allow such tasks.
        """
        data, augment = self.config.data, self.config.augment
        if split not in self.dataset.splits:
            raise ConfigError(f"{data.name} has no split {split!r}; there are: {', '.join(self.dataset.splits)}")
        try:
            return self.dataset.sampler(
                split,
                ways=data.ways if self.classification else None,
                shots=self.shots(split),
                queries=data.queries,
                meta_batch=tasks,
                seed=seed,
                device=self.device,
                dtype=self.dtype,
                augmentation=Augmentation(**asdict(augment)) if augmented and augment != AugmentConfig() else None,
            )
        except ValueError as error:
            raise ConfigError(f"{data.name}, split {split!r}: {error}") from error


def build(config: TrainConfig) -> Experiment:
    """Everything that a run needs, checked before anything is written.

    Raises:
        ConfigError: knobs that do not fit together, or do not fit the data.
        DataError: the data set is missing, damaged or of the wrong format.
        RunError: the device asked for is not there.
    """
    device = resolve_device(config.run.device)
    dataset = open_dataset(config.data)
    learner = build_learner(config, kind=dataset.kind, input_shape=dataset.input_shape, device=device)
    return Experiment(**vars(learner), dataset=dataset)


def build_learner(config: TrainConfig, *, kind: str, input_shape: tuple[int, ...], device: torch.device) -> Learner:
    """The part that needs no data, for "classification" or "regression" of inputs of this shape.

    Raises:
        ConfigError: knobs that do not fit together, or do not fit such inputs.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    loss = task_loss(config, kind=kind, input_shape=input_shape)
    dtype = getattr(torch, config.run.dtype)
    lam = None
    if config.meta.learn_lam != "none":
        lam = LearnableLam(loss.model, config.inner.lam, sharing=config.meta.learn_lam, dtype=dtype, device=device)
    return Learner(
        config=config,
        loss=loss,
        algorithm=_algorithm(config, loss, lam, config.inner.steps),
        test_algorithm=_algorithm(config, loss, lam, config.test_inner_steps),
        lam=lam,
        device=device,
        dtype=dtype,
    )


def _described(layout: ParameterLayout) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in zip(layout.names, layout.shapes, strict=True))


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for; `auto` is a GPU where torch has one, else the CPU.

    Raises:
        RunError: the name is not a device, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"run.device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def open_dataset(data: SourceConfig) -> Dataset:
    """The data set of a configuration.

    Raises:
        ConfigError: options that the data set does not have, or not allow.
        DataError: it is missing, damaged or of the wrong format.
    """
    taken = dataset_options(data.name)
    for knob in fields(SourceConfig):
        value = getattr(data, knob.name)
        if knob.name not in ("name", *taken) and value != knob.default:
            name = knob.name.replace("_", "-")
            raise ConfigError(f"data.{name} must be left out for the data set {data.name!r}, got {str(value)!r}")
    try:
        return load_dataset(data.name, **{option: getattr(data, option) for option in taken})
    except ValueError as error:
        raise ConfigError(f"{data.name}: {error}") from error


def task_loss(config: TrainConfig, *, kind: str, input_shape: tuple[int, ...]) -> TaskLoss:
    """The model of a configuration, for "classification" or "regression" of such inputs, and its criterion.

    Raises:
        ConfigError: the model does not take such inputs.
    """
    model, classification = config.model, kind == "classification"
    outputs = config.data.ways if classification else 1
    if model.name == "mlp":
        net: TaskModel = MLP(
            math.prod(input_shape), model.hidden, outputs, activation=model.activation, precision=model.precision
        )
    else:
        channels, height, width = input_shape
        if height != width:
            raise ConfigError(f"model.name 'conv4' needs square images, {config.data.name} has {height} × {width}")
        net = Conv4(
            outputs,
            in_channels=channels,
            image_size=height,
            filters=model.filters,
            pooling=model.pooling,
            precision=model.precision,
        )
    return TaskLoss(net, "cross_entropy" if classification else "mse")


def _inner(config: TrainConfig, steps: int) -> InnerSolver:
    inner = config.inner
    if inner.solver == "hessian_free":
        return HessianFree(
            steps=steps,
            cg_steps=inner.cg_steps,
            curvature=inner.curvature,
            damping=inner.damping,
            backtracks=inner.backtracks,
        )
    return GradientDescent(
        steps=steps,
        lr=inner.lr,
        optimizer=inner.optimizer,
        momentum=inner.momentum,
        betas=inner.betas,
        proximal=inner.proximal,
        batch_size=inner.batch_size,
    )


def _algorithm(config: TrainConfig, loss: TaskLoss, learnt: LearnableLam | None, inner_steps: int) -> MetaAlgorithm:
    meta, inner = config.meta, _inner(config, inner_steps)
    lam = config.inner.lam if learnt is None else learnt
    if meta.algorithm == "maml":
        return MAML(loss, lam=lam, inner=inner, checkpoint=meta.checkpoint_steps)
    if meta.algorithm == "fomaml":
        return FOMAML(loss, lam=config.inner.lam, inner=inner)
    if meta.algorithm == "reptile":
        return Reptile(loss, lam=config.inner.lam, inner=inner)
    return IMAML(
        loss,
        lam=lam,
        inner=inner,
        solver=meta.solver,
        solver_lr=meta.solver_lr,
        cg_steps=meta.cg_steps,
        cg_rtol=meta.cg_rtol,
        damping=meta.damping,
        curvature=meta.curvature,
        negative_curvature=meta.negative_curvature,
    )

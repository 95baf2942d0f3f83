"""From a configuration to the objects that train: data set, model, loss, meta-gradient algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.data import Dataset, Sampler, load_dataset
from imaml_ext.inner import GradientDescent, HessianFree, InnerSolver
from imaml_ext.meta import FOMAML, IMAML, MAML, LearnableLam, MetaAlgorithm, Reptile
from imaml_ext.models import MLP, Conv4, TaskLoss, TaskModel
from imaml_ext.training.checkpoint import Checkpoint, CheckpointError
from imaml_ext.training.config import ConfigError, DataConfig, TrainConfig
from imaml_ext.training.run_directory import RunError


@dataclass(frozen=True)
class Experiment:
    """What a configuration describes, on its device."""

    config: TrainConfig
    dataset: Dataset
    loss: TaskLoss
    algorithm: MetaAlgorithm
    test_algorithm: MetaAlgorithm  # the same, with the inner steps of the evaluation
    lam: LearnableLam | None  # of both, where it is learnt
    device: torch.device
    dtype: torch.dtype

    @property
    def model(self) -> TaskModel:
        return self.loss.model

    @property
    def classification(self) -> bool:
        return self.dataset.kind == "classification"

    def initial_theta(self) -> Tensor:
        """theta [N], the same bits for a seed on every machine."""
        return self.model.init(seed=self.config.run.seed, dtype=self.dtype, device=self.device)

    def sampler(self, split: str, *, tasks: int, seed: int) -> Sampler:
        """Batches of `tasks` tasks of a split; batch t is a function of (seed, split, t) alone.

        Raises:
            ConfigError: the data set has no such split, or its classes do not allow such tasks.
        """
        data = self.config.data
        if split not in self.dataset.splits:
            raise ConfigError(f"{data.name} has no split {split!r}; there are: {', '.join(self.dataset.splits)}")
        try:
            return self.dataset.sampler(
                split,
                ways=data.ways if self.classification else None,
                shots=data.train_shots if split == "train" and data.train_shots is not None else data.shots,
                queries=data.queries,
                meta_batch=tasks,
                seed=seed,
                device=self.device,
                dtype=self.dtype,
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
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    dataset = open_dataset(config.data)
    loss = TaskLoss(_model(config, dataset), "cross_entropy" if dataset.kind == "classification" else "mse")
    dtype = getattr(torch, config.run.dtype)
    lam = None
    if config.meta.learn_lam != "none":
        lam = LearnableLam(loss.model, config.inner.lam, sharing=config.meta.learn_lam, dtype=dtype, device=device)
    return Experiment(
        config=config,
        dataset=dataset,
        loss=loss,
        algorithm=_algorithm(config, loss, lam, config.inner.steps),
        test_algorithm=_algorithm(config, loss, lam, config.test_inner_steps),
        lam=lam,
        device=device,
        dtype=dtype,
    )


def restore_lam(experiment: Experiment, saved: Checkpoint) -> None:
    """Put the λ of a checkpoint into the experiment's algorithms, where it is learnt.

    Raises:
        CheckpointError: the checkpoint holds none, or of another shape.
    """
    if experiment.lam is None:
        return
    log = experiment.lam.log.detach()
    if saved.log_lam is None or saved.log_lam.shape != log.shape:
        found = "no lambda" if saved.log_lam is None else f"{saved.log_lam.numel()} values of lambda"
        raise CheckpointError(f"the checkpoint of step {saved.step} holds {found}, the model needs {log.numel()}")
    log.copy_(saved.log_lam)


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


def open_dataset(data: DataConfig) -> Dataset:
    """The data set of a configuration.

    Raises:
        ConfigError: options that the data set does not allow.
        DataError: it is missing, damaged or of the wrong format.
    """
    try:
        return load_dataset(
            data.name,
            root=data.root,
            split_protocol=data.split_protocol,
            validation=data.validation,
            rotations=data.rotations,
            cache_dir=data.cache_dir,
            download=data.download,
            features=data.features,
            condition_number=data.condition_number,
            noise=data.noise,
        )
    except ValueError as error:
        raise ConfigError(f"{data.name}: {error}") from error


def _model(config: TrainConfig, dataset: Dataset) -> TaskModel:
    model = config.model
    outputs = config.data.ways if dataset.kind == "classification" else 1
    if model.name == "conv4":
        channels, height, width = dataset.input_shape
        if height != width:
            raise ConfigError(f"model.name 'conv4' needs square images, {config.data.name} has {height} × {width}")
        return Conv4(outputs, in_channels=channels, image_size=height, filters=model.filters, pooling=model.pooling)
    features = 1
    for size in dataset.input_shape:
        features *= size
    return MLP(features, model.hidden, outputs, activation=model.activation)


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
        steps=steps, lr=inner.lr, optimizer=inner.optimizer, momentum=inner.momentum, proximal=inner.proximal
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

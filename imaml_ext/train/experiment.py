"""From a configuration to the objects that train: data set, loss, algorithm, meta-parameters to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imaml_ext.data import Augmentation, Dataset, Sampler
from imaml_ext.errors import CheckpointError, ConfigError, RunError
from imaml_ext.losses import TaskLoss
from imaml_ext.meta import MetaAlgorithm
from imaml_ext.models import Conv4, ParameterLayout, TaskModel
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.export import weights_from


@dataclass(frozen=True)
class Experiment:
    """Holds what a configuration describes, on its device.

    Attributes:
        test_algorithm: the algorithm with the inner steps of the evaluation.
    """

    config: TrainConfig
    dataset: Dataset
    loss: TaskLoss
    algorithm: MetaAlgorithm
    test_algorithm: MetaAlgorithm
    device: torch.device
    dtype: torch.dtype

    @property
    def model(self) -> TaskModel:
        return self.loss.model

    @property
    def classification(self) -> bool:
        return self.config.classification

    def initial_params(self, start: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the meta-parameters to begin with: {"theta": [N]}, and what is learnt beside it.

        theta is random, the same bits for a seed on every machine, or what `theta.weights` names. With a shared head,
        every class has the mean over the classes. The features that the last layer reads are scaled by
        `theta.feature_scale`.

        Args:
            start: what `starting_params` has read; None: it is read here.

        Raises:
            RunError, ConfigError: there are no such weights, they are damaged, or another model's.
        """
        start = self.starting_params() if start is None else start
        start = {name: value.to(self.device, self.dtype, copy=True) for name, value in start.items()}
        random = self.model.init(seed=self.config.run.seed, dtype=self.dtype, device=self.device)
        theta = self.shared_(start.get("theta", random))
        if isinstance(self.model, Conv4):
            self.model.scale_features_(theta, self.config.theta.feature_scale)
        params = self.algorithm.initial(theta)
        fits = {name: value for name, value in start.items() if name in params and value.shape == params[name].shape}
        return params | fits  # theta itself is in both

    def starting_params(self) -> dict[str, Tensor]:
        """Reads the meta-parameters that `theta.weights` names, as this model has them; empty where it names none."""
        source = self.config.theta.weights
        if source is None:
            return {}
        ways = self.config.tasks.ways if self.config.theta.shared_head else None
        weights = weights_from(source)
        weights.card.recorded_classes.check(self.dataset, what=f"theta.weights {weights.name}")
        weights = weights.for_ways(ways, shared=True)
        ours, theirs = self.model.layout, weights.model.layout
        if theirs != ours:
            expected = f"have the parameters of the model, {_described(ours)}, got {_described(theirs)}"
            raise ConfigError(f"theta.weights must {expected}")
        return weights.params

    def shared_(self, vector: Tensor) -> Tensor:
        """Makes theta [N], or a gradient of it, the same for all classes where the head is a shared one; in place.

        Labels are dealt to the classes of a task at random, so that what theta tells of one class and not of another
        is noise (Ye and Chao, How to Train Your MAML to Excel in Few-Shot Classification, ICLR 2022).
        """
        return self.model.layout.share_last_layer_(vector) if self.config.theta.shared_head else vector

    def restored(self, saved: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns saved meta-parameters on the device; a CheckpointError says what `like` holds, and they do not."""
        for name, value in like.items():
            found = saved.get(name, value[:0])
            if found.shape != value.shape or found.dtype != value.dtype:
                held = f"{found.numel()} values of {name}, {found.dtype}"
                raise CheckpointError(f"the checkpoint holds {held}; the model has {value.numel()}, {value.dtype}")
        return {name: saved[name].to(self.device, copy=True) for name in like}

    def sampler(self, split: str, *, tasks: int, seed: int, augmented: bool = False) -> Sampler:
        """Returns a sampler of batches of `tasks` tasks of a split; batch t is a function of (seed, split, t) alone.

        `augmented`: images are changed as the configuration says for training. ConfigError: there are no such tasks.
        """
        config, name, augment = self.config, self.config.data.kind_name, self.config.augment
        if split not in self.dataset.splits:
            raise ConfigError(f"{name} has no split {split!r}; there are: {', '.join(self.dataset.splits)}")
        try:
            return self.dataset.sampler(
                split,
                ways=config.tasks.ways if self.classification else None,
                **config.tasks.sizes(split),
                meta_batch=tasks,
                seed=seed,
                device=self.device,
                dtype=self.dtype,
                augmentation=augment if augmented and augment != Augmentation() else None,
            )
        except ValueError as error:
            raise ConfigError(f"{name}, split {split!r}: {error}") from error


def build(config: TrainConfig) -> Experiment:
    """Makes everything that a run needs, checked before anything is written.

    Raises:
        ConfigError: settings that do not fit together, or do not fit the data.
        DataError: the data set is missing, damaged or of the wrong format.
        RunError: the device asked for is not there.
    """
    device = resolve_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    dataset = config.data.load()
    loss = config.task_loss(dataset.input_shape)
    algorithm = config.algorithm.bound(loss)
    tested = replace(algorithm, inner=replace(algorithm.inner, steps=config.test_inner_steps))  # type: ignore[type-var]
    dtype = getattr(torch, config.run.dtype)
    return Experiment(config, dataset, loss, algorithm, tested, device, dtype)


def resolve_device(name: str) -> torch.device:
    """Returns the device that a name stands for; `auto` is a GPU where torch has one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"run.device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _described(layout: ParameterLayout) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in zip(layout.names, layout.shapes, strict=True))

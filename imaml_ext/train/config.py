"""The configuration of a training run: what is trained, on which tasks, and how it is run and recorded.

It holds the library's own settings objects (a data source, a model, an algorithm), and the groups of this module. The
command line is made from these classes (the comment beside a field is its help), and `config.json` is their JSON form.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from imaml_ext.data import Augmentation, DataSource, Glyphs
from imaml_ext.errors import ConfigError
from imaml_ext.losses import TaskLoss
from imaml_ext.meta import IMAML, MetaAlgorithm
from imaml_ext.models import Conv4, TaskModel
from imaml_ext.settings import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, Bounds, Settings, leaves

_TWO = Bounds(at_least=2)


@dataclass(frozen=True)
class Tasks(Settings):
    """Says what a task is made of."""

    ways: Annotated[int, _TWO] = 5  # Classes per task (not in regression).
    shots: Annotated[int, COUNT] = 1  # Support examples per class; in regression, support points per task.
    # The same in training, where it is to differ from the test; unset: tasks.shots.
    train_shots: Annotated[int | None, COUNT] = None
    # Query examples per class, judged together; in regression, query points per task. Unset: as many as shots.
    queries: Annotated[int | None, COUNT] = None
    # The same in training, where it is to differ from the test; unset: as at the test.
    train_queries: Annotated[int | None, COUNT] = None

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"train_queries": None, **values}

    def sizes(self, split: str) -> dict[str, int]:
        """Returns shots and queries of the tasks of a split."""
        shots, queries = self.shots, self.queries or self.shots
        if split == "train":
            shots, queries = self.train_shots or shots, self.train_queries or queries
        return {"shots": shots, "queries": queries}


@dataclass(frozen=True)
class Theta(Settings):
    """Says which meta-parameters to begin with, and what the classes of a task share of them."""

    # Begin with published weights, a file *.safetensors, or the run in a directory; unset: random parameters.
    weights: str | None = None
    shared_head: bool = False  # All classes begin with one and the same vector and bias of the last layer.
    # Factor on the features that the last layer reads, applied once at the beginning (conv4).
    feature_scale: Annotated[float, POSITIVE] = 1.0


@dataclass(frozen=True)
class Outer(Settings):
    """Configures the outer loop (Algorithm 1)."""

    steps: Annotated[int, COUNT] = 1000  # Meta-steps.
    meta_batch: Annotated[int, COUNT] = 8  # Tasks per meta-step.
    optimizer: Literal["adam", "sgd"] = "adam"  # Outer optimiser.
    lr: Annotated[float, POSITIVE] = 1e-3  # Peak learning rate of theta.
    # Peak learning rate of what is learnt beside theta (of its logarithm); it follows the same schedule.
    learnt_lr: Annotated[float, POSITIVE] = 1e-2
    # How the learning rates fall from their peak to 0 over the run.
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Meta-steps over which the learning rates first rise linearly to their peak.
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    # Largest norm of a meta-parameter's gradient; longer ones are scaled down to it. Unset: no limit.
    clip_norm: Annotated[float | None, POSITIVE] = None
    # Decay of exponential averages of the meta-parameters, which are evaluated in their place; 0: off.
    average: Annotated[float, FRACTION] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.warmup_steps < self.steps, "warmup_steps", f"smaller than steps ({self.steps})")


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """Configures validation during training, and the test at the end."""

    # Classes that the run is judged on at its end: those of the test, or of the validation in a stage before the last.
    split: Literal["test", "val"] = "test"
    tasks: Annotated[int, _TWO] = 600  # Tasks of that.
    meta_batch: Annotated[int, COUNT] = 25  # Tasks evaluated at a time; it changes the memory needed, not the result.
    # Inner steps at validation and test; unset: as in training; 0 judges theta itself.
    inner_steps: Annotated[int | None, NOT_NEGATIVE] = None
    every: Annotated[int, NOT_NEGATIVE] = 0  # Meta-steps between validations, on the validation split; 0: never.
    validation_tasks: Annotated[int, _TWO] = 100  # Tasks per validation, the same ones each time.
    # Keep the checkpoint of the best validation, and judge it in place of the last one: at the end of the run, and in
    # `evaluate` and `export`. The best has the highest accuracy or, in regression, the lowest loss.
    keep_best: bool = False
    # Stop after so many validations in turn that are not better than the best before them; unset: never.
    patience: Annotated[int | None, COUNT] = None
    # Seed of the validation and test tasks, apart from run.seed: every run is tested on the same tasks.
    seed: Annotated[int, NOT_NEGATIVE] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tracks_best:
            self.require(self.every > 0, "every", "above 0 with keep_best or patience, which need validations")

    @property
    def tracks_best(self) -> bool:
        """Whether the run remembers its best validation."""
        return self.keep_best or self.patience is not None

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"split": "test", "keep_best": False, "patience": None, **values}


@dataclass(frozen=True)
class RunSettings(Settings):
    """Says how the run is executed and recorded."""

    seed: Annotated[int, NOT_NEGATIVE] = 0  # Seed of the initial parameters and of the training tasks.
    device: str = "auto"  # `cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU where torch has one, else the CPU.
    dtype: Literal["float32", "float64"] = "float32"  # Floating-point type of parameters and images.
    capture: bool = False  # Capture the meta-step as a CUDA graph and replay it (on a GPU only).
    # CPU threads; unset: torch's own choice. Bit-identical results need the same number.
    threads: Annotated[int | None, COUNT] = None
    # Meta-steps averaged into a line of metrics.jsonl; the device is waited for only there.
    log_every: Annotated[int, COUNT] = 20
    checkpoint_every: Annotated[int, COUNT] = 200  # Meta-steps between checkpoints.
    keep_checkpoints: Annotated[int, COUNT] = 3  # Number of newest checkpoints kept.
    tensorboard: bool = True  # Write TensorBoard events, where tensorboard is installed.

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.device), "device", "the name of a device")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Holds everything that decides a run; its JSON form is recorded in the run directory.

    Raises:
        ConfigTypeError, ConfigError: a setting of the wrong type or outside its range, or settings that do not fit
            together; a TypeError and a ValueError.
    """

    data: DataSource = field(default_factory=Glyphs)  # Data set.
    tasks: Tasks = field(default_factory=Tasks)
    augment: Augmentation = field(default_factory=Augmentation)
    model: TaskModel = field(default_factory=Conv4)  # Network that is adapted to each task.
    theta: Theta = field(default_factory=Theta)
    # How the meta-gradient is computed: implicitly, through the inner steps, to first order, or by Reptile.
    algorithm: MetaAlgorithm = field(default_factory=IMAML)
    outer: Outer = field(default_factory=Outer)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        conv4, learn = isinstance(self.model, Conv4), self.algorithm.learn
        if not self.classification:
            without = f"for the data set {self.data.kind_name!r}, which has no"
            self._demand("model", not conv4, f"'mlp' {without} images")
            self._demand("theta.shared_head", not self.theta.shared_head, f"false {without} classes")
            for path, value in leaves(self.augment, "augment."):
                self._demand(path, not value, f"left out {without} images")
        if "parameter" in learn.values():
            expected = "false where something is learnt per 'parameter', which tells the classes apart"
            self._demand("theta.shared_head", not self.theta.shared_head, expected)
        self._demand("theta.feature_scale", conv4 or self.theta.feature_scale == 1, "1 but for conv4")
        if self.run.dtype != "float32":
            self._demand("model.precision", self.model.precision == "float32", "'float32' with run.dtype 'float64'")
        self._demand("algorithm.lam", "lam" not in learn or bool(self.algorithm.lam > 0), "positive to be learnt")
        if self.run.capture:
            self._check_capture()

    def _check_capture(self) -> None:
        """Refuses what a CUDA graph cannot hold: waiting for the device, a learning rate that lives on the host."""
        waits = "with run.capture, which cannot wait for the device"
        adam = "'adam' with run.capture, whose learning rate can stay on the device"
        self._demand("outer.optimizer", self.outer.optimizer == "adam", adam)
        for path, value in leaves(self.algorithm, "algorithm."):
            if path.endswith(".stop_early"):
                self._demand(path, not value, f"unset {waits}")
            elif path.endswith(".keep_moments"):
                self._demand(path, not value, f"false {waits}")
            elif path.endswith(".on_breakdown"):
                self._demand(path, value != "raise", f"'keep', 'gradient' or 'skip' {waits}")
            elif path.endswith(".preconditioner"):
                self._demand(path, value is None, f"unset {waits}")

    def _demand(self, path: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ConfigError(f"{path} must be {expected}, got {dict(leaves(self))[path]!r}")

    @property
    def classification(self) -> bool:
        """Whether the tasks have classes."""
        return self.data.kind_of_task == "classification"

    @property
    def outputs(self) -> int:
        """Outputs of the model per example: one per class, or one number."""
        return self.tasks.ways if self.classification else 1

    @property
    def test_inner_steps(self) -> int:
        """Inner steps at validation and test."""
        given = self.evaluation.inner_steps
        return self.algorithm.inner.steps if given is None else given

    def task_loss(self, input_shape: tuple[int, ...]) -> TaskLoss:
        """Returns the model for examples of this shape, with the criterion of its tasks.

        Raises:
            ConfigError: the model does not take such inputs.
        """
        return TaskLoss(self.model.fitted(input_shape, self.outputs), "cross_entropy" if self.classification else "mse")


def differences(before: Settings, after: Settings, prefix: str = "") -> dict[str, Any]:
    """Returns the settings in which `after` differs from `before`, {path: value} as `settings.changed` takes them."""
    found: dict[str, Any] = {}
    for field_ in fields(after):  # type: ignore[arg-type]
        path, old, new = f"{prefix}{field_.name}", getattr(before, field_.name), getattr(after, field_.name)
        if isinstance(new, Settings) and type(new) is type(old):
            found |= differences(old, new, f"{path}.")
        elif new != old:
            found[path] = new
    return found

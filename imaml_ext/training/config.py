"""The configuration of a training run: nested frozen dataclasses, each knob defined once.

The command line is generated from these classes (the line under a field is its help), `config.json` of a run directory
is their JSON form, and `from_json` reads it back strictly. Nothing here imports torch: `imaml --help` stays quick.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from imaml_ext.errors import ConfigError

Config = TypeVar("Config")


def _check(condition: bool, knob: str, expected: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{knob} must be {expected}, got {value!r}")


def _check_finite_positive(knob: str, value: float) -> None:
    _check(math.isfinite(value) and value > 0, knob, "a positive number", value)


def _check_finite_nonnegative(knob: str, value: float) -> None:
    _check(math.isfinite(value) and value >= 0, knob, "a number >= 0", value)


def _check_fraction(knob: str, value: float) -> None:
    _check(0 <= value < 1, knob, "in [0, 1)", value)


def _check_count(knob: str, value: int, least: int = 1) -> None:
    _check(value >= least, knob, f"an integer >= {least}", value)


DatasetName = Literal["glyphs", "omniglot", "mini-imagenet", "cifar-fs", "fc100", "folder", "sinusoid", "linear"]


@dataclass(frozen=True)
class SourceConfig:
    """A data set. An option that it has no use for must be left as it is."""

    name: DatasetName = "glyphs"
    """Data set. `glyphs`, `sinusoid` and `linear` need no download."""

    root: Path | None = None
    """Folder of the data set's files; unset: the environment variable IMAML_DATA_ROOT, else the cache."""

    cache_dir: Path | None = None
    """Folder for rendered or packed images; unset: the user's cache folder."""

    download: bool = False
    """Download the data set through torchvision when it is not under the root (omniglot, cifar-fs, fc100)."""

    split_protocol: Literal["1200/423", "vinyals"] = "1200/423"
    """Omniglot's characters: 1,200 to train on and 423 to test, or Vinyals' 1,028 / 172 / 423 with validation."""

    validation: int = 0
    """Characters of the protocol 1200/423 that are held out of the 1,200 for validation (omniglot)."""

    rotations: bool = True
    """A character in each of four orientations is a class of its own (omniglot; glyphs: in training only)."""

    image_size: int = 84
    """Pixels a side that pictures are scaled to (folder)."""

    greyscale: bool = False
    """Read pictures without their colours (folder)."""

    val_fraction: float = 0.16
    """Fraction of the classes for validation, where there are no folders train, val and test (folder)."""

    test_fraction: float = 0.2
    """Fraction of the classes for testing, likewise (folder)."""

    features: int = 20
    """Inputs of a regression task (linear)."""

    condition_number: float = 10.0
    """Condition number of the regression problems (linear)."""

    noise: float = 0.1
    """Standard deviation of the noise on the targets (linear)."""

    def __post_init__(self) -> None:
        _check_count("data.validation", self.validation, least=0)
        _check_count("data.image-size", self.image_size)
        _check_fraction("data.val-fraction", self.val_fraction)
        _check_fraction("data.test-fraction", self.test_fraction)
        _check(
            self.val_fraction + self.test_fraction < 1,
            "data.test-fraction",
            f"below 1 together with data.val-fraction ({self.val_fraction})",
            self.test_fraction,
        )
        _check_count("data.features", self.features)
        _check(
            math.isfinite(self.condition_number) and self.condition_number >= 1,
            "data.condition-number",
            "a number >= 1",
            self.condition_number,
        )
        _check_finite_nonnegative("data.noise", self.noise)


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Where the tasks come from, and what they are made of."""

    ways: int = 5
    """Classes of a task (not in regression)."""

    shots: int = 1
    """Support examples of each class; for regression, support points of a task."""

    train_shots: int | None = None
    """The same in training, where it is to be another number than at test; unset: data.shots."""

    queries: int = 5
    """Query examples of each class; for regression, query points of a task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("data.ways", self.ways, least=2)
        _check_count("data.shots", self.shots)
        if self.train_shots is not None:
            _check_count("data.train-shots", self.train_shots)
        _check_count("data.queries", self.queries)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to the images of training tasks, support and query alike; none at validation and test."""

    flip: bool = False
    """Mirror every other image left to right."""

    crop_padding: int = 0
    """Shift each image by up to so many pixels in each direction; what is uncovered is black."""

    brightness: float = 0.0
    """Multiply each image by a random factor in 1 - brightness .. 1 + brightness."""

    contrast: float = 0.0
    """Likewise the differences from the image's mean."""

    saturation: float = 0.0
    """Likewise the differences of colours from grey."""

    def __post_init__(self) -> None:
        _check_count("augment.crop-padding", self.crop_padding, least=0)
        for knob in ("brightness", "contrast", "saturation"):
            _check(0 <= getattr(self, knob) <= 1, f"augment.{knob}", "in [0, 1]", getattr(self, knob))


@dataclass(frozen=True)
class ModelConfig:
    """The network that is adapted to each task."""

    name: Literal["conv4", "mlp"] = "conv4"
    """Four convolutions with batch norm, for images; or fully connected layers."""

    filters: int = 64
    """Channels of each convolution (conv4)."""

    pooling: Literal["stride", "max"] = "stride"
    """How conv4 halves the image after each layer."""

    hidden: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers (mlp)."""

    activation: Literal["relu", "tanh"] = "relu"
    """Non-linearity of the hidden layers (mlp)."""

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of the products in every layer: on a GPU, less than float32 is for its tensor cores; a CPU rounds to it."""

    weights: str | None = None
    """Meta-parameters to begin with: the name of published weights or a file *.safetensors; unset: random ones."""

    head: Literal["own", "shared"] = "own"
    """Meta-parameters of the last layer: every class's own, or one vector and bias that all of them begin with."""

    feature_scale: float = 1.0
    """Factor on the features that the last layer reads, by the meta-parameters to begin with (conv4)."""

    def __post_init__(self) -> None:
        _check_count("model.filters", self.filters)
        _check_finite_positive("model.feature-scale", self.feature_scale)
        if self.name != "conv4":
            _check(self.feature_scale == 1, "model.feature-scale", f"left out for {self.name}", self.feature_scale)
        _check(all(width >= 1 for width in self.hidden), "model.hidden", "widths >= 1", self.hidden)


@dataclass(frozen=True)
class InnerConfig:
    """The proximal problem of a task, argmin over phi of L(phi) + lam/2 |phi - theta|^2, and its solver."""

    lam: float = 2.0
    """Regularisation lambda: how strongly a task's parameters are held at theta. 0 is plain MAML, FOMAML, Reptile."""

    solver: Literal["gradient_descent", "hessian_free"] = "gradient_descent"
    """How the problem is solved: gradient descent, or Newton-CG with a line search (needs few inner.steps)."""

    steps: int = 16
    """Gradient or Newton steps in training and, unless evaluation.inner-steps says otherwise, at test."""

    lr: float = 0.1
    """Inner learning rate (gradient_descent)."""

    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """Inner optimiser (gradient_descent)."""

    momentum: float = 0.9
    """Momentum of the inner optimiser `momentum`."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments of the inner optimiser `adam`."""

    batch_size: int | None = None
    """Examples of a task in a gradient step, each in its turn (gradient_descent); unset: its whole support set."""

    proximal: Literal["gradient", "pullback"] = "gradient"
    """Every step on the proximal objective; or plain steps, then one step of the penalty (the paper's public code)."""

    cg_steps: int = 5
    """Conjugate-gradient iterations of a Newton direction (hessian_free)."""

    curvature: Literal["hessian", "gauss_newton"] = "gauss_newton"
    """The matrix of the Newton direction (hessian_free)."""

    damping: float = 0.0
    """delta >= 0, added to lambda in the Newton direction (hessian_free)."""

    backtracks: int = 10
    """How often a Newton step is halved at most, before the task stays where it is (hessian_free)."""

    def __post_init__(self) -> None:
        _check_finite_nonnegative("inner.lam", self.lam)
        _check_count("inner.steps", self.steps)
        _check_finite_positive("inner.lr", self.lr)
        _check_fraction("inner.momentum", self.momentum)
        for beta in self.betas:
            _check(0 <= beta < 1, "inner.betas", "two numbers in [0, 1)", self.betas)
        if self.batch_size is not None:
            _check_count("inner.batch-size", self.batch_size)
        _check_count("inner.cg-steps", self.cg_steps)
        _check_finite_nonnegative("inner.damping", self.damping)
        _check_count("inner.backtracks", self.backtracks, least=0)
        if self.solver == "hessian_free":
            without = "with inner.solver 'hessian_free'"
            _check(self.optimizer == "sgd", "inner.optimizer", f"left out {without}", self.optimizer)
            _check(self.proximal == "gradient", "inner.proximal", f"left out {without}", self.proximal)
            _check(self.batch_size is None, "inner.batch-size", f"left out {without}", self.batch_size)


@dataclass(frozen=True)
class MetaConfig:
    """The meta-gradient (Algorithm 2)."""

    algorithm: Literal["imaml", "maml", "fomaml", "reptile"] = "imaml"
    """How the meta-gradient is computed: implicitly, through the inner steps, to first order, or by Reptile."""

    solver: Literal["cg", "neumann", "fixed_point"] = "cg"
    """Solver of the implicit system (imaml): conjugate gradients, Neumann series, or fixed point of the inner step."""

    cg_steps: int = 5
    """Iterations of the implicit solve, whichever solver it is."""

    cg_rtol: float = 1e-5
    """Relative residual at which a task's solve stops early."""

    solver_lr: float | None = None
    """Step size of the solver fixed_point; unset: inner.lr."""

    damping: float = 0.0
    """delta >= 0, added to lambda in the operator of the solve."""

    curvature: Literal["hessian", "gauss_newton"] = "gauss_newton"
    """The matrix of the solve: the Gauss-Newton matrix, which trains stably, or the Hessian, the paper's letter."""

    negative_curvature: Literal["keep", "gradient", "skip", "raise"] = "keep"
    """A task whose solve breaks down gives its last good iterate, its first-order gradient, or nothing; or stop."""

    checkpoint_steps: bool = False
    """Keep the inner iterates alone and compute the rest again in the backward sweep (maml): memory for time."""

    learn_lam: Literal["none", "global", "layer", "parameter"] = "none"
    """Learn lambda from inner.lam on: one, one a parameter tensor, or one a parameter (imaml, maml)."""

    def __post_init__(self) -> None:
        _check_count("meta.cg-steps", self.cg_steps)
        _check_finite_nonnegative("meta.cg-rtol", self.cg_rtol)
        _check_finite_nonnegative("meta.damping", self.damping)
        if self.solver_lr is not None:
            _check_finite_positive("meta.solver-lr", self.solver_lr)
        # A knob that the algorithm has no use for was meant for another one.
        if self.algorithm != "imaml":
            _check(self.solver == "cg", "meta.solver", f"left out with meta.algorithm {self.algorithm!r}", self.solver)
        if self.algorithm != "maml":
            _check(
                not self.checkpoint_steps,
                "meta.checkpoint-steps",
                f"left out with meta.algorithm {self.algorithm!r}",
                self.checkpoint_steps,
            )
        if self.solver != "fixed_point":
            _check(
                self.solver_lr is None, "meta.solver-lr", f"left out with meta.solver {self.solver!r}", self.solver_lr
            )
        if self.algorithm in ("fomaml", "reptile"):
            _check(
                self.learn_lam == "none",
                "meta.learn-lam",
                f"'none' with meta.algorithm {self.algorithm!r}, which has no gradient in lambda",
                self.learn_lam,
            )


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop (Algorithm 1)."""

    steps: int = 1000
    """Meta-steps."""

    meta_batch: int = 8
    """Tasks a meta-step."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Outer optimiser."""

    lr: float = 1e-3
    """Peak outer learning rate."""

    lam_lr: float = 1e-2
    """Peak learning rate of log lambda, where meta.learn-lam learns it; it follows the same schedule."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""

    eps: float = 1e-8
    """Adam's epsilon."""

    momentum: float = 0.0
    """Momentum of the outer optimiser `sgd`."""

    weight_decay: float = 0.0
    """L2 penalty on theta (coupled, as in torch.optim.Adam and SGD)."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from its peak to lr * final-lr-fraction over the run."""

    final_lr_fraction: float = 0.0
    """Learning rate at the end of a linear or cosine schedule, as a fraction of the peak."""

    warmup_steps: int = 0
    """Meta-steps over which the learning rate first rises linearly to its peak."""

    clip_norm: float | None = None
    """Largest norm of the meta-gradient; longer ones are scaled down to it."""

    average: float = 0.0
    """Decay of an exponential average of theta that is evaluated in its place; 0: off."""

    def __post_init__(self) -> None:
        _check_count("outer.steps", self.steps)
        _check_count("outer.meta-batch", self.meta_batch)
        _check_finite_positive("outer.lr", self.lr)
        _check_finite_positive("outer.lam-lr", self.lam_lr)
        for beta in self.betas:
            _check(0 <= beta < 1, "outer.betas", "two numbers in [0, 1)", self.betas)
        _check_finite_positive("outer.eps", self.eps)
        _check_fraction("outer.momentum", self.momentum)
        _check_finite_nonnegative("outer.weight-decay", self.weight_decay)
        _check(0 <= self.final_lr_fraction <= 1, "outer.final-lr-fraction", "in [0, 1]", self.final_lr_fraction)
        _check_count("outer.warmup-steps", self.warmup_steps, least=0)
        _check(
            self.warmup_steps < self.steps,
            "outer.warmup-steps",
            f"smaller than outer.steps ({self.steps})",
            self.warmup_steps,
        )
        if self.clip_norm is not None:
            _check_finite_positive("outer.clip-norm", self.clip_norm)
        _check_fraction("outer.average", self.average)


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation while training, and the test at the end."""

    tasks: int = 600
    """Test tasks at the end of the run."""

    meta_batch: int = 25
    """Tasks evaluated at a time: memory, not the result."""

    inner_steps: int | None = None
    """Inner steps at validation and test; unset: inner.steps; 0 judges theta itself."""

    every: int = 0
    """Meta-steps between validations, on the validation split where there is one; 0: never."""

    validation_tasks: int = 100
    """Tasks of each validation; the same ones each time."""

    seed: int = 0
    """Seed of the validation and test tasks, apart from run.seed: every run is tested on the same tasks."""

    def __post_init__(self) -> None:
        _check_count("evaluation.tasks", self.tasks, least=2)
        _check_count("evaluation.meta-batch", self.meta_batch)
        if self.inner_steps is not None:
            _check_count("evaluation.inner-steps", self.inner_steps, least=0)
        _check_count("evaluation.every", self.every, least=0)
        _check_count("evaluation.validation-tasks", self.validation_tasks, least=2)
        _check_count("evaluation.seed", self.seed, least=0)


@dataclass(frozen=True)
class FromScratch:
    """The baseline without meta-learning: each task's network is trained on its support set alone, with Adam."""

    steps: int
    lr: float = 0.003

    def __post_init__(self) -> None:
        _check_count("from-scratch", self.steps)
        _check_finite_positive("scratch-lr", self.lr)


@dataclass(frozen=True)
class RunConfig:
    """How the run is executed and recorded."""

    seed: int = 0
    """Seed of the initial parameters and of the training tasks."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU where torch has one, else the CPU."""

    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type of parameters and images."""

    capture: bool = False
    """Capture the meta-step as a CUDA graph, and replay it; on a GPU only."""

    threads: int | None = None
    """CPU threads; unset: torch's own choice. Bit-identical results need the same number."""

    log_every: int = 20
    """Meta-steps averaged into a line of metrics.jsonl; the only moments at which the device is waited for."""

    checkpoint_every: int = 200
    """Meta-steps between checkpoints."""

    keep_checkpoints: int = 3
    """Newest checkpoints kept."""

    tensorboard: bool = True
    """Write TensorBoard events, where tensorboard is installed."""

    def __post_init__(self) -> None:
        _check_count("run.seed", self.seed, least=0)
        _check(bool(self.device), "run.device", "a device name", self.device)
        if self.threads is not None:
            _check_count("run.threads", self.threads)
        _check_count("run.log-every", self.log_every)
        _check_count("run.checkpoint-every", self.checkpoint_every)
        _check_count("run.keep-checkpoints", self.keep_checkpoints)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; its JSON form is recorded in the run directory."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.data.name in ("sinusoid", "linear") and self.model.name == "conv4":
            raise ConfigError(f"model.name must be 'mlp' for the data set {self.data.name!r}, which has no images")
        if self.run.dtype != "float32":
            without = f"'float32' with run.dtype {self.run.dtype!r}"
            _check(self.model.precision == "float32", "model.precision", without, self.model.precision)
        if self.model.head == "shared":
            classes = self.data.name not in ("sinusoid", "linear")
            without = f"'own' for the data set {self.data.name!r}, which has no classes"
            _check(classes, "model.head", without, self.model.head)
            each = "'own' with meta.learn-lam 'parameter', which tells the classes apart"
            _check(self.meta.learn_lam != "parameter", "model.head", each, self.model.head)
        for name, value in knobs(self.augment, "augment."):
            if self.data.name in ("sinusoid", "linear"):
                without = f"left out for the data set {self.data.name!r}, which has no images"
                _check(not value, name.replace("_", "-"), without, value)
        if self.meta.algorithm == "imaml" or self.meta.learn_lam != "none":
            wanted = "to be learnt" if self.meta.algorithm != "imaml" else "with meta.algorithm 'imaml'"
            _check(self.inner.lam > 0, "inner.lam", f"a positive number {wanted}", self.inner.lam)
        if self.inner.solver == "hessian_free":
            without = "with inner.solver 'hessian_free'"
            _check(
                self.meta.algorithm != "maml",
                "meta.algorithm",
                f"'imaml', 'fomaml' or 'reptile' {without}, whose steps are not differentiated",
                self.meta.algorithm,
            )
            _check(
                self.meta.solver != "fixed_point" or self.meta.solver_lr is not None,
                "meta.solver-lr",
                f"given for the solver 'fixed_point' {without}",
                self.meta.solver_lr,
            )

        if self.run.capture:
            _check(
                self.outer.optimizer == "adam",
                "outer.optimizer",
                "'adam' with run.capture, whose learning rate can stay on the device",
                self.outer.optimizer,
            )
            _check(
                self.meta.negative_curvature != "raise",
                "meta.negative-curvature",
                "'keep', 'gradient' or 'skip' with run.capture, which cannot wait for the device",
                self.meta.negative_curvature,
            )

    @property
    def test_inner_steps(self) -> int:
        """Inner steps at validation and test."""
        return self.inner.steps if self.evaluation.inner_steps is None else self.evaluation.inner_steps


def knobs(config: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every knob as ("outer.lr", value), in the order of definition."""
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from knobs(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def with_knobs(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values for some knobs, {"outer.lr": 1e-3, …}.

    Raises:
        ConfigError: a knob that does not exist, or a value that its own check refuses.
    """
    known = {name for name, _ in knobs(config)}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown knob {name}")
        group, knob = name.split(".")
        groups.setdefault(group, {})[knob] = value
    changed = {group: dataclasses.replace(getattr(config, group), **knobs) for group, knobs in groups.items()}
    return from_json(TrainConfig, to_json(dataclasses.replace(config, **changed)))  # strict in the types of values


def to_json(config: object) -> dict[str, Any]:
    """The configuration as plain JSON values; `from_json` gives it back equal."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


# Knobs that runs recorded before there were such do not have; their defaults are what those runs did.
_ADDED = (
    "augment",
    "data.image_size",
    "data.greyscale",
    "data.val_fraction",
    "data.test_fraction",
    "model.precision",
    "model.weights",
    "model.head",
    "model.feature_scale",
    "inner.betas",
    "inner.batch_size",
    "run.capture",
)


def from_json(cls: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Read what `to_json` wrote.

    Strict: every knob must be there with a value of its type, and nothing else; but for knobs newer than the run.

    Raises:
        ConfigError: on an unknown or missing knob, a value of the wrong type, or one that the knob's own check refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the configuration'} must be a JSON object, got {values!r}")
    types_of = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for unknown in (name for name in values if name not in names):
        raise ConfigError(f"unknown knob {prefix}{unknown}; known here: {', '.join(names)}")
    for missing in (name for name in names if name not in values and f"{prefix}{name}" not in _ADDED):
        raise ConfigError(f"knob {prefix}{missing} is missing")
    return cls(**{name: _typed(types_of[name], values[name], f"{prefix}{name}") for name in names if name in values})


def _typed(expected: Any, value: Any, knob: str) -> Any:
    """A JSON value as the type of its knob."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return from_json(expected, value, f"{knob}.")  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):  # only `X | None` is used
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _typed(inner, value, knob)
    if origin is Literal:
        _check(value in arguments, knob, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        _check(isinstance(value, list), knob, "a list", value)
        if arguments[-1] is Ellipsis:
            return tuple(_typed(arguments[0], element, knob) for element in value)
        _check(len(value) == len(arguments), knob, f"a list of {len(arguments)} values", value)
        return tuple(_typed(argument, element, knob) for argument, element in zip(arguments, value, strict=True))
    if expected is Path:
        _check(isinstance(value, str), knob, "a path", value)
        return Path(value)
    if expected is float:
        _check(isinstance(value, int | float) and not isinstance(value, bool), knob, "a number", value)
        return float(value)
    name = {int: "an integer", bool: "true or false", str: "a string"}[expected]
    _check(type(value) is expected, knob, name, value)
    return value

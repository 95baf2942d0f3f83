"""The options of each experiment; the command line is generated from these classes, as from those of training.

Nothing here imports torch: `imaml reproduce --help` stays quick.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from imaml_ext.errors import ConfigError

Algorithm = Literal["imaml-gd", "imaml-hf", "maml", "fomaml", "reptile"]
ALGORITHMS: tuple[Algorithm, ...] = ("imaml-gd", "imaml-hf", "maml", "fomaml", "reptile")
Method = Literal["maml", "maml-checkpoint", "fomaml", "imaml-gd", "imaml-hf"]
METHODS: tuple[Method, ...] = ("maml", "maml-checkpoint", "fomaml", "imaml-gd", "imaml-hf")


def _check_each(knob: str, values: Iterable[float], *, least: float) -> None:
    """At least one value, each finite and no smaller than `least`."""
    values = tuple(values)
    if not values or not all(math.isfinite(value) and value >= least for value in values):
        shown = " ".join(map(str, values)) or "none"
        raise ConfigError(f"--{knob} must be one or more numbers >= {least:g}, got {shown}")


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """What all experiments have in common."""

    name: ClassVar[str]

    output_dir: Path

    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Exactness(ExperimentOptions):
    """Error of the meta-gradient against inner steps, on linear regression, where it is known exactly."""

    name: ClassVar[str] = "exactness"

    output_dir: Path = Path("results/exactness")
    """Where exactness.json and exactness.png are written."""

    condition_numbers: tuple[float, ...] = (10.0, 50.0, 250.0)
    """Condition numbers of the support loss."""

    eigenvalues: tuple[int, ...] = (5, 20)
    """Distinct eigenvalues of the support loss; CG is exact after as many steps."""

    dtypes: tuple[Literal["float32", "float64"], ...] = ("float64", "float32")
    """Arithmetic."""

    cg_steps: tuple[int, ...] = (2, 5, 10, 20)
    """CG steps of iMAML, a curve each."""

    features: int = 20
    """Parameters of a task."""

    tasks: int = 8
    """Tasks of a meta-gradient."""

    draws: int = 3
    """Meta-batches; the figure shows the median error and its range."""

    seed: int = 0
    """Seed of the tasks."""

    def __post_init__(self) -> None:
        _check_each("condition-numbers", self.condition_numbers, least=2)
        _check_each("eigenvalues", self.eigenvalues, least=2)
        _check_each("cg-steps", self.cg_steps, least=1)
        _check_each("features", [self.features], least=2)
        _check_each("tasks", [self.tasks], least=1)
        _check_each("draws", [self.draws], least=1)
        if not self.dtypes:
            raise ConfigError("--dtypes must name float32, float64 or both, got none")
        if max(self.eigenvalues) > self.features:
            raise ConfigError(f"--eigenvalues must not exceed --features, {self.features}, got {max(self.eigenvalues)}")


@dataclass(frozen=True)
class Cost(ExperimentOptions):
    """Time and peak memory of one meta-gradient against inner steps, 20-way 5-shot, Conv4."""

    name: ClassVar[str] = "cost"

    output_dir: Path = Path("results/cost")
    """Where cost.json and cost.png are written; cells that cost.json has already are not measured again."""

    methods: tuple[Method, ...] = METHODS
    """Algorithms."""

    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Inner steps; Newton steps for imaml-hf."""

    meta_batch: int = 1
    """Tasks of a meta-gradient."""

    queries: int = 5
    """Query images of each class."""

    filters: int = 64
    """Channels of each convolution."""

    repeats: int = 3
    """Timed meta-gradients a cell, after a first one that measures memory; the median counts."""

    memory_limit: float | None = None
    """GiB; a cell that would need more is left out. Unset: nine tenths of what the device has free."""

    device: str = "auto"
    """`cpu`, `cuda`, …; `auto`: a GPU where torch has one, else the CPU."""

    threads: int | None = None
    """CPU threads; unset: torch's own choice."""

    data: Literal["omniglot", "glyphs"] = "omniglot"
    """Images; `glyphs` needs no download and has the same shape."""

    data_root: Path | None = None
    """Folder of Omniglot's files; unset: the environment variable IMAML_DATA_ROOT, else the cache."""

    def __post_init__(self) -> None:
        _check_each("steps", self.steps, least=1)
        for knob in ("meta_batch", "queries", "filters", "repeats"):
            _check_each(knob.replace("_", "-"), [getattr(self, knob)], least=1)
        if self.threads is not None:
            _check_each("threads", [self.threads], least=1)
        if self.memory_limit is not None and not (math.isfinite(self.memory_limit) and self.memory_limit > 0):
            raise ConfigError(f"--memory-limit must be a positive number of GiB, got {self.memory_limit}")
        if not self.methods:
            raise ConfigError(f"--methods must name at least one of {', '.join(METHODS)}, got none")


@dataclass(frozen=True)
class TrainedOptions(ExperimentOptions):
    """Of the experiments that train: each cell is a run directory, begun, continued, or finished already."""

    cells: tuple[str, ...] = ()
    """Cells to train, a whole name or the beginning of names; unset: all."""

    budget: Literal["small", "published", "trial"] = "small"
    """How long each cell is trained: docs/experiments.md has the figures. `trial`: seconds, to see that all works."""

    draw_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train nothing: draw from the runs that are finished."""

    device: str = "auto"
    """`cpu`, `cuda`, …; `auto`: a GPU where torch has one, else the CPU."""

    threads: int | None = None
    """CPU threads; unset: torch's own choice."""

    seed: int = 0
    """Seed of the initial parameters and of the training tasks."""

    def __post_init__(self) -> None:
        _check_each("seed", [self.seed], least=0)
        if self.threads is not None:
            _check_each("threads", [self.threads], least=1)


@dataclass(frozen=True)
class ImageOptions(TrainedOptions):
    """Of the experiments on images."""

    data: Literal["omniglot", "glyphs"] = "omniglot"
    """Images; `glyphs` needs no download."""

    data_root: Path | None = None
    """Folder of Omniglot's files; unset: the environment variable IMAML_DATA_ROOT, else the cache."""


@dataclass(frozen=True)
class Sinusoid(TrainedOptions):
    """5- and 10-shot sinusoid regression by every algorithm: error against inner steps at test."""

    name: ClassVar[str] = "sinusoid"

    output_dir: Path = Path("results/sinusoid")
    """Where tables and figures are written; a run directory a cell, such as 5shot/maml, is under runs/BUDGET/."""


@dataclass(frozen=True)
class OmniglotTable(ImageOptions):
    """The paper's table: every algorithm on 5- and 20-way, 1- and 5-shot Omniglot, beside the published figures."""

    name: ClassVar[str] = "omniglot-table"

    output_dir: Path = Path("results/omniglot-table")
    """Where tables and figures are written; a run directory a cell, such as 5w1s/imaml-gd, is under runs/BUDGET/."""


@dataclass(frozen=True)
class Ablation(ImageOptions):
    """Damping, CG steps, lambda, curvature and the inner step of iMAML, on 5-way 1-shot at one fixed budget."""

    name: ClassVar[str] = "ablation"

    output_dir: Path = Path("results/ablation")
    """Where tables and figures are written; a run directory a cell, such as lam/0.5, is under runs/BUDGET/."""


_ALL: tuple[type[ExperimentOptions], ...] = (Exactness, Cost, Sinusoid, OmniglotTable, Ablation)
EXPERIMENTS = {kind.name: kind for kind in _ALL}

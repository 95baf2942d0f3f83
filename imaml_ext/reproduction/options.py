"""The options of each experiment; the command line is made from these classes. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from imaml_ext.settings import COUNT, NOT_NEGATIVE, POSITIVE, Bounds, Settings

ALGORITHMS = ("imaml-gd", "imaml-hf", "maml", "fomaml", "reptile")
Method = Literal["maml", "maml-checkpoint", "fomaml", "imaml-gd", "imaml-hf"]
_TWO = Bounds(at_least=2)


@dataclass(frozen=True)
class ExperimentOptions(Settings):
    """Options of every experiment."""

    name: ClassVar[str]
    output_dir: Path | None = None  # Where numbers, tables and figures are written; unset: results/NAME.

    @property
    def folder(self) -> Path:
        return self.output_dir or Path("results") / self.name

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value in vars(self).items():
            self.require(value != () or field == "cells", field, "one or more values")


@dataclass(frozen=True)
class DeviceOptions(ExperimentOptions):
    """Options of the experiments that measure or train on a device."""

    device: str = "auto"  # `cpu`, `cuda`, …; `auto`: a GPU where torch has one, else the CPU.
    threads: Annotated[int | None, COUNT] = None  # CPU threads; unset: torch's own choice.


@dataclass(frozen=True)
class ImageOptions(ExperimentOptions):
    """Options of the experiments on images."""

    data: Literal["omniglot", "glyphs"] = "omniglot"  # Images; `glyphs` needs no download and has the same shape.
    # Folder of Omniglot's files; unset: the environment variable IMAML_DATA_ROOT, else the cache.
    data_root: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.data_root is None or self.data == "omniglot"
        self.require(needed, "data_root", f"left out for the data set {self.data!r}, which has no files")


@dataclass(frozen=True)
class TrainedOptions(DeviceOptions):
    """Options of the experiments that train: each cell is a run directory, runs/BUDGET/CELL under the output."""

    # Cells to train, a whole name or the beginning of names, such as 5w1s/maml or 5w1s; unset: all.
    cells: tuple[str, ...] = ()
    # How long each cell is trained (docs/reproduction/experiments.md). `trial`: seconds, to see that all works.
    budget: Literal["small", "published", "trial"] = "small"
    draw_only: bool = False  # Train nothing: draw from the runs that are finished.
    seed: Annotated[int, NOT_NEGATIVE] = 0  # Seed of the initial parameters and of the training tasks.


@dataclass(frozen=True)
class Exactness(ExperimentOptions):
    """Error of the meta-gradient against inner steps, on linear regression, where it is known exactly."""

    name: ClassVar[str] = "exactness"
    # Condition numbers of the support loss.
    condition_numbers: Annotated[tuple[float, ...], _TWO] = (10.0, 50.0, 250.0)
    # Distinct eigenvalues of the support loss; CG is exact after as many steps.
    eigenvalues: Annotated[tuple[int, ...], _TWO] = (5, 20)
    dtypes: tuple[Literal["float32", "float64"], ...] = ("float64", "float32")  # Arithmetic.
    cg_steps: Annotated[tuple[int, ...], COUNT] = (2, 5, 10, 20)  # CG steps of iMAML, one curve for each.
    features: Annotated[int, _TWO] = 20  # Parameters of a task.
    tasks: Annotated[int, COUNT] = 8  # Tasks of a meta-gradient.
    draws: Annotated[int, COUNT] = 3  # Meta-batches; the figure shows the median error and its range.
    seed: Annotated[int, NOT_NEGATIVE] = 0  # Seed of the tasks.

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = f"no larger than features ({self.features})"
        self.require(max(self.eigenvalues) <= self.features, "eigenvalues", expected)


@dataclass(frozen=True)
class Cost(ImageOptions, DeviceOptions):
    """Time and peak memory of one meta-gradient against inner steps, 20-way 5-shot, Conv4."""

    name: ClassVar[str] = "cost"
    # Algorithms; cells that cost.json has already are not measured again.
    methods: tuple[Method, ...] = ("maml", "maml-checkpoint", "fomaml", "imaml-gd", "imaml-hf")
    steps: Annotated[tuple[int, ...], COUNT] = (1, 2, 4, 8, 16, 32, 64)  # Inner steps; Newton steps for imaml-hf.
    meta_batch: Annotated[int, COUNT] = 1  # Tasks of a meta-gradient.
    queries: Annotated[int, COUNT] = 5  # Query images per class.
    filters: Annotated[int, COUNT] = 64  # Channels of each convolution.
    # Timed meta-gradients per cell, after a first one that measures memory; the median counts.
    repeats: Annotated[int, COUNT] = 3
    # GiB; a cell that would need more is left out. Unset: nine tenths of what the device has free.
    memory_limit: Annotated[float | None, POSITIVE] = None


@dataclass(frozen=True)
class Sinusoid(TrainedOptions):
    """5- and 10-shot sinusoid regression by every algorithm: error against inner steps at test."""

    name: ClassVar[str] = "sinusoid"


@dataclass(frozen=True)
class EqualBudget(ImageOptions, TrainedOptions):
    """Every algorithm on 5- and 20-way, 1- and 5-shot Omniglot, on equally many training tasks."""

    name: ClassVar[str] = "equal-budget"


@dataclass(frozen=True)
class OmniglotTable(DeviceOptions):
    """The paper's table: every algorithm on 5- and 20-way, 1- and 5-shot Omniglot, beside the published figures."""

    name: ClassVar[str] = "omniglot-table"
    # Cells to train, a whole name or the beginning of names, such as 5w1s/maml or 5w1s; unset: all.
    cells: tuple[str, ...] = ()
    split: Literal["1200/423", "vinyals"] = "1200/423"  # Characters to train on and to test on.
    capture: bool = False  # Capture the meta-steps as CUDA graphs (on a GPU only), those of Reptile excepted.
    trial: bool = False  # Seconds per cell on the built-in glyphs, to see that all works.
    draw_only: bool = False  # Train nothing: draw from the results that are there.
    # Folder of Omniglot's files; unset: the environment variable IMAML_DATA_ROOT, else the cache.
    data_root: Path | None = None


@dataclass(frozen=True)
class Ablation(ImageOptions, TrainedOptions):
    """Damping, CG steps, lambda, curvature and the inner step of iMAML, on 5-way 1-shot at one fixed budget."""

    name: ClassVar[str] = "ablation"


EXPERIMENTS = {kind.name: kind for kind in (Exactness, Cost, Sinusoid, OmniglotTable, EqualBudget, Ablation)}

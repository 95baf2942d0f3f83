"""A few-shot learner from trained weights: give it labelled examples, and it tells new ones apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from imaml_ext.batch import TaskData
from imaml_ext.errors import DataError, WeightsError
from imaml_ext.pictures import Reading
from imaml_ext.pretrained.adapted import AdaptedLearner, checked_examples, on_device
from imaml_ext.pretrained.images import read_as, read_images
from imaml_ext.pretrained.weights import Weights, read_weights


def load_pretrained(
    source: Path | str, *, ways: int | None = None, device: torch.device | str = "cpu"
) -> FewShotLearner:
    """Makes a learner from weights that come with the package, by name, or from a file NAME.safetensors.

        learner = load_pretrained("omniglot-5w1s")
        adapted = learner.adapt(learner.read(["a.png", "b.png"]), torch.tensor([0, 1]))
        labels = adapted.predict(adapted.read(["which.png"])).argmax(-1)

    `ways`: tell that many classes apart (`Weights.for_ways`), in place of as many as in training.

    Raises:
        WeightsError: there are no such weights, the file is damaged, or `ways` is not for them. RunError: the device is
            not there.
    """
    return FewShotLearner(read_weights(source), ways=ways, device=device)


def learn_pictures(
    weights: Weights,
    pictures: Mapping[str, Sequence[Path | str]],
    *,
    reading: Reading | None = None,
    device: torch.device | str = "cpu",
) -> AdaptedLearner:
    """Adapts weights to pictures of named classes, any number of each: {name: image files}.

    `reading`: how they are read, in place of how those of the training were.

    Raises:
        WeightsError: the weights are of regression, or their examples have another shape than pictures that are read
            so. DataError: fewer than two classes, a class without pictures, or pictures that cannot be read.
    """
    reading = reading or weights.card.reading
    if weights.card.kind != "classification" or reading is None:
        raise WeightsError(f"the weights {weights.name} are of regression: they tell no pictures apart")
    if reading.shape != weights.card.input_shape:
        wanted, got = (" × ".join(map(str, shape)) for shape in (weights.card.input_shape, reading.shape))
        raise WeightsError(f"the weights {weights.name} take pictures of {wanted} numbers, this reading gives {got}")
    if len(pictures) < 2:
        raise DataError(f"at least two classes of pictures are needed, got {', '.join(pictures) or 'none'}")
    if empty := [name for name, paths in pictures.items() if not paths]:
        raise DataError(f"classes without pictures: {', '.join(empty)}")
    learner = FewShotLearner(weights, ways=len(pictures), device=device)
    x = read_images([path for paths in pictures.values() for path in paths], reading)
    y = torch.tensor([label for label, paths in enumerate(pictures.values()) for _ in paths])
    return learner.adapt(x, y, classes=list(pictures), reading=reading)


class FewShotLearner:
    """Holds trained meta-parameters with the algorithm that adapts them.

    Attributes:
        weights: what was loaded. input_shape: of one example, (C, H, W) or (features,). reading: how pictures are read,
            as in training; None in regression. ways: the most classes that a task may have; 0 in regression.
    """

    def __init__(self, weights: Weights, *, ways: int | None = None, device: torch.device | str = "cpu") -> None:
        self.weights = weights = weights.for_ways(ways)
        self.input_shape, self.reading = weights.card.input_shape, weights.card.reading
        self.classification = weights.card.kind == "classification"
        self.ways = weights.card.tasks["ways"] if self.classification else 0
        self._algorithm = weights.bound_algorithm()
        self._params = {name: on_device(value, device) for name, value in weights.params.items()}
        self._theta = self._params["theta"]  # [N]

    def read(self, paths: Sequence[Path | str]) -> Tensor:
        """Reads image files as those of the training were read: [n, C, H, W]; errors as of `read_images`."""
        return read_as(self.reading, paths, self.weights.name)

    def adapt(
        self, x: Tensor, y: Tensor, *, classes: Sequence[str] | None = None, reading: Reading | None = None
    ) -> AdaptedLearner:
        """Solves the inner problem on one support set.

        Args:
            x: [S, *input_shape]; images in [0, 1], Omniglot's with ink 1 on paper 0. y: [S] integer labels in
                [0, ways), or float targets [S, 1] in regression. Weights for K shots do best with K examples per class.
            classes: a name per label, `ways` of them; "0", "1", … where omitted.
            reading: how x was read from pictures, if not as in training.

        Raises:
            TypeError, ValueError: a shape, dtype or label that does not fit.
        """
        x = checked_examples(x, "x", self.input_shape, like=self._theta)
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a tensor, got {type(y).__name__}")
        if self.classification:
            if y.is_floating_point() or y.dtype == torch.bool:
                raise TypeError(f"y must hold integer labels, got {y.dtype}")
            if y.shape != (len(x),):
                raise ValueError(f"y must have shape [{len(x)}], one label per example of x, got {list(y.shape)}")
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.ways:
                raise ValueError(f"y must hold labels in [0, {self.ways}), got {int(y.min())} to {int(y.max())}")
            y = y.to(self._theta.device, torch.int64)
        else:
            if y.shape != (len(x), 1):
                raise ValueError(f"y must have shape [{len(x)}, 1], one target per example of x, got {list(y.shape)}")
            y = y.to(self._theta)
        names = tuple(map(str, range(self.ways))) if classes is None else tuple(classes)
        if len(names) != self.ways or len(set(names)) != len(names):
            raise ValueError(f"classes must be {self.ways} different names, one per label, got {list(names)}")
        return AdaptedLearner(
            loss=self._algorithm.loss,
            phi=self._algorithm.adapt(self._params, TaskData(x.unsqueeze(0), y.unsqueeze(0))),
            support=x,
            classes=names,
            reading=reading or self.reading,
            weights=self.weights.name,
        )

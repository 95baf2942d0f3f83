"""A few-shot learner from trained weights: give it labelled examples, and it tells new ones apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imaml_ext.batch import TaskData
from imaml_ext.errors import RunError
from imaml_ext.pretrained.weights import Weights, read_weights


def load_pretrained(
    source: Path | str, *, ways: int | None = None, device: torch.device | str = "cpu"
) -> FewShotLearner:
    """Makes a learner from weights that come with the package, by name, or from a file NAME.safetensors.

        learner = load_pretrained("omniglot-5w1s-gd")
        adapted = learner.adapt(read_images(["a.png", "b.png"], learner.reading), torch.tensor([0, 1]))
        labels = adapted.predict(read_images(["which.png"], learner.reading)).argmax(-1)

    `ways`: tell that many classes apart, by a last layer that they share (`Weights.for_ways`), in place of as many as
    in training.

    Raises:
        WeightsError: there are no such weights, the file is damaged, or `ways` is not for them. RunError: the device is
            not there.
    """
    return FewShotLearner(read_weights(source), ways=ways, device=device)


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
        try:
            self._params = {name: value.to(device) for name, value in weights.params.items()}
        except (RuntimeError, AssertionError) as error:
            raise RunError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
        self._theta = self._params["theta"]  # [N]

    def adapt(self, x: Tensor, y: Tensor) -> AdaptedLearner:
        """Solves the inner problem on one support set.

        Args:
            x: [S, *input_shape]; images in [0, 1], Omniglot's with ink 1 on paper 0. y: [S] integer labels in
                [0, ways), or float targets [S, 1] in regression. Weights for K shots do best with K examples per class.

        Raises:
            TypeError, ValueError: a shape, dtype or label that does not fit.
        """
        x = self.examples(x, "x")
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
        phi = self._algorithm.adapt(self._params, TaskData(x.unsqueeze(0), y.unsqueeze(0)))
        return AdaptedLearner(self, phi, x)

    def examples(self, x: Tensor, name: str) -> Tensor:
        """Returns examples [S, *input_shape] as the parameters are; uint8 images become [0, 1]."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 1 + len(self.input_shape) or tuple(x.shape[1:]) != self.input_shape or not len(x):
            expected = ", ".join(map(str, ("S", *self.input_shape)))
            raise ValueError(f"{name} must have shape [{expected}] with S >= 1, got {list(x.shape)}")
        values = x.to(self._theta)
        return values / 255 if x.dtype == torch.uint8 else values


@dataclass(frozen=True)
class AdaptedLearner:
    """Holds a learner that has seen its support set.

    Attributes:
        phi: [1, N]. support: [S, *input_shape].
    """

    learner: FewShotLearner
    phi: Tensor
    support: Tensor

    def predict(self, x: Tensor, *, with_support: bool = True) -> Tensor:
        """Returns probabilities [Q, ways] of new examples [Q, *input_shape]; outputs [Q, 1] in regression.

        Batch normalisation takes its statistics from the examples that are given together, in training and test alike.
        `with_support` puts the support set beside them, so that one example alone is judged nearly as well as many.
        Without it they are judged as in `imaml evaluate`, all queries of a task together.

        Raises:
            TypeError, ValueError: x is not [Q, *input_shape].
        """
        examples = self.learner.examples(x, "x")
        if with_support:
            examples = torch.cat([examples, self.support])
        with torch.no_grad():
            outputs = self.learner._algorithm.loss.outputs(self.phi, examples.unsqueeze(0))[0, : len(x)]  # [Q, ways]
        return outputs.softmax(-1) if self.learner.classification else outputs

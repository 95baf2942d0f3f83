"""A few-shot learner from trained weights: give it labelled examples, and it tells new ones apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from imaml_ext.models import TaskData
from imaml_ext.pretrained.weights import Weights, read_weights
from imaml_ext.training.experiment import Learner, build_learner, resolve_device


def load_pretrained(
    source: Path | str, *, ways: int | None = None, device: torch.device | str = "cpu"
) -> FewShotLearner:
    """A learner from weights that come with the package, by name, or from a file NAME.safetensors.

        learner = load_pretrained("omniglot-5w1s-gd")
        adapted = learner.adapt(read_images(["a.png", "b.png"], learner.input_shape), torch.tensor([0, 1]))
        labels = adapted.predict(read_images(["which.png"], learner.input_shape)).argmax(-1)

    `ways`: tell that many classes apart, by a last layer that they share (`Weights.parameters`), in place of as many as
    in training.

    Raises:
        WeightsError: there are no such weights, the file is damaged, or `ways` is not for them. RunError: the device is
            not there.
    """
    return FewShotLearner(read_weights(source), ways=ways, device=device)


class FewShotLearner:
    """Trained meta-parameters with the algorithm that adapts them.

    Attributes:
        weights: what was loaded. input_shape: of one example, (C, H, W) or (features,). ways: the most classes that a
            task may have; 0 in regression.
    """

    def __init__(self, weights: Weights, *, ways: int | None = None, device: torch.device | str = "cpu") -> None:
        card, config = weights.card, weights.config
        parameters = weights.parameters(ways=ways)
        if ways is not None:
            config = replace(config, data=replace(config.data, ways=ways))
        self.weights = weights
        self.input_shape = card.input_shape
        self.classification = card.kind == "classification"
        self.ways = config.data.ways if self.classification else 0
        self._learner: Learner = build_learner(
            config, kind=card.kind, input_shape=card.input_shape, device=resolve_device(str(device))
        )
        self._learner.restore_lam(weights.log_lam)
        theta = self._learner.model.layout.flatten(parameters)  # [N]
        self._theta = theta.to(self._learner.device, self._learner.dtype)

    def adapt(self, x: Tensor, y: Tensor) -> AdaptedLearner:
        """Solve the inner problem on one support set.

        Args:
            x: [S, *input_shape]; images in [0, 1], Omniglot's with ink 1 on paper 0. y: [S] integer labels in
                [0, ways), or float targets [S, 1] in regression. Weights for K shots do best with K examples a class.

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
                raise ValueError(f"y must have shape [{len(x)}], a label an example of x, got {list(y.shape)}")
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.ways:
                raise ValueError(f"y must hold labels in [0, {self.ways}), got {int(y.min())} to {int(y.max())}")
            y = y.to(self._learner.device, torch.int64)
        else:
            if y.shape != (len(x), 1):
                raise ValueError(f"y must have shape [{len(x)}, 1], a target an example of x, got {list(y.shape)}")
            y = y.to(self._learner.device, self._learner.dtype)
        phi = self._learner.test_algorithm.adapt(self._theta, TaskData(x.unsqueeze(0), y.unsqueeze(0)))
        return AdaptedLearner(self, phi, x)

    def examples(self, x: Tensor, name: str) -> Tensor:
        """Examples [S, *input_shape] in the type and on the device of the parameters; uint8 images become [0, 1]."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 1 + len(self.input_shape) or tuple(x.shape[1:]) != self.input_shape or not len(x):
            expected = ", ".join(map(str, ("S", *self.input_shape)))
            raise ValueError(f"{name} must have shape [{expected}] with S >= 1, got {list(x.shape)}")
        values = x.to(self._learner.device, self._learner.dtype)
        return values / 255 if x.dtype == torch.uint8 else values


@dataclass(frozen=True)
class AdaptedLearner:
    """A learner that has seen its support set.

    Attributes:
        phi: [1, N]. support: [S, *input_shape].
    """

    learner: FewShotLearner
    phi: Tensor
    support: Tensor

    def predict(self, x: Tensor, *, with_support: bool = True) -> Tensor:
        """Probabilities [Q, ways] of the classes of new examples [Q, *input_shape]; outputs [Q, 1] in regression.

        Batch normalisation takes its statistics from the examples given at once, in training and test alike: an example
        is judged by the company it is in. `with_support` puts the support set beside them, so that one example alone
        is judged nearly as well as many; without it they are judged as `imaml evaluate` does, all queries of a task
        at once.

        Raises:
            TypeError, ValueError: x is not [Q, *input_shape].
        """
        examples = self.learner.examples(x, "x")
        if with_support:
            examples = torch.cat([examples, self.support])
        with torch.no_grad():
            outputs = self.learner._learner.loss.outputs(self.phi, examples.unsqueeze(0))[0, : len(x)]  # [Q, ways]
        return outputs.softmax(-1) if self.learner.classification else outputs

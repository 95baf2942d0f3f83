"""A learner that has seen its examples: it tells new ones apart, and is saved and loaded as one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from imaml_ext.checks import check_choice
from imaml_ext.errors import RunError, WeightsError
from imaml_ext.losses import TaskLoss
from imaml_ext.models import TaskModel
from imaml_ext.pictures import Reading
from imaml_ext.pretrained.images import read_as
from imaml_ext.pretrained.weights import read_tensors, write_tensors
from imaml_ext.settings import from_json, to_json

FORMAT = "imaml_ext learner 1"
BESIDE = ("support", "all", "queries")
_SUPPORT = "support"  # the tensor that stands beside the parameters in the file


@dataclass(frozen=True, kw_only=True)
class AdaptedLearner:
    """Holds a learner that has seen its support set.

    Attributes:
        loss: the model with its criterion. phi: [1, N]. support: [S, *input_shape].
        classes: a name per label; none in regression.
        reading: how its pictures are read; None in regression. weights: the name of those that it was adapted from.
    """

    loss: TaskLoss
    phi: Tensor
    support: Tensor
    classes: tuple[str, ...]
    reading: Reading | None
    weights: str

    def predict(self, x: Tensor, *, beside: Literal["support", "all", "queries"] = "support") -> Tensor:
        """Returns probabilities [Q, ways] of new examples [Q, *input_shape]; outputs [Q, 1] in regression.

        Batch normalisation takes its statistics from the examples that are judged together, in training and test alike.

        Args:
            beside: what each example is judged together with. "support": the support set alone, so that the answer for
                one example does not depend on the others. "all": the support set and all other examples of x
                (transductive). "queries": the other examples of x, as in `imaml evaluate` and the literature; it needs
                many of them, of all classes.

        Raises:
            TypeError, ValueError: x is not [Q, *input_shape], or another `beside`.
        """
        check_choice("beside", beside, BESIDE)
        x = checked_examples(x, "x", tuple(self.support.shape[1:]), like=self.phi)
        support = self.support.unsqueeze(0)
        with torch.no_grad():
            if beside == "support":
                outputs = outputs_beside_support(self.loss, self.phi, support, x.unsqueeze(0))
            else:
                together = torch.cat([x, self.support]) if beside == "all" else x
                outputs = self.loss.outputs(self.phi, together.unsqueeze(0))[:, : len(x)]
        return outputs[0].softmax(-1) if self.loss.classification else outputs[0]

    def read(self, paths: Sequence[Path | str]) -> Tensor:
        """Reads image files as its examples were read: [Q, C, H, W]; errors as of `read_images`."""
        return read_as(self.reading, paths, self.weights)

    def save(self, path: Path | str) -> None:
        """Writes the learner as one file NAME.safetensors, which `load_adapted` and `imaml predict` take.

        It holds the adapted parameters by name and the support set, which batch normalisation needs again.

        Raises:
            RunError: another ending. WriteError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise RunError(f"path must be a file NAME.safetensors, got {path}")
        phi = self.loss.model.layout.views(self.phi[0])
        tensors = {name: value.cpu().contiguous() for name, value in {**phi, _SUPPORT: self.support}.items()}
        values = {
            "model": to_json(self.loss.model),
            "criterion": self.loss.criterion_name,
            "classes": self.classes,
            "reading": None if self.reading is None else to_json(self.reading),
            "weights": self.weights,
        }
        write_tensors(path, FORMAT, tensors, values)


def load_adapted(path: Path | str, *, device: torch.device | str = "cpu") -> AdaptedLearner:
    """Loads a learner that `AdaptedLearner.save` or `imaml predict --save` has written.

    Raises:
        WeightsError: the file is missing, damaged or something else. RunError: the device is not there.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    form = metadata.pop("format", None)
    if form != FORMAT:
        raise WeightsError(f"{path} is no adapted learner: its format is {form!r}; weights are given with --weights")
    try:
        values = {key: json.loads(value) for key, value in metadata.items()}
        model = from_json(TaskModel, values["model"], "model")  # type: ignore[type-abstract]  # as one of its kinds
        reading = None if values["reading"] is None else from_json(Reading, values["reading"], "reading")
        support = tensors.pop(_SUPPORT)
        phi = model.layout.flatten(tensors).unsqueeze(0)
        return AdaptedLearner(
            loss=TaskLoss(model, values["criterion"]),
            phi=on_device(phi, device),
            support=on_device(support, device),
            classes=tuple(values["classes"]),
            reading=reading,
            weights=values["weights"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"the learner {path} cannot be used: {error}") from error


def outputs_beside_support(
    loss: TaskLoss,
    phi: Tensor,
    support_x: Tensor,
    query_x: Tensor,
    mask: Tensor | None = None,
    ways: Tensor | None = None,
) -> Tensor:
    """Returns outputs [B, Q, *] of queries that are judged one by one, each beside the support set of its task.

    Args:
        phi: [B, N]. support_x: [B, S, *]. query_x: [B, Q, *]. mask: [B, S], of the support set. ways: [B].
    """
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
    alone = [torch.cat([query, support_x], dim=1) for query in query_x.split(1, dim=1)]  # Q times [B, 1 + S, *]
    return torch.cat([loss.outputs(phi, x, mask, ways)[:, :1] for x in alone], dim=1)


def checked_examples(x: Tensor, name: str, shape: tuple[int, ...], *, like: Tensor) -> Tensor:
    """Returns examples [S, *shape] as `like` is; uint8 images become [0, 1]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if tuple(x.shape[1:]) != shape or x.dim() != 1 + len(shape) or not len(x):
        expected = ", ".join(map(str, ("S", *shape)))
        raise ValueError(f"{name} must have shape [{expected}] with S >= 1, got {list(x.shape)}")
    values = x.to(like)
    return values / 255 if x.dtype == torch.uint8 else values


def on_device(value: Tensor, device: torch.device | str) -> Tensor:
    """Returns the tensor on a device; RunError where there is no such device."""
    try:
        return value.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error

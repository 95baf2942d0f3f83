"""The meta-step captured once as a CUDA graph and replayed: one launch in place of thousands.

A graph replays the same kernels on the same memory. All that differs from step to step therefore stands in buffers,
filled before a replay (which tasks, learning rates, the number of the step), and all that a step changes, it changes in
place: the meta-parameters, their averages, the optimiser's moments and the sums of the metrics.
"""

from __future__ import annotations

import numpy as np
import torch

from imaml_ext.data import EpisodeBatch, EpisodeSampler, Sampler
from imaml_ext.data.class_images import unit_range
from imaml_ext.data.episodes import class_labels
from imaml_ext.errors import RunError
from imaml_ext.train.experiment import Experiment
from imaml_ext.train.meta_step import State, update
from imaml_ext.train.schedule import average_weight, learning_rate, set_learning_rate

WARM_UP = 3  # steps before the capture, in which libraries and autograd set up what they keep


def static_tasks(tasks: Sampler) -> _ImageTasks | _DrawnTasks:
    """Returns the same tasks as `tasks.sample(step)` gives, to the bit, in buffers that stay where they are.

    `load(step)` fills the buffers without waiting for the device; `batch()` is a function of the buffers alone, of
    fixed shapes, that never looks at the host.
    """
    if isinstance(tasks, EpisodeSampler) and tasks.augmentation is None:
        return _ImageTasks(tasks)
    return _DrawnTasks(tasks)


class _ImageTasks:
    """Holds row numbers [B, S] and [B, Q] of a table of images in every orientation; gathers on the device."""

    def __init__(self, sampler: EpisodeSampler) -> None:
        self._sampler = sampler
        self._table, self._first_row = sampler.images.table()
        device = sampler.images.device
        sides = (sampler.shots, sampler.queries)
        shapes = [(sampler.meta_batch, sampler.ways * each) for each in sides]
        self._rows = [torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes]
        self._labels = [class_labels(sampler.meta_batch, sampler.ways, each, device) for each in sides]

    def load(self, step: int) -> None:
        chosen = self._sampler.indices(step)
        for buffer, drawings in zip(self._rows, (chosen.support, chosen.query), strict=True):
            rows = self._first_row[chosen.classes][..., None] + drawings  # [B, ways, shots or queries]
            host = torch.from_numpy(np.ascontiguousarray(rows.reshape(buffer.shape)))
            # Pinned anew each time: the allocator hands the memory out again only when the copy out of it is over.
            buffer.copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)

    def batch(self) -> EpisodeBatch:
        shape = self._sampler.images.image_shape
        xs = [
            unit_range(self._table.index_select(0, rows.flatten()), self._sampler.dtype).view(*rows.shape, *shape)
            for rows in self._rows
        ]
        return EpisodeBatch(xs[0], self._labels[0], xs[1], self._labels[1])


class _DrawnTasks:
    """Holds the episodes themselves, of a sampler whose work is not the same at every step."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        first = sampler.sample(0)
        sides = (side.clone(memory_format=torch.contiguous_format) for side in first.tensors())
        self._batch = EpisodeBatch(*sides)

    def load(self, step: int) -> None:
        for buffer, drawn in zip(self._batch.tensors(), self._sampler.sample(step).tensors(), strict=True):
            buffer.copy_(drawn, non_blocking=True)

    def batch(self) -> EpisodeBatch:
        return self._batch


class StaticStep:
    """Takes a meta-step in two parts: `load` fills buffers, `run` is a function of them and of the state alone.

    Run one after the other they do what `EagerStep` does, on any device.

    Args:
        state: its optimiser has learning rates in tensors: `outer_optimizer(…, static=True)`.
    """

    def __init__(self, experiment: Experiment, tasks: Sampler, state: State) -> None:
        self.state = state
        self._experiment = experiment
        self._tasks = static_tasks(tasks)
        theta = state.params["theta"]
        self._weight = torch.zeros_like(theta[0])  # 1 − d of the average
        self._step = torch.zeros((), dtype=torch.int64, device=theta.device)
        self._execute = self.run

    def load(self) -> None:
        outer, step = self._experiment.config.outer, self.state.step
        self._tasks.load(step)
        set_learning_rate(self.state.optimizer, outer, learning_rate(outer, step))
        self._weight.fill_(average_weight(outer, step))
        self._step.fill_(step + 1)

    def run(self) -> None:
        meta = self._experiment.algorithm.meta_gradient(self.state.params, self._tasks.batch())
        metrics, finite = update(self._experiment, self.state, meta, self._weight)
        self.state.metrics.add(metrics, step=self._step, finite=finite)

    def rehearse(self, times: int) -> None:
        """Runs `times` times, and puts the state back: what came into being on the way begins at zero."""
        before = {value.data_ptr(): value.clone() for value in self.state.tensors()}
        for _ in range(times):
            self.run()
        for value in self.state.tensors():
            saved = before.get(value.data_ptr())
            value.zero_() if saved is None else value.copy_(saved)

    def __call__(self) -> None:
        self.load()
        self._execute()
        self.state.step += 1
        self.state.metrics.count()


class CapturedStep(StaticStep):
    """Replays the `run` of a `StaticStep`, which it captures when it is made.

    Raises:
        RunError: something in the meta-step cannot be captured; says what.
    """

    def __init__(self, experiment: Experiment, tasks: Sampler, state: State) -> None:
        super().__init__(experiment, tasks, state)
        self.load()
        self._graph = torch.cuda.CUDAGraph()
        # Warmed up and captured on one stream of its own, as torch's notes on CUDA graphs have it.
        device = state.params["theta"].device
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.rehearse(WARM_UP)
        current.wait_stream(stream)
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self.run()
        except RuntimeError as error:
            _leave_capture(device)
            why = f"{str(error).splitlines()[0]}; leave run.capture out"
            raise RunError(f"the meta-step cannot be captured as a CUDA graph: {why}") from error
        self._execute = self._graph.replay


def _leave_capture(device: torch.device) -> None:
    """Captures something that can be captured: a capture that has failed leaves the device's random generator in it."""
    with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)

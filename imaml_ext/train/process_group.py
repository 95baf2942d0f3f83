"""A job of several processes over torch.distributed: gloo between CPUs and between hosts, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The defaults of its functions are the group there is when it is first imported, as torch.optim does by way of dynamo.
# Such a group would outlive its destruction, and gloo's threads, which may yet have to let go of a tensor, Python:
# the process would then end in SIGABRT. Imported here, there is none.
import torch.distributed.nn
from torch import Tensor

from imaml_ext.errors import ConfigError, LostRank, ReportedElsewhere, RunError
from imaml_ext.meta import MetaGradient
from imaml_ext.train.ranks import Ranks, Result

# The longest that one rank waits for another: for data that are rendered or downloaded, for a picture that is drawn.
PATIENCE = timedelta(minutes=10)


class ProcessGroup(Ranks):
    """Connects the ranks that torchrun has started; `Ranks` describes the methods."""

    def __init__(self, rank: int, size: int, store: dist.Store) -> None:
        self.rank = rank
        self.size = size
        self._store = store

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator[ProcessGroup]:
        """Finds the others, and leaves them at the end."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with _explained():
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
            # The launcher's store outlives a restart; the addresses of the processes before must not be found in it.
            store = dist.PrefixStore(f"imaml_ext/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        ranks = cls(rank, size, store)
        try:
            yield ranks
            ranks._part()
        except ReportedElsewhere:
            raise
        except BaseException as error:
            # The first to fail is heard. Those who then find it gone have nothing to add.
            if not ranks._first_to_report() and isinstance(error, LostRank):
                raise ReportedElsewhere(str(error)) from error
            raise
        finally:
            dist.destroy_process_group()

    def _part(self) -> None:
        """Waits until every rank has all that the others sent it: closing a connection discards what is under way."""
        with _explained():
            self._store.set(f"done/{self.rank}", "")
            self._store.wait([f"done/{rank}" for rank in range(self.size)], PATIENCE)

    def _first_to_report(self) -> bool:
        try:
            return self._store.add("reported", 1) == 1
        except RuntimeError:  # the launcher has gone too
            return True

    def use_device(self, name: str) -> None:
        if not torch.cuda.is_available() or not (name == "auto" or name.startswith("cuda")):
            return
        if name not in ("auto", "cuda"):
            of_several = "in a job of several processes, each of which takes a GPU of its own"
            raise ConfigError(f"run.device must be 'auto', 'cuda' or 'cpu' {of_several}, got {name!r}")
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            advice = "start no more than that with --nproc-per-node, or train with --run.device cpu"
            raise RunError(f"each process needs a GPU of its own, and this machine has {there}: {advice}")
        torch.cuda.set_device(local)

    def first_of_machine(self, action: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        first = int(os.environ["LOCAL_RANK"]) == 0
        self.on_all(lambda: action(*args, **kwargs) if first else None)

    def check_equal(self, facts: Mapping[str, object]) -> None:
        everyones: list[Mapping[str, object]] = self._gather(dict(facts))
        for name, value in everyones[0].items():
            for rank, others in enumerate(everyones):
                if others.get(name) != value:
                    message = f"{name} is {value!r} on rank 0, {others.get(name)!r} on rank {rank}"
                    raise self.reported_once(RunError(f"every process must run the same: {message}"))

    def on_all(self, action: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        error = None
        try:
            result = action(*args, **kwargs)
        except Exception as caught:
            error = caught
        failures = self._gather(None if error is None else str(error))
        failed = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
        if failed is None:
            return result
        if error is not None and failed == self.rank:
            raise error
        raise ReportedElsewhere(failures[failed])

    def on_first(self, action: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        outcome: list[Any] = [self.on_all(lambda: action(*args, **kwargs) if self.first else None)]
        with _explained():
            dist.broadcast_object_list(outcome, src=0)
        return outcome[0]

    def reported_once(self, error: Exception) -> Exception:
        return error if self.first else ReportedElsewhere(str(error), getattr(error, "exit_code", 1))

    def maximum(self, number: int) -> int:
        shared = torch.tensor(number)  # on the CPU, whatever the device: from host to host
        with _explained():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        with _explained():
            dist.all_reduce(total)
        return total

    def mean_over_tasks(self, meta: MetaGradient, *, tasks: int) -> MetaGradient:
        """Returns Σ_r n_r m_r / Σ_r n_r of the means m_r, in one all-reduce; n_r counts what each is a mean over.

        Gradients and most metrics are means over the tasks that count, parts of the tasks over all of them. `per_task`
        is of this rank's own tasks.
        """
        vectors = meta.gradients | meta.carried
        lengths = [len(vector) for vector in vectors.values()]
        means = torch.cat([*vectors.values()])
        counted, all_tasks = meta.counted.to(means), means.new_full((), tasks)
        of_all = {name for name, value in meta.per_task.items() if value.dtype == torch.bool}
        numbers = torch.stack([all_tasks if name in of_all else counted for name in meta.metrics])
        metrics = torch.stack([value.to(means) for value in meta.metrics.values()])
        # Where no task of a rank counts, its means are 0 / 0, and it has nothing to add.
        metrics = torch.where(numbers > 0, metrics * numbers, 0.0)
        weighted = torch.where(counted > 0, means * counted, 0.0)
        sums = self.sum(torch.cat([weighted, metrics, counted.view(1), all_tasks.view(1)]))
        weighted, metrics, counted, all_tasks = sums.split([len(weighted), len(metrics), 1, 1])
        numbers = torch.cat([all_tasks if name in of_all else counted for name in meta.metrics])
        vectors = dict(zip(vectors, (weighted / counted).split(lengths), strict=True))
        return MetaGradient(
            gradients={name: vectors[name] for name in meta.gradients},
            counted=counted.squeeze(),
            metrics=dict(zip(meta.metrics, (metrics / numbers).unbind(), strict=True)),
            per_task=meta.per_task,
            carried={name: vectors[name] for name in meta.carried},
        )

    def _gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, by rank."""
        everyones: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(everyones, value)
        return everyones


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo, NCCL and the store each have their own words, which --debug shows
        raise LostRank(
            f"another process of the job has ended, or has not answered for {PATIENCE.seconds // 60} minutes; "
            "--resume continues from the newest checkpoint"
        ) from error

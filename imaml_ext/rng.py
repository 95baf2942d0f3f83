"""Counter-based randomness: what is drawn is a function of (seed, stream, step) alone.

The words come raw from NumPy's Philox bit generator, whose output is fixed by its published algorithm (Salmon et al.,
*Parallel random numbers: as easy as 1, 2, 3*, SC 2011); the methods of `numpy.random.Generator`, which may change
from one NumPy release to the next, are not used.
"""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["choose_distinct", "normal", "philox_words", "random_words", "uniform"]


def philox_words(key: tuple[int, int], count: int, counter: tuple[int, int, int, int] = (0, 0, 0, 0)) -> np.ndarray:
    """`count` random 64-bit words, uint64 [count], from the Philox counters that begin at `counter` under `key`."""
    keys = np.array([part % 2**64 for part in key], dtype=np.uint64)
    return np.random.Philox(key=keys, counter=np.array(counter, dtype=np.uint64)).random_raw(count)


def random_words(
    *, seed: int, stream: str, step: int, first_task: int, num_tasks: int, words_per_task: int
) -> np.ndarray:
    """Random 64-bit words for tasks `first_task` … `first_task + num_tasks - 1` of one meta-step.

    Each task has a Philox counter range of its own, (·, task, step, 0) under the key (seed, hash of stream). The words
    of a task depend neither on how many tasks there are nor on which process draws them.

    Returns uint64 [num_tasks, words_per_task].
    """
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    key = (seed, int.from_bytes(digest, "little"))
    words = np.empty((num_tasks, words_per_task), dtype=np.uint64)
    for row in range(num_tasks):
        words[row] = philox_words(key, words_per_task, (0, first_task + row, step, 0))
    return words


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits of each word."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(words: np.ndarray) -> np.ndarray:
    """Standard normal float64 by Box-Muller; the last axis of `words` is even, and pairs of halves make the
    output."""
    half = words.shape[-1] // 2
    radius = np.sqrt(-2.0 * np.log1p(-uniform(words[..., :half])))
    angle = 2.0 * np.pi * uniform(words[..., half:])
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def choose_distinct(words: np.ndarray, population: int | np.ndarray) -> np.ndarray:
    """For each row, `words.shape[1]` distinct numbers of `range(population)`, in random order.

    A partial Fisher-Yates shuffle, vectorised over rows. A word w becomes an index below n as ⌊(w ≫ 32)·n / 2³²⌋: the
    probabilities are uniform to within n/2³².

    Args: words uint64 [rows, count]; population, for all rows or one per row [rows], count ≤ population < 2³².
    Returns int64 [rows, count].
    """
    rows, count = words.shape
    populations = np.asarray(population, dtype=np.int64).reshape(-1, 1)  # [1 or rows, 1]
    deck = np.tile(np.arange(populations.max(), dtype=np.int64), (rows, 1))
    left = (populations - np.arange(count)).astype(np.uint64)  # [1 or rows, count]
    swap = (((words >> np.uint64(32)) * left) >> np.uint64(32)).astype(np.int64)
    every_row = np.arange(rows)
    for position in range(count):
        other = position + swap[:, position]
        chosen = deck[every_row, other]
        deck[every_row, other] = deck[:, position]
        deck[:, position] = chosen
    return deck[:, :count]

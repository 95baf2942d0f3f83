"""How hard a few-shot data set is before anything is learned: the nearest support image, pixel by pixel."""

from __future__ import annotations

import torch

from imaml_ext.checks import check_int
from imaml_ext.data.episodes import EpisodeSampler


def nearest_neighbour_accuracy(sampler: EpisodeSampler, *, tasks: int) -> tuple[float, float]:
    """Accuracy (0 to 1) of giving each query image the label of the support image at the least Euclidean distance.

    Returns the mean over at least `tasks` tasks (whole batches from step 0) and 1.96 standard errors of it.
    """
    tasks = check_int("tasks", tasks, minimum=2)
    accuracies = []
    for step in range(-(-tasks // sampler.meta_batch)):
        batch = sampler.sample(step)
        distance = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))  # [B, Q, S]
        guess = batch.support_y.gather(1, distance.argmin(-1))
        accuracies.append((guess == batch.query_y).double().mean(1))
    accuracy = torch.cat(accuracies)
    return accuracy.mean().item(), 1.96 * accuracy.std().item() / accuracy.numel() ** 0.5

"""Personalised federated learning by pFedMe: the proximal problems of all clients are one batch.

Each client b has data of its own, and a personal model near the model w that all share,

    θ_b(w) = argmin_θ  f_b(θ) + ½ λ ‖θ − w‖².

The gradient of the minimum in w is λ (w − θ_b). In each of R local rounds (Algorithm 1 of the paper) a client finds θ_b
by K gradient steps on a mini-batch, and moves its copy of w: w_b ← w_b − η λ (w_b − θ_b). Then the server moves w to
(1 − β) w + β mean w_b over some clients. The data are the paper's synthetic ones, for logistic regression.
Clients differ in their labelling function, their inputs and their number of examples. The reference is FedAvg with as
many rounds, at the best of five learning rates for the test examples. The last row has R more steps of each client.

Source: Dinh, Tran and Nguyen, Personalized federated learning with Moreau envelopes (2020), arXiv 2006.08848.
"""

from __future__ import annotations

import torch
from common import Rows, linear, show
from torch import Tensor
from torch.nn.functional import cross_entropy

import imaml_ext

D, C, R, K, BATCH = 60, 10, 20, 5, 20
LAM, ETA, BETA, RATE = 20.0, 0.005, 1.0, 0.01  # λ, η, β, and the learning rate of θ


def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[B], of parameters [B, C (D + 1)] and examples [B, n, D], [B, n]."""
    return cross_entropy(linear(theta, x).mT, y, reduction="none").mean(1)


class Clients:
    """Synthetic(½, ½) of B clients, nine tenths of it for training, and the mini-batches that are drawn from it."""

    def __init__(self, clients: int, sampled: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.number, self.sampled, normal = clients, sampled, lambda *s: torch.randn(*s, generator=self.generator)
        sizes = 5 * (50 + normal(clients).mul(2).add(4).exp().clamp(max=200).long())  # log-normal, cut at 1,250
        mean_W, mean_x = 0.5 * normal(clients, 1, 1), 0.5 * normal(clients, 1) + normal(clients, D)
        W, b = mean_W + normal(clients, D, C), mean_W + normal(clients, 1, C)
        deviation = torch.arange(1, D + 1) ** -0.6
        self.x = mean_x.unsqueeze(1) + deviation * normal(clients, int(sizes.max()), D)  # [B, n, D]
        self.y = (self.x @ W + b).argmax(2)
        self.train, place = (9 * sizes) // 10, torch.arange(self.x.shape[1])
        self.tested = (place >= self.train.unsqueeze(1)) & (place < sizes.unsqueeze(1))  # [B, n]

    def batch(self) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(self.number, BATCH, generator=self.generator) * self.train.unsqueeze(1)
        rows = torch.arange(self.number).unsqueeze(1), drawn.long()
        return self.x[rows], self.y[rows]

    def mean_of_some(self, w_b: Tensor, weights: Tensor) -> Tensor:
        some = torch.randperm(self.number, generator=self.generator)[: self.sampled]
        return (weights[some] / weights[some].sum()).unsqueeze(0) @ w_b[some]  # [1, N]

    def accuracy(self, theta: Tensor) -> float:
        """Over all test examples, of one model [1, N] or a model per client [B, N]."""
        return float((linear(theta, self.x).argmax(2) == self.y)[self.tested].float().mean())


def pfedme(data: Clients, rounds: int) -> tuple[Tensor, Tensor]:
    """The shared model w [1, N] and the personal ones [B, N]."""
    w, inner = torch.zeros(1, C * (D + 1)), imaml_ext.GradientDescent(steps=K, lr=RATE)
    theta = w.repeat(data.number, 1)
    for _ in range(rounds):
        w_b = w.repeat(data.number, 1)
        for _ in range(R):
            theta = imaml_ext.argmin(loss, theta, data.batch(), inner=inner, center=w_b, lam=LAM)
            w_b = w_b - ETA * LAM * (w_b - theta)
        w = (1 - BETA) * w + BETA * data.mean_of_some(w_b, torch.ones(data.number))
    return w, theta


def fedavg(data: Clients, rounds: int, lr: float) -> tuple[Tensor, Tensor]:
    """The model w [1, N], a mean by numbers of examples; and what R more steps of each client make of it [B, N]."""
    w = torch.zeros(1, C * (D + 1))
    for number in range(rounds + 1):
        w_b = w.repeat(data.number, 1)
        for _ in range(R):
            w_b.requires_grad_()
            w_b = (w_b - lr * torch.autograd.grad(loss(w_b, *data.batch()).sum(), w_b)[0]).detach()
        w = data.mean_of_some(w_b, data.train.float()) if number < rounds else w
    return w, w_b


def main(clients: int = 100, sampled: int = 10, rounds: int = 100, seed: int = 0) -> Rows:
    data = Clients(clients, sampled, seed)
    w, theta = pfedme(data, rounds)
    runs = [fedavg(data, rounds, lr) for lr in (0.003, 0.01, 0.03, 0.1, 0.3)]
    accuracies = {"pFedMe, personal models": data.accuracy(theta), "pFedMe, shared model": data.accuracy(w)}
    accuracies["FedAvg"] = max(data.accuracy(w) for w, _ in runs)
    accuracies["FedAvg, then R steps of each client"] = max(data.accuracy(w_b) for _, w_b in runs)
    return {name: {"accuracy": accuracy} for name, accuracy in accuracies.items()}


if __name__ == "__main__":
    show(main())

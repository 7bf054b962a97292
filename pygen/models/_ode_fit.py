"""Searches for the parameters of an ODE in coordinates of their own: between ode_rnn.py, which knows the loss, and an
optimizer, which sees a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pygen.models._lbfgs import minimise

_AWAY = 10.0  # times the loss at the start: as good as infinite
_MOST_HALVINGS = 10  # of Adam's learning rate, each after a solution that ran away


class Diverged(RuntimeError):
    """The solution is not finite."""


class Fit(NamedTuple):
    """What `ODERNN.fit` found. The model has the same parameters.

    Attributes:
        losses: at the start and after every iteration, masked mean squared errors.
        converged: whether the loss stopped changing, rather than that the iterations came to an end.
        parameters: name -> value, those of the smallest loss, detached.
        x0: (B, D) or (D,), the starts: learned with learn_start, else as they were given.
        loss: the smallest.
        evaluations: how often the loss and its gradient were computed.
        reason: "converged"; "iterations", there were no more; "no decrease", nothing smaller was found even along the
            gradient, as at the limit of the arithmetic; "stopped", by the callback; "interrupted", by Ctrl-C.
    """

    losses: list[float]
    converged: bool
    parameters: dict[str, Tensor]
    x0: Tensor
    loss: float
    evaluations: int
    reason: str


class Leaf(NamedTuple):
    """A tensor to learn, and how it follows from its coordinates u: start + scale * u, or start * exp(u) if log."""

    tensor: Tensor
    relative: bool
    log: bool = False


class _Coordinates:
    """All leaves as one vector u, which begins at 0."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = leaves
        self.starts = [leaf.tensor.detach().clone() for leaf in leaves]
        self.scales = [self._scale(leaf, start) for leaf, start in zip(leaves, self.starts, strict=True)]
        self.sizes = [start.numel() for start in self.starts]

    @staticmethod
    def _scale(leaf: Leaf, start: Tensor) -> Tensor:
        """What a coordinate of 1 stands for: the start's size; where that is 0, the largest element's, or 1."""
        if not leaf.relative or not start.numel():
            return torch.ones_like(start)
        size = start.abs()
        largest = size.max()
        return torch.where(size > 0, size, torch.where(largest > 0, largest, torch.ones_like(largest)))

    def zeros(self) -> Tensor:
        return torch.zeros(sum(self.sizes), dtype=self.starts[0].dtype, device=self.starts[0].device)

    @torch.no_grad()
    def write(self, u: Tensor) -> None:
        """Give the leaves the values that u stands for."""
        for leaf, start, scale, part in zip(self.leaves, self.starts, self.scales, u.split(self.sizes), strict=True):
            part = part.view_as(start)
            leaf.tensor.copy_(start * part.exp() if leaf.log else torch.addcmul(start, scale, part))

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / du at what was written last."""
        gradients = torch.autograd.grad(loss, [leaf.tensor for leaf in self.leaves], allow_unused=True)
        parts = []
        for leaf, scale, gradient in zip(self.leaves, self.scales, gradients, strict=True):
            gradient = torch.zeros_like(leaf.tensor) if gradient is None else gradient
            parts.append((gradient * (leaf.tensor.detach() if leaf.log else scale)).flatten())
        return torch.cat(parts)


class Search:
    """The loss as a function of u, the best u, and what to tell about the way there.

    Args:
        leaves: what to learn, at their starts.
        loss: the loss at what the leaves are; raises Diverged where there is none.
        tolerance, enough: see `_lbfgs.minimise`.
        callback: (iteration, loss) -> true to stop.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        loss: Callable[[], Tensor],
        *,
        tolerance: float,
        enough: float,
        callback: Callable[[int, float], bool | None] | None,
    ) -> None:
        self.coordinates = _Coordinates(leaves)
        self.loss, self.callback = loss, callback
        self.tolerance, self.enough = tolerance, enough
        self.best, self.best_loss = self.coordinates.zeros(), math.inf
        self.losses: list[float] = []
        self.evaluations = 0

    def run(self, optimizer: str, iterations: int, learning_rate: float) -> str:
        """Why it ended. The leaves have the best values afterwards, whatever happens.

        Raises:
            Diverged: there is no loss at the start, or Adam, whatever its learning rate, leaves where there is one.
        """
        try:
            u = self.coordinates.zeros()
            first = self._evaluate(u)
            self.losses.append(first[0])
            if optimizer == "adam":
                return self._adam(u, first, iterations, learning_rate)
            return minimise(
                self._finite_or_infinite,
                u,
                first,
                iterations=iterations,
                tolerance=self.tolerance,
                after=self._after,
                enough=self.enough,
            )
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            self.coordinates.write(self.best)

    def _evaluate(self, u: Tensor) -> tuple[float, Tensor]:
        self.evaluations += 1
        self.coordinates.write(u)
        loss = self.loss()
        gradient = self.coordinates.gradient(loss)
        value = loss.item()
        if not math.isfinite(value) or not gradient.isfinite().all():
            what = "loss" if not math.isfinite(value) else "gradient"
            raise Diverged(f"ODERNN: the {what} of these parameters is not finite, their solution is too large")
        if value < self.best_loss:
            self.best, self.best_loss = u.clone(), value
        return value, gradient

    def _finite_or_infinite(self, u: Tensor) -> tuple[float, Tensor]:
        """A solution that runs away is a step too far for a line search, not the end."""
        try:
            return self._evaluate(u)
        except Diverged:
            return math.inf, torch.full_like(u, math.nan)

    def _after(self, loss: float) -> bool:
        self.losses.append(loss)
        return self.callback is not None and bool(self.callback(len(self.losses) - 1, loss))

    def _adam(self, u: Tensor, first: tuple[float, Tensor], iterations: int, learning_rate: float) -> str:
        loss, gradient = first
        start, u.grad = loss, gradient
        optimizer = torch.optim.Adam([u], learning_rate)
        halvings = 0
        for _ in range(iterations):
            if loss <= self.enough or gradient.abs().max().item() <= self.tolerance * loss:
                return "converged"
            optimizer.step()
            try:
                loss, gradient = self._evaluate(u)
                # One gradient from near a pole, and Adam's steps are tiny for a thousand iterations
                away = loss > _AWAY * start and halvings < _MOST_HALVINGS
            except Diverged:
                if halvings == _MOST_HALVINGS:
                    raise
                away = True
            if away:
                halvings += 1
                u = self.best.clone()
                optimizer = torch.optim.Adam([u], learning_rate / 2**halvings)
                loss, gradient = self._evaluate(u)
            u.grad = gradient
            if self._after(loss):
                return "stopped"
        return "iterations"

"""Fixed-step solutions of dx/dt = f(x, t), and their gradient with respect to starts and parameters; for ode_rnn.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Derivative = Callable[[Tensor, Tensor], Tensor]

_ON_GRID = 1e-4  # of a step, which the last one may be longer by: times in float32 that were meant to lie on the grid
# B * D up to which the gradient of all steps at once is the cheaper one. 420 Euler steps of the competition model, loss
# and gradient, on one core: 31 ms instead of 97 at B = 1, 52 instead of 120 at B = 64, 128 instead of 101 at B = 512.
# D + 1 products with the Jacobian instead of one pay while overhead is what is paid for.
_PARALLEL_SIZE = 128
_PARALLEL_DIMENSION = 16


class Steps(NamedTuple):
    """Where the steps of a solution are. B' is B, or 1 when all trajectories share their times.

    Attributes:
        t: (N, B', 1), where each begins.
        h: (N, B', 1), their lengths; 0 after the last observation of a trajectory that ends before others.
        at: int64 (T, B'), how many steps lie before each observation.
    """

    t: np.ndarray
    h: np.ndarray
    at: np.ndarray


def grid(times: np.ndarray, t0: float, step: float) -> Steps:
    """Steps of length `step` from each time to the next, the last of them shortened so that it ends at the time.

    Args:
        times: float64 (T, B'), not decreasing, from t0 on; NaN for no observation.
    """
    begins, lengths, at = [], [], []
    for column in times.T:
        end = np.fmax.accumulate(np.concatenate(([t0], column)))  # NaN: the time before it
        start, end = end[:-1], end[1:]
        exact = (end - start) / step
        near = np.round(exact)
        count = np.where(np.abs(exact - near) <= _ON_GRID, near, np.ceil(exact))
        count = np.where(end > start, np.maximum(count, 1), 0).astype(np.int64)
        before = np.cumsum(count)
        k = np.arange(count.sum()) - np.repeat(before - count, count)
        t = np.repeat(start, count) + k * step
        last = k == np.repeat(count, count) - 1
        begins.append(t)
        lengths.append(np.where(last, np.repeat(end, count) - t, step))
        at.append(before)
    n = max(map(len, begins))
    t = np.stack([np.pad(b, (0, n - len(b)), constant_values=b[-1] if len(b) else t0) for b in begins], 1)
    h = np.stack([np.pad(b, (0, n - len(b))) for b in lengths], 1)
    return Steps(t[..., None], h[..., None], np.stack(at, 1))


# ---- one step: x (B, D), and for every number that the step needs a tensor (B, 1) or (1, 1)


def _euler(f: Derivative, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    return torch.addcmul(x, f(x, t), h)


def _midpoint(f: Derivative, x: Tensor, t: Tensor, middle: Tensor, h: Tensor, half: Tensor) -> Tensor:
    return torch.addcmul(x, f(torch.addcmul(x, f(x, t), half), middle), h)


def _rk4(
    f: Derivative, x: Tensor, t: Tensor, middle: Tensor, end: Tensor, h: Tensor, half: Tensor, sixth: Tensor
) -> Tensor:
    k1 = f(x, t)
    k2 = f(torch.addcmul(x, k1, half), middle)
    k3 = f(torch.addcmul(x, k2, half), middle)
    k4 = f(torch.addcmul(x, k3, h), end)
    return torch.addcmul(x, torch.add(k1 + k4, k2 + k3, alpha=2), sixth)


class _Method(NamedTuple):
    advance: Callable[..., Tensor]
    numbers: Callable[[np.ndarray, np.ndarray], tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]]
    """From t and h the times at which f is called and the factors; computed once, not in every step."""


METHODS = {
    "euler": _Method(_euler, lambda t, h: ((t,), (h,))),
    "midpoint": _Method(_midpoint, lambda t, h: ((t, t + h / 2), (h, h / 2))),
    "rk4": _Method(_rk4, lambda t, h: ((t, t + h / 2, t + h), (h, h / 2, h / 6))),
}


# ---- all steps


class System(NamedTuple):
    """f as it is now, and f as a function of tensors that stand in for the parameters.

    Attributes:
        f: (x (B, D), t (B, 1)) -> (B, D).
        tensors: the parameters by their names.
        replaced: f with other tensors for its parameters.
    """

    f: Derivative
    tensors: Mapping[str, Tensor]
    replaced: Callable[[Mapping[str, Tensor]], Derivative]


class Solver:
    """x_{n+1} from x_n, n = 0 .. N - 1.

    Args:
        method: a key of METHODS.
        steps: where they are.
        x: (B, D), any tensor of the batch, dtype and device to come.
        segment: number of steps whose intermediate results are kept at once for the gradient; None for all.
    """

    def __init__(self, method: str, steps: Steps, x: Tensor, segment: int | None) -> None:
        self.advance = METHODS[method].advance
        times, factors = METHODS[method].numbers(steps.t, steps.h)
        n, batch = len(steps.t), len(x)
        # f may concatenate t to x, so that t has all rows; a factor is only multiplied with
        self.numbers = [torch.as_tensor(a, dtype=x.dtype, device=x.device).expand(n, batch, 1) for a in times]
        self.numbers += [torch.as_tensor(a, dtype=x.dtype, device=x.device) for a in factors]
        self.batch = batch
        self.length = segment or max(n, 1)
        self.segments = [(a, min(a + self.length, n)) for a in range(0, n, self.length)]
        self.thrifty = segment is not None

    def solve(self, system: System, x: Tensor, parallel: bool) -> Tensor:
        """The states x_0 .. x_N, (N + 1, B, D), differentiable where x or a parameter is.

        Args:
            parallel: whether the gradient may be that of all steps at once.
        """
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in system.tensors.values()))
        if not wanted:
            with torch.no_grad():  # f may hold parameters that system does not know of: nobody asked for theirs
                return self.unrolled(system.f, x)
        if parallel and x.numel() <= _PARALLEL_SIZE and x.size(1) <= _PARALLEL_DIMENSION:
            with torch.no_grad():
                states = self.unrolled(system.f, x)
                same = self._rows_are_independent(system.f, states)
            if same:
                return _AllStepsAtOnce.apply(x, self, system, [states], *system.tensors.values())
        return self.unrolled(system.f, x, self.thrifty)

    def unrolled(self, f: Derivative, x: Tensor, thrifty: bool = False) -> Tensor:
        """The states by one step after the other, each recorded by autograd; segment by segment again in the backward
        pass if thrifty."""
        states = [x]
        for a, b in self.segments:
            run = self._segment
            states += checkpoint(run, f, x, a, b, use_reentrant=False) if thrifty else run(f, x, a, b)
            x = states[-1]
        return torch.stack(states)

    def _segment(self, f: Derivative, x: Tensor, a: int, b: int) -> list[Tensor]:
        states = []
        for numbers in zip(*(tensor[a:b].unbind() for tensor in self.numbers), strict=True):
            x = self.advance(f, x, *numbers)
            states.append(x)
        return states

    def together(self, f: Derivative, x: Tensor, a: int, b: int) -> Tensor:
        """Steps a .. b - 1 at once, as rows: x ((b - a) B, D) of states before them, the same of states after them."""
        rows = [n[a:b].expand(b - a, self.batch, 1).reshape(-1, 1) for n in self.numbers]
        return self.advance(f, x, *rows)

    def _rows_are_independent(self, f: Derivative, states: Tensor) -> bool:
        """Whether f gives what it gave when all steps are rows of one batch: not with batch norm or dropout."""
        eps = torch.finfo(states.dtype).eps
        for a, b in self.segments:
            x, after = states[a:b].flatten(0, 1), states[a + 1 : b + 1].flatten(0, 1)
            again = self.together(f, x, a, b)
            change = (after - x).abs().amax()  # what an error of f is relative to
            if not (again - after).abs().amax() <= eps**0.5 * change + 16 * eps * after.abs().amax():
                return False
        return True


class _AllStepsAtOnce(torch.autograd.Function):
    r"""States that are known, with their gradient.

    With :math:`x_{n+1} = \Phi_n(x_n; \theta)`, :math:`J_n = \partial \Phi_n / \partial x_n` and the incoming gradient
    :math:`g_n`: :math:`\lambda_n = g_n + J_n^\top \lambda_{n+1}`, :math:`\bar\theta = \sum_n \lambda_{n+1}^\top
    \partial \Phi_n / \partial\theta`. The states are known, so that all J come from D products with a batch of all
    steps; what remains step by step is one product of a vector with a matrix.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, solver: Solver, system: System, known: list[Tensor], *tensors: Tensor) -> Tensor:
        states = known.pop()
        ctx.solver, ctx.system = solver, system
        ctx.save_for_backward(states, *tensors)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "ODERNN: second derivatives need the steps on record; build it with gradient='unrolled'"
            )
        (grad,) = grads
        states, *tensors = ctx.saved_tensors
        solver, wanted = ctx.solver, ctx.needs_input_grad[4:]
        leaves = [p.detach().requires_grad_(want) for p, want in zip(tensors, wanted, strict=True)]
        f = ctx.system.replaced(dict(zip(ctx.system.tensors, leaves, strict=True)))
        learning = [p for p in leaves if p.requires_grad]
        sums: list[Tensor | None] = [None] * len(learning)
        batch, dimension = states.shape[1:]
        after = grad[-1].unsqueeze(1)  # (B, 1, D)
        for a, b in reversed(solver.segments):
            with torch.enable_grad():
                x = states[a:b].detach().flatten(0, 1).requires_grad_()
                y = solver.together(f, x, a, b)
            jacobian = _jacobian(y, x).view(b - a, batch, dimension, dimension)
            adjoints = [after]
            for g, j in zip(reversed(grad[a:b].unsqueeze(2).unbind()), reversed(jacobian.unbind()), strict=True):
                after = torch.baddbmm(g, after, j)
                adjoints.append(after)
            if learning:
                adjoint = torch.stack(adjoints[-2::-1]).view_as(y)
                parts = torch.autograd.grad(y, learning, adjoint, allow_unused=True)
                sums = [_plus(s, part) for s, part in zip(sums, parts, strict=True)]
        gradients = iter(sums)
        return after.squeeze(1), None, None, None, *(next(gradients) if want else None for want in wanted)


def _jacobian(y: Tensor, x: Tensor) -> Tensor:
    """dy/dx of rows that are independent, (R, D, D); the graph stays."""
    rows = []
    for unit in torch.eye(x.size(1), dtype=x.dtype, device=x.device):
        rows.append(torch.autograd.grad(y, x, unit.expand_as(y), retain_graph=True)[0])
    return torch.stack(rows, 1)


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other

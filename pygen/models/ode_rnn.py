"""Recurrent nets that solve differential equations, fitted to observations. _ode_arguments.py checks what comes in, the
steps are _ode_solver.py's, the search for parameters is _ode_fit.py's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pygen.models._ode_arguments import Observed, check_choice, checked_times, observed, parameter, starts, written
from pygen.models._ode_fit import Diverged, Fit, Leaf, Search
from pygen.models._ode_solver import METHODS, Derivative, Solver, Steps, System, grid

GRADIENTS = ("auto", "unrolled")
OPTIMIZERS = {"lbfgs": 200, "adam": 2000}  # and how many iterations by default
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
_FEW = 12  # parameters that a message can name


class _Data(NamedTuple):
    """Observations, and the steps that lead to them."""

    solver: Solver
    steps: Steps
    seen: Observed


class ODERNN(nn.Module):
    r"""A recurrent net whose cell is one step of a solver of :math:`\dot x = f(x, t; \theta)`.

    .. math::
        x_{n+1} = x_n + h\, \varphi(x_n, t_n), \qquad
        \varphi_\text{Euler} = f(x, t), \quad
        \varphi_\text{midpoint} = f(x + \tfrac h2 f(x, t), t + \tfrac h2), \quad
        \varphi_\text{RK4} = \tfrac16 (k_1 + 2 k_2 + 2 k_3 + k_4)

    Their errors fall as h, h^2 and h^4. From each time that is asked for to the next there are steps of length h, the
    last one shortened so that it ends exactly there: nothing is interpolated.

    Args:
        f: the right-hand side, called with x (B, D) and t (B, 1), and the parameters by name if there are any; returns
            (B, D). An `nn.Module` learns its own parameters. Each row depends on itself alone, or the gradient is the
            slow one.
        parameters: name -> number or tensor, where learning starts.
        step: h.
        method: "euler", "midpoint" or "rk4".
        checkpoint_every: keep the intermediate results of this many steps at a time, and compute them again for the
            gradient; None keeps those of all steps.
        gradient: "auto" differentiates all steps of a small system (D <= 16, B D <= 128) as one batch, up to three
            times faster, where f allows it, and step by step otherwise; "unrolled" always does the latter, which has
            second derivatives.
        dtype: of the parameters and of what is computed. By default f's if it has parameters, else float64.
        device: of the parameters.

    Raises:
        ValueError, TypeError: a step that is not positive, an unknown method, a parameter that is not a finite real
            number, or whose name is no identifier, x0, or an attribute of nn.ParameterDict.

    Example:
        >>> from pygen import models
        >>> def growth(x, t, p):
        ...     return p["rate"] * x * (1 - x / p["capacity"])
        >>> model = models.ODERNN(growth, {"rate": 1.0, "capacity": 10.0}, step=0.1, method="rk4")
        >>> model([1.0], [0.0, 1.25, 20.0]).detach().flatten()
        tensor([ 1.0000,  2.7944, 10.0000], dtype=torch.float64)
        >>> fit = model.fit([1.0], [1, 2, 4], [[2.0], [3.5], [7.0]])
        >>> fit.converged, {name: round(float(value), 2) for name, value in fit.parameters.items()}
        (True, {'rate': 0.81, 'capacity': 9.29})

    Source: Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", Springer 1993.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        parameters: Mapping[str, Any] | None = None,
        *,
        step: float,
        method: str = "euler",
        checkpoint_every: int | None = None,
        gradient: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"ODERNN: f must be a function or a module, got {type(f).__name__}")
        if not (isinstance(step, int | float) and 0 < step < math.inf):
            raise ValueError(f"ODERNN: step must be a positive number, got {step!r}")
        check_choice("method", method, METHODS)
        check_choice("gradient", gradient, GRADIENTS)
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(f"ODERNN: checkpoint_every must be at least 1, got {checkpoint_every}")
        self.f = f
        self.step, self.method, self.gradient = float(step), method, gradient
        self.checkpoint_every = checkpoint_every
        if isinstance(f, nn.Module):
            f.to(device=device, dtype=dtype)
        like = next((p for p in super().parameters() if p.is_floating_point()), None)
        dtype = dtype or (torch.float64 if like is None else like.dtype)
        device = device or (None if like is None else like.device)
        self.takes_parameters = parameters is not None
        self.theta = nn.ParameterDict(
            [
                (name, parameter(name, value, dtype, device)) for name, value in (parameters or {}).items()
            ]  # a dict is sorted
        )

    def forward(self, x0: Any, times: Any, *, t0: float = 0.0) -> Tensor:
        """The solution at the times.

        Args:
            x0: (B, D), or (D,) for one trajectory: the starts, at t0. Converted to the dtype of the parameters.
            times: (T,), the same for all trajectories, or (T, B); none before t0, not decreasing. NaN in (T, B): no
                more for this trajectory, whose last state is repeated.
            t0: the time of the starts.

        Returns:
            (T, B, D), or (T, D) for x0 (D,). Differentiable with respect to x0 and the parameters.

        Raises:
            ValueError, TypeError: shapes that do not fit, times before t0 or out of order, an f that returns something
                else than (B, D).
            Diverged: a RuntimeError, the solution is not finite; says from which step on.
        """
        x, alone = self._start(x0)
        steps = grid(checked_times(times, len(x), t0), t0, self.step)
        seen = _at(self._solve(x, steps, self._solver(steps, x)), steps)
        return seen.squeeze(1) if alone else seen

    def trajectory(self, x0: Any, end: float, *, t0: float = 0.0) -> tuple[Tensor, Tensor]:
        """The solution after every step from t0 to end, the last step shortened to end there.

        Returns:
            t: (N + 1,), from t0 on. x: (N + 1, B, D), or (N + 1, D) for x0 (D,).

        Raises:
            ValueError, TypeError, Diverged: as `forward`.
        """
        x, alone = self._start(x0)
        steps = grid(checked_times([end], len(x), t0), t0, self.step)
        states = self._solve(x, steps, self._solver(steps, x))
        t = torch.as_tensor(np.append(steps.t[:, 0, 0], end if len(steps.t) else t0), dtype=x.dtype, device=x.device)
        return t, states.squeeze(1) if alone else states

    def loss(
        self,
        x0: Any,
        times: Any,
        observations: Any,
        mask: Any = None,
        *,
        scale: Any = None,
        t0: float = 0.0,
    ) -> Tensor:
        r"""What `fit` minimises, :math:`\frac1M \sum_\text{observed} ((x - \text{observation}) / \text{scale})^2`.

        Args:
            x0, times, t0: as in `forward`.
            observations: (T, B, D), or (T, D) for x0 (D,). NaN: not observed.
            mask: bool, of the same shape or without D; False: not observed.
            scale: of the observations' errors, of any shape that broadcasts to theirs; by default 1.

        Returns:
            Scalar.

        Raises:
            ValueError, TypeError, Diverged: as `forward`; nothing observed at all.
        """
        x, alone = self._start(x0)
        return self._loss(x, self._data(x, alone, times, (observations, mask, scale), t0))

    def fit(
        self,
        x0: Any,
        times: Any,
        observations: Any,
        mask: Any = None,
        *,
        scale: Any = None,
        t0: float = 0.0,
        optimizer: str = "lbfgs",
        iterations: int | None = None,
        learning_rate: float = 0.02,
        positive: bool | Collection[str] = False,
        learn_start: bool = False,
        tolerance: float | None = None,
        callback: Callable[[int, float], bool | None] | None = None,
    ) -> Fit:
        r"""Learn the parameters from observations, by L-BFGS with a strong Wolfe line search or by Adam.

        `parameters` are searched in units of their starts, so that it does not matter that one is a thousand times
        another; so is x0; the weights of a module f as they are. Where a trial's solution runs away, the line search
        comes back; Adam returns to the best parameters with half its learning rate. Ctrl-C ends the search, and the
        best parameters so far are kept. Where parameters can stand in for one another the loss has long valleys, and
        float32 may not see the way down: float64 does.

        Args:
            x0, times, observations, mask, scale, t0: as in `loss`.
            optimizer: "lbfgs" or "adam".
            iterations: at most; by default 200 of L-BFGS, 2000 of Adam.
            learning_rate: of Adam, in units of the starts.
            positive: the names of parameters to search by their logarithms, or True for all `parameters`.
            learn_start: learn x0 as well, all of it, from where it is.
            tolerance: L-BFGS has converged when two iterations in a row lower the loss by less than this share, either
                of the two when the gradient is less than this share of the loss. By default 1e-9, in float32 1e-6.
            callback: (iteration, loss), after each; stops the search when it returns true.

        Returns:
            `Fit`: losses, converged, parameters, x0, loss, evaluations, reason.

        Raises:
            ValueError, TypeError: as `loss`; nothing to learn; a positive parameter that is not positive.
            Diverged: the solution from the first parameters is not finite, or Adam found no way back.
        """
        check_choice("optimizer", optimizer, OPTIMIZERS)
        x, alone = self._start(x0)
        x = x.detach().clone().requires_grad_(learn_start)
        data = self._data(x, alone, times, (observations, mask, scale), t0)
        leaves = [
            Leaf(p, relative=name.startswith("theta."), log=log)
            for name, p, log in self._learned(positive)
            if p.requires_grad
        ]
        leaves += [Leaf(x, relative=True)] if learn_start else []
        if not leaves:
            raise ValueError("ODERNN.fit: there is nothing to learn, neither parameters nor, with learn_start, x0")
        level = (data.seen.target * data.seen.weight).square().sum().item() / data.seen.number
        search = Search(
            leaves,
            lambda: self._loss(x, data),
            tolerance=_TOLERANCE.get(x.dtype, 1e-6) if tolerance is None else tolerance,
            enough=level * torch.finfo(x.dtype).eps ** 2,
            callback=callback,
        )
        with torch.enable_grad():
            reason = search.run(optimizer, OPTIMIZERS[optimizer] if iterations is None else iterations, learning_rate)
        found = {name.removeprefix("theta."): p.detach().clone() for name, p in self.named_parameters()}
        start = x.detach().squeeze(0) if alone else x.detach()
        return Fit(search.losses, reason == "converged", found, start, search.best_loss, search.evaluations, reason)

    def standard_errors(
        self,
        x0: Any,
        times: Any,
        observations: Any,
        mask: Any = None,
        *,
        scale: Any = None,
        t0: float = 0.0,
        learn_start: bool = False,
    ) -> dict[str, Tensor]:
        r"""How uncertain fitted parameters are, from the curvature of the sum of squares at them.

        .. math::
            \operatorname{cov}\theta = s^2 (J^\top J)^{-1}, \quad J = \partial (x / \text{scale}) / \partial\theta,
            \quad s^2 = \frac{1}{M - P} \sum_\text{observed} ((x - \text{observation}) / \text{scale})^2

        That is the inverse of the Fisher information where the M errors are independent and normal with one variance
        (times scale^2), and the solution is nearly linear in the P parameters within the errors. J by forward-mode
        derivatives.

        Args:
            x0, times, observations, mask, scale, t0: as they were for `fit`; x0 of its result.
            learn_start: whether x0 was learned: it takes its share of the uncertainty, and comes under the name "x0".

        Returns:
            name -> tensor like the parameter.

        Raises:
            ValueError, TypeError: as `loss`; not more observations than parameters, or observations that do not
                determine the parameters.
        """
        x, alone = self._start(x0)
        x = x.detach()
        data = self._data(x, alone, times, (observations, mask, scale), t0)
        learned = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        tensors = list(learned.values()) + ([x] if learn_start else [])
        sizes = [p.numel() for p in tensors]
        if data.seen.number <= sum(sizes):
            raise ValueError(
                f"ODERNN.standard_errors: {data.seen.number} observed numbers do not give the errors of {sum(sizes)} "
                "parameters; there must be more of them"
            )
        seen = data.seen.weight.flatten().nonzero().squeeze(1)

        def residuals(theta: Tensor) -> Tensor:
            parts = [p.view_as(like) for p, like in zip(theta.split(sizes), tensors, strict=True)]
            f = self._replaced(dict(zip(learned, parts, strict=False)))
            at = _at(data.solver.unrolled(f, parts[-1] if learn_start else x), data.steps)
            return ((at - data.seen.target) * data.seen.weight).flatten()[seen]

        theta = torch.cat([p.flatten() for p in tensors])
        variance = residuals(theta).square().sum() / (data.seen.number - len(theta))
        jacobian = torch.func.jacfwd(residuals)(theta)
        size = jacobian.norm(dim=0)  # columns of length 1: parameters of any unit
        _, singular, v = torch.linalg.svd(jacobian / size.clamp_min(torch.finfo(x.dtype).tiny), full_matrices=False)
        if not singular[-1] > torch.finfo(x.dtype).eps * data.seen.number * singular[0]:
            raise ValueError("ODERNN.standard_errors: the observations do not determine all parameters")
        errors = (variance * (v / singular.unsqueeze(1)).square().sum(0)).sqrt() / size
        parts = [e.view_as(like) for e, like in zip(errors.split(sizes), tensors, strict=True)]
        names = [name.removeprefix("theta.") for name in learned]
        named = dict(zip(names, parts, strict=False))
        if learn_start:
            named["x0"] = parts[-1].squeeze(0) if alone else parts[-1]
        return named

    def extra_repr(self) -> str:
        return f"step={self.step:g}, method={self.method!r}"

    # ---- f and its parameters

    def _replaced(self, tensors: Mapping[str, Tensor]) -> Derivative:
        """f with other tensors for parameters, by their names in `named_parameters`; for the rest what they are."""
        theta = {name: tensors.get(f"theta.{name}", value) for name, value in self.theta.items()}
        own = {name.removeprefix("f."): value for name, value in tensors.items() if name.startswith("f.")}
        more = (theta,) if self.takes_parameters else ()
        f = self.f
        if isinstance(f, nn.Module) and own:
            module = f
            return lambda x, t: torch.func.functional_call(module, own, (x, t, *more))
        return lambda x, t: f(x, t, *more)

    def _learned(self, positive: bool | Collection[str]) -> list[tuple[str, nn.Parameter, bool]]:
        """Names, parameters, and whether to learn the logarithm."""
        logs = {positive} if isinstance(positive, str) else set(self.theta if positive is True else positive or ())
        if unknown := logs - set(self.theta):
            raise ValueError(f"ODERNN.fit: positive names no parameter: {', '.join(sorted(unknown))}")
        for name in logs:
            if not (self.theta[name] > 0).all():
                raise ValueError(
                    f"ODERNN.fit: {name} must start above 0 to stay positive, got {written(self.theta[name])}"
                )
        return [(name, p, name.removeprefix("theta.") in logs) for name, p in self.named_parameters()]

    # ---- solutions

    def _start(self, x0: Any) -> tuple[Tensor, bool]:
        return starts(x0, next((p for p in self.parameters() if p.is_floating_point()), None))

    def _data(self, x: Tensor, alone: bool, times: Any, given: tuple[Any, Any, Any], t0: float) -> _Data:
        at = checked_times(times, len(x), t0)
        seen = observed(x, alone, at, *given)
        steps = grid(at, t0, self.step)
        return _Data(self._solver(steps, x), steps, seen)

    def _solver(self, steps: Steps, x: Tensor) -> Solver:
        return Solver(self.method, steps, x, self.checkpoint_every)

    def _loss(self, x: Tensor, data: _Data) -> Tensor:
        residual = (_at(self._solve(x, data.steps, data.solver), data.steps) - data.seen.target) * data.seen.weight
        return residual.square().sum() / data.seen.number

    def _solve(self, x: Tensor, steps: Steps, solver: Solver) -> Tensor:
        """(N + 1, B, D), all of them finite."""
        tensors = dict(self.named_parameters())
        f = self._replaced({})
        hidden = self._probe(x, solver) if len(steps.t) else False
        states = solver.solve(System(f, tensors, self._replaced), x, self.gradient == "auto" and not hidden)
        finite = states.detach().isfinite().flatten(1)
        if not finite.all():
            self._diverged(states.detach(), steps)
        return states

    def _probe(self, x: Tensor, solver: Solver) -> bool:
        """Check what f returns. True if its result has a gradient that leads to other tensors than its parameters."""
        f = self._replaced({name: p.detach() for name, p in self.named_parameters()})
        y = f(x.detach(), solver.numbers[0][0])
        if not isinstance(y, Tensor):
            raise TypeError(f"ODERNN: f must return a tensor, got {type(y).__name__}")
        if y.shape != x.shape:
            raise ValueError(
                f"ODERNN: f must return dx/dt of the shape of x (B, D) = {tuple(x.shape)}, got {tuple(y.shape)}; the "
                "elements of a state are x[..., 0], x[..., 1], ..."
            )
        if y.dtype != x.dtype:
            raise TypeError(f"ODERNN: f must return {x.dtype} as x is, got {y.dtype}")
        return y.requires_grad

    def _diverged(self, states: Tensor, steps: Steps) -> None:
        bad = (~states.isfinite()).any(2)  # (N + 1, B)
        n = int(bad.any(1).nonzero()[0])
        b = int(bad[n].nonzero()[0])
        t = steps.t[n - 1, min(b, steps.t.shape[1] - 1), 0]
        values = [f"{name} = {written(p)}" for name, p in self.theta.items()]
        short = sum(p.numel() for p in self.theta.values()) <= _FEW
        parameters = f" with {', '.join(values)}" if values and short else ""
        raise Diverged(
            f"ODERNN: the solution is not finite after step {n} of {len(steps.t)}, from t = {t:g}, in trajectory {b}"
            f"{parameters}; {self.method} with step {self.step:g} may be too coarse for f, or f grows without bound"
        )


def _at(states: Tensor, steps: Steps) -> Tensor:
    """(N + 1, B, D) -> (T, B, D), at the observations."""
    at = torch.as_tensor(steps.at, device=states.device)
    return states[at[:, 0]] if at.size(1) == 1 else states[at, torch.arange(states.size(1), device=states.device)]


__all__: Sequence[str] = ("Diverged", "Fit", "ODERNN")

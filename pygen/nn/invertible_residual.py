"""`InvertibleResidual`: x + g(x) with a contraction g. _log_det_series.py has its log-determinants, _fixed_point.py its
inverse, pygen/nn/utils the bounds that make g one."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pygen.nn._fixed_point import FixedPoint, ImplicitGradient, solve
from pygen.nn._log_det_series import (
    DISTRIBUTIONS,
    PROBES,
    draw,
    draw_probe,
    exact_log_det,
    roulette_weights,
    series_log_det,
)
from pygen.nn.transform import Retraced, Transform, trace
from pygen.reference._dtypes import compute_dtype, widen

__all__ = ["FixedPoint", "InvertibleResidual"]

LOG_DETS = ("exact", "truncated", "russian_roulette")


class InvertibleResidual(Transform):
    r"""A residual block that is invertible because its branch is a contraction, Lip(g) <= c < 1.

    .. math::
        z = x + g(x), \qquad \log\det = \log |\det (I + J)| = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \mathrm{tr}(J^k),
        \qquad J = \partial g / \partial x

    The branch is the caller's, and so is its bound: every layer of it needs a Lipschitz constant of at most 1 and one
    of them c (`pygen.nn.utils.spectral_norm(layer, bound=c)`, or `conv_spectral_norm(layer, size, bound=c)` there,
    activations with slopes in [-1, 1]), and no sample may see another (no batch norm). Smooth activations (ELU,
    softplus, tanh): of a ReLU, the log-determinant has no gradient with respect to x. Nothing here trusts the bound: an
    inverse that does not converge is an error, never a wrong x.

    **Log-determinant.** With probes v of mean 0 and covariance I, :math:`v^\top J^k v` has the mean
    :math:`\mathrm{tr}(J^k)` and takes k vector-Jacobian products. Every sample has probes of its own.

    - "exact": the whole Jacobian, for small samples.
    - "truncated": the first n_terms of the series; the bias is at most :math:`D c^{n+1} / ((n + 1)(1 - c))`.
    - "russian_roulette": unbiased. n_exact terms and N more, where term k counts
      :math:`1 / \mathrm{P}(N \ge k - n_{exact})` times. Each of the n_samples draws one N for the whole batch, so
      all samples are as expensive, and errors of samples in one batch are not independent. The variance is finite for
      geometric N where c is below :math:`\sqrt{1 - p}`; choose p accordingly. Poisson N has lighter tails than the
      series, so its variance is not finite for any c, though the terms that make it so are hardly ever drawn.

    **Gradient.** That of the estimate by autograd keeps the graphs of all terms. With the Neumann gradient it is one
    of :math:`\mathrm{tr}((I + J)^{-1} dJ)`, estimated with the same v, N and weights w as
    :math:`\sum_k w_{k+1} (-1)^k v^\top J^k\, dJ\, v` and the graph of one term: the same mean, whatever gradients
    come in for the samples. It has no second derivative and says so.

    **Inverse.** :math:`x \leftarrow z - g(x)` from x = z until the residual
    :math:`|x + g(x) - z|_\infty \le \mathrm{tolerance} \cdot \max(1, |z|_\infty)`, for every sample by itself; then
    :math:`|x - x^*|_2 \le |x + g(x) - z|_2 / (1 - c)`. x has the gradient of the implicit function theorem with
    respect to z, context and parameters, found by a fixed point as well. For all this the branch is in eval mode,
    weights under a parametrization are computed once, and autocast is off, because rounding to 16 bit would not
    converge. In `forward` autocast works as everywhere, and log_det is kept in float32. A branch with spectral norms
    takes one step of the power iteration in every `forward` in training mode, and none in `inverse`, which is that of
    the last forward.

    Args:
        branch: g, a module from x (and context, when one is given) to the shape of x.
        log_det: "exact", "truncated" or "russian_roulette", as above.
        n_terms: for "truncated".
        n_exact, n_exact_eval: terms that are always there for "russian_roulette", in training and in eval mode: for
            measuring, more terms and less noise.
        n_samples: estimates that are averaged.
        distribution: of N: "geometric", N = 1, 2, ... with success probability `p`, or "poisson" with mean `rate`.
        probe: "gaussian" or "rademacher" (signs; less variance, none at all for diagonal J).
        neumann_gradient: as above; False for plain autograd through the series.
        exact_limit: the most elements of a sample for "exact", whose cost grows with their square, the determinant's
            with the cube.
        inverse_tolerance: as above; in 16-bit types at least 8 roundings.
        max_inverse_iterations: where `inverse` gives up. Rounding aside, c^n reaches 1e-6 in 20 iterations for c = 0.5,
            132 for 0.9 and 1375 for 0.99.
        generator: source of v and N, on the device of x; torch's global generators by default. Also an attribute.

    Shape:
        x, z: (B, D) or (B, C, H, W) or any (B, ...), floating point. context: whatever the branch takes, (B, ...).
        log_det: (B,), float32 at least.

    Raises:
        ValueError: an argument out of its range, samples larger than exact_limit, a branch that changes the shape of x.
        RuntimeError: `inverse` did not converge, in the backward: its gradient did not. NotImplementedError, in the
        backward: second derivatives of the Neumann gradient or of the inverse.

    Under torch.compile, the block runs as it is, between two graphs. In a `ReversibleSequential`, x is found by the
    fixed point, and the forward that is run again repeats its random numbers, unless the block has a generator of its
    own, which is refused.

    Example:
        >>> import torch
        >>> from pygen.nn import InvertibleResidual
        >>> branch = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = branch.weight.copy_(torch.tensor([[0.0, 0.5], [0.5, 0.0]]))
        >>> block = InvertibleResidual(branch)
        >>> z, log_det = block(torch.tensor([[1.0, 2.0]]))
        >>> z.detach(), log_det.detach()  # log(1 - 0.5 * 0.5)
        (tensor([[2.0000, 2.5000]]), tensor([-0.2877]))
        >>> block.invert(z).converged
        tensor([True])

    Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible Residual Networks", ICML 2019. Chen, Behrmann,
    Duvenaud, Jacobsen, "Residual Flows for Invertible Generative Modeling", NeurIPS 2019, equations 6 to 9.
    """

    def __init__(
        self,
        branch: nn.Module,
        *,
        log_det: str = "exact",
        n_terms: int = 10,
        n_exact: int = 2,
        n_exact_eval: int = 20,
        n_samples: int = 1,
        distribution: str = "geometric",
        p: float = 0.5,
        rate: float = 2.0,
        probe: str = "gaussian",
        neumann_gradient: bool = True,
        exact_limit: int = 512,
        inverse_tolerance: float = 1e-6,
        max_inverse_iterations: int = 2000,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("log_det", log_det, LOG_DETS),
            ("distribution", distribution, DISTRIBUTIONS),
            ("probe", probe, PROBES),
        ):
            if value not in allowed:
                raise ValueError(f"InvertibleResidual: {name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, number, least in (
            ("n_terms", n_terms, 1),
            ("n_exact", n_exact, 0),
            ("n_exact_eval", n_exact_eval, 0),
            ("n_samples", n_samples, 1),
            ("exact_limit", exact_limit, 1),
            ("max_inverse_iterations", max_inverse_iterations, 1),
        ):
            if number < least:
                raise ValueError(f"InvertibleResidual: {name} must be at least {least}, got {number}")
        if not 0 < p < 1:
            raise ValueError(f"InvertibleResidual: p must be between 0 and 1, got {p}")
        for name, positive in (("rate", rate), ("inverse_tolerance", inverse_tolerance)):
            if not (positive > 0 and math.isfinite(positive)):
                raise ValueError(f"InvertibleResidual: {name} must be positive, got {positive}")
        self.branch = branch
        self.log_det = log_det
        self.n_terms, self.n_samples = n_terms, n_samples
        self.n_exact, self.n_exact_eval = n_exact, n_exact_eval
        self.distribution, self.p, self.rate = distribution, p, rate
        self.probe, self.neumann_gradient = probe, neumann_gradient
        self.exact_limit = exact_limit
        self.inverse_tolerance, self.max_inverse_iterations = inverse_tolerance, max_inverse_iterations
        self.generator = generator

    @torch.compiler.disable
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x)
        wanted = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # A view, because hooks on x are for gradients of the loss, not for those inside of log_det.
            attached = wanted and x.requires_grad
            source = x.view_as(x) if attached else _ordinary(x).detach().requires_grad_()
            g = self._run_branch(source, None if context is None else _ordinary(context))
            z = (source + g).to(x.dtype)
            log_det = self._log_det(g, source, create_graph=wanted)
        return (z, log_det) if wanted else (z.detach(), log_det.detach())

    def _log_det(self, g: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """(B,), with one random probe for every sample, and one number of terms for all, n_samples times."""
        if self.log_det == "exact":
            if x.shape[1:].numel() > self.exact_limit:
                raise ValueError(
                    "InvertibleResidual: log_det='exact' computes whole Jacobians, and samples of shape "
                    f"{tuple(x.shape[1:])} have {x.shape[1:].numel()} elements; exact_limit is {self.exact_limit}. Use "
                    "log_det='russian_roulette', or raise it"
                )
            return exact_log_det(g, x, create_graph=create_graph)
        total = x.new_zeros(len(x), dtype=compute_dtype(x.dtype))
        for _ in range(self.n_samples):
            probe = draw_probe(g, self.probe, self.generator)
            total = total + series_log_det(
                g, x, probe, self._weights(), neumann=self.neumann_gradient, create_graph=create_graph
            )
        return total / self.n_samples

    def _weights(self) -> list[float]:
        if self.log_det == "truncated":
            return [1.0] * self.n_terms
        parameter = self.p if self.distribution == "geometric" else self.rate
        n = draw(self.distribution, parameter, self.generator)
        return roulette_weights(self.n_exact if self.training else self.n_exact_eval, n, self.distribution, parameter)

    @torch.compiler.disable
    def invert(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        tolerance: float | None = None,
        max_iterations: int | None = None,
    ) -> FixedPoint:
        """x of z, and for every sample whether it is one: what `inverse` does, without raising and without gradients.

        Args:
            z: (B, ...). context: as in `forward`.
            tolerance, max_iterations: instead of `inverse_tolerance` and `max_inverse_iterations`.

        Returns:
            `FixedPoint` (x, converged, iterations, error); under autocast x is float32 at least.

        Raises:
            ValueError: tolerance <= 0 or max_iterations < 0, or samples that are not (B, ...) and floating point.
        """
        self._check(z)
        tolerance = self._tolerance(z) if tolerance is None else tolerance
        max_iterations = self.max_inverse_iterations if max_iterations is None else max_iterations
        if not tolerance > 0:
            raise ValueError(f"InvertibleResidual: tolerance must be positive, got {tolerance}")
        if max_iterations < 0:
            raise ValueError(f"InvertibleResidual: max_iterations must not be negative, got {max_iterations}")
        z = _without_autocast(z)
        with _held(self.branch), _no_autocast(z):
            return solve(self._run_branch, z.detach(), context, tolerance, max_iterations)

    @torch.compiler.disable
    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dtype, z = z.dtype, _without_autocast(z)
        with _held(self.branch):
            x = self._solution(z, context)
            if torch.is_grad_enabled():
                with _no_autocast(z):
                    source = x.requires_grad_()
                    g = self._run_branch(source, context)
                    system = (g, source, self._tolerance(z), self.max_inverse_iterations)
                    x = ImplicitGradient.apply(z - g, system)
            _, log_det = self.forward(x, context)
        return x.to(dtype), -log_det

    def _solution(self, z: Tensor, context: Tensor | None) -> Tensor:
        """x without a gradient, or an error that says how far away it is."""
        found = self.invert(z, context)
        failed = int((~found.converged).sum())
        if failed:
            raise RuntimeError(
                f"InvertibleResidual: the inverse of {failed} of {len(z)} samples did not converge: after "
                f"{int(found.iterations.max())} iterations the largest error is {found.error.amax().item():.1e}, the "
                f"tolerance {self._tolerance(z):.1e}. The branch must be a contraction: bound every layer, for example "
                "with pygen.nn.utils.spectral_norm(layer, bound=0.9), with enough power iterations. If it is one, "
                "raise max_inverse_iterations, or inverse_tolerance if it asks for less than rounding, "
                f"{torch.finfo(z.dtype).eps:.1e}, allows. `invert` returns what was found instead of raising"
            )
        return found.x

    def retrace(self, z: Tensor, context: Tensor | None = None) -> Retraced:
        """See `Transform.retrace`. The forward that is run again takes no step of the power iteration either.

        Raises:
            RuntimeError: the inverse did not converge, or the random numbers of an own generator are over.
        """
        if self.generator is not None and self.log_det != "exact":
            raise RuntimeError(
                "InvertibleResidual: a layer with its own generator cannot repeat its random numbers in a "
                "ReversibleSequential; leave generator=None, so that torch's global one is used, or use nn.Sequential"
            )
        with torch.no_grad():
            x = self._solution(z, context)
        with _held(self.branch, parametrizations_only=True):
            return trace(self, x, context)

    def _run_branch(self, x: Tensor, context: Tensor | None) -> Tensor:
        g = self.branch(x) if context is None else self.branch(x, context)
        if g.shape != x.shape:
            raise ValueError(
                f"InvertibleResidual: the branch must keep the shape of x, got {tuple(x.shape)} -> {tuple(g.shape)}"
            )
        return g

    def _tolerance(self, z: Tensor) -> float:
        """The tolerance of the inverse, which 16-bit types cannot meet: there it is 8 roundings."""
        eps = torch.finfo(z.dtype).eps
        return max(self.inverse_tolerance, 8 * eps) if z.dtype.itemsize < 4 else self.inverse_tolerance

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or not x.is_floating_point():
            raise ValueError(
                f"InvertibleResidual: expected floating-point samples (B, ...), got {tuple(x.shape)}, {x.dtype}"
            )

    def extra_repr(self) -> str:
        if self.log_det == "exact":
            return "log_det=exact"
        gradient = f"probe={self.probe}, n_samples={self.n_samples}, neumann_gradient={self.neumann_gradient}"
        if self.log_det == "truncated":
            return f"log_det=truncated, n_terms={self.n_terms}, {gradient}"
        number = f"p={self.p}" if self.distribution == "geometric" else f"rate={self.rate}"
        exact = f"n_exact={self.n_exact}, n_exact_eval={self.n_exact_eval}"
        return f"log_det=russian_roulette, {self.distribution}, {number}, {exact}, {gradient}"


def _ordinary(x: Tensor) -> Tensor:
    """x, or a copy of it where `torch.inference_mode` made one that no graph may contain."""
    return x.clone() if x.is_inference() else x


def _without_autocast(x: Tensor) -> Tensor:
    """What autocast would have done for 16-bit inputs of float32 layers."""
    return widen(x) if torch.is_autocast_enabled(x.device.type) else x


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


@contextlib.contextmanager
def _held(branch: nn.Module, *, parametrizations_only: bool = False) -> Iterator[None]:
    """The branch as one fixed function, that of its last forward: no dropout, no further step of the power iteration.

    Weights that are computed from others, by torch.nn.utils.parametrize, are computed once.
    """
    owners = [module for module in branch.modules() if parametrize.is_parametrized(module)]
    held = list(branch.modules())
    if parametrizations_only:
        held = [part for owner in owners for part in owner.parametrizations.modules()]  # type: ignore[union-attr]
    held = [module for module in held if module.training]
    for module in held:
        module.training = False
    try:
        with parametrize.cached():
            if torch.is_grad_enabled():
                # Before `solve` does it without a graph, and the gradients of whoever comes next are lost.
                for owner in owners:
                    for name in owner.parametrizations:  # type: ignore[union-attr]
                        getattr(owner, name)
            yield
    finally:
        for module in held:
            module.training = True

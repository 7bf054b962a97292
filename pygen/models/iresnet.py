"""Invertible residual networks: densities, classifiers and both, by blocks x + g(x). The block is
nn.InvertibleResidual, its branches are _iresnet_blocks.py's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.models._iresnet_blocks import bounded_weights, conv_branch, dense_branch, settle
from pygen.models.flow import Flow, arguments
from pygen.models.scales import image_shape
from pygen.models.stacks import check_choice, check_size
from pygen.nn import ActNorm, Reshape, Sequential, Squeeze
from pygen.nn.invertible_residual import InvertibleResidual
from pygen.nn.transform import Transform

if TYPE_CHECKING:
    from pygen.data import Dataset

ARCHITECTURES = ("mlp", "conv")
OBJECTIVES = ("density", "classifier", "hybrid")
_BLOCKS = {"mlp": 8, "conv": 3}
_HIDDEN = {"mlp": (64, 64), "conv": (32, 32)}
_MOST_SCALES = 3  # by default: enough for 32 x 32
_EXACT_SIZE = 8  # elements of a sample up to which the whole Jacobian is cheaper than a series of products with it
_LOSS_UNITS = {"density": "bits/dim", "classifier": "nats of cross-entropy", "hybrid": "nats + weight * bits/dim"}


class NotConverged(RuntimeError):
    """The fixed point of a block was not found."""


class Inversion(NamedTuple):
    """What `IResNet.invert` found.

    Attributes:
        x: (B, *shape), real; with levels, floor(x) is the integer.
        converged: bool (B,): every block's fixed point did.
        iterations: int64 (B,): of the block that took most.
        error: (B,), :math:`|f(x) - z|_\\infty / \\max(1, |z|_\\infty)`, computed by going back to z through the whole
            model.
    """

    x: Tensor
    converged: Tensor
    iterations: Tensor
    error: Tensor


class IResNet(Flow):
    r"""Residual networks that can be inverted, as a density, a classifier, or both at once.

    .. math::
        x_{l+1} = x_l + g_l(x_l), \quad \mathrm{Lip}(g_l) \le c < 1, \qquad
        \log\det = \sum_l \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \mathrm{tr}\, J_{g_l}^k

    A block's inverse is the fixed point of x <- z - g(x). Every layer's weight is divided by its spectral norm over its
    share of c where that is larger (a convolution's as the operator on images of this size). In eval mode the norms are
    computed to the last digits, for whatever weights are there, an average of a training's too: the bounds hold.

    Args:
        shape: of one sample: (D,) for vectors, (H, W) or (C, H, W) for images.
        levels, alpha, logit: integers 0 .. levels - 1 instead of real data, as in `Flow`.
        objective: "density": bits per dimension. "classifier": the cross-entropy of a linear layer on the features
            f(x), rectified and averaged over their pixels. "hybrid": cross-entropy + density_weight * bits per dim.
        num_classes: of the labels, for the latter two.
        density_weight: of "hybrid".
        architecture: "mlp" on flattened samples or "conv"; by default what fits the shape.
        blocks: how many; at every scale for "conv". By default 8, and 3 for "conv".
        hidden: widths of each branch's hidden layers, for "conv" channels: the first and last convolution are 3 x 3,
            those between 1 x 1. By default (64, 64), and (32, 32) for "conv".
        scales: for "conv": each begins with a squeeze; height and width are divisible by 2 ** scales. By default as
            many as the sides allow, up to 3.
        coefficient: c, of each branch as a whole: each of n layers has :math:`c^{1/n}`.
        activation: "sine", "lipswish", "elu" or "tanh", on a scale of their own that each learns: sin(b x) / b.
        actnorm: an `nn.ActNorm` in front of every block, and after the last.
        n_power_iterations: steps for the norms each time that training uses a weight.
        log_det: "exact", "truncated" or "russian_roulette", as in `nn.InvertibleResidual`. By default exact for samples
            of up to 8 elements, and unbiased for larger ones.
        n_terms, n_exact, n_exact_eval, n_samples, distribution, neumann_gradient: of the estimates, as there.
        inverse_tolerance, max_inverse_iterations: of each block's fixed point, as there.

    Raises:
        ValueError: a shape that the architecture does not fit, no `num_classes` where they are needed, or a bad option.

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.IResNet((2,), blocks=2).eval()
        >>> x = torch.randn(5, 2)
        >>> z, log_det = model(x)
        >>> found = model.invert(z)
        >>> bool(found.converged.all()), torch.allclose(found.x, x, atol=1e-4), model.sample(3).shape
        (True, True, torch.Size([3, 2]))

    Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible Residual Networks", ICML 2019. The unbiased
    log-determinant: Chen, Behrmann, Duvenaud, Jacobsen, "Residual Flows for Invertible Generative Modeling", NeurIPS
    2019.
    """

    name = "iresnet"
    reconstruction = "found again from its features"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        objective: str = "density",
        num_classes: int | None = None,
        density_weight: float = 1.0,
        architecture: str | None = None,
        blocks: int | None = None,
        hidden: Sequence[int] | None = None,
        scales: int | None = None,
        coefficient: float = 0.9,
        activation: str = "sine",
        actnorm: bool = True,
        n_power_iterations: int = 5,
        log_det: str | None = None,
        n_terms: int = 10,
        n_exact: int = 2,
        n_exact_eval: int = 20,
        n_samples: int = 1,
        distribution: str = "geometric",
        neumann_gradient: bool = True,
        inverse_tolerance: float = 1e-6,
        max_inverse_iterations: int = 2000,
        logit: bool = True,
        alpha: float = 0.05,
    ) -> None:
        config = arguments(locals())
        check_choice("IResNet", "objective", objective, OBJECTIVES)
        if architecture is None:
            architecture = "mlp" if len(shape) == 1 else "conv"
        check_choice("IResNet", "architecture", architecture, ARCHITECTURES)
        _check_classes(objective, num_classes, density_weight)
        depth = _BLOCKS[architecture] if blocks is None else blocks
        if depth < 1:
            raise ValueError(f"IResNet: blocks must be at least 1, got {blocks}")
        widths = _HIDDEN[architecture] if hidden is None else hidden
        size = math.prod(shape)
        bounds: dict[str, Any] = {
            "activation": activation,
            "coefficient": coefficient,
            "n_power_iterations": n_power_iterations,
        }
        estimate: dict[str, Any] = {
            "log_det": log_det or ("exact" if size <= _EXACT_SIZE else "russian_roulette"),
            "n_terms": n_terms,
            "n_exact": n_exact,
            "n_exact_eval": n_exact_eval,
            "n_samples": n_samples,
            "distribution": distribution,
            "neumann_gradient": neumann_gradient,
            "inverse_tolerance": inverse_tolerance,
            "max_inverse_iterations": max_inverse_iterations,
        }

        def stack(at: Sequence[int]) -> list[Transform]:
            layers: list[Transform] = []
            for _ in range(depth):
                branch = (
                    dense_branch("IResNet", size, widths, **bounds)
                    if architecture == "mlp"
                    else conv_branch("IResNet", at, widths, **bounds)
                )
                layers += [ActNorm(at[0])] if actnorm else []
                layers.append(InvertibleResidual(branch, **estimate))
            return layers

        transforms: list[Transform] = []
        if architecture == "mlp":
            check_size("IResNet", shape, depth)
            at: tuple[int, ...] = (size,)
            transforms += [] if tuple(shape) == at else [Reshape(shape, at)]
            transforms += stack(at)
        else:
            scales = _default_scales(shape) if scales is None else scales
            at = image_shape("IResNet", shape, scales, squeezes=scales)
            transforms += [] if tuple(shape) == at else [Reshape(shape, at)]
            for _ in range(scales):
                transforms.append(Squeeze())
                at = transforms[-1].output_shape(at)
                transforms += stack(at)
        transforms += [ActNorm(at[0])] if actnorm else []
        super().__init__(Sequential(*transforms), shape, levels=levels, alpha=alpha, logit=logit, config=config)
        self.objective, self.density_weight = objective, density_weight
        self.head = None if objective == "density" else nn.Linear(at[0], num_classes or 0)
        self.labelled = self.head is not None
        self.loss_unit = _LOSS_UNITS[objective]
        self.metric_names = ("accuracy", "cross_entropy") if self.labelled else ()
        self.pictures = _pictures(objective, self.shape, levels)
        self.cannot = _CANNOT if objective == "classifier" else {}
        self._settled: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def arguments_for(cls, data: Dataset) -> dict[str, Any]:
        classes = data.num_classes
        return super().arguments_for(data) | ({} if classes is None else {"num_classes": classes})

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        self._settle()
        return super().forward(x, context, generator=generator)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, *shape) and log_det: (B,) of the inverse, as of every flow.

        Raises:
            RuntimeError: a fixed point did not converge; `invert` gives what was found.
        """
        self._settle()
        return super().inverse(z, context)

    def features(self, x: Tensor) -> Tensor:
        """f(x), (B, *latent_shape), without the log-determinant; integers are taken at the middle of their cell."""
        self._settle()
        z = self._real(self._middle(x), None)
        if self.preprocess is not None:
            z, _ = self.preprocess(z)
        for transform in self._transforms():
            z = z + transform.branch(z) if isinstance(transform, InvertibleResidual) else transform(z)[0]
        return z

    @torch.no_grad()
    def invert(self, z: Tensor) -> Inversion:
        """x from its features z: (B, *latent_shape), with how well that went. Never raises: look at `converged`."""
        self._settle()
        converged = torch.ones(len(z), dtype=torch.bool, device=z.device)
        iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        x = z
        for transform in reversed(self._transforms()):
            if isinstance(transform, InvertibleResidual):
                found = transform.invert(x)
                x, converged = found.x, converged & found.converged
                iterations = torch.maximum(iterations, found.iterations)
            else:
                x, _ = transform.inverse(x)
        if self.preprocess is not None:
            x, _ = self.preprocess.inverse(x)
        size = z.abs().flatten(1).amax(1).clamp_min(1)
        error = (self.features(x) - z).abs().flatten(1).amax(1) / size
        return Inversion(x, converged, iterations, error)

    def classify(self, x: Tensor) -> Tensor:
        """Logits of the classes, (B, num_classes).

        Raises:
            ValueError: a model of the objective "density".
        """
        return self._logits(self.features(x))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """x found again from f(x), (B, *shape); int64 in 0 .. levels - 1 when the model has levels.

        Raises:
            NotConverged: a fixed point was not found.
        """
        return self._data(self.features(x), None)

    def sample(self, n: int, context: Tensor | None = None, **options: Any) -> Tensor:
        """As `Flow.sample`.

        Raises:
            ValueError: the objective is "classifier": nothing has made its features a normal density.
            NotConverged: a fixed point was not found.
        """
        if self.objective == "classifier":
            raise ValueError(f"an iresnet {_CANNOT['sample']}")
        return super().sample(n, context, **options)

    def loss(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """What training minimises, a scalar: x (B, *shape) and, but for "density", labels int64 (B,)."""
        if self.objective == "density":
            return self.bits_per_dim(x).mean()
        labels = self._labels(x, labels)
        if self.objective == "classifier":
            return F.cross_entropy(self.classify(x), labels)
        z, log_det = self(x)
        bits = -(self.prior.log_prob(z) + log_det).mean() / (math.prod(self.shape) * math.log(2))
        return F.cross_entropy(self._logits(z), labels) + self.density_weight * bits

    def statistics(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """How many samples, how many of them classified right, and the sum of their cross-entropies; float64, (3,)."""
        if not self.labelled:
            return super().statistics(x)
        labels = self._labels(x, labels)
        logits = self.classify(x)
        right = (logits.argmax(1) == labels).double().sum()
        nats = F.cross_entropy(logits.double(), labels, reduction="sum")
        return torch.stack((right.new_tensor(float(len(x))), right, nats))

    def metrics(self, statistics: Tensor) -> dict[str, float]:
        """The share of samples classified right, and the mean cross-entropy in nats."""
        if not self.labelled:
            return {}
        n, right, nats = statistics.tolist()
        return {"accuracy": right / n, "cross_entropy": nats / n}

    def train(self, mode: bool = True) -> IResNet:
        self._settled = None
        return super().train(mode)

    def _transforms(self) -> list[Any]:
        return list(self.transform.transforms)  # type: ignore[arg-type]

    def _logits(self, z: Tensor) -> Tensor:
        if self.head is None:
            raise ValueError("IResNet: objective='density' has no classifier; build it with 'classifier' or 'hybrid'")
        features = z.relu()
        return self.head(features if z.dim() == 2 else features.flatten(2).mean(2))

    def _labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or labels.dtype != torch.int64 or labels.shape != (len(x),):
            got = "nothing" if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"IResNet: objective={self.objective!r} needs labels, int64 ({len(x)},), got {got}")
        return labels

    def _data(self, z: Tensor, context: Tensor | None) -> Tensor:
        found = self.invert(z)
        if not found.converged.all():
            failed = int((~found.converged).sum())
            raise NotConverged(
                f"IResNet: the inverse of {failed} of {len(z)} samples did not converge: after "
                f"{int(found.iterations.max())} iterations of a block the error is {found.error.amax().item():.1e}; "
                "`invert` returns what was found"
            )
        return found.x if self.levels is None else found.x.floor().clamp(0, self.levels - 1).long()

    @torch.compiler.disable
    def _settle(self) -> None:
        """In eval mode: norms that are right for these weights. Once for as long as nothing changes them."""
        if self.training:
            return
        tensors = [t for norm, weight in bounded_weights(self) for t in (weight, norm._u, norm._v)]
        if any(t.is_inference() for t in tensors):
            return  # nobody counts their changes, and nobody may change them
        if self._settled != _versions(tensors):
            settle(self)
            self._settled = _versions(tensors)


_CANNOT = {
    "sample": "that was trained as a classifier has no density to draw from; --reconstruct 64 shows test samples "
    "found again from its features",
}


def _default_scales(shape: Sequence[int]) -> int:
    """How often the sides can be halved, from 1 to 3."""
    divisible = [n for n in range(1, _MOST_SCALES + 1) if all(side % 2**n == 0 for side in shape[-2:])]
    return max(divisible, default=1)


def _versions(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((id(t), t._version) for t in tensors)


def _check_classes(objective: str, num_classes: int | None, density_weight: float) -> None:
    if objective != "density" and (num_classes is None or num_classes < 2):
        raise ValueError(
            f"IResNet: objective={objective!r} needs num_classes, at least 2, got {num_classes}; "
            "data without labels have none"
        )
    if not (density_weight >= 0 and math.isfinite(density_weight)):
        raise ValueError(f"IResNet: density_weight must be a number >= 0, got {density_weight}")


def _pictures(objective: str, shape: tuple[int, ...], levels: int | None) -> tuple[str, ...]:
    if shape == (2,) and levels is None:
        return () if objective == "classifier" else ("density",)
    if len(shape) != 3 or shape[0] not in (1, 3) or levels is None:
        return ()
    return {"density": ("samples",), "classifier": ("inversions",), "hybrid": ("samples", "inversions")}[objective]

"""Penalties on the slope of a GAN's critic. Plain PyTorch: the penalty is differentiated twice, and so must the critic
be; `pygen.nn.utils.spectral_norm` bounds the slope by construction instead."""

from collections.abc import Callable

import torch
from torch import Tensor

from pygen.reference._dtypes import widen

_KINDS = ("two_sided", "one_sided", "zero_centered")
_PLACES = ("interpolated", "real", "fake")


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor | None,
    fake: Tensor | None,
    *context: object,
    kind: str = "two_sided",
    center: float | None = None,
    at: str = "interpolated",
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The penalty on a critic's slope at B points, to be added, times a weight, to the critic's loss.

    With :math:`g_b = \nabla_x f(x_b)`, its norm over all dimensions of a sample, and c the center:

    =================  =======================================  =====================================================
    ``two_sided``      :math:`E\,(|g_b| - c)^2`                 WGAN-GP
    ``one_sided``      :math:`E\,\max(0, |g_b| - c)^2`          WGAN-LP: a slope below c is as good as c
    ``zero_centered``  :math:`E\,|g_b|^2`                       R1 at ``"real"``, R2 at ``"fake"`` (there with weight
                                                                :math:`\gamma / 2`); also at ``"interpolated"``
    =================  =======================================  =====================================================

    The points are the real samples, the generated ones, or
    :math:`x_b = \alpha_b\, \mathrm{real}_b + (1 - \alpha_b)\, \mathrm{fake}_b` with one :math:`\alpha_b \sim U(0, 1)`
    for every sample. real and fake are constants: nothing flows back to a generator from here.

    The critic is called once, in float32 also under autocast: the slope is a gradient, and small ones vanish in 16
    bits. Its samples must not see each other: with batch normalisation g_b is the slope of all scores of the batch, not
    of its own (use layer or instance normalisation). A critic in training mode moves its buffers in this call as in any
    other.

    Args:
        critic: f(x, \*context) -> (B,) or (B, ...), as many samples as x; further elements of a sample, such as the
            logits of patches, are summed. Every operation in it must be differentiable twice; one that does not depend
            on x has slope 0. Pass the eager module: what `torch.compile` makes of it refuses a second derivative.
        real: (B, ...) floating; None where ``at="fake"``.
        fake: the shape of real; None where ``at="real"``.
        context: what else the critic takes, labels for instance.
        kind: "two_sided", "one_sided" or "zero_centered".
        center: c, by default 1; none for "zero_centered".
        at: "interpolated", "real" or "fake".
        reduction: "mean", or "none" for a value per sample.
        generator: of the alphas; torch's own when left out.

    Returns:
        scalar or (B,), float32 for 16-bit samples and their dtype otherwise; differentiable in the critic's parameters
        where gradients are enabled, and a plain number under `torch.no_grad`. An empty batch has penalty 0.

    Raises:
        ValueError: real and fake differ in shape, one that is needed is missing, an unknown option, or a critic whose
        result has another batch size. TypeError: samples that are not floating point, or a critic that returns no
        tensor.

    Example:
        >>> import torch
        >>> from pygen.functional import gradient_penalty
        >>> critic = torch.nn.Linear(2, 1)
        >>> critic.weight.data = torch.tensor([[3.0, 4.0]])  # slope 5 everywhere
        >>> gradient_penalty(critic, torch.randn(8, 2), torch.randn(8, 2)).item()
        16.0

    Source: Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, "Improved training of Wasserstein GANs", NeurIPS 2017;
    Petzka, Fischer, Lukovnikov, "On the regularization of Wasserstein GANs", ICLR 2018; Mescheder, Geiger, Nowozin,
    "Which training methods for GANs do actually converge?", ICML 2018.
    """
    _check_options(kind, center, at, reduction)
    points = _points(real, fake, at, generator)
    norm = _slopes(critic, points, context)
    if kind == "zero_centered":
        penalty = norm.square()
    else:
        excess = norm - (1.0 if center is None else center)
        penalty = (excess.clamp_min(0) if kind == "one_sided" else excess).square()
    return penalty if reduction == "none" else penalty.sum() / max(1, len(penalty))


def interpolates(real: Tensor, fake: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""A point on the segment between every real sample and its fake: :math:`\alpha_b` real_b + (1 - :math:`\alpha_b`)
    fake_b, :math:`\alpha_b \sim U(0, 1)` drawn once for each sample.

    Args:
        real, fake: (B, ...), of one shape.
        generator: of the alphas; they are drawn on its device, so that a CPU generator gives the same on every device.

    Returns:
        (B, ...), in the wider of the two dtypes; differentiable in both.

    Raises:
        ValueError: different shapes. TypeError: what is not floating point.

    Example:
        >>> import torch
        >>> from pygen.functional import interpolates
        >>> points = interpolates(torch.ones(3, 2), torch.zeros(3, 2))  # the alphas
        >>> bool((points[:, 0] == points[:, 1]).all() and (points[0] != points[1]).all())
        True
    """
    _check_samples("real", real)
    _check_samples("fake", fake)
    if real.shape != fake.shape:
        raise ValueError(
            "gradient_penalty: real and fake must be of one shape, so that every real sample has its fake, "
            f"got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    dtype = torch.promote_types(real.dtype, fake.dtype)
    start, end = widen(fake.to(dtype)), widen(real.to(dtype))
    device = real.device if generator is None else generator.device
    alpha = torch.rand(len(real), dtype=start.dtype, device=device, generator=generator)
    alpha = alpha.to(real.device).reshape(-1, *[1] * (real.dim() - 1))
    return torch.lerp(start, end, alpha).to(dtype)


def _check_options(kind: str, center: float | None, at: str, reduction: str) -> None:
    options = (("kind", kind, _KINDS), ("at", at, _PLACES), ("reduction", reduction, ("mean", "none")))
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"gradient_penalty: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if kind == "zero_centered" and center not in (None, 0):
        raise ValueError(f"gradient_penalty: zero_centered has its center at 0, got center {center}")


def _check_samples(name: str, samples: Tensor | None) -> Tensor:
    if samples is None:
        raise ValueError(f"gradient_penalty: {name} is needed at these points, got None")
    if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.dim() < 1:
        raise TypeError(f"gradient_penalty: {name} must be a floating point tensor (B, ...), got {_described(samples)}")
    return samples


def _described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _points(real: Tensor | None, fake: Tensor | None, at: str, generator: torch.Generator | None) -> Tensor:
    """Where the slope is taken, cut off from what made them."""
    if at == "interpolated":
        real, fake = _check_samples("real", real), _check_samples("fake", fake)
        return interpolates(real.detach(), fake.detach(), generator=generator)
    return _check_samples(at, real if at == "real" else fake).detach()


def _slopes(critic: Callable[..., Tensor], points: Tensor, context: tuple[object, ...]) -> Tensor:
    """|g_b|, (B,), with a graph to the critic's parameters where the caller has gradients enabled."""
    wanted = torch.is_grad_enabled()
    device = points.device.type
    if torch.is_autocast_enabled(device):
        points = widen(points)
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # A tensor of its own: the samples themselves must not be told to require a gradient.
        points = points.clone().requires_grad_()
        scores = critic(points, *context)
        _check_scores(scores, len(points))
        if not scores.requires_grad:
            return widen(points.new_zeros(len(points)))
        (gradient,) = torch.autograd.grad(
            scores.sum(), points, create_graph=wanted, allow_unused=True, materialize_grads=True
        )
        # Its derivative at a gradient of zero is zero; that of sqrt(sum of squares) would be NaN.
        return torch.linalg.vector_norm(widen(gradient).unsqueeze(-1).flatten(1), dim=1)


def _check_scores(scores: object, batch: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"gradient_penalty: critic must return a tensor, got {_described(scores)}")
    if scores.dim() < 1 or len(scores) != batch:
        raise ValueError(
            f"gradient_penalty: critic must return ({batch}, ...), one score for each sample, got {tuple(scores.shape)}"
        )

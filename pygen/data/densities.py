"""Densities in the plane whose logarithm is known: data for models of vectors. loaders.py makes data sets of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pygen.data.dataset import SPLIT_SEED, Dataset

SIZES = {"train": 10_000, "valid": 2_000, "test": 5_000}  # samples of each split of a data set
_NODES = 256  # of the quadrature along an arc: about as far apart as the noise is wide, or closer; good to 1e-5
_AT_ONCE = 2048  # points whose distances to all nodes are held at once, 8 MB of them


@dataclass(frozen=True)
class Density:
    r"""A density in the plane, scaled to mean 0 and variance 1 along both axes.

    .. math::
        \log p(x) = \log q(x \odot \sigma) + \log \sigma_1 \sigma_2

    with the density q as its picture is usually drawn, and its standard deviations :math:`\sigma`, both in closed form.

    Args:
        name: what `pygen.data.load` calls it.
        draw: (n, generator) -> n samples of q, (n, 2) float64.
        log_q: (N, 2) float64 -> log q, (N,); -inf outside of q's support.
        variances: of q along the two axes; its mean is 0.

    Example:
        >>> import torch
        >>> from pygen.data.densities import DENSITIES
        >>> moons = DENSITIES["moons"]
        >>> x = moons.sample(1000, torch.Generator().manual_seed(0))
        >>> x.shape, moons.log_prob(x).shape
        (torch.Size([1000, 2]), torch.Size([1000]))
    """

    name: str
    draw: Callable[[int, torch.Generator], Tensor]
    log_q: Callable[[Tensor], Tensor]
    variances: tuple[float, float]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n samples, (n, 2), float64.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"{self.name}: n must not be negative, got {n}")
        return self.draw(n, generator) / self._std()

    def log_prob(self, x: Tensor) -> Tensor:
        """x: (N, 2), floating point -> log p in nats, (N,), float64.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 2 or x.size(1) != 2:
            raise ValueError(f"{self.name}: x must be (N, 2), got {tuple(x.shape)}")
        std = self._std()
        parts = [self.log_q(part.double().cpu() * std) for part in x.split(_AT_ONCE)]
        return torch.cat(parts).to(x.device) + std.log().sum().item()

    def entropy(self) -> float:
        """In nats: what the mean of -log_prob over the test split is of the density itself; no model's can be lower in
        expectation."""
        return -self.log_prob(self.dataset().test).mean().item()

    def dataset(self) -> Dataset:
        """Three splits, float32, always the same."""
        x = self.sample(sum(SIZES.values()), torch.Generator().manual_seed(SPLIT_SEED)).float()
        train, valid, test = x.split(list(SIZES.values()))
        return Dataset(train, valid, test, None, (2,), self.name, {"name_or_path": self.name})

    def _std(self) -> Tensor:
        return torch.tensor(self.variances, dtype=torch.float64).sqrt()


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, dtype=torch.float64, generator=generator)


def _choice(n: int, options: int, generator: torch.Generator) -> Tensor:
    return torch.randint(options, (n,), generator=generator)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def _log_normal(x: Tensor, std: float) -> Tensor:
    """(..., 2) -> log N(x; 0, std^2 I)."""
    return -0.5 * x.square().sum(-1) / std**2 - math.log(2 * math.pi * std**2)


def _log_mixture(x: Tensor, centres: Tensor, std: float, weights: Tensor) -> Tensor:
    """Parts, of the weights (K,), of normal densities around centres (K, 2)."""
    squares = (x.square().sum(1, keepdim=True) + centres.square().sum(1)).addmm(x, centres.T, alpha=-2)
    return (squares / (-2 * std**2) + weights.log()).logsumexp(1) - math.log(2 * math.pi * std**2)


def _along_curve(
    name: str, curve: Callable[[Tensor, Tensor], Tensor], std: float, variances: tuple[float, float]
) -> Density:
    """Points of two arcs, each with normal noise around it. `curve` takes u in (0, 1), uniform, and the arc, 0 or 1."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return curve(_uniform(n, generator), _choice(n, 2, generator)) + std * _normal(n, generator)

    def log_q(x: Tensor) -> Tensor:
        # The midpoint rule of the integral over s with u = s^2, which the spirals need: they begin as a root of u.
        s = ((torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES).repeat(2)
        nodes = curve(s.square(), torch.arange(2).repeat_interleave(_NODES))
        return _log_mixture(x, nodes, std, s / _NODES)

    return Density(name, draw, log_q, (variances[0] + std**2, variances[1] + std**2))


def _moons() -> Density:
    """Two half circles of radius 1 that reach into each other."""

    def curve(u: Tensor, arc: Tensor) -> Tensor:
        sign = 1.0 - 2.0 * arc  # the second is the first, turned by half a circle around the origin
        return sign.unsqueeze(1) * (_polar(torch.ones_like(u), math.pi * u) - torch.tensor((0.5, 0.25)))

    # E (cos - 1/2)^2 and E (sin - 1/4)^2 over half a circle.
    return _along_curve("moons", curve, 0.06, (0.75, 0.5 - 1 / math.pi + 1 / 16))


def _spirals() -> Density:
    """Two arms of one and a half turns, evenly filled."""
    end = 3 * math.pi

    def curve(u: Tensor, arc: Tensor) -> Tensor:
        radius = u.sqrt()
        return (1.0 - 2.0 * arc).unsqueeze(1) * _polar(radius, end * radius)

    # E r^2 cos^2(end r) with the density 2 r of r; sin^2 has the rest of E r^2 = 1/2.
    shift = 3 / (4 * end**2)
    return _along_curve("spirals", curve, 0.03, (0.25 + shift, 0.25 - shift))


def _eight_gaussians() -> Density:
    """Normal densities at the corners of an octagon."""
    std = 0.12
    centres = _polar(torch.ones(8, dtype=torch.float64), torch.arange(8, dtype=torch.float64) * math.pi / 4)
    weights = torch.full((8,), 1 / 8, dtype=torch.float64)
    variance = 0.5 + std**2

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return centres[_choice(n, 8, generator)] + std * _normal(n, generator)

    return Density("eight_gaussians", draw, lambda x: _log_mixture(x, centres, std, weights), (variance, variance))


def _checkerboard() -> Density:
    """Uniform on the eight squares of one colour of a board of 4 x 4 squares of side 1."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        row, column = _choice(n, 4, generator), 2 * _choice(n, 2, generator)
        y, x = row + _uniform(n, generator), column + row % 2 + _uniform(n, generator)
        return torch.stack((x, y), 1) - 2

    def log_q(x: Tensor) -> Tensor:
        cell = x.add(2).floor()
        inside = ((cell >= 0) & (cell < 4)).all(1) & (cell.sum(1) % 2 == 0)
        return torch.where(inside, 0.0, -math.inf).to(x.dtype) - math.log(8)

    return Density("checkerboard", draw, log_q, (4 / 3, 4 / 3))  # of a uniform number in [-2, 2]


def _rings() -> Density:
    """Four circles around the origin, each a quarter of the points, with normal noise."""
    std, radii = 0.04, torch.arange(1, 5, dtype=torch.float64) / 4

    def draw(n: int, generator: torch.Generator) -> Tensor:
        angle = 2 * math.pi * _uniform(n, generator)
        return _polar(radii[_choice(n, 4, generator)], angle) + std * _normal(n, generator)

    def log_q(x: Tensor) -> Tensor:
        # The mean over a circle of exp(-|x - c|^2 / 2 std^2) is a Bessel function, here scaled by exp(-|x| r / std^2).
        distance = x.square().sum(1, keepdim=True).sqrt()
        log_bessel = torch.special.i0e(distance * radii / std**2).log()
        log_radial = -0.5 * (distance - radii).square() / std**2 - math.log(2 * math.pi * std**2)
        return (log_bessel + log_radial).logsumexp(1) - math.log(4)

    variance = radii.square().mean().item() / 2 + std**2
    return Density("rings", draw, log_q, (variance, variance))


def _pinwheel() -> Density:
    """Five blades: narrow normal densities at radius 1, each turned further the further out it is."""
    along, across, twist, blades = 0.3, 0.06, 0.6, 5
    starts = torch.arange(blades, dtype=torch.float64) * 2 * math.pi / blades
    spread = torch.tensor((along, across), dtype=torch.float64)
    centre = torch.tensor((1.0, 0.0), dtype=torch.float64)

    def turned(x: Tensor, blade: Tensor, direction: float) -> Tensor:
        # A turn that depends on the radius alone keeps areas: the density needs no Jacobian.
        angle = direction * (blade + twist * x.square().sum(-1).sqrt().exp())
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]), -1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return turned(centre + spread * _normal(n, generator), starts[_choice(n, blades, generator)], 1.0)

    def log_q(x: Tensor) -> Tensor:
        straight = (turned(x.unsqueeze(1), starts, -1.0) - centre) / spread
        return _log_normal(straight, 1.0).logsumexp(1) - math.log(blades) - spread.log().sum().item()

    variance = (1 + along**2 + across**2) / 2  # five blades around the origin: the same along every axis
    return Density("pinwheel", draw, log_q, (variance, variance))


DENSITIES: dict[str, Density] = {
    density.name: density
    for density in (_moons(), _eight_gaussians(), _checkerboard(), _pinwheel(), _rings(), _spirals())
}

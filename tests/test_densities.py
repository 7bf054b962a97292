"""The densities in the plane: integrals, moments and histograms say that samples and log-densities belong together."""

import math

import pytest
import torch

from pygen import data
from pygen.data import DENSITIES

NAMES = tuple(DENSITIES)
KNOWN = ("checkerboard", "eight_gaussians", "moons", "pinwheel", "rings", "spirals")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cells(side, extent=4.0):
    """Centres (side^2, 2) of the cells of [-extent, extent]^2, and the area of one."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * (2 * extent / side) - extent
    return torch.cartesian_prod(centres, centres), (2 * extent / side) ** 2


def test_the_names_are_the_known_ones():
    assert tuple(sorted(NAMES)) == KNOWN


@pytest.mark.parametrize("name", NAMES)
def test_the_density_integrates_to_one(name):
    # Cells no wider than the narrowest noise: the sum is then the integral of a smooth density to 1e-8. The
    # checkerboard is none: it gets finer cells, and is off by part of those along its edges.
    points, area = cells(640 if name == "checkerboard" else 200)
    tolerance = 1e-2 if name == "checkerboard" else 1e-3
    assert DENSITIES[name].log_prob(points).exp().sum().item() * area == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_where_the_log_density_says(name):
    """Counts in coarse cells against the integral of the density over them: chi-square with its own spread."""
    n, coarse, extent = 20_000, 16, 3.2
    fine = 40 if name == "checkerboard" else 10
    x = DENSITIES[name].sample(n, generator())
    index = ((x + extent) * (coarse / (2 * extent))).floor().long().clamp(0, coarse - 1)
    counts = torch.bincount(index[:, 0] * coarse + index[:, 1], minlength=coarse**2).double()
    points, area = cells(coarse * fine, extent)
    mass = DENSITIES[name].log_prob(points).exp().view(coarse, fine, coarse, fine).sum((1, 3)).flatten() * area
    expected = n * mass
    enough = expected > 20
    chi_square = ((counts - expected)[enough].square() / expected[enough]).sum().item()
    cells_used = int(enough.sum())
    assert expected[enough].sum() > 0.95 * n
    # Mean k, variance 2 k. The checkerboard's integral over a cell at an edge is off by up to a fine cell's row.
    slack = 0.5 * cells_used if name == "checkerboard" else 0
    assert chi_square < cells_used + 4 * math.sqrt(2 * cells_used) + slack


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_mean_zero_and_variance_one(name):
    x = DENSITIES[name].sample(100_000, generator())
    assert x.shape == (100_000, 2) and x.dtype == torch.float64
    # Standard errors at this n: 0.003 of the mean, at most 0.0045 of the variance (a normal's is the largest here).
    torch.testing.assert_close(x.mean(0), torch.zeros(2).double(), rtol=0, atol=0.015)
    torch.testing.assert_close(x.var(0), torch.ones(2).double(), rtol=0, atol=0.02)


def test_eight_gaussians_are_the_mixture_of_torch_distributions():
    from torch import distributions as d

    scale = math.sqrt(0.5 + 0.12**2)
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = torch.stack((angle.cos(), angle.sin()), 1) / scale
    component = d.Independent(d.Normal(centres, torch.full((8, 2), 0.12 / scale, dtype=torch.float64)), 1)
    mixture = d.MixtureSameFamily(d.Categorical(torch.ones(8, dtype=torch.float64)), component)
    x = torch.randn(100, 2, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(DENSITIES["eight_gaussians"].log_prob(x), mixture.log_prob(x), rtol=0, atol=1e-10)


def test_the_checkerboard_is_uniform_on_half_of_its_square():
    board = DENSITIES["checkerboard"]
    side = 4 / math.sqrt(4 / 3)  # of the board: a uniform number of variance 1
    inside = board.log_prob(board.sample(1000, generator()))
    torch.testing.assert_close(inside, torch.full_like(inside, -math.log(side**2 / 2)), rtol=0, atol=1e-12)
    assert board.log_prob(torch.tensor([[side, 0.0], [0.0, -side]])).tolist() == [-math.inf, -math.inf]
    square = torch.tensor([[side / 8, side / 8], [side / 8, -side / 8]], dtype=torch.float64)
    assert board.log_prob(square).isfinite().tolist() == [True, False], "neighbours have different colours"


def test_no_model_can_beat_the_entropy_of_the_density():
    """A standard normal, which is not the density, has the larger cross-entropy: 1 + log 2 pi at variance 1."""
    normal = 1 + math.log(2 * math.pi)
    for density in DENSITIES.values():
        assert density.entropy() < normal - 0.3
    assert DENSITIES["checkerboard"].entropy() == pytest.approx(math.log(6), abs=1e-12), "half of a square of area 12"


@pytest.mark.parametrize("name", NAMES)
def test_a_density_is_a_data_set_of_that_name_always_the_same(name):
    dataset, again = data.load(name), data.load(name)
    assert (dataset.name, dataset.shape, dataset.levels, dataset.labels) == (name, (2,), None, None)
    assert [len(x) for _, x in dataset.splits()] == [10_000, 2_000, 5_000]
    assert all(x.dtype == torch.float32 for _, x in dataset.splits())
    assert torch.equal(dataset.train, again.train) and not torch.equal(dataset.train[:2000], dataset.valid)
    assert torch.equal(data.load(**dataset.source).test, dataset.test)


def test_bad_points_and_counts_are_sentences():
    with pytest.raises(ValueError, match=r"moons: x must be \(N, 2\), got \(3,\)"):
        DENSITIES["moons"].log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="moons: n must not be negative, got -1"):
        DENSITIES["moons"].sample(-1, generator())
    assert DENSITIES["moons"].sample(0, generator()).shape == (0, 2)


def test_real_data_are_floating_and_finite():
    x = torch.zeros(3, 2)
    assert data.Dataset(x, x, x, None, (2,), "mine").levels is None
    with pytest.raises(ValueError, match=r"mine: valid must be real numbers \(N, 2\), got torch.int64 \(3, 2\)"):
        data.Dataset(x, x.long(), x, None, (2,), "mine")
    with pytest.raises(ValueError, match=r"mine: test must be finite, got NaN or infinity"):
        data.Dataset(x, x, x / 0, None, (2,), "mine")


def test_labels_belong_to_their_samples():
    x, y = torch.zeros(3, 2), torch.arange(3)
    labelled = data.Dataset(x, x, x, None, (2,), "mine", labels={"train": y, "valid": y, "test": y})
    assert labelled.num_classes == 3 and len(labelled.tensors("test", labelled=True)) == 2
    assert labelled.tensors("test", labelled=False) == (labelled.test,)
    for wrong, got in ((y[:2], r"torch.int64 \(2,\)"), (y.float(), r"torch.float32 \(3,\)"), (y - 1, r".* with -1")):
        with pytest.raises(ValueError, match=rf"mine: labels of valid must be int64 \(3,\).*got {got}"):
            data.Dataset(x, x, x, None, (2,), "mine", labels={"train": y, "valid": wrong, "test": y})
    with pytest.raises(ValueError, match="got nothing"):
        data.Dataset(x, x, x, None, (2,), "mine", labels={"train": y})
    without = data.Dataset(x, x, x, None, (2,), "mine")
    assert without.num_classes is None
    with pytest.raises(ValueError, match="mine: the data have no labels, and this model is trained with labels"):
        without.tensors("train", labelled=True)


def test_the_digits_labels_are_those_of_their_images():
    digits_of = pytest.importorskip("sklearn.datasets").load_digits()
    truth = {tuple(image.flatten().astype(int)): int(label) for image, label in
             zip(digits_of.images, digits_of.target, strict=True)}  # fmt: skip
    digits = data.load("digits")
    assert digits.num_classes == 10
    for split, x in digits.splits():
        assert [truth[tuple(image.flatten().tolist())] for image in x] == digits.labels[split].tolist()

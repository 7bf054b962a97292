"""GAN losses against sums by hand, their gradients against finite differences, and the optimum that theory names."""

import math

import numpy as np
import pytest
import torch

from pygen.functional import gan_losses
from pygen.functional.gan_losses import GAN_LOSSES, gan_loss

REAL, FAKE = [2.0, 0.5, -1.0], [-3.0, 1.0]
LOG = np.log1p  # ln(1 + e^s) below: plain, for scores of this size
BY_HAND = {
    # max(0, 1 - 2) + max(0, 1 - 0.5) + max(0, 1 + 1) over 3; max(0, 1 - 3) + max(0, 1 + 1) over 2
    "hinge": ((0 + 0.5 + 2) / 3 + (0 + 2) / 2, -(-3 + 1) / 2),
    "non_saturating": (
        sum(LOG(np.exp(-s)) for s in REAL) / 3 + sum(LOG(np.exp(s)) for s in FAKE) / 2,
        sum(LOG(np.exp(-s)) for s in FAKE) / 2,
    ),
    "wasserstein": ((-3 + 1) / 2 - (2 + 0.5 - 1) / 3, -(-3 + 1) / 2),
    "least_squares": (0.5 * (1 + 0.25 + 4) / 3 + 0.5 * (9 + 1) / 2, 0.5 * (16 + 0) / 2),
}


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_losses_are_the_sums_by_hand(name):
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    discriminator, generator = BY_HAND[name]
    assert gan_loss(name).discriminator(real, fake).item() == pytest.approx(discriminator, rel=1e-6)
    assert gan_loss(name).generator(fake).item() == pytest.approx(generator, rel=1e-6)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    real, fake = (torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (REAL, [-3.0, 1.5]))
    assert torch.autograd.gradcheck(gan_loss(name).discriminator, (real, fake))
    assert torch.autograd.gradcheck(gan_loss(name).generator, (fake,))


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_a_generator_gains_by_higher_scores_and_a_discriminator_by_scores_apart(name):
    loss = gan_loss(name)
    low, high = torch.full((4,), -0.9), torch.full((4,), 0.9)
    assert loss.generator(high) < loss.generator(low)
    assert loss.discriminator(high, low) < loss.discriminator(low, high)


def test_hinge_has_no_gradient_beyond_the_margin():
    real, fake = torch.tensor([1.5, 0.0], requires_grad=True), torch.tensor([-1.5, 0.0], requires_grad=True)
    gan_loss("hinge").discriminator(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.5] and fake.grad.tolist() == [0.0, 0.5]


def test_undecided_scores_cost_what_theory_says():
    zero = torch.zeros(5)
    expected = {"hinge": 2.0, "non_saturating": 2 * math.log(2), "wasserstein": 0.0, "least_squares": 0.5}
    for name, value in expected.items():
        assert gan_loss(name).discriminator(zero, zero).item() == pytest.approx(value), name


def test_non_saturating_losses_are_finite_for_scores_that_overflow_exp():
    loss = gan_loss("non_saturating")
    sure = torch.tensor([1e4])
    assert loss.discriminator(-sure, sure).item() == pytest.approx(2e4)
    assert loss.generator(-sure).item() == pytest.approx(1e4)


@pytest.mark.parametrize("name", ("hinge", "non_saturating", "least_squares"))
def test_the_best_discriminator_is_known_in_closed_form(name):
    """Minimised pointwise: p(x) f(D) + q(x) g(D) has its minimum where the papers say, for densities 0.8 and 0.2."""
    p, q = 0.8, 0.2
    best = {"hinge": 1.0, "non_saturating": math.log(p / q), "least_squares": p / (p + q)}[name]
    scores = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    data, samples = (
        torch.stack([gan_loss(name).discriminator(*pair) for pair in pairs])
        for pairs in (
            [(s.view(1), torch.full((1,), -1e9 if name != "least_squares" else 0.0)) for s in scores],
            [(torch.full((1,), 1e9 if name != "least_squares" else 1.0), s.view(1)) for s in scores],
        )
    )
    assert scores[(p * data + q * samples).argmin()].item() == pytest.approx(best, abs=2e-3)


def test_an_unknown_loss_is_refused_with_the_names_that_exist():
    with pytest.raises(
        ValueError, match="loss must be one of hinge, non_saturating, wasserstein, least_squares, got 'x'"
    ):
        gan_loss("x")


def test_every_public_function_is_in_all():
    functions = {name for name in vars(gan_losses) if name.endswith("_loss")}
    assert functions <= set(gan_losses.__all__)

"""Gradient penalties: equal to closed forms for linear and quadratic critics, sample by sample, without NaN and with no
way back to the generator."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pygen.functional import gradient_penalties
from pygen.functional.gradient_penalties import gradient_penalty, interpolates
from pygen.nn.utils.spectral_norm import spectral_norm

KINDS = ("two_sided", "one_sided", "zero_centered")
PLACES = ("interpolated", "real", "fake")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batches(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype), 3 + torch.randn(*shape, dtype=dtype)


class LinearCritic(nn.Module):
    """f(x) = w . x: slope w everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.w


def quadratic(x):
    """f(x) = |x|^2 / 2: slope x."""
    return x.flatten(1).square().sum(1) / 2


# ---- closed forms


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize(
    ("kind", "w", "expected", "slope"),
    (
        # |w| = 5: penalty and its gradient along w / |w|.
        ("two_sided", [3.0, 4.0], 16.0, 8.0),
        ("one_sided", [3.0, 4.0], 16.0, 8.0),
        ("zero_centered", [3.0, 4.0], 25.0, 10.0),
        # |w| = 0.5: pulled up, left alone, pulled down.
        ("two_sided", [0.3, 0.4], 0.25, -1.0),
        ("one_sided", [0.3, 0.4], 0.0, 0.0),
        ("zero_centered", [0.3, 0.4], 0.25, 1.0),
    ),
)
def test_a_linear_critics_penalty_and_its_gradient_are_those_by_hand(kind, at, w, expected, slope):
    critic = LinearCritic(w)
    penalty = gradient_penalty(critic, *batches(7, 2), kind=kind, at=at)
    penalty.backward()
    direction = critic.w.detach() / critic.w.detach().norm()
    torch.testing.assert_close(penalty.item(), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(critic.w.grad, slope * direction, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("at", "index"), (("real", 0), ("fake", 1)))
def test_r1_and_r2_of_a_quadratic_critic_are_the_mean_squares_of_the_samples(at, index):
    samples = batches(6, 2, 3)
    penalty = gradient_penalty(quadratic, *samples, kind="zero_centered", at=at)
    torch.testing.assert_close(penalty, samples[index].square().sum((1, 2)).mean())


@pytest.mark.parametrize(("at", "missing"), (("real", 1), ("fake", 0)))
def test_r1_needs_no_fakes_and_r2_no_real_samples(at, missing):
    samples = list(batches(5, 2))
    expected = gradient_penalty(quadratic, *samples, at=at)
    samples[missing] = None
    assert gradient_penalty(quadratic, *samples, at=at) == expected


def test_the_center_is_what_the_slope_is_compared_with():
    real, fake = batches(5, 2)
    assert gradient_penalty(LinearCritic([3.0, 4.0]), real, fake, center=3).item() == pytest.approx(4.0, rel=1e-14)
    assert gradient_penalty(LinearCritic([3.0, 4.0]), real, fake, center=6, kind="one_sided") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_finite_differences(kind):
    critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    real, fake = batches(4, 3)
    names, values = zip(*critic.named_parameters(), strict=True)

    def penalty(*parameters):
        def call(x):
            return torch.func.functional_call(critic, dict(zip(names, parameters, strict=True)), (x,))

        # A center inside the range of the slopes, so that one_sided has samples on both sides.
        center = None if kind == "zero_centered" else 0.3
        generator = torch.Generator().manual_seed(1)
        return gradient_penalty(call, real, fake, kind=kind, center=center, generator=generator)

    assert torch.autograd.gradcheck(penalty, values)


# ---- per sample


def test_every_interpolate_lies_on_its_own_segment_at_its_own_fraction():
    real, fake = batches(64, 2, 3)
    points = interpolates(real, fake)
    alphas = (points - fake) / (real - fake)
    first = alphas[:, :1, :1]
    torch.testing.assert_close(alphas, first.expand_as(alphas), rtol=0, atol=1e-10)
    assert first.min() >= 0 and first.max() <= 1
    assert len(first.unique()) == 64, "one alpha for several samples"
    assert first.min() < 0.2 and first.max() > 0.8  # missed by 64 uniform numbers once in a million


def test_the_critic_sees_those_interpolates():
    real, fake = batches(5, 3)
    seen = []

    def critic(x):
        seen.append(x.detach().clone())
        return quadratic(x)

    gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(3))
    (points,) = seen
    assert torch.equal(points, interpolates(real, fake, generator=torch.Generator().manual_seed(3)))


def test_the_norm_is_of_each_sample_and_over_all_its_dimensions():
    real = torch.randn(6, 2, 3, 4, dtype=torch.float64)
    each = gradient_penalty(quadratic, real, None, at="real", reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(each, torch.stack([(x.norm() - 1) ** 2 for x in real]))
    torch.testing.assert_close(gradient_penalty(quadratic, real, None, at="real"), each.mean())


def test_a_sample_has_the_penalty_that_it_has_alone():
    critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    real, _ = batches(6, 3)
    together = gradient_penalty(critic, real, None, at="real", reduction="none")
    alone = torch.cat([gradient_penalty(critic, x[None], None, at="real", reduction="none") for x in real])
    torch.testing.assert_close(together, alone)


def test_with_batch_normalisation_samples_see_each_other_as_documented():
    critic = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()
    real, _ = batches(6, 3)
    changed = torch.cat((real[:1], 2 * real[1:]))
    values = [gradient_penalty(critic, x, None, at="real", reduction="none")[0] for x in (real, changed)]
    assert not torch.isclose(*values)


@pytest.mark.parametrize("shape", ((4,), (4, 1), (4, 1, 3, 3)))
def test_scores_of_any_shape_are_summed_within_a_sample(shape):
    real, _ = batches(4, 2)
    weights = torch.rand(shape, dtype=torch.float64)

    def critic(x):
        return (x.sum(1).view(-1, *[1] * (len(shape) - 1))) * weights

    each = gradient_penalty(critic, real, None, at="real", kind="zero_centered", reduction="none")
    torch.testing.assert_close(each, 2 * weights.view(4, -1).sum(1) ** 2)


def test_vectors_of_one_number_per_sample_have_a_slope():
    penalty = gradient_penalty(lambda x: 3 * x, torch.randn(5), torch.randn(5))
    torch.testing.assert_close(penalty, torch.tensor(4.0))


# ---- random numbers


def test_the_same_generator_gives_the_same_penalty_and_another_seed_another():
    real, fake = batches(8, 2)
    first, again, other = (
        gradient_penalty(quadratic, real, fake, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == again and first != other


def test_a_generator_leaves_torchs_own_untouched():
    before = torch.get_rng_state()
    gradient_penalty(quadratic, *batches(4, 2), generator=torch.Generator())
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    batches(4, 2)
    assert torch.equal(torch.get_rng_state(), after)


# ---- what flows back


@pytest.mark.parametrize("at", PLACES)
def test_nothing_flows_back_to_the_samples_and_they_stay_as_they_were(at):
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    real, latent = (x.requires_grad_() for x in batches(5, 2))
    fake = 2 * latent
    gradient_penalty(critic, real, fake, at=at).backward()
    assert real.grad is None and latent.grad is None
    plain = torch.randn(3, 2, dtype=torch.float64)
    gradient_penalty(critic, plain, plain, at=at)
    assert not plain.requires_grad and plain.grad is None


def test_under_no_grad_it_is_the_same_number_without_a_graph():
    critic = LinearCritic([3.0, 4.0])
    with torch.no_grad():
        penalty = gradient_penalty(critic, *batches(4, 2))
    assert not penalty.requires_grad and penalty.item() == pytest.approx(16.0, rel=1e-14)
    assert critic.w.grad is None


def test_gradients_of_the_loss_and_of_the_penalty_add():
    critic = LinearCritic([3.0, 4.0])
    real, fake = batches(4, 2)
    loss = critic(fake).mean() - critic(real).mean() + 10 * gradient_penalty(critic, real, fake)
    loss.backward()
    expected = fake.mean(0) - real.mean(0) + 80 * critic.w.detach() / 5
    torch.testing.assert_close(critic.w.grad, expected)


# ---- where a square root or a missing graph would give NaN or an error


@pytest.mark.parametrize("kind", KINDS)
def test_a_slope_of_zero_gives_no_nan(kind):
    critic = LinearCritic([0.0, 0.0])
    penalty = gradient_penalty(critic, *batches(4, 2), kind=kind)
    penalty.backward()
    assert penalty.item() == {"two_sided": 1.0, "one_sided": 0.0, "zero_centered": 0.0}[kind]
    assert torch.equal(critic.w.grad, torch.zeros(2).double())


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_with_slope_zero_does_not_spoil_the_others(kind):
    real = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    gradient_penalty(lambda x: scale * quadratic(x), real, None, at="real", kind=kind).backward()
    expected = {"two_sided": 2 * 4 * 5 / 2, "one_sided": 2 * 4 * 5 / 2, "zero_centered": 2 * 25 / 2}[kind]
    torch.testing.assert_close(scale.grad.item(), expected)


def test_a_constant_critic_has_slope_zero():
    bias = nn.Parameter(torch.zeros(()))
    real, fake = batches(4, 2, dtype=torch.float32)
    for critic in (lambda x: torch.ones(len(x), 1), lambda x: bias.expand(len(x)), lambda x: 0 * x.sum(1) + bias):
        assert gradient_penalty(critic, real, fake).item() == 1.0
        assert gradient_penalty(critic, real, fake, kind="zero_centered").item() == 0.0


def test_an_empty_batch_has_penalty_zero():
    penalty = gradient_penalty(LinearCritic([3.0, 4.0]), *batches(0, 2))
    assert penalty.item() == 0


# ---- critics


def test_a_conditional_critic_takes_its_labels_as_arguments_or_in_a_closure():
    embedding = nn.Embedding(3, 2).double()
    labels = torch.tensor([0, 1, 2, 0])
    real, _ = batches(4, 2)

    def critic(x, y):
        return (x * embedding(y)).sum(1)

    each = gradient_penalty(critic, real, None, labels, at="real", kind="zero_centered", reduction="none")
    torch.testing.assert_close(each, embedding(labels).square().sum(1))
    closed = gradient_penalty(lambda x: critic(x, labels), real, None, at="real", kind="zero_centered")
    torch.testing.assert_close(closed, each.mean())


def test_a_convolutional_critic_learns_slope_one():
    critic = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 1))
    real, fake = batches(16, 1, 4, 4, dtype=torch.float32)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    before = gradient_penalty(critic, real, fake).item()
    for _ in range(100):
        optimizer.zero_grad()
        gradient_penalty(critic, real, fake).backward()
        optimizer.step()
    assert gradient_penalty(critic, real, fake).item() < 0.1 * before


def test_the_critic_is_called_once():
    """A second call would move the vectors of a power iteration and running statistics once more."""
    calls = []
    gradient_penalty(lambda x: calls.append(1) or quadratic(x), *batches(4, 2))
    assert len(calls) == 1


def test_a_normalised_row_has_slope_one_and_nothing_left_to_learn():
    critic = spectral_norm(nn.Linear(3, 1))
    penalty = gradient_penalty(critic, *batches(4, 3, dtype=torch.float32), kind="zero_centered")
    penalty.backward()
    torch.testing.assert_close(penalty.item(), 1.0, rtol=1e-6, atol=0)
    gradient = critic.parametrizations.weight.original.grad
    # A weight of length 1 / 2 makes rounding of 1e-7 a few times that.
    torch.testing.assert_close(gradient, torch.zeros(1, 3), rtol=0, atol=1e-6)


def test_the_gradient_through_spectral_norm_is_that_through_torchs():
    grads = []
    for normalise in (spectral_norm, nn.utils.parametrizations.spectral_norm):
        torch.manual_seed(1)
        critic = nn.Sequential(normalise(nn.Linear(3, 6)), nn.Tanh(), normalise(nn.Linear(6, 1))).double()
        gradient_penalty(critic, *batches(4, 3), generator=torch.Generator().manual_seed(1)).backward()
        grads.append([p.grad for p in critic.parameters()])
    # The vectors are made in float32, 15 steps with their rounding.
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# ---- dtypes


def test_under_autocast_it_is_the_float32_penalty_bit_for_bit():
    critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    real, fake = batches(4, 3, dtype=torch.float32)
    expected = gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(0))
        # What a generator makes under autocast is in 16 bits.
        mixed = gradient_penalty(critic, real, fake.bfloat16())
        halves = gradient_penalty(critic, None, fake.bfloat16(), at="fake")
        assert critic(real).dtype == torch.bfloat16
    assert penalty.dtype == mixed.dtype == halves.dtype == torch.float32
    assert torch.equal(penalty, expected)
    (mixed + halves).backward()
    assert all(p.grad.dtype == torch.float32 for p in critic.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_critic_in_16_bits_has_its_norms_in_float32(dtype):
    critic = LinearCritic([3.0, 4.0]).to(dtype)
    penalty = gradient_penalty(critic, *batches(4, 2, dtype=dtype))
    penalty.backward()
    assert penalty.dtype == torch.float32 and penalty.item() == 16.0
    assert critic.w.grad.dtype == dtype


# ---- several processes


def test_a_critic_under_distributed_data_parallel_gets_the_mean_gradient(tmp_path):
    script = Path(__file__).with_name("two_processes_penalties.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- refusals


@pytest.mark.parametrize(
    ("change", "sentence"),
    (
        ({"fake": torch.zeros(3, 2)}, "one shape.*(4, 2).*(3, 2)"),
        ({"fake": torch.zeros(4, 1)}, "one shape"),
        ({"fake": None}, "fake is needed"),
        ({"real": None, "at": "real"}, "real is needed"),
        ({"kind": "both"}, "kind must be one of"),
        ({"at": "middle"}, "at must be one of"),
        ({"reduction": "sum"}, "reduction must be one of"),
        ({"kind": "zero_centered", "center": 2.0}, "center at 0, got center 2.0"),
        ({"critic": lambda x: x.sum()}, r"must return \(4, ...\).*got \(\)"),
        ({"critic": lambda x: x[:2].sum(1)}, r"must return \(4, ...\).*got \(2,\)"),
    ),
)
def test_what_does_not_fit_is_refused_with_a_sentence(change, sentence):
    arguments = {"critic": quadratic, "real": torch.zeros(4, 2), "fake": torch.zeros(4, 2), **change}
    with pytest.raises(ValueError, match=sentence):
        gradient_penalty(arguments.pop("critic"), arguments.pop("real"), arguments.pop("fake"), **arguments)


def test_integers_and_critics_without_a_tensor_are_type_errors():
    with pytest.raises(TypeError, match="real must be a floating point"):
        gradient_penalty(quadratic, torch.zeros(4, 2).long(), torch.zeros(4, 2))
    with pytest.raises(TypeError, match="critic must return a tensor, got tuple"):
        gradient_penalty(lambda x: (x, x), torch.zeros(4, 2), torch.zeros(4, 2))


def test_examples_in_docstrings_run():
    result = doctest.testmod(gradient_penalties)
    assert result.attempted > 0 and result.failed == 0

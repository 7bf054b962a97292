"""Smooth functions: each within its error bound of the hard function, against sums over subsets, root finders and hard
counts; what all of them keep at extreme scales, in any type and under torch's transformations."""

import doctest
import functools
import itertools
import math
import runpy
import sys
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pygen import ops
from pygen.functional import _smooth_top_k, smooth

ROOT = Path(__file__).parents[2]
METHODS = ("threshold", "elementary_symmetric")
INF = math.inf
# What float64 loses in sums of a dozen terms of size 1; bounds that are reached exactly need it.
ROUNDING = 1e-13

by_method = pytest.mark.parametrize("method", METHODS)
rows = st.lists(st.floats(-20, 20), min_size=2, max_size=9).map(lambda v: torch.tensor(v, dtype=torch.float64))
temperatures = st.floats(0.01, 10)
few = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape, scale=1.0):
    return torch.randn(shape, dtype=torch.float64) * scale


def gap(x, k=1):
    """x_(k) - x_(k+1)."""
    ordered = x.sort(-1, descending=True).values
    return ordered[..., k - 1] - ordered[..., k]


# ---- maximum, arg max, one-hot


@few
@given(rows, temperatures)
def test_smooth_max_is_above_the_maximum_by_at_most_t_log_n(x, t):
    excess = smooth.smooth_max(x, temperature=t) - x.max()
    slack = ROUNDING * (1 + x.abs().max())
    assert -slack <= excess <= t * math.log(len(x)) + slack
    assert excess <= t * (len(x) - 1) * math.exp(-gap(x) / t) + slack


@few
@given(rows, temperatures)
def test_its_mean_variant_is_between_the_mean_and_the_maximum_and_t_log_n_below_it_at_most(x, t):
    value = smooth.smooth_max(x, temperature=t, mean=True)
    slack = ROUNDING * (1 + x.abs().max())
    assert max(x.mean(), x.max() - t * math.log(len(x))) - slack <= value <= x.max() + slack


@few
@given(rows, temperatures)
def test_smooth_min_is_below_the_minimum_by_at_most_t_log_n(x, t):
    slack = ROUNDING * (1 + x.abs().max())
    assert -slack <= x.min() - smooth.smooth_min(x, temperature=t) <= t * math.log(len(x)) + slack
    assert -slack <= smooth.smooth_min(x, temperature=t, mean=True) - x.min() <= t * math.log(len(x)) + slack


def test_the_bounds_of_the_maximum_are_reached_where_all_elements_are_equal():
    x = torch.full((7,), 3.0, dtype=torch.float64)
    assert smooth.smooth_max(x, temperature=2.0).item() == pytest.approx(3 + 2 * math.log(7), rel=1e-15)
    assert smooth.smooth_max(x, temperature=2.0, mean=True).item() == pytest.approx(3, rel=1e-15)
    assert smooth.smooth_min(x, temperature=2.0).item() == pytest.approx(3 - 2 * math.log(7), rel=1e-15)


@pytest.mark.parametrize("t", [1e-3, 0.5, 1.0, 1e6])
def test_smooth_max_is_the_log_sum_exp_of_fifty_digits(t):
    x = normal(9, scale=5)
    with mpmath.workdps(50):
        total = mpmath.fsum(mpmath.exp(mpmath.mpf(v) / t) for v in x.tolist())
        plain, mean = float(t * mpmath.log(total)), float(t * mpmath.log(total / 9))
    assert smooth.smooth_max(x, temperature=t).item() == pytest.approx(plain, rel=1e-14)
    # log of the sum less log n: what cancels is of the size of T log n.
    assert smooth.smooth_max(x, temperature=t, mean=True).item() == pytest.approx(mean, abs=1e-15 * (1 + t * 5))


def test_the_gradient_of_smooth_max_is_soft_one_hot():
    x = normal(4, 6).requires_grad_()
    (found,) = torch.autograd.grad(smooth.smooth_max(x, temperature=0.3).sum(), x)
    torch.testing.assert_close(found, smooth.soft_one_hot(x.detach(), temperature=0.3))


def test_the_maximum_of_nothing_but_minus_infinity_is_that_with_gradient_zero():
    x = torch.tensor([[-INF, -INF], [-INF, 1.0]], requires_grad=True)
    value = smooth.smooth_max(x)
    value[0].backward()
    assert value.tolist() == [-INF, 1.0] and torch.equal(x.grad, torch.zeros(2, 2))
    assert smooth.smooth_max(torch.tensor([INF, 1.0])) == INF


@few
@given(rows, temperatures)
def test_soft_argmax_and_soft_one_hot_are_within_their_bounds_of_the_hard_ones(x, t):
    n, decay = len(x), math.exp(-gap(x) / t)
    distance = (smooth.soft_argmax(x, temperature=t) - x.argmax()).abs()
    assert distance <= n * (n - 1) / 2 * decay + ROUNDING
    difference = smooth.soft_one_hot(x, temperature=t) - torch.nn.functional.one_hot(x.argmax(), n)
    assert difference.abs().sum() <= 2 * (n - 1) * decay + ROUNDING
    assert difference.abs().max() <= (n - 1) * decay + ROUNDING


@few
@given(rows, temperatures)
def test_cumax_is_as_close_to_the_step_at_the_arg_max_as_the_one_hot_vector(x, t):
    step = (torch.arange(len(x)) >= x.argmax()).double()
    assert ((ops.cumax(x / t) - step).abs() <= (len(x) - 1) * math.exp(-gap(x) / t) + ROUNDING).all()


def test_soft_argmax_is_the_sum_of_the_complement_of_cumax():
    x = normal(5, 8)
    expected = ops.cumax(x / 0.7, complement=True).sum(-1)
    torch.testing.assert_close(smooth.soft_argmax(x, temperature=0.7), expected)


def test_where_several_are_largest_the_soft_argmax_tends_to_the_mean_of_their_indices():
    assert smooth.soft_argmax(torch.tensor([5.0, 0.0, 5.0, 5.0]), temperature=1e-3) == pytest.approx(5 / 3)
    one_hot = smooth.soft_one_hot(torch.tensor([5.0, 0.0, 5.0]), temperature=1e-3)
    assert one_hot.tolist() == [0.5, 0.0, 0.5]


def test_an_index_above_256_survives_16_bits():
    x = torch.zeros(1000, dtype=torch.bfloat16)
    x[777] = 100
    assert smooth.soft_argmax(x) == 777 and smooth.soft_argmax(x).dtype == torch.float32


@few
@given(st.integers(1, 6), st.floats(0, 1), st.floats(0.01, 10))
def test_the_one_hot_of_an_index_is_within_its_bound(n, where, t):
    index = torch.tensor(where * (n - 1), dtype=torch.float64)
    p = smooth.soft_one_hot_of_index(index, n, temperature=t)
    assert p.sum().item() == pytest.approx(1, rel=1e-14)
    nearest = int(index.round())
    exponent = (1 - 2 * abs(index.item() - nearest)) / t
    if 0 < exponent < 700:
        hard = torch.nn.functional.one_hot(torch.tensor(nearest), n)
        assert (p - hard).abs().sum() <= 4 / math.expm1(exponent) + ROUNDING


def test_the_one_hot_of_an_index_undoes_the_soft_argmax_and_moves_with_it():
    x = torch.tensor([0.0, 0.0, 9.0, 0.0], dtype=torch.float64, requires_grad=True)
    p = smooth.soft_one_hot_of_index(smooth.soft_argmax(x, temperature=0.3), 4, temperature=0.1)
    torch.testing.assert_close(p, torch.tensor([0.0, 0.0, 1.0, 0.0]).double(), atol=1e-3, rtol=0)
    index = torch.tensor(1.4, requires_grad=True)
    (slope,) = torch.autograd.grad(smooth.soft_one_hot_of_index(index, 4)[2], index)
    assert slope > 0


# ---- accuracy, F1


def test_soft_accuracy_is_the_mean_chance_of_the_label():
    logits, labels = normal(6, 3), torch.tensor([0, 1, 2, 0, 1, 1])
    expected = sum((logits[i] / 0.5).softmax(0)[y] for i, y in enumerate(labels.tolist())) / 6
    torch.testing.assert_close(smooth.soft_accuracy(logits, labels, temperature=0.5), expected)


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_soft_accuracy_is_within_its_bound_of_the_counted_one(t, classes):
    logits, labels = normal(50, classes), torch.randint(classes, (50,))
    of_label = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -INF).amax(1)
    bound = ((classes - 1) * (-(of_label - others).abs() / t).exp()).mean()
    hard = sum(int(row.argmax()) == y for row, y in zip(logits, labels.tolist(), strict=True)) / 50
    assert abs(smooth.soft_accuracy(logits, labels, temperature=t) - hard) <= bound + ROUNDING


def test_classes_may_be_at_another_dimension_and_samples_left_out():
    logits, labels = normal(2, 3, 4), torch.randint(3, (2, 4))
    labels[0, 1] = labels[1, 3] = -100
    each = smooth.soft_accuracy(logits, labels, dim=1, reduction="none")
    assert each[0, 1] == 0 and each.shape == (2, 4)
    last = logits.movedim(1, -1)[labels >= 0]
    expected = smooth.soft_accuracy(last, labels[labels >= 0])
    torch.testing.assert_close(smooth.soft_accuracy(logits, labels, dim=1), expected)
    torch.testing.assert_close(smooth.soft_accuracy(logits, labels, dim=1, reduction="sum"), expected * 6)
    for average in ("macro", "micro", "none"):
        found = smooth.soft_f1(logits, labels, dim=1, average=average)
        torch.testing.assert_close(found, smooth.soft_f1(last, labels[labels >= 0], average=average))


def counted_f1(decisions, truth):
    """F1 from counts of two lists of truth values, 0 where nothing is positive."""
    pairs = list(zip(decisions, truth, strict=True))
    right, either = sum(a and b for a, b in pairs), sum(a + b for a, b in pairs)
    return 2 * right / either if either else 0.0


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5, 3.0])
def test_soft_f1_of_two_classes_is_within_its_bound_of_the_counted_one(t):
    logits, labels = normal(40), torch.randint(2, (40,))
    hard = counted_f1((logits > 0).tolist(), labels.bool().tolist())
    bound = ((1 + labels) * (-logits.abs() / t).exp()).sum() / labels.sum()
    assert abs(smooth.soft_f1(logits, labels, average="binary", temperature=t) - hard) <= bound + ROUNDING


@pytest.mark.parametrize("t", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["classes", "decisions"])
def test_soft_f1_of_many_classes_is_within_its_bound_of_the_counted_one(t, kind):
    logits = normal(60, 4)
    logits[:, 3] -= 0 if kind == "decisions" else 50  # a class that is neither label nor answer
    if kind == "classes":
        labels = torch.randint(3, (60,))
        decisions = torch.nn.functional.one_hot(logits.argmax(1), 4).bool()
        truth = torch.nn.functional.one_hot(labels, 4).bool()
        epsilon = (3 * (-gap(logits) / t).exp())[:, None].expand(60, 4)
    else:
        labels = torch.randint(2, (60, 4))
        decisions, truth, epsilon = logits > 0, labels.bool(), (-logits.abs() / t).exp()
    weighted, positives = (1 + truth.double()) * epsilon, truth.sum(0)
    hard = [counted_f1(decisions[:, c].tolist(), truth[:, c].tolist()) for c in range(4)]
    bounds = torch.where(positives > 0, weighted.sum(0) / positives.clamp_min(1), 0.0)
    each = smooth.soft_f1(logits, labels, average="none", temperature=t)
    assert ((each - torch.tensor(hard)).abs() <= bounds + ROUNDING).all()
    macro = smooth.soft_f1(logits, labels, temperature=t)
    assert abs(macro - sum(hard) / 4) <= bounds.mean() + ROUNDING
    micro = smooth.soft_f1(logits, labels, average="micro", temperature=t)
    hard_micro = counted_f1(decisions.flatten().tolist(), truth.flatten().tolist())
    assert abs(micro - hard_micro) <= weighted.sum() / positives.sum() + ROUNDING


def test_hard_limits_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = normal(80, 5), torch.randint(5, (80,))
    answers = logits.argmax(1)
    assert smooth.soft_accuracy(logits, labels, temperature=1e-6) == pytest.approx(
        metrics.accuracy_score(labels, answers), abs=1e-12
    )
    for average in ("macro", "micro"):
        expected = metrics.f1_score(labels, answers, average=average)
        assert smooth.soft_f1(logits, labels, average=average, temperature=1e-6) == pytest.approx(expected, abs=1e-12)


def test_the_micro_average_over_classes_is_the_accuracy():
    logits, labels = normal(20, 4), torch.randint(4, (20,))
    torch.testing.assert_close(smooth.soft_f1(logits, labels, average="micro"), smooth.soft_accuracy(logits, labels))


def test_scores_without_positives_or_without_samples_are_zero_and_their_gradients_finite():
    logits = torch.full((4, 3), -200.0, requires_grad=True)
    score = smooth.soft_f1(logits, torch.zeros(4, 3), average="none", temperature=0.1)  # sigmoids underflow: 0 / 0
    score.sum().backward()
    assert torch.equal(score, torch.zeros(3)) and torch.equal(logits.grad, torch.zeros(4, 3))
    assert smooth.soft_f1(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 0
    assert smooth.soft_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).isnan()


def test_ascending_the_soft_f1_raises_the_counted_one():
    x, labels = normal(200, 2), torch.zeros(200, dtype=torch.long)
    labels[:20] = 1  # few positives, two deviations away
    x[:20] += 2
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], 0.1)
    for _ in range(100):
        loss = 1 - smooth.soft_f1(x @ weight[:2] + weight[2], labels, average="binary")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decisions = (x @ weight[:2] + weight[2] > 0).tolist()
    assert counted_f1(decisions, labels.bool().tolist()) > 0.7


# ---- top-k


def over_subsets(x, k, t):
    """Chances by the sum over all subsets of k, in fifty digits."""
    with mpmath.workdps(50):
        weights = [mpmath.exp(mpmath.mpf(v) / t) for v in x.tolist()]
        subsets = list(itertools.combinations(range(len(x)), k))
        products = [mpmath.fprod(weights[i] for i in s) for s in subsets]
        total = mpmath.fsum(products)
        inside = [
            mpmath.fsum(p for s, p in zip(subsets, products, strict=True) if i in s) / total for i in range(len(x))
        ]
        return torch.tensor([float(p) for p in inside], dtype=torch.float64)


@pytest.mark.parametrize("t", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_elementary_symmetric_top_k_is_the_mean_of_random_subsets(n, t):
    x = normal(n, scale=2)
    for k in range(n + 1):
        found = smooth.soft_top_k(x, k, method="elementary_symmetric", temperature=t)
        # Relative: the smallest chances, 1e-50 among them, are right to the last digits as well.
        torch.testing.assert_close(found, over_subsets(x, k, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0.05, 1.0, 20.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 1), (5, 2), (5, 4), (50, 7), (1000, 999)])
def test_thresholded_top_k_is_a_sigmoid_about_the_root_that_brent_finds(n, k, t):
    optimize = pytest.importorskip("scipy.optimize")
    x = normal(n, scale=2)
    low, high = x.min() - t * math.log(n) - 1, x.max() + t * math.log(n) + 1
    root = optimize.brentq(lambda tau: ((x - tau) / t).sigmoid().sum().item() - k, low, high, xtol=1e-14, rtol=1e-14)
    # The root is known to the rounding of its sums, k eps, over their slope, which is least for k next to n.
    torch.testing.assert_close(
        smooth.soft_top_k(x, k, temperature=t), ((x - root) / t).sigmoid(), rtol=1e-9, atol=1e-12
    )


@few
@given(rows, temperatures, st.integers(1, 8))
def test_soft_top_k_adds_up_to_k_within_its_bound_of_the_hard_choice(x, t, k):
    n, k = len(x), min(k, len(x) - 1)
    hard = torch.zeros_like(x).scatter(0, x.topk(k).indices, 1.0)
    delta = math.sqrt(k * (n - k)) * math.exp(-gap(x, k) / (2 * t))
    for method, bound in zip(METHODS, (2 * delta, 2 * delta**2), strict=True):
        p = smooth.soft_top_k(x, k, method=method, temperature=t)
        assert p.sum().item() == pytest.approx(k, rel=1e-13)
        assert (p >= 0).all() and (p <= 1).all()
        assert (p - hard).abs().sum() <= bound + ROUNDING
        assert (p - hard).abs().max() <= bound / 2 + ROUNDING


@by_method
@few
@given(x=rows, t=temperatures, k=st.integers(1, 8))
def test_the_choice_keeps_the_order_and_complements_that_of_the_smallest(method, x, t, k):
    n, k = len(x), min(k, len(x) - 1)
    p = smooth.soft_top_k(x, k, method=method, temperature=t)
    assert (p[x.argsort()].diff() >= -ROUNDING).all()
    lowest = smooth.soft_top_k(-x, n - k, method=method, temperature=t)
    torch.testing.assert_close(p + lowest, torch.ones_like(p))


def test_one_of_n_by_elementary_symmetric_polynomials_is_softmax():
    x = normal(4, 9)
    found = smooth.soft_top_k(x, 1, method="elementary_symmetric", temperature=0.4)
    torch.testing.assert_close(found, (x / 0.4).softmax(-1), rtol=1e-13, atol=0)


@by_method
def test_all_or_none_is_ones_or_zeros_with_gradient_zero(method):
    x = torch.randn(3, 4, requires_grad=True)
    for k in (0, 4):
        p = smooth.soft_top_k(x, k, method=method)
        (grad,) = torch.autograd.grad(p.sum(), x)
        assert (p == k / 4).all() and (grad == 0).all()


@by_method
def test_equal_elements_have_equal_weights_to_the_last_digits(method):
    p = smooth.soft_top_k(torch.full((7,), 3.0, dtype=torch.float64), 3, method=method)
    torch.testing.assert_close(p, torch.full((7,), 3 / 7, dtype=torch.float64), rtol=1e-15, atol=0)
    p = smooth.soft_top_k(torch.tensor([9.0, 1.0, 1.0, 1.0, -9.0]).double(), 2, method=method, temperature=0.01)
    shares = torch.tensor([3, 1, 1, 1, 0]).double() / 3
    torch.testing.assert_close(p, shares, rtol=1e-14, atol=1e-200)


@by_method
def test_ten_of_two_thousand_equals_do_not_underflow(method):
    """Coins of chance 1/2 would come up ten times in two thousand once in 10^575: the level makes it k / n."""
    p = smooth.soft_top_k(torch.full((2000,), 3.0), 10, method=method)
    torch.testing.assert_close(p, torch.full((2000,), 10 / 2000), rtol=1e-5, atol=0)


@by_method
def test_elements_of_minus_infinity_are_not_chosen_and_change_nothing_for_the_others(method):
    x = normal(6).requires_grad_()
    padded = torch.cat((torch.tensor([-INF]).double(), x, torch.tensor([-INF]).double()))
    p, plain = (smooth.soft_top_k(v, 2, method=method) for v in (padded, x))
    torch.testing.assert_close(p[1:-1], plain)
    assert p[0] == p[-1] == 0
    grads = [torch.autograd.grad(v[2], x, retain_graph=True)[0] for v in (p[1:-1], plain)]
    torch.testing.assert_close(*grads)


@by_method
def test_rows_with_exactly_k_candidates_are_hard_and_with_fewer_nan(method):
    x = torch.tensor([[1.0, -INF, 0.0, -INF], [1.0, -INF, -INF, -INF], [1.0, 2.0, 3.0, 4.0], [1.0, INF, 0.0, 0.0]])
    x = torch.cat((x, torch.tensor([[math.nan, 1.0, 2.0, 3.0], [1e30, -INF, -1e30, -INF]]))).requires_grad_()
    p = smooth.soft_top_k(x, 2, method=method)
    assert p[0].tolist() == p[5].tolist() == [1, 0, 1, 0]
    assert p[[1, 3, 4]].isnan().all() and p[2].isfinite().all()
    (grad,) = torch.autograd.grad(p[[0, 2, 5]].square().sum(), x)
    assert grad.isfinite().all() and (grad[[0, 5]] == 0).all() and (grad[2] != 0).any()
    assert smooth.soft_top_k(x, 4, method=method)[[0, 1, 3, 4]].isnan().all()


@by_method
@pytest.mark.parametrize("k", [1, 37, 500, 1990])
def test_float32_of_long_rows_is_that_of_float64(method, k):
    x = torch.randn(2000) * 3
    found, want = (smooth.soft_top_k(v, k, method=method, temperature=0.5) for v in (x, x.double()))
    # (x - tau) / T, of size 20, is rounded to 1e-6 and that is the relative error of what it is the logarithm of.
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=1e-30)
    assert found.sum().item() == pytest.approx(k, rel=1e-5)


@by_method
def test_a_gap_of_a_thousand_temperatures_still_has_a_level(method):
    """Where all p (1 - p) underflow the level is 0 / 0, unless it is sought in logarithms."""
    x = torch.tensor([2000.0, 1000.0, 0.0, -50.0], dtype=torch.float64, requires_grad=True)
    p = smooth.soft_top_k(x, 2, method=method)
    assert p.tolist() == pytest.approx([1, 1, 0, 0], abs=1e-200)
    assert torch.autograd.grad(p.sum(), x)[0].abs().max() < 1e-200


def test_the_gradient_by_threshold_is_that_of_moving_the_root():
    optimize = pytest.importorskip("scipy.optimize")
    x, k, h = normal(6), 2, 1e-5

    def weights(values):
        root = optimize.brentq(lambda tau: (values - tau).sigmoid().sum().item() - k, -20, 20, xtol=1e-15, rtol=1e-15)
        return (values - root).sigmoid()

    found = torch.autograd.functional.jacobian(lambda v: smooth.soft_top_k(v, k), x)
    steps = h * torch.eye(6, dtype=torch.float64)
    expected = torch.stack([(weights(x + s) - weights(x - s)) / (2 * h) for s in steps], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.sum(0), torch.zeros(6).double(), rtol=0, atol=1e-14)  # the sum stays k


def test_the_elementary_symmetric_jacobian_is_the_covariance_of_random_subsets():
    x, k = normal(6), 3
    found = torch.autograd.functional.jacobian(
        lambda v: smooth.soft_top_k(v, k, method="elementary_symmetric", temperature=1.0), x
    )
    subsets = torch.tensor([[float(i in s) for i in range(6)] for s in itertools.combinations(range(6), k)]).double()
    chances = (subsets @ x).softmax(0)
    centred = subsets - chances @ subsets
    torch.testing.assert_close(found, centred.T @ (chances[:, None] * centred))


# ---- what holds for all

LABELS = torch.tensor([0, 2, 1, 1])
BITS = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 0, 1, 0]])
# Functions of (4, 5) and a temperature, along the last dimension.
FUNCTIONS = {
    "max": smooth.smooth_max,
    "max-mean": functools.partial(smooth.smooth_max, mean=True),
    "min": smooth.smooth_min,
    "argmax": smooth.soft_argmax,
    "one-hot": smooth.soft_one_hot,
    "one-hot-of-index": lambda x, temperature: smooth.soft_one_hot_of_index(x, 4, temperature=temperature),
    "accuracy": lambda x, temperature: smooth.soft_accuracy(x, LABELS, temperature=temperature),
    "f1-classes": lambda x, temperature: smooth.soft_f1(x, LABELS, temperature=temperature),
    "f1-decisions": lambda x, temperature: smooth.soft_f1(x, BITS, average="none", temperature=temperature),
    "f1-binary": lambda x, temperature: smooth.soft_f1(x, BITS, average="binary", temperature=temperature),
    "threshold": lambda x, temperature: smooth.soft_top_k(x, 2, temperature=temperature),
    "elementary": lambda x, temperature: smooth.soft_top_k(
        x, 3, method="elementary_symmetric", temperature=temperature
    ),
}
ALONG_ROWS = {
    **{name: FUNCTIONS[name] for name in ("max", "max-mean", "min", "argmax", "one-hot")},
    "threshold": functools.partial(smooth.soft_top_k, k=2),
    "elementary": functools.partial(smooth.soft_top_k, k=2, method="elementary_symmetric"),
}
every = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
along_rows = pytest.mark.parametrize("function", ALONG_ROWS.values(), ids=ALONG_ROWS)


@every
def test_derivatives_of_first_and_second_order_are_those_of_finite_differences(function):
    x = normal(4, 5).requires_grad_()
    smoothed = functools.partial(function, temperature=0.7)
    assert torch.autograd.gradcheck(smoothed, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(smoothed, x)


@every
@pytest.mark.parametrize("t", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e15, 3e38])
def test_no_scale_and_no_temperature_gives_an_infinity_or_nan(function, scale, t):
    x = (torch.randn(4, 5).clamp(-1, 1) * scale).requires_grad_()
    value = function(x, temperature=t)
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all()
    assert grad.isfinite().all()


@along_rows
def test_minus_infinities_give_no_nan_in_gradients(function):
    x = torch.randn(4, 5)
    x[:, [0, 3]] = INF if function is smooth.smooth_min else -INF
    x.requires_grad_()
    value = function(x, temperature=0.5)
    (grad,) = torch.autograd.grad((value if value.dim() == 1 else value[:, 1]).sum(), x)
    assert value.isfinite().all() and grad.isfinite().all() and (grad[:, [0, 3]] == 0).all()
    assert (grad[:, [1, 2, 4]] != 0).any()


@along_rows
@pytest.mark.parametrize("dim", [0, 1, 2, -2, -3])
def test_any_dimension_of_any_layout_is_that_one_moved_to_the_end(function, dim):
    x = normal(3, 4, 5).permute(2, 0, 1)
    found, expected = function(x, dim=dim), function(x.movedim(dim, -1).contiguous())
    torch.testing.assert_close(found if found.dim() == 2 else found.movedim(dim, -1), expected)


def test_keepdim_keeps_it():
    for function in (smooth.smooth_max, smooth.smooth_min, smooth.soft_argmax):
        x = normal(2, 3, 4)
        for dim in (0, 1, -1, -2):
            torch.testing.assert_close(function(x, dim, keepdim=True), function(x, dim).unsqueeze(dim))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_float32_and_rounded_once(function, dtype):
    x = torch.randn(4, 5).to(dtype)
    found, wide = function(x, temperature=0.5), function(x.float(), temperature=0.5)
    assert found.dtype in (dtype, torch.float32)
    assert torch.equal(found, wide.to(found.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(x.float(), temperature=0.5), wide)


@pytest.mark.parametrize(
    "name", ["max", "argmax", "one-hot-of-index", "accuracy", "f1-classes", "threshold", "elementary"]
)
def test_torch_compile_takes_it_in_one_graph(name):
    torch._dynamo.reset()  # all cases share the code of their wrapper, and nine of it are too many
    function = FUNCTIONS[name]
    x = normal(4, 5).requires_grad_()
    smoothed = functools.partial(function, temperature=0.5)
    compiled = torch.compile(smoothed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), smoothed(x))
    (found,), (expected,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, smoothed))
    torch.testing.assert_close(found, expected)


@every
def test_vmap_and_the_transforms_of_torch_func_go_through_it(function):
    x = normal(3, 4, 5)
    smoothed = functools.partial(function, temperature=0.5)
    torch.testing.assert_close(torch.func.vmap(smoothed)(x), torch.stack([smoothed(v) for v in x]))

    def loss(v):
        return smoothed(v).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(v) for v in leaf), leaf)
    torch.testing.assert_close(grads, expected)
    hessian = torch.func.hessian(loss)(x[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x[0]))


def test_a_scalar_is_a_row_of_one():
    x = torch.tensor(3.0, requires_grad=True)
    assert smooth.smooth_max(x) == smooth.smooth_min(x, mean=True) == 3
    assert smooth.soft_argmax(x) == 0 and smooth.soft_one_hot(x) == 1
    assert smooth.soft_top_k(x, 1) == 1 and smooth.soft_top_k(x, 0) == 0


def test_a_batch_of_nothing_gives_nothing():
    x = torch.zeros(0, 4)
    assert smooth.smooth_max(x).shape == smooth.soft_argmax(x).shape == (0,)
    for method in METHODS:
        assert smooth.soft_top_k(x, 2, method=method).shape == (0, 4)


X = torch.zeros(3, 4)
Y = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: smooth.smooth_max([1.0]), TypeError, "smooth_max: x must be a torch.Tensor, got list"),
        (lambda: smooth.smooth_min(Y), TypeError, "smooth_min: x must be floating point, got torch.int64"),
        (lambda: smooth.soft_argmax(X, 2), IndexError, r"dim must be in \[-2, 1\] for x of shape \(3, 4\), got 2"),
        (lambda: smooth.soft_one_hot(X[:, :0]), ValueError, r"at least one element along dim -1, got shape \(3, 0\)"),
        (lambda: smooth.smooth_max(X, temperature=0.0), ValueError, "must be finite and at least 1.2e-38, got 0.0"),
        (lambda: smooth.smooth_max(X, temperature=-1.0), ValueError, "must be finite and at least .* got -1.0"),
        (lambda: smooth.smooth_max(X, temperature=INF), ValueError, "must be finite and at least .* got inf"),
        (lambda: smooth.smooth_max(X, temperature=math.nan), ValueError, "must be finite and at least .* got nan"),
        (lambda: smooth.smooth_max(X, temperature=torch.ones(1)), TypeError, "temperature must be a number, got a"),
        (lambda: smooth.soft_one_hot_of_index(Y, 3), TypeError, "index must be floating point, got torch.int64"),
        (lambda: smooth.soft_one_hot_of_index(X, 0), ValueError, "n must be at least 1, got 0"),
        (lambda: smooth.soft_accuracy(X, Y[:2]), ValueError, r"labels must have the shape \(3,\) .* got \(2,\)"),
        (lambda: smooth.soft_accuracy(X, Y.float()), TypeError, "numbers of classes, got torch.float32"),
        (lambda: smooth.soft_accuracy(X, [0, 1, 2]), TypeError, "labels must be a torch.Tensor, got list"),
        (lambda: smooth.soft_accuracy(X[0, 0], Y[0]), ValueError, "a dimension of classes, got a scalar"),
        (lambda: smooth.soft_accuracy(X, Y, reduction="max"), ValueError, "one of mean, sum, none, got 'max'"),
        (lambda: smooth.soft_f1(X, Y, average="weighted"), ValueError, "binary, micro, macro, none, got 'weighted'"),
        (lambda: smooth.soft_f1(X, Y, average="binary"), ValueError, r"shape \(3, 4\) of the logits, got \(3,\)"),
        (lambda: smooth.soft_f1(X, Y[:2]), ValueError, r"labels must have the shape \(3,\) .* got \(2,\)"),
        (lambda: smooth.soft_top_k(X, 5), ValueError, r"k must be in \[0, 4\] for x of shape \(3, 4\), got 5"),
        (lambda: smooth.soft_top_k(X, -1), ValueError, r"k must be in \[0, 4\]"),
        (lambda: smooth.soft_top_k(X, 2.0), TypeError, "k must be an integer, got float"),
        (lambda: smooth.soft_top_k(X, 2, method="sort"), ValueError, "threshold, elementary_symmetric, got 'sort'"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


# ---- documentation


def test_examples_in_docstrings_run():
    for module in (smooth, _smooth_top_k):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0


def test_code_of_the_page_runs(run_page):
    assert run_page("smooth.md") > 2


def test_the_example_draws_its_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    script = ROOT / "examples" / "smooth_functions.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--out", str(tmp_path / "smooth.png")])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "smooth.png").stat().st_size > 10_000

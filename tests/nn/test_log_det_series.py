"""The series of a residual block's log-determinant: estimates whose mean is the truth, gradients for every sample."""

import math

import pytest
import torch
from nn.jacobian import normal

from pygen.nn._log_det_series import (
    draw,
    draw_probe,
    exact_log_det,
    jacobian,
    roulette_weights,
    series_log_det,
    survival,
)

DISTRIBUTIONS = {"geometric": 0.5, "poisson": 2.0}


def probability(distribution, parameter, k):
    if distribution == "geometric":
        return parameter * (1 - parameter) ** (k - 1) if k else 0.0
    return math.exp(-parameter) * parameter**k / math.factorial(k)


class Block:
    """g(x) = B tanh(A x), with norms such that Lip(g) <= c, on a batch of samples."""

    def __init__(self, batch, size, c, width=7):
        first, second = normal(width, size, seed=2), normal(size, width, seed=3)
        self.first = (first / torch.linalg.matrix_norm(first, 2)).requires_grad_()
        self.second = (c * second / torch.linalg.matrix_norm(second, 2)).requires_grad_()
        self.x = normal(batch, size).requires_grad_()
        self.g = (self.x @ self.first.T).tanh() @ self.second.T

    def dense_jacobian(self):
        """B diag(1 - tanh^2(A x)) A, from the formula."""
        slopes = 1 - (self.x @ self.first.T).tanh().square()
        return self.second @ (slopes[:, :, None] * self.first)

    def true_log_det(self):
        return torch.linalg.slogdet(torch.eye(self.x.size(1)) + self.dense_jacobian()).logabsdet

    def with_all_probes(self, weights, neumann):
        """The sum over the unit vectors as probes: their traces are exact, so nothing is random."""
        probes = torch.eye(self.x.size(1), dtype=torch.float64)
        return sum(
            series_log_det(self.g, self.x, e.expand_as(self.x), weights, neumann=neumann, create_graph=True)
            for e in probes
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.x, self.first, self.second), retain_graph=True)


def assert_same(found, expected, atol):
    for f, e in zip(found, expected, strict=True):
        assert e.abs().max() > 1e-3
        torch.testing.assert_close(f, e, rtol=0, atol=atol)


@pytest.mark.parametrize("size", (1, 5, 30))
def test_the_jacobian_and_its_log_det_are_those_of_the_formula(size):
    block = Block(3, size, 0.9)
    found = exact_log_det(block.g, block.x, create_graph=True)
    torch.testing.assert_close(jacobian(block.g, block.x), block.dense_jacobian(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, block.true_log_det(), rtol=0, atol=1e-12)
    assert_same(block.gradients(found.sum()), block.gradients(block.true_log_det().sum()), 1e-12)


@pytest.mark.parametrize("c", (0.3, 0.9))
def test_truncation_errs_by_no_more_than_the_geometric_bound(c):
    block = Block(4, 3, c)
    truth = block.true_log_det()
    for n in (1, 2, 5, 10, 20):
        error = (block.with_all_probes([1.0] * n, False) - truth).abs().max()
        assert error <= 3 * c ** (n + 1) / ((n + 1) * (1 - c)) + 1e-14


def test_truncation_converges_at_exactly_the_rate_of_the_series_where_j_is_diagonal():
    x = normal(2, 3).requires_grad_()
    g = -0.8 * x
    errors = []
    for n in (10, 20, 30):
        found = series_log_det(g, x, torch.ones_like(x), [1.0] * n, neumann=False, create_graph=False)
        errors.append((found - 3 * math.log(0.2)).abs().max().item())
        rest = 3 * sum(0.8**k / k for k in range(n + 1, 200))
        assert errors[-1] == pytest.approx(rest, rel=1e-9)


@pytest.mark.parametrize("neumann", (False, True))
def test_every_sample_gets_its_own_incoming_gradient(neumann):
    """residual-flows scales the whole batch's gradient by that of the first sample, here 0."""
    block = Block(4, 3, 0.5)
    incoming = torch.tensor([0.0, 1.0, -3.0, 0.1], dtype=torch.float64)
    found = block.gradients((incoming * block.with_all_probes([1.0] * 60, neumann)).sum())
    assert_same(found, block.gradients((incoming * block.true_log_det()).sum()), 1e-12)


@pytest.mark.parametrize("neumann", (False, True))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_over_all_numbers_of_terms_is_the_log_det_and_its_gradient(distribution, neumann):
    """All that Russian roulette draws is N: sum_N P(N) estimate(N) leaves nothing to chance."""
    block, parameter, mean = Block(3, 2, 0.4), DISTRIBUTIONS[distribution], 0
    for n in range(44):
        weights = roulette_weights(1, n, distribution, parameter)
        mean = mean + probability(distribution, parameter, n) * block.with_all_probes(weights, neumann)
    # What is left out: N >= 44, of probability 0.5^43 = 1e-13, with weights up to 1e13 where |tr J^44| < 1e-17.
    torch.testing.assert_close(mean, block.true_log_det(), rtol=0, atol=1e-12)
    assert_same(block.gradients(mean.sum()), block.gradients(block.true_log_det().sum()), 1e-11)


@pytest.mark.parametrize("kind", ("gaussian", "rademacher"))
@pytest.mark.parametrize("neumann", (False, True))
def test_the_mean_over_probes_is_the_log_det_and_its_gradient(neumann, kind):
    """4,000 equal samples are 4,000 probes; the gradients with respect to x are as many estimates."""
    block = Block(1, 3, 0.8)
    truth = block.with_all_probes([1.0] * 6, neumann=False)
    true_gradient = torch.autograd.grad(truth, block.x)[0]
    many = Block(1, 3, 0.8)
    many.x = many.x.detach().expand(4000, -1).clone().requires_grad_()
    many.g = (many.x @ many.first.T).tanh() @ many.second.T
    probe = draw_probe(many.g, kind, torch.Generator().manual_seed(0))
    found = series_log_det(many.g, many.x, probe, [1.0] * 6, neumann=neumann, create_graph=True)
    for estimates, expected in ((found, truth), (torch.autograd.grad(found.sum(), many.x)[0], true_gradient[0])):
        standard_error = estimates.std(0) / 4000**0.5
        assert ((estimates.mean(0) - expected).abs() < 4 * standard_error).all()
        assert (standard_error < 0.05).all(), "or the test would see nothing"


def test_with_equal_probes_neumann_and_plain_gradients_are_equal_where_j_is_diagonal():
    parameter = normal(3).requires_grad_()
    x, incoming = normal(5, 3).requires_grad_(), normal(5, seed=4)
    g = 0.7 * (x * parameter.sigmoid()).tanh()
    probe = draw_probe(x, "gaussian", torch.Generator().manual_seed(0))
    weights = roulette_weights(2, 5, "poisson", 2.0)
    grads = []
    for neumann in (False, True):
        found = series_log_det(g, x, probe, weights, neumann=neumann, create_graph=True)
        grads.append(torch.autograd.grad((incoming * found).sum(), (parameter, x), retain_graph=True))
    assert_same(grads[1], grads[0], 1e-12)


def nodes(tensor):
    """How many functions the graph of a tensor has."""
    seen, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return len(seen)


def test_the_neumann_gradient_keeps_the_graph_of_one_term_whatever_their_number():
    block, probe, sizes = Block(2, 3, 0.5), normal(2, 3, seed=5), {}
    for neumann in (False, True):
        found = (
            series_log_det(block.g, block.x, probe, [1.0] * n, neumann=neumann, create_graph=True) for n in (2, 20)
        )
        sizes[neumann] = [nodes(tensor) for tensor in found]
    assert sizes[True][0] == sizes[True][1] < sizes[False][0] < sizes[False][1] / 4


def test_values_do_not_depend_on_how_the_gradient_is_computed():
    block = Block(3, 4, 0.9)
    probe = normal(3, 4, seed=5)
    values = [
        series_log_det(block.g, block.x, probe, [1.0, 1.0, 2.0], neumann=neumann, create_graph=graph).detach()
        for neumann, graph in ((False, False), (False, True), (True, False), (True, True))
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=0)


def test_plain_gradients_have_second_derivatives_and_the_neumann_gradient_refuses_them():
    block = Block(2, 3, 0.5)
    plain, neumann = (block.with_all_probes([1.0] * 60, neumann).sum() for neumann in (False, True))
    second, expected = (
        torch.autograd.grad(torch.autograd.grad(loss, block.x, create_graph=True)[0].square().sum(), block.first)
        for loss in (plain, block.true_log_det().sum())
    )
    assert_same(second, expected, 1e-12)
    with pytest.raises(NotImplementedError, match="second derivatives.*neumann_gradient=False"):
        torch.autograd.grad(neumann, block.x, create_graph=True)


def test_no_term_at_all_is_a_zero_with_a_graph():
    block = Block(2, 3, 0.5)
    for neumann in (False, True):
        found = block.with_all_probes(roulette_weights(0, 0, "poisson", 2.0), neumann)
        assert found.tolist() == [0, 0]
        assert all(grad.abs().max() == 0 for grad in block.gradients(found.sum()))


def test_a_branch_that_does_not_see_x_has_log_det_0():
    x = normal(2, 3).requires_grad_()
    for g in (torch.zeros_like(x), normal(3).requires_grad_() + torch.zeros_like(x)):
        assert exact_log_det(g, x).tolist() == [0, 0]
        found = series_log_det(g, x, torch.ones_like(x), [1.0] * 3, neumann=True, create_graph=False)
        assert found.tolist() == [0, 0]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_survival_is_the_sum_of_the_tail_even_far_out(distribution):
    parameter = DISTRIBUTIONS[distribution]
    for k in (0, 1, 2, 5, 30):
        tail = sum(probability(distribution, parameter, i) for i in range(k, 160))
        assert survival(distribution, parameter, k) == pytest.approx(tail, rel=1e-12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_drawn_numbers_have_the_distribution_that_the_weights_assume(distribution):
    parameter, generator, n = DISTRIBUTIONS[distribution], torch.Generator().manual_seed(0), 4000
    drawn = torch.tensor([draw(distribution, parameter, generator) for _ in range(n)])
    for k in range(8):
        expected = survival(distribution, parameter, k)
        assert abs((drawn >= k).double().mean() - expected) <= 4 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("kind", ("gaussian", "rademacher"))
def test_probes_have_mean_0_and_variance_1(kind):
    probe = draw_probe(torch.empty(10000, dtype=torch.float64), kind, torch.Generator().manual_seed(0))
    assert abs(probe.mean()) < 0.04 and abs(probe.square().mean() - 1) < 4 * math.sqrt(2 / 10000)
    assert kind == "gaussian" or probe.abs().eq(1).all()


def test_sums_of_16_bit_products_are_float32():
    x = torch.full((1, 4096), 0.5, dtype=torch.bfloat16, requires_grad=True)
    found = series_log_det(0.5 * x, x, torch.ones_like(x), [1.0], neumann=True, create_graph=True)
    assert found.dtype == torch.float32 and found.item() == 2048

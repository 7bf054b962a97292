"""Penalties on weights: spectral and Frobenius norms against the SVD, orthogonality against values by hand, the lemma
that the Self-Orthogonality regulariser stands on, and the code of the page on spectral norm."""

import copy
import doctest
import io
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pygen import ops
from pygen.functional import regularizers
from pygen.functional.regularizers import (
    SpectralPenalty,
    frobenius_bound,
    orthogonality,
    self_orthogonality,
    spectral_penalty,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    """Every kind of layer that has a matrix, and some that have none."""
    return nn.Sequential(
        nn.Embedding(7, 12),
        nn.Unflatten(-1, (3, 4)),
        nn.Conv1d(3, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.ConvTranspose1d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def matrices(model):
    """The four weights of `network`, output channels in rows."""
    return [
        model[0].weight,
        model[2].weight.flatten(1),
        model[4].weight.transpose(0, 1).flatten(1),
        model[7].weight,
    ]


def true_norms(model):
    return torch.stack([torch.linalg.matrix_norm(w.detach().double(), 2) for w in matrices(model)])


# ---- spectral penalty


def test_spectral_penalty_is_the_sum_of_squared_largest_singular_values():
    model = network().double()
    penalty = SpectralPenalty(model, n_power_iterations=500)
    torch.testing.assert_close(penalty(model), true_norms(model).square().sum(), rtol=1e-9, atol=0)
    plain = SpectralPenalty(model, n_power_iterations=500, squared=False)
    torch.testing.assert_close(plain(model), true_norms(model).sum(), rtol=1e-9, atol=0)


def test_one_step_per_call_is_enough_while_weights_rest():
    model = network().double()
    penalty = SpectralPenalty(model)
    for _ in range(500):
        value = penalty(model)
    torch.testing.assert_close(value, true_norms(model).square().sum(), rtol=1e-9, atol=0)


def test_its_gradient_is_two_sigma_u_v():
    model = network().double()
    SpectralPenalty(model, n_power_iterations=500)(model).backward()
    for weight, matrix in zip((model[i].weight for i in (0, 2, 4, 7)), matrices(model), strict=True):
        u, s, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
        expected = 2 * s[0] * torch.outer(u[:, 0], vh[0])
        found = weight.grad.transpose(0, 1) if weight is model[4].weight else weight.grad
        torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-6)


def test_all_layers_are_one_call_of_the_op(monkeypatch):
    model = network()
    penalty = SpectralPenalty(model)
    calls = []

    def counted(weights, *arguments, **options):
        calls.append(len(weights))
        return original(weights, *arguments, **options)

    original = ops.power_iteration_multi
    monkeypatch.setattr(ops, "power_iteration_multi", counted)
    penalty(model)
    assert calls == [4]


def test_the_pure_function_gives_the_modules_value_and_its_next_vectors():
    model = network()
    penalty = SpectralPenalty(model)
    buffers = copy.deepcopy(dict(penalty.named_buffers()))
    us, vs = ([buffers[f"_{side}{i}"] for i in range(4)] for side in "uv")
    weights = [model[i].weight for i in (0, 2, 4, 7)]
    value, us, vs = spectral_penalty(weights, us, vs, dims=[0, 0, 1, 0])
    assert torch.equal(value, penalty(model))
    for i in range(4):
        assert torch.equal(us[i], penalty.get_buffer(f"_u{i}")) and torch.equal(vs[i], penalty.get_buffer(f"_v{i}"))


def test_vectors_move_in_training_mode_only():
    model = network()
    penalty = SpectralPenalty(model).eval()
    before = copy.deepcopy(penalty.state_dict())
    assert penalty(model) == penalty(model)
    torch.testing.assert_close(penalty.state_dict(), before, rtol=0, atol=0)
    penalty.train()(model)
    assert not torch.equal(penalty._u3, before["_u3"])


def test_a_weight_of_zeros_has_penalty_and_gradient_zero():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    penalty = SpectralPenalty(model)
    value = penalty(model)
    value.backward()
    assert value == 0 and torch.equal(model.weight.grad, torch.zeros(2, 3))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(penalty(model).item(), 4.0)


@pytest.mark.parametrize("shape", ((1, 5), (5, 1), (1, 1)))
def test_a_row_or_a_column_has_its_length(shape):
    model = nn.Linear(*reversed(shape), bias=False)
    torch.testing.assert_close(SpectralPenalty(model)(model), model.weight.detach().square().sum())


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    sigma = torch.linalg.matrix_norm(model[0].weight.detach(), 2)
    torch.testing.assert_close(SpectralPenalty(model, 300)(model), sigma**2)
    torch.testing.assert_close(frobenius_bound(model), model[0].weight.square().sum())


def test_a_parametrised_layer_is_penalised_for_the_weight_that_it_uses():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), parametrizations.weight_norm(nn.Linear(3, 3)))
    penalty = SpectralPenalty(model, 300)(model)
    expected = sum(torch.linalg.matrix_norm(layer.weight.detach(), 2) ** 2 for layer in model)
    torch.testing.assert_close(penalty.detach(), expected)
    penalty.backward()
    assert all(p.grad is not None for layer in model for p in layer.parametrizations.parameters())


def test_layers_of_several_dtypes_add():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False).double())
    value = SpectralPenalty(model, 500)(model)
    expected = sum(torch.linalg.matrix_norm(layer.weight.detach().double(), 2) ** 2 for layer in model)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)
    assert value.dtype == frobenius_bound(model).dtype == torch.float64


def test_of_16_bit_weights_the_penalty_and_its_vectors_are_float32():
    model = nn.Linear(8, 4).bfloat16()
    penalty = SpectralPenalty(model, 100)
    value = penalty(model)
    assert value.dtype == penalty._u0.dtype == torch.float32
    expected = torch.linalg.matrix_norm(model.weight.detach().float(), 2).square()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=0)
    value.backward()
    assert model.weight.grad.dtype == torch.bfloat16


def test_under_autocast_the_penalty_is_the_same():
    model = network()
    penalty = SpectralPenalty(model).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = penalty(model)
    assert inside.dtype == torch.float32 and torch.equal(inside, penalty(model))


def reloaded(penalty):
    new = SpectralPenalty(network())
    new.load_state_dict(penalty.state_dict())
    return new


def pickled(penalty):
    file = io.BytesIO()
    torch.save(penalty, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", (reloaded, pickled, copy.deepcopy))
def test_a_copy_goes_on_where_the_original_was(make):
    model = network()
    penalty = SpectralPenalty(model)
    penalty(model)
    assert torch.equal(make(penalty)(model), penalty(model))


def test_it_holds_no_part_of_the_model():
    penalty = SpectralPenalty(network())
    assert not list(penalty.parameters()) and len(penalty.state_dict()) == 8


def test_gradients_accumulate_over_calls_whose_vectors_have_moved_since():
    model = network()
    penalty = SpectralPenalty(model)
    twice = penalty(model) + penalty(model)
    twice.backward()
    # Each layer's <W, grad> = 2 sigma^2 is linear in the sum of the two penalties.
    along = sum((p.grad * p).sum() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(along, 2 * twice.detach())


def test_the_penalty_compiles_to_one_graph_and_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = network()
    penalty = SpectralPenalty(model)
    counter = CompileCounter()
    compiled = torch.compile(lambda: penalty(model), fullgraph=True, backend=counter)
    expected = copy.deepcopy(penalty)
    for _ in range(3):
        torch.testing.assert_close(compiled(), expected(model))
    assert counter.frame_count == 1


def test_a_compiled_model_is_penalised_like_the_model_it_was_made_of():
    model = network()
    penalty = SpectralPenalty(model).eval()
    assert torch.equal(penalty(torch.compile(model)), penalty(model))


@pytest.mark.parametrize(
    ("make", "other", "sentence"),
    (
        (nn.ReLU, None, "must have a linear"),
        (lambda: nn.LazyLinear(3), None, "has no weight yet"),
        (lambda: nn.Linear(3, 2), lambda: nn.Linear(2, 2), "2 rows and 3 columns"),
        (lambda: nn.Linear(3, 2), network, "must have 1 layers"),
        (lambda: nn.Linear(3, 2), lambda: nn.Linear(3, 2, device="meta"), "move both alike"),
    ),
)
def test_models_that_do_not_fit_are_refused_with_a_sentence(make, other, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpectralPenalty(make())(other())


def test_a_penalised_network_ends_with_smaller_norms():
    norms = []
    for strength in (0.0, 0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        penalty = SpectralPenalty(model)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x = torch.randn(64, 4)
        for _ in range(100):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean() + strength * penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        norms.append(sum(torch.linalg.matrix_norm(model[i].weight.detach(), 2) ** 2 for i in (0, 2)))
    free, penalised = norms
    assert penalised < 0.8 * free


# ---- Frobenius bound


def test_frobenius_norms_bound_spectral_norms():
    model = network()
    assert frobenius_bound(model) >= SpectralPenalty(model, 100)(model)
    each = frobenius_bound(model, squared=False, reduction="none")
    assert (each >= true_norms(model)).all()
    torch.testing.assert_close(each.detach(), torch.stack([w.detach().norm() for w in matrices(model)]))
    torch.testing.assert_close(frobenius_bound(model, squared=False, reduction="product"), each.prod())


def test_the_bound_is_an_equality_for_rank_one():
    weight = torch.outer(torch.randn(4).double(), torch.randn(3).double())
    sigma = torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(frobenius_bound(weight, squared=False), sigma)


def test_its_gradient_is_that_of_weight_decay_and_zero_at_zero():
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(frobenius_bound(weight), weight)
    torch.testing.assert_close(gradient, 2 * weight.detach())
    zero = torch.zeros(3, 2, requires_grad=True)
    for squared in (True, False):
        (gradient,) = torch.autograd.grad(frobenius_bound(zero, squared=squared), zero)
        assert torch.equal(gradient, torch.zeros(3, 2))


def test_frobenius_bound_refuses_unknown_reductions_and_no_weights():
    with pytest.raises(ValueError, match="reduction must be one of"):
        frobenius_bound(torch.ones(2, 2), reduction="max")
    with pytest.raises(ValueError, match="at least one weight"):
        frobenius_bound([])


# ---- Self-Orthogonality


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("scale", (1e-30, 1.0, 1e30))
def test_two_identical_columns_give_402_exactly(dtype, scale):
    for batch in (1, 2, 31, 128):
        column = torch.randn(5, 1, dtype=dtype)
        weight = torch.cat((column, column), 1) * scale
        assert self_orthogonality(torch.randn(batch, 5, dtype=dtype), weight).item() == 402.0


def test_opposite_columns_give_402_and_a_column_alone_gives_0():
    x, column = torch.randn(32, 5).double(), torch.randn(5, 1).double()
    assert self_orthogonality(x, torch.cat((column, -column), 1)).item() == 402.0
    assert self_orthogonality(x, column).item() == 0.0


def by_hand(x, weight, temperature=10.0, mean_weight=100.0):
    """The formula in loops over pairs, in Python's own numbers."""
    y = x.double() @ weight.double()
    columns = [[math.tanh(temperature * v) for v in y[:, i].tolist()] for i in range(y.size(1))]
    columns = [[v / math.sqrt(sum(w * w for w in c)) for v in c] for c in columns]
    pairs = [
        sum(a * b for a, b in zip(columns[i], columns[j], strict=True))
        for i in range(len(columns))
        for j in range(len(columns))
        if i != j
    ]
    return mean_weight * sum(pairs) ** 2 + sum(t * t for t in pairs)


def test_self_orthogonality_is_its_formula():
    x, weight = torch.randn(9, 4).double(), torch.randn(4, 5).double()
    assert self_orthogonality(x, weight).item() == pytest.approx(by_hand(x, weight), rel=1e-12)
    found = self_orthogonality(x, weight, temperature=0.5, mean_weight=3.0).item()
    assert found == pytest.approx(by_hand(x, weight, 0.5, 3.0), rel=1e-12)


def test_responses_may_be_given_in_place_of_inputs_and_filters():
    x, weight = torch.randn(9, 4), torch.randn(4, 3)
    assert torch.equal(self_orthogonality(x @ weight), self_orthogonality(x, weight))


def test_its_gradient_is_that_of_finite_differences():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = (0.1 * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(self_orthogonality, (x, weight))


def test_columns_of_zeros_give_no_nan_and_leave_the_others_as_they_are():
    x, weight = torch.randn(16, 4).double(), torch.randn(4, 3).double()
    padded = torch.cat((weight, torch.zeros(4, 1).double()), 1).requires_grad_()
    value = self_orthogonality(x, padded)
    torch.testing.assert_close(value, self_orthogonality(x, weight))
    value.backward()
    assert padded.grad.isfinite().all() and (padded.grad[:, 3] == 0).all() and (padded.grad[:, :3] != 0).any()


@pytest.mark.parametrize("batch", (0, 4))
def test_a_batch_of_zeros_or_of_nothing_gives_zero_and_no_nan(batch):
    weight = torch.randn(3, 2, requires_grad=True)
    value = self_orthogonality(torch.zeros(batch, 3), weight)
    value.backward()
    assert value.item() == 0 and torch.equal(weight.grad, torch.zeros(3, 2))


def test_in_16_bits_and_under_autocast_it_is_computed_in_float32():
    x, weight = torch.randn(64, 4).bfloat16(), torch.randn(4, 3).bfloat16()
    expected = self_orthogonality(x.float(), weight.float())
    assert torch.equal(self_orthogonality(x, weight), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(self_orthogonality(x.float(), weight.float()), expected)
        assert orthogonality(weight.float()).dtype == torch.float32


@pytest.mark.parametrize("theta", (0.1, math.pi / 4, math.pi / 2, 2.5))
def test_the_mean_product_of_signs_is_1_minus_2_theta_over_pi(theta):
    n = 100_000
    x = torch.randn(n, 3, dtype=torch.float64)
    first, second = torch.tensor([1.0, 0.0, 0.0]), 2 * torch.tensor([math.cos(theta), math.sin(theta), 0.0])
    signs = (x @ first.double()).sign() * (x @ second.double()).sign()
    expected = 1 - 2 * theta / math.pi
    assert abs(signs.mean().item() - expected) < 4 * math.sqrt((1 - expected**2) / n)


def test_its_cosines_estimate_the_same_angle():
    """R of two filters is 402 T^2: T is nearly the mean product of signs, as tanh(10 y) is nearly a sign for long y."""
    theta, n = math.pi / 3, 20_000
    weight = 100 * torch.tensor([[1.0, math.cos(theta)], [0.0, math.sin(theta)]]).double()
    t = math.sqrt(self_orthogonality(torch.randn(n, 2).double(), weight).item() / 402)
    expected = 1 - 2 * theta / math.pi
    assert abs(t - expected) < 4 * math.sqrt((1 - expected**2) / n)


@pytest.mark.parametrize("shapes", (((4, 3), (2, 5)), ((4, 3, 2), (2, 5)), ((4, 3), (3,)), ((4,), None)))
def test_self_orthogonality_refuses_shapes_that_do_not_fit(shapes):
    x, weight = (None if s is None else torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=r"x must be \(b, d\) and weight \(d, k\), got"):
        self_orthogonality(x, weight)


# ---- orthogonality


def test_orthogonality_is_the_off_diagonal_part_of_the_gram_matrix():
    weight = torch.randn(4, 3).double()
    gram, eye = weight.T @ weight, torch.eye(3).double()
    torch.testing.assert_close(orthogonality(weight), torch.linalg.matrix_norm((gram - eye) * (1 - eye)).square())
    torch.testing.assert_close(orthogonality(weight, between="rows"), orthogonality(weight.T))


def test_orthogonal_columns_of_any_length_give_0():
    q, _ = torch.linalg.qr(torch.randn(5, 3).double())
    assert orthogonality(q * torch.tensor([1.0, 10.0, 0.0])).item() < 1e-25


def test_filters_of_a_convolution_are_rows_and_those_of_a_transposed_one_too():
    conv, transposed = nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(2, 4, 3)
    torch.testing.assert_close(orthogonality(conv.weight, between="rows"), orthogonality(conv.weight.flatten(1).T))
    moved = transposed.weight.transpose(0, 1).flatten(1)
    torch.testing.assert_close(orthogonality(transposed.weight, between="rows", dim=1), orthogonality(moved.T))


def test_its_gradient_is_4_w_times_the_off_diagonal_part():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(orthogonality(weight), weight)
    w = weight.detach()
    gram = w.T @ w
    torch.testing.assert_close(gradient, 4 * w @ (gram - gram.diag().diag()))


def test_orthogonality_refuses_vectors_and_unknown_sides():
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        orthogonality(torch.ones(3))
    with pytest.raises(ValueError, match="columns or rows"):
        orthogonality(torch.ones(3, 3), between="filters")


# ---- documentation


def test_examples_in_docstrings_run():
    result = doctest.testmod(regularizers)
    assert result.attempted > 0 and result.failed == 0


def test_code_of_the_page_on_spectral_norm_runs(run_page):
    assert run_page("spectral-norm.md") > 5


def test_the_example_turns_nearly_parallel_filters_apart(monkeypatch, capsys):
    script = ROOT / "examples" / "self_orthogonality.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--data", "gaussian", "--steps", "200"])
    runpy.run_path(str(script), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  step")]
    degrees = [float(words[4]) for words in lines]
    first, second = degrees[: len(degrees) // 2], degrees[len(degrees) // 2 :]
    for each in (first, second):
        assert each[0] > 50 and each[-1] < 20

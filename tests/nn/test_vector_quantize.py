"""VectorQuantize: what it returns, learns and passes back, and what users of other implementations trip over."""

import copy
import math
import pickle

import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from pygen.nn import _codebook_sampling
from pygen.nn._codebook_kmeans import kmeans
from pygen.nn.vector_quantize import VectorQuantize

EXACT = {"rtol": 0, "atol": 0}
aten = torch.ops.aten


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(*args, seed=0, **options):
    torch.manual_seed(seed)
    module = VectorQuantize(*args, **options)
    if not options.get("kmeans_init"):
        module.codebook = torch.randn_like(module.codebook)  # the first codes are much shorter than the data here
    return module


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Watch(TorchDispatchMode):
    """Counts the operators that run, and the elements of the largest tensor that any of them returns."""

    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[function] = self.calls.get(function, 0) + 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def trained(module, x, **arguments):
    """One training step -> the result and x's gradient."""
    x = x.clone().requires_grad_()
    result = module(x, **arguments)
    (result[0].float().square().sum() + result[2]).backward()
    return result, x.grad


# What it returns


@pytest.mark.parametrize("training", (True, False))
def test_every_vector_becomes_its_nearest_code(training):
    module = quantizer(7, 33, freeze_codebook=True).train(training)
    x = data(4, 50, 7)
    quantized, indices, _ = module(x)
    brute = (x[..., None, :].double() - module.codebook.double()).square().sum(-1).argmin(-1)
    torch.testing.assert_close(indices, brute, **EXACT)
    torch.testing.assert_close(quantized, module.codebook[brute], **EXACT)


@pytest.mark.parametrize("options", ({}, {"use_cosine_sim": True}), ids=("euclidean", "cosine"))
def test_loss_is_the_mean_squared_difference(options):
    module = quantizer(6, 12, commitment_weight=0.25, **options)
    x = 3 + data(5, 20, 6)
    quantized, _, loss, parts = module(x, return_loss_breakdown=True)
    seen = torch.nn.functional.normalize(x, dim=-1) if options else x
    expected = (seen.double() - quantized.double()).square().mean().float()
    torch.testing.assert_close(loss, 0.25 * expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts.commitment, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", (0.0, 1e4))
def test_a_vector_that_is_a_code_has_distance_0(offset):
    module = quantizer(32, 64)
    module.codebook = offset + module.codebook
    quantized, indices, loss = module(module.codebook.clone()[None])
    torch.testing.assert_close(indices[0], torch.arange(64), **EXACT)
    assert loss == 0


def test_eval_mode_has_no_loss_and_learns_nothing():
    module = quantizer(4, 8, threshold_ema_dead_code=2).eval()
    before = state(module)
    assert module(data(3, 9, 4))[2] == 0
    torch.testing.assert_close(state(module), before, **EXACT)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("options", ({}, {"use_cosine_sim": True}), ids=("euclidean", "cosine"))
def test_result_has_the_dtype_of_x_and_the_loss_is_float32_at_least(dtype, options):
    quantized, _, loss = quantizer(4, 8, **options)(data(3, 9, 4).to(dtype))
    assert quantized.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


LAYOUTS = {
    "sequence": ({}, (2, 10, 12)),
    "vectors": ({}, (10, 12)),
    "grid": ({}, (2, 3, 5, 12)),
    "channels first": ({"channel_last": False}, (2, 12, 10)),
    "images": ({"accept_image_fmap": True}, (2, 12, 3, 5)),
    "volumes": ({"accept_3d_fmap": True}, (2, 12, 3, 5, 2)),
}
HEADS = {
    "one": {},
    "projected": {"codebook_dim": 5},
    "heads": {"heads": 3, "codebook_dim": 4},
    "separate heads": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
    "projected separate heads": {"heads": 2, "codebook_dim": 5, "separate_codebook_per_head": True},
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_output_of_the_indices_is_the_output(layout, shape, heads):
    module = quantizer(12, 20, **layout, **heads).eval()
    x = data(*shape)
    quantized, indices, _ = module(x)
    assert quantized.shape == x.shape
    assert indices.shape == (*x.movedim(1 if module._channel_first else -1, -1).shape[:-1], *heads_of(module))
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized)


def heads_of(module):
    return (module.heads,) if module.heads > 1 else ()


@pytest.mark.parametrize("heads", ({}, HEADS["heads"], HEADS["separate heads"]))
def test_the_code_of_index_minus_1_is_0(heads):
    module = quantizer(12, 20, **heads)
    codes = module.get_codes_from_indices(torch.full((2, 5, *heads_of(module)), -1))
    torch.testing.assert_close(codes, torch.zeros(2, 5, 12), **EXACT)


def test_strides_of_x_change_nothing():
    module = quantizer(6, 16, accept_image_fmap=True).eval()
    x = data(2, 6, 4, 5)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), module(x), **EXACT)
    torch.testing.assert_close(module(x.transpose(2, 3))[1], module(x)[1].transpose(1, 2), **EXACT)


@pytest.mark.parametrize("options", ({}, {"threshold_ema_dead_code": 2}, {"heads": 2, "codebook_dim": 2}))
def test_an_empty_batch_has_loss_0_and_leaves_the_codes_finite(options):
    module = quantizer(4, 8, **options)
    quantized, _, loss = module(data(0, 9, 4))
    assert quantized.shape == (0, 9, 4) and loss == 0
    assert all(tensor.isfinite().all() for tensor in state(module).values())


# Gradients


def test_straight_through_passes_the_gradient_unchanged():
    module = quantizer(4, 8, rotation_trick=False, commitment_weight=0.0)
    x, weight = data(3, 9, 4).requires_grad_(), data(3, 9, 4, seed=1)
    (module(x)[0] * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight, **EXACT)


def test_rotation_trick_turns_the_gradient_by_the_angle_in_the_plane():
    """In two dimensions the rotation from x to q is that by the difference of their angles."""
    module = quantizer(2, 8, rotation_trick=True, commitment_weight=0.0, freeze_codebook=True).double()
    x, weight = data(1, 200, 2).double().requires_grad_(), data(1, 200, 2, seed=1).double()
    quantized = module(x)[0]
    (quantized * weight).sum().backward()
    as_complex = torch.view_as_complex
    ratio = as_complex(quantized.detach()) / as_complex(x.detach())  # turns and stretches x into q
    torch.testing.assert_close(as_complex(x.grad), as_complex(weight) * ratio.conj(), rtol=1e-9, atol=1e-9)


def test_rotation_trick_is_the_matrix_of_the_paper():
    module = quantizer(5, 8, rotation_trick=True, commitment_weight=0.0, freeze_codebook=True).double()
    x, weight = data(1, 60, 5).double().requires_grad_(), data(1, 60, 5, seed=1).double()
    quantized = module(x)[0]
    (quantized * weight).sum().backward()
    u, v = (torch.nn.functional.normalize(t.detach()[0], dim=-1) for t in (x, quantized))
    r = torch.nn.functional.normalize(u + v, dim=-1)

    def outer(a, b):
        return a[:, :, None] * b[:, None, :]

    rotation = torch.eye(5).double() - 2 * outer(r, r) + 2 * outer(v, u)
    scale = quantized.detach()[0].norm(dim=-1) / x.detach()[0].norm(dim=-1)
    matrix = scale[:, None, None] * rotation
    torch.testing.assert_close((matrix @ x.detach()[0][..., None])[..., 0], quantized.detach()[0])
    torch.testing.assert_close(x.grad[0], (matrix.mT @ weight[0][..., None])[..., 0])


def test_rotation_trick_of_a_zero_or_opposite_vector_is_finite():
    module = quantizer(3, 1, rotation_trick=True)
    x = torch.stack([torch.zeros(3), -module.codebook[0], 1e-30 * module.codebook[0]])[None]
    _, grad = trained(module, x)
    assert grad.isfinite().all()


def test_no_rotation_for_one_dimension():
    assert not VectorQuantize(1, 4).rotation_trick
    assert VectorQuantize(2, 4).rotation_trick
    assert not VectorQuantize(2, 4, straight_through=True).rotation_trick


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("heads", ({}, {"heads": 2, "codebook_dim": 2, "separate_codebook_per_head": True}))
def test_gradients_of_the_commitment_loss_are_those_of_finite_differences(heads, masked):
    module = quantizer(4, 6, learnable_codebook=True, **heads).double()
    x = data(2, 7, 4).double().requires_grad_()
    mask = data(2, 7, seed=1) > 0 if masked else None

    def loss(x, embed):
        return torch.func.functional_call(module, {"_codebook.embed": embed}, (x,), {"mask": mask})[2]

    assert torch.autograd.gradcheck(loss, (x, module._codebook.embed.detach().clone().requires_grad_()))


def test_without_gradient_to_the_input_that_of_the_result_is_the_codebooks():
    module = quantizer(4, 6, learnable_codebook=True, route_gradients_to_input=False, commitment_weight=0.0)
    x = data(2, 7, 4).requires_grad_()
    quantized, indices, _ = module(x)
    quantized.sum().backward()
    assert x.grad is None or not x.grad.any()
    uses = torch.bincount(indices.flatten(), minlength=6).float()
    torch.testing.assert_close(module._codebook.embed.grad, uses[None, :, None].expand(1, 6, 4), **EXACT)


def test_projection_learns_from_the_result_even_if_the_input_needs_no_gradient():
    module = quantizer(4, 6, codebook_dim=3, commitment_weight=0.0)
    module(data(2, 7, 4))[0].sum().backward()
    assert module.project_in.weight.grad.any()


def test_double_backward_is_refused_in_a_sentence():
    x = data(2, 7, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(quantizer(4, 6)(x)[2], x, create_graph=True)


def test_two_forwards_before_one_backward():
    module = quantizer(4, 6, orthogonal_reg_weight=1.0, codebook_dim=3)
    first, second = data(2, 7, 4).requires_grad_(), data(2, 7, 4, seed=1).requires_grad_()
    losses = [(quantized.sum() + loss) for quantized, _, loss in (module(first), module(second))]
    sum(losses).backward()
    assert first.grad.isfinite().all() and second.grad.any()


# Learning


def test_moving_averages_are_applied_after_quantising():
    module = quantizer(4, 8)
    before = module.codebook.clone()
    quantized, indices, _ = module(data(3, 30, 4))
    torch.testing.assert_close(quantized, before[indices], **EXACT)
    assert (module.codebook != before).any()


def test_codes_move_to_the_means_of_what_chose_them():
    module = quantizer(2, 4, decay=0.5, eps=1e-9)
    x = data(1, 400, 2)
    for _ in range(60):  # 0.5^60: nothing is left of the start
        _, indices, _ = module(x)
    means = torch.stack([x[0][indices[0] == k].mean(0) for k in range(4)])
    torch.testing.assert_close(module.codebook, means, rtol=1e-4, atol=1e-4)


def test_a_training_step_is_one_search_one_pass_of_statistics_and_no_wait():
    module = quantizer(8, 32, threshold_ema_dead_code=2)
    with Watch() as watch:
        trained(module, data(4, 50, 8), mask=data(4, 50) > -1)
    assert watch.calls[torch.ops.pygen.nearest_codebook.default] == 1
    assert watch.calls[torch.ops.pygen.codebook_statistics.default] == 1
    waits = (aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.masked_select.default)
    assert not set(waits) & set(watch.calls)


@pytest.mark.parametrize(
    "options",
    (
        {"threshold_ema_dead_code": 2},
        {"use_cosine_sim": True},
        {"learnable_codebook": True},
        {"orthogonal_reg_weight": 1.0},
        {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True, "orthogonal_reg_max_codes": 64},
        {"kmeans_init": True, "kmeans_iters": 2},
        {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    ),
    ids=lambda options: ", ".join(options),
)
def test_no_tensor_has_n_times_k_elements(options):
    n, k = 2048, 1024
    module = quantizer(8, k, **options)
    with Watch() as watch:
        trained(module, data(1, n, 8), return_metrics=True)
    assert watch.largest <= 8 * (max(n, k) + 2)


def test_stochastic_codes_are_drawn_in_pieces():
    module = quantizer(4, 2048, stochastic_sample_codes=True)
    with Watch() as watch:
        trained(module, data(1, 3 * _codebook_sampling.CHUNK // 2048, 4))
    assert watch.largest <= _codebook_sampling.CHUNK


def test_frozen_codes_stay():
    module = quantizer(4, 8, threshold_ema_dead_code=2, learnable_codebook=True)
    before = state(module)
    x = data(3, 9, 4).requires_grad_()
    module(x, freeze_codebook=True)[2].backward()
    torch.testing.assert_close(state(module), before, **EXACT)
    assert x.grad.any()
    grad = module._codebook.embed.grad
    assert grad is None or not grad.any()


def test_codes_that_are_set_stay_through_the_next_update():
    module = quantizer(4, 8)
    module(data(3, 9, 4))
    codes = data(8, 4, seed=5)
    module.codebook = codes
    module(data(0, 9, 4))
    torch.testing.assert_close(module.codebook, codes, rtol=1e-4, atol=1e-4)  # Laplace smoothing moves mass by 1e-5


def test_manual_updates_wait_for_the_call():
    module, automatic = quantizer(4, 8, manual_ema_update=True), quantizer(4, 8)
    before = module.codebook.clone()
    x = data(3, 9, 4)
    module(x)
    torch.testing.assert_close(module.codebook, before, **EXACT)
    module._codebook.update_ema()
    automatic(x)
    torch.testing.assert_close(module.codebook, automatic.codebook, **EXACT)


def test_a_batch_without_update():
    module = quantizer(4, 8)
    before = state(module)
    module(data(3, 9, 4), ema_update=False)
    torch.testing.assert_close(state(module), before, **EXACT)


def test_orthogonal_loss_is_0_for_orthogonal_codes_and_1_less_1_in_n_for_equal_ones():
    module = quantizer(6, 5, orthogonal_reg_weight=1.0, freeze_codebook=True)
    for codes, expected in ((3 * torch.eye(6)[:5], 0.0), (torch.ones(5, 6), 1 - 1 / 5)):
        module.codebook = codes
        parts = module(data(1, 9, 6), return_loss_breakdown=True)[3]
        torch.testing.assert_close(parts.orthogonal_reg, torch.tensor(expected), rtol=0, atol=1e-6)


def test_orthogonal_loss_of_so_many_codes():
    module = quantizer(2, 8, orthogonal_reg_weight=1.0, orthogonal_reg_max_codes=2, freeze_codebook=True)
    module.codebook = torch.cat([torch.eye(2)[:1].expand(4, 2), torch.eye(2)[1:].expand(4, 2)])
    seen = {round(module(data(1, 9, 2), return_loss_breakdown=True)[3].orthogonal_reg.item(), 5) for _ in range(30)}
    assert seen == {0.0, 0.5}  # two codes across, or two alike


def test_orthogonal_loss_of_so_many_active_codes():
    module = quantizer(
        2,
        8,
        orthogonal_reg_weight=1.0,
        orthogonal_reg_active_codes_only=True,
        orthogonal_reg_max_codes=2,
        freeze_codebook=True,
    )
    module.codebook = torch.cat([torch.eye(2), 9 + torch.eye(2).repeat(3, 1)])
    for _ in range(10):  # of the eight codes two are active, which are across
        assert module(torch.eye(2)[None], return_loss_breakdown=True)[3].orthogonal_reg.abs() < 1e-6


# K-Means


def test_k_means_leaves_a_centre_that_nothing_chooses_where_it_is():
    x = torch.tensor([[5.0, 5.0], [5.0, 5.0], [7.0, 7.0]])[None]
    means, counts, _ = kmeans(x, torch.ones(1, 3, dtype=torch.bool), 3, 5, cosine=False, together=False)
    assert sorted(means[0, :, 0].tolist()) == [5.0, 5.0, 7.0]
    assert sorted(counts[0].tolist()) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("dim", (1, 3, 15, 300))
def test_k_means_starts_in_any_dimension(dim):
    centres = 10 * data(6, dim)
    x = (centres.repeat_interleave(50, 0) + 0.01 * data(300, dim, seed=1))[None]
    module = quantizer(dim, 24, kmeans_init=True, kmeans_iters=10)
    loss = module(x)[2]
    assert loss < 1.0  # the centres are 100 apart
    assert module._codebook.initted and module.codebook.isfinite().all()


def test_k_means_happens_once_and_not_after_loading():
    module = quantizer(3, 4, kmeans_init=True, freeze_codebook=True)
    module(data(2, 30, 3))
    before = state(module)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded(module)):
        other(100 + data(2, 30, 3, seed=1))
        torch.testing.assert_close(state(other), before, **EXACT)


def loaded(module):
    other = quantizer(3, 4, kmeans_init=True, freeze_codebook=True)
    other.load_state_dict(module.state_dict())
    return other


def test_a_state_that_waits_for_k_means_waits_after_loading_too():
    module = quantizer(3, 4)
    module.load_state_dict(VectorQuantize(3, 4, kmeans_init=True).state_dict())
    x = data(2, 30, 3)
    module(x)
    assert module._codebook.initted and (module.codebook.norm(dim=-1) > 0.1).all()


def test_k_means_from_fewer_vectors_than_codes_warns():
    module = quantizer(3, 40, kmeans_init=True)
    with pytest.warns(UserWarning, match="40 codes from 18 vectors"):
        module(data(2, 9, 3))
    assert module.codebook.isfinite().all()


def test_k_means_waits_for_a_batch_with_vectors():
    module = quantizer(3, 4, kmeans_init=True)
    module(data(0, 9, 3))
    module(data(2, 9, 3), mask=torch.zeros(2, 9, dtype=torch.bool))
    assert not module._codebook.initted
    module(data(2, 9, 3))
    assert module._codebook.initted and module.codebook.any()


# Dead codes


def test_a_dead_code_is_revived_with_all_its_state():
    module = quantizer(3, 16, threshold_ema_dead_code=2, decay=0.9)
    module.codebook = torch.cat([data(4, 3), 1000 + data(12, 3)])
    x = data(2, 50, 3)
    module(x)
    book = module._codebook
    for embed, average, size in zip(book.embed[0, 4:], book.embed_avg[0, 4:], book.cluster_size[0, 4:], strict=True):
        assert (x.view(-1, 3) == embed).all(-1).any()
        torch.testing.assert_close(average, 2 * embed, **EXACT)
        assert size == 2


def test_a_revived_code_stays_where_it_is_put():
    """Were its moving average not reset, the next update would throw it back."""
    module = quantizer(3, 16, threshold_ema_dead_code=1, decay=0.9)
    module.codebook = torch.cat([data(4, 3), 1000 + data(12, 3)])
    for _ in range(3):
        module(data(2, 50, 3))
    assert module.codebook.abs().max() < 10


def test_revived_codes_are_different_vectors_even_if_few_are_valid():
    module = quantizer(3, 16, threshold_ema_dead_code=2)
    module.codebook = 1000 + data(16, 3)
    x = data(1, 50, 3)
    mask = torch.zeros(1, 50, dtype=torch.bool)
    mask[0, 10:17] = True
    module(x, mask=mask)
    revived = module.codebook[(module.codebook < 100).all(-1)]
    assert 0 < len(revived) <= 7
    assert len(revived.unique(dim=0)) == len(revived)
    assert all((x[mask] == code).all(-1).any() for code in revived)


def test_revival_spreads_a_collapsed_codebook():
    module = quantizer(8, 64, threshold_ema_dead_code=1, decay=0.8)
    module.codebook = 50 + 1e-3 * data(64, 8)
    for step in range(10):
        metrics = module(data(4, 128, 8, seed=step), return_metrics=True)[3]
        if step == 0:
            assert metrics.perplexity < 3
    assert metrics.perplexity > 30 and metrics.usage > 0.6


# Masks

MASKED = {
    "averages": {},
    "cosine": {"use_cosine_sim": True},
    "K-Means": {"kmeans_init": True, "codebook_size": 8},
    "learnable": {"learnable_codebook": True},
    "heads": {"heads": 2, "codebook_dim": 3},
    "separate heads": {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    "projection": {"codebook_dim": 3},
    "projected heads": {"heads": 2, "codebook_dim": 5},
    "drawn codes": {"stochastic_sample_codes": True, "sample_codebook_temp": 1e-6},
    "active codes": {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True},
}


@pytest.mark.parametrize("options", MASKED.values(), ids=MASKED)
def test_masked_positions_count_in_nothing_whatever_they_hold(options):
    options = {"codebook_size": 20} | options
    packed, padded = quantizer(6, **options), quantizer(6, **options)
    lens = torch.tensor([9, 1, 0, 5])
    mask = torch.arange(9) < lens[:, None]
    x = data(4, 9, 6)
    torch.manual_seed(7)
    (q1, i1, loss1, m1), g1 = trained(packed, x[mask][None], return_metrics=True)
    x[~mask] = torch.nan
    torch.manual_seed(7)
    (q2, i2, loss2, m2), g2 = trained(padded, x, mask=mask, return_metrics=True)
    torch.testing.assert_close((q2[mask], i2[mask], g2[mask]), (q1[0], i1[0], g1[0]))
    torch.testing.assert_close((loss2, m2), (loss1, m1))
    torch.testing.assert_close(state(padded), state(packed))
    for one, other in zip(padded.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert (i2[~mask] == -1).all() and not q2[~mask].any() and not g2[~mask].any()


def test_masks_have_the_shape_of_the_positions_in_every_layout():
    x, mask = data(2, 6, 4, 5), data(2, 4, 5) > 0
    images = quantizer(6, 8, accept_image_fmap=True)
    sequences = quantizer(6, 8)
    expected = sequences(x.movedim(1, -1), mask=mask)
    quantized, indices, loss = images(x, mask=mask)
    torch.testing.assert_close((quantized.movedim(1, -1), indices, loss), expected)


def test_lengths_are_a_mask():
    x, lens = data(3, 9, 6), torch.tensor([9, 0, 4])
    mask = torch.arange(9) < lens[:, None]
    torch.testing.assert_close(quantizer(6, 8)(x, lens=lens), quantizer(6, 8)(x, mask=mask), **EXACT)


def test_masked_positions_keep_the_input_if_asked_to():
    x, mask = data(3, 9, 6), data(3, 9, seed=1) > 0
    for options in ({}, {"codebook_dim": 3}):
        module = quantizer(6, 8, return_zeros_for_masked_padding=False, **options)
        quantized = module(x, mask=mask)[0]
        torch.testing.assert_close(quantized[~mask], x[~mask], **EXACT)


@pytest.mark.parametrize("options", ({}, {"threshold_ema_dead_code": 2}, {"use_cosine_sim": True}, {"decay": 0.0}))
def test_a_fully_masked_batch_leaves_everything_finite(options):
    module = quantizer(6, 8, **options)
    before = module.codebook.clone()
    for _ in range(3):
        (_, _, loss, metrics), grad = trained(
            module, data(3, 9, 6), mask=torch.zeros(3, 9, dtype=torch.bool), return_metrics=True
        )
    assert loss == 0 and not grad.any() and metrics.usage == 0
    assert all(tensor.isfinite().all() for tensor in state(module).values())
    torch.testing.assert_close(module.codebook, before, rtol=1e-4, atol=1e-4)


def test_a_vector_that_is_not_finite_shows_and_is_not_learnt():
    module, clean = (quantizer(6, 8, threshold_ema_dead_code=2, kmeans_init=True) for _ in range(2))
    x = data(1, 90, 6)
    broken = torch.cat([x, torch.full((1, 1, 6), torch.nan), torch.full((1, 1, 6), torch.inf)], 1)
    torch.manual_seed(7)
    clean(x)
    torch.manual_seed(7)
    quantized, indices, loss = module(broken)
    assert (indices[0, 90:] == -1).all() and quantized[0, 90:].isnan().all() and loss.isnan()
    torch.testing.assert_close(state(module), state(clean))


# 16 bits


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"codebook_dim": 5},
        {"use_cosine_sim": True, "codebook_dim": 5},
        {"learnable_codebook": True, "heads": 2},
        {"kmeans_init": True},
        {"orthogonal_reg_weight": 1.0},
        {"stochastic_sample_codes": True, "rotation_trick": False},
    ),
    ids=lambda options: ", ".join(options),
)
def test_autocast_trains_without_nan_and_leaves_the_state_float32(dtype, options):
    module = quantizer(8, 16, threshold_ema_dead_code=2, **options)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), module)
    for seed in range(3):
        with torch.autocast("cpu", dtype):
            quantized, _, loss = model(300 * data(3, 40, 8, seed=seed))
        (quantized.float().sum() + loss).backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == (torch.bool if name.endswith("initted") else torch.float32)
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_module_cast_to_16_bits_keeps_its_codes_and_averages_exact(dtype):
    module = quantizer(8, 16, codebook_dim=5, learnable_codebook=True)
    before = state(module._codebook)
    module.to(dtype)
    torch.testing.assert_close(state(module._codebook), before, **EXACT)
    assert module.project_in.weight.dtype == dtype
    result, grad = trained(module, data(3, 40, 8).to(dtype))
    assert result[0].dtype == grad.dtype == dtype and grad.isfinite().all()


def test_a_module_cast_to_float64_computes_in_it():
    module = quantizer(8, 16).double()
    (quantized, _, loss), _ = trained(module, data(3, 40, 8).double())
    assert quantized.dtype == loss.dtype == module.codebook.dtype == torch.float64


# Cosine codes


def test_cosine_codes_have_length_1_and_zero_vectors_an_index():
    module = quantizer(5, 7, use_cosine_sim=True)
    x = torch.cat([data(1, 50, 5), torch.zeros(1, 1, 5), -module.codebook[None], 1e-20 * data(1, 3, 5)], 1)
    (_, indices, _), grad = trained(module, x)
    assert indices.min() >= 0 and indices.max() < 7 and grad.isfinite().all()
    used = module._codebook.embed_avg.norm(dim=-1) > 1e-3
    torch.testing.assert_close(module.codebook.norm(dim=-1)[used[0]], torch.ones(int(used.sum())))


# torch.compile

COMPILED = {
    "averages": ({}, False),
    "masked revival": ({"threshold_ema_dead_code": 2}, True),
    "masked separate heads of cosine codes": (
        {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True, "use_cosine_sim": True},
        True,
    ),
    "learnable, after K-Means": ({"learnable_codebook": True, "kmeans_init": True}, False),
    "orthogonal codes of images": (
        {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True, "accept_image_fmap": True},
        False,
    ),
}


@pytest.mark.parametrize(("options", "masked"), COMPILED.values(), ids=COMPILED)
def test_a_training_step_compiles_to_one_graph_and_does_the_same(options, masked):
    torch._dynamo.reset()
    shape = (2, 6, 4, 5) if "accept_image_fmap" in options else (2, 20, 6)
    mask = data(2, 20, seed=9) > 0 if masked else None
    eager = quantizer(6, 16, **options)
    if "kmeans_init" in options:
        eager(data(*shape))  # the first batch starts the codes, outside of any graph
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = data(*shape, seed=seed)
        outcomes = []
        for step in (eager, compiled):
            torch.manual_seed(seed)
            outcomes.append(trained(step, x, mask=mask, return_metrics=True))
        torch.testing.assert_close(*outcomes)
        if "threshold_ema_dead_code" not in options:  # which vectors revive a code is random
            torch.testing.assert_close(state(module), state(eager))


def test_a_graph_breaks_at_the_k_means_start_and_never_again():
    torch._dynamo.reset()
    module = quantizer(6, 16, kmeans_init=True)
    compiled = torch.compile(module, backend="aot_eager")
    compiled(data(2, 20, 6))
    assert module._codebook.initted
    compiled(data(2, 20, 6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(3):
            compiled(data(2, 20, 6, seed=seed))


# Several processes; how they work together is tested in test_codebook_sync.py


def test_the_world_is_asked_at_every_forward(monkeypatch):
    """A module that was made before init_process_group takes part all the same."""
    module, alone = quantizer(4, 8, sync_codebook=None), quantizer(4, 8)
    x = data(3, 30, 4)
    module(x)
    alone(x)
    reduced = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda group=None: 0)
    # Both processes of this world hold the same batch.
    monkeypatch.setattr(distributed, "all_reduce", lambda t, *a, **k: reduced.append(t.mul_(2)))
    module(x)
    assert len(reduced) == 1
    monkeypatch.undo()
    alone(torch.cat([x, x], 1))
    torch.testing.assert_close(state(module), state(alone))


# Metrics


def test_perplexity_and_usage():
    module = quantizer(1, 4, freeze_codebook=True)
    module.codebook = torch.arange(4.0)[:, None]
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0])[None, :, None]
    for mode in (True, False):
        metrics = module.train(mode)(x, return_metrics=True)[3]
        torch.testing.assert_close(metrics.perplexity, torch.tensor(math.exp(1.5 * math.log(2))))
        assert metrics.usage == 0.75


def test_perplexity_of_separate_codebooks_is_their_mean():
    module = quantizer(2, 2, heads=2, codebook_dim=1, separate_codebook_per_head=True).eval()
    module.codebook = torch.tensor([[[0.0], [1.0]], [[0.0], [1.0]]])
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    metrics = module(x, return_metrics=True)[3]
    torch.testing.assert_close(metrics.perplexity, torch.tensor(1.5))
    assert metrics.usage == 0.75


# What is refused

REFUSED = {
    "commitment_use_cross_entropy_loss": True,
    "codebook_diversity_loss_weight": 0.1,
    "codebook_diversity_temperature": 10.0,
    "directional_reparam": True,
    "directional_reparam_variance": 1e-3,
    "sync_affine_param": True,
    "vq_bridge": torch.nn.Identity(),
    "in_place_codebook_optimizer": torch.optim.SGD,
    "manual_in_place_optimizer_update": True,
    "affine_param": True,
    "affine_param_batch_decay": 0.9,
    "affine_param_codebook_decay": 0.99,
    "sync_update_v": 0.5,
}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED)
def test_an_option_that_is_not_implemented_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"VectorQuantize: {name} is not implemented"):
        VectorQuantize(4, 8, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "indices": torch.zeros(1, 9, dtype=torch.long),
        "topk": 2,
        "codebook_transform_fn": lambda codes: codes,
        "ema_update_weight": torch.ones(8),
        "accum_ema_update": True,
    }.items(),
)
def test_an_argument_that_is_not_implemented_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"VectorQuantize.forward: {name} is not implemented"):
        quantizer(4, 8)(data(1, 9, 4), **{name: value})


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="'codebook_dims'"):
        VectorQuantize(4, 8, codebook_dims=2)


@pytest.mark.parametrize(
    ("options", "names"),
    (
        ({"learnable_codebook": True, "use_cosine_sim": True}, "learnable_codebook and use_cosine_sim"),
        ({"learnable_codebook": True, "ema_update": True}, "learnable_codebook and ema_update"),
        ({"rotation_trick": True, "straight_through": True}, "rotation_trick and straight_through"),
        ({"straight_through": True, "route_gradients_to_input": False}, "route_gradients_to_input"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"kmeans_init": True, "kmeans_iters": 0}, "kmeans_iters"),
    ),
)
def test_impossible_options_are_refused_by_name(options, names):
    with pytest.raises(ValueError, match=names):
        VectorQuantize(**{"dim": 4, "codebook_size": 8} | options)


@pytest.mark.parametrize(
    ("options", "shape", "arguments", "message"),
    (
        ({}, (3, 9, 5), {}, r"x must be \(B, ..., 4\), got \(3, 9, 5\)"),
        ({"accept_image_fmap": True}, (3, 4, 5), {}, r"x must be \(B, 4, H, W\)"),
        ({"channel_last": False}, (3, 9, 4), {}, r"x must be \(B, 4, ...\)"),
        ({}, (3, 9, 4), {"mask": torch.ones(3, 8).bool()}, r"\(3, 9\), got torch.bool \(3, 8\)"),
        ({}, (3, 9, 4), {"mask": torch.ones(3, 9)}, "mask must be bool"),
        ({}, (3, 9, 4), {"lens": torch.ones(2)}, "lens must be"),
        ({}, (3, 9, 4), {"lens": torch.ones(3), "mask": torch.ones(3, 9).bool()}, "mask and lens"),
        ({"ema_update": False}, (3, 9, 4), {"ema_update": True}, "ema_update=True is not implemented"),
    ),
)
def test_wrong_arguments_are_refused_in_a_sentence(options, shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantizer(4, 8, **options)(data(*shape), **arguments)

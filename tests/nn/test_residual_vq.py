"""ResidualVQ against its definition, a loop over codebooks in float64. Against vector-quantize-pytorch:
tests/peers/test_residual_vq_peer.py; in several processes: test_codebook_sync.py."""

import copy

import pytest
import torch

from pygen.nn.residual_vq import ResidualVQ

DIM = 8


def make(seed=0, **options):
    torch.manual_seed(seed)
    return ResidualVQ(**{"dim": DIM, "num_quantizers": 4, "codebook_size": 16} | options)


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_definition(x, codebooks):
    """x: (N, D) and one (K, D) for each layer -> the sum of the codes and the indices, in float64."""
    residual, indices = x.double(), []
    for codes in codebooks:
        indices.append((residual[:, None] - codes.double()).square().sum(-1).argmin(1))
        residual = residual - codes.double()[indices[-1]]
    return x.double() - residual, torch.stack(indices, 1)


@pytest.mark.parametrize("sizes", [16, (20, 5, 3)], ids=str)
def test_each_layer_quantises_what_the_one_before_left(sizes):
    vq = make(codebook_size=sizes, num_quantizers=4 if sizes == 16 else None).eval()
    x = data(3, 50, DIM)
    quantized, indices, losses = vq(x)
    expected, chosen = by_definition(x.flatten(0, 1), vq.codebooks)
    assert torch.equal(indices.flatten(0, 1), chosen)
    # float32 rounds each of a few additions of numbers around 1.
    torch.testing.assert_close(quantized.flatten(0, 1).double(), expected, rtol=1e-6, atol=1e-6)
    assert losses.shape == (len(vq.layers),) and (losses == 0).all()


def test_each_layer_halves_what_is_left_or_better_after_training():
    vq = make(codebook_size=64, kmeans_init=True)
    x = data(1, 2000, DIM)
    for _ in range(5):
        vq(x)
    residuals = [(vq.eval().get_codes_from_indices(vq(x)[1])[:n].sum(0) - x).square().mean() for n in range(5)]
    assert all(after < 0.75 * before for before, after in zip(residuals, residuals[1:], strict=False)), residuals


def test_indices_decode_to_what_was_quantised():
    for options in ({}, {"codebook_dim": 3}, {"heads": 2, "codebook_dim": 4}, {"heads": 2, "codebook_dim": 3}):
        vq = make(**options).eval()
        quantized, indices, _, codes = vq(data(2, 9, DIM), return_all_codes=True)
        heads = options.get("heads", 1)
        assert indices.shape == ((2, 9, 4) if heads == 1 else (2, 9, 2, 4))
        assert codes.shape == (4, 2, 9, options.get("codebook_dim", DIM) * heads)
        torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)
        torch.testing.assert_close(vq.project_out(codes.sum(0)), quantized)


def test_a_prefix_of_the_indices_is_a_coarse_quantisation():
    vq = make(quantize_dropout=True).eval()
    x = data(2, 9, DIM)
    _, indices, _, codes = vq(x, return_all_codes=True)
    torch.testing.assert_close(vq.get_output_from_indices(indices[..., :2]), codes[:2].sum(0))
    dropped = indices.clone()
    dropped[..., 2:] = -1
    torch.testing.assert_close(vq.get_output_from_indices(dropped), codes[:2].sum(0))
    with pytest.raises(ValueError, match="indices must have 4"):
        make().get_codes_from_indices(indices[..., :2])


def test_layouts_are_one_another_transposed():
    x = data(2, DIM, 3, 5)
    vq = make().eval()
    expected, chosen, _ = vq(x.permute(0, 2, 3, 1))
    image = make(accept_image_fmap=True).eval()
    quantized, indices, _, codes = image(x, return_all_codes=True)
    assert torch.equal(quantized, expected.permute(0, 3, 1, 2)) and torch.equal(indices, chosen)
    assert codes.shape == (4, 2, 3, 5, DIM)
    torch.testing.assert_close(image.get_output_from_indices(indices), quantized)
    first = make(channel_last=False).eval()
    assert torch.equal(first(x.flatten(2))[0], quantized.flatten(2))
    alone, index, _ = vq(x[:, :, 0, 0])
    torch.testing.assert_close(alone, quantized[:, :, 0, 0])
    assert torch.equal(index, indices[:, 0, 0])


def test_masked_positions_are_zero_or_unchanged_and_teach_nothing():
    x, mask = data(2, 20, DIM), torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) > 0.4
    garbage = torch.where(mask[..., None], x, torch.nan)
    clean, dirty, kept = make(), make(), make(return_zeros_for_masked_padding=False)
    results = [vq(t, mask=mask) for vq, t in ((clean, x), (dirty, garbage), (kept, x))]
    for quantized, indices, losses in results:
        assert torch.equal(quantized[mask], results[0][0][mask])
        assert (indices[~mask] == -1).all() and torch.equal(indices[mask], results[0][1][mask])
        assert torch.equal(losses, results[0][2])
    assert (results[1][0][~mask] == 0).all() and torch.equal(results[2][0][~mask], x[~mask])
    for a, b, c in zip(*(vq.state_dict().values() for vq in (clean, dirty, kept)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_fully_masked_and_an_empty_batch_give_zero_loss_and_gradients():
    for options in ({}, {"learnable_codebook": True, "ema_update": False}):
        vq = make(**options)
        for n, mask in ((5, torch.zeros(2, 5, dtype=torch.bool)), (0, None)):
            x = data(2, n, DIM).requires_grad_()
            quantized, _, losses = vq(x, mask=mask)
            assert (losses == 0).all()
            (quantized.sum() + losses.sum()).backward()
            assert all((t.grad == 0).all() for t in (x, *vq.parameters()))
        assert all(t.isfinite().all() for t in vq.state_dict().values())


def test_dropout_uses_the_first_layers_and_every_number_of_them():
    vq = make(quantize_dropout=True, quantize_dropout_cutoff_index=1)
    numbers = set()
    for _ in range(40):
        _, indices, losses = vq(data(2, 3, DIM))
        used = int((indices[0, 0] >= 0).sum())
        assert (indices[..., :used] >= 0).all() and (indices[..., used:] == -1).all()
        assert (losses[:used] > 0).all() and (losses[used:] == 0).all()
        numbers.add(used)
    assert numbers == {2, 3, 4}
    assert (vq.eval()(data(2, 3, DIM))[1] >= 0).all(), "none in evaluation"


def test_dropout_in_multiples():
    vq = make(num_quantizers=7, quantize_dropout=True, quantize_dropout_multiple_of=3)
    assert {int((vq(data(1, 2, DIM))[1][0, 0] >= 0).sum()) for _ in range(40)} == {3, 6, 7}


def test_dropout_is_repeatable_and_does_not_touch_the_generator():
    runs = []
    for seed in (1, 2):
        vq = make(quantize_dropout=True)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        runs.append([int((vq(data(1, 2, DIM))[1] >= 0).sum()) for _ in range(10)])
        assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1]
    vq.quantize_dropout_draws = 3
    assert [int((vq(data(1, 2, DIM))[1] >= 0).sum()) for _ in range(7)] == runs[0][3:]


def test_a_dropped_layer_learns_nothing_but_has_a_gradient():
    vq = make(quantize_dropout=True, threshold_ema_dead_code=1)
    before = copy.deepcopy(vq.layers[-1].state_dict())
    while (indices := vq(data(2, 3, DIM))[1])[0, 0, -1] >= 0:
        before = copy.deepcopy(vq.layers[-1].state_dict())
    assert (indices[..., -1] == -1).all()
    assert all(torch.equal(t, before[name]) for name, t in vq.layers[-1].state_dict().items())
    vq = make(quantize_dropout=True, learnable_codebook=True, ema_update=False)
    for _ in range(5):
        vq.zero_grad()
        _, indices, losses = vq(data(2, 3, DIM))
        losses.sum().backward()
        for layer, used in zip(vq.layers, (indices[0, 0] >= 0).tolist(), strict=True):
            assert bool((layer._codebook.embed.grad != 0).any()) == used


def test_a_shared_codebook_is_one_and_learns_from_all_layers():
    vq = make(shared_codebook=True, num_quantizers=3, eps=0.0)
    assert len({id(layer._codebook) for layer in vq.layers}) == 1
    x = data(1, 300, DIM)
    codebook = vq.codebooks[0].clone()
    _, indices = by_definition(x[0], [codebook] * 3)
    residual, size, total = x[0], torch.ones(16), codebook.clone()
    for index in indices.T:  # the averages as if updated after each layer, the codes at the end
        one_hot = torch.nn.functional.one_hot(index, 16).float()
        size, total = 0.8 * size + 0.2 * one_hot.sum(0), 0.8 * total + 0.2 * (one_hot.T @ residual)
        residual = residual - codebook[index]
    vq(x)
    for codes in vq.codebooks:
        torch.testing.assert_close(codes, total / size[:, None], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_each_layer_reaches_x():
    """As in vector-quantize-pytorch, where every straight-through adds its own: q layers, q times the gradient."""
    vq = make(straight_through=True, commitment_weight=0.0)
    x = data(1, 5, DIM).requires_grad_()
    vq(x)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 4.0))
    vq = make(straight_through=True, commitment_weight=0.0, quant_grad_frac=1.0)
    x.grad = None
    vq(x)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_the_losses_are_the_commitment_of_each_layer():
    vq = make(commitment_weight=0.25)
    x = data(1, 50, DIM)
    codebooks = vq.codebooks
    _, indices, losses = vq(x)
    left = x[0]
    for codes, index, loss in zip(codebooks, indices[0].T, losses, strict=True):
        torch.testing.assert_close(loss, 0.25 * (left - codes[index]).square().mean())
        left = left - codes[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    vq = make(threshold_ema_dead_code=1)
    x = data(2, 10, DIM).to(dtype).requires_grad_()
    quantized, _, losses = vq(x)
    assert quantized.dtype == dtype and quantized.isfinite().all()
    (quantized.float().sum() + losses.sum()).backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    assert vq.codebooks.dtype == torch.float32


@pytest.mark.slow
def test_a_training_step_compiles_into_one_graph():
    vq, eager = make(num_quantizers=2), make(num_quantizers=2)
    compiled = torch.compile(vq, backend="eager", fullgraph=True)
    for step in range(2):
        x = data(2, 10, DIM, seed=step)
        for mine, theirs in zip(compiled(x), eager(x), strict=True):
            torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(vq.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beam_size": 2}, "beam_size is not implemented"),
        ({"eval_beam_size": 2}, "eval_beam_size is not implemented"),
        ({"diveq": True}, "diveq is not implemented"),
        ({"implicit_neural_codebook": True}, "implicit_neural_codebook is not implemented"),
        ({"mlp_kwargs": {"depth": 2}}, "mlp_kwargs is not implemented"),
        ({"affine_param": True}, "affine_param is not implemented"),
        ({"num_quantizers": None}, "num_quantizers must be at least 1, got None"),
        ({"codebook_size": (4, 5)}, "codebook_size must have one number per layer"),
        ({"codebook_size": (4, 5), "num_quantizers": 2, "shared_codebook": True}, "shared codebook has one"),
        ({"quantize_dropout_cutoff_index": 4}, "quantize_dropout_cutoff_index must be from 0 to 3"),
        ({"quantize_dropout_multiple_of": 0}, "quantize_dropout_multiple_of must be at least 1"),
    ],
    ids=str,
)
def test_what_is_not_implemented_or_makes_no_sense_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_arguments_that_ask_for_nothing_are_accepted():
    make(diveq=False, beam_size=None, mlp_kwargs={}, implicit_neural_codebook=False)
    with pytest.raises(TypeError, match="codebok_dim"):
        make(codebok_dim=3)


def test_wrong_inputs_are_refused_with_their_shape():
    vq = make()
    with pytest.raises(ValueError, match=r"x must have 8 features, got \(2, 7\)"):
        vq(data(2, 7))
    with pytest.raises(ValueError, match="indices is not implemented"):
        vq(data(2, 3, DIM), indices=torch.zeros(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask must be"):
        vq(data(2, 3, DIM), mask=torch.ones(2, 4, dtype=torch.bool))

"""VQVAE: shapes in and out, the loss and its gradients against formulas, and one step compiled."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pygen import data, models
from pygen.models.vqvae import code_counts, perplexity

SMALL = {"num_hiddens": 8, "num_residual_hiddens": 4, "codebook_size": 16, "codebook_dim": 4}
QUANTIZERS = (
    {"quantizer": "ema"},
    {"quantizer": "gradient"},
    {"quantizer": "residual", "num_quantizers": 3},
)


def new_model(shape=(1, 8, 8), levels=17, **options):
    torch.manual_seed(0)
    return models.VQVAE(shape, levels=levels, **(SMALL | options))


def images(n, shape=(1, 8, 8), levels=17, seed=0):
    return torch.randint(0, levels, (n, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda options: options["quantizer"])
@pytest.mark.parametrize(
    ("shape", "sides"),
    (
        ((1, 28, 28), (7, 7)),
        ((1, 8, 8), (2, 2)),
        ((8, 8), (2, 2)),
        ((3, 32, 16), (8, 4)),
        ((3, 9, 6), (3, 2)),
        ((2, 1, 1), (1, 1)),
    ),
)
def test_images_of_any_size_become_codes_and_images_again(shape, sides, quantizer):
    model, x = new_model(shape, **quantizer), images(3, shape)
    assert model(x).loss.isfinite()
    model.eval()
    codes = model.encode(x)
    assert codes.shape == (3, *model.code_shape) and codes.dtype == torch.int64
    assert model.code_shape == (*sides, 3) if quantizer["quantizer"] == "residual" else model.code_shape == sides
    again = model.decode(codes)
    assert again.shape == x.shape and again.dtype == torch.int64 and 0 <= again.min() <= again.max() <= 16
    assert torch.equal(model.reconstruct(x), again)
    output = model(x)
    assert torch.equal(output.indices, codes)
    assert torch.equal(output.reconstruction.round().clamp(0, 16).long(), again)


def test_real_data_are_reconstructed_as_real_numbers():
    model = new_model((1, 8, 8), levels=None).eval()
    x = torch.randn(2, 1, 8, 8)
    again = model.reconstruct(x)
    assert again.is_floating_point() and torch.equal(again, model(x).reconstruction)


@pytest.mark.parametrize("downsamplings", (1, 3))
def test_downsamplings_decide_how_many_pixels_share_a_code(downsamplings):
    model = new_model((1, 16, 24), downsamplings=downsamplings)
    assert model.code_shape == (16 // 2**downsamplings, 24 // 2**downsamplings)
    assert model(images(2, (1, 16, 24))).indices.shape == (2, *model.code_shape)


def test_the_reconstruction_loss_is_the_share_of_the_variance_that_is_missed():
    x = images(5)
    mean, std = x.double().mean().item(), x.double().std(correction=0).item()
    model = new_model(mean=mean, std=std).eval()
    output = model(x)
    missed = (output.reconstruction.double() - x).square().mean() / x.double().var(correction=0)
    assert output.loss.item() == pytest.approx(missed.item(), rel=1e-5)
    assert output.quantizer_loss == 0 and output.loss == output.reconstruction_loss
    with torch.no_grad():
        for parameter in model.decoder[-1].parameters():
            parameter.zero_()
    assert model.loss(x).item() == pytest.approx(1, rel=1e-5), "the mean image misses all of it"


@pytest.mark.parametrize("levels", (None, 17))
def test_mean_and_std_come_from_the_training_data(levels):
    x = images(2000)
    dataset = data.Dataset(x, x[:5] * 0, x[:5] * 0, 17, (1, 8, 8), "noise")
    arguments = models.VQVAE.arguments_for(dataset)
    assert arguments["mean"] == pytest.approx(np.mean(x.numpy()), rel=1e-12)
    assert arguments["std"] == pytest.approx(np.std(x.numpy()), rel=1e-12)
    assert arguments["shape"] == (1, 8, 8) and arguments["levels"] == 17
    constant = data.Dataset(x * 0 + 3, x[:5], x[:5], 17, (1, 8, 8), "constant")
    assert models.VQVAE.arguments_for(constant)["std"] == 1.0


def latents_and_codes(model, x):
    """z and what replaces it, from the encoder and the codebook alone, (B, h w, D)."""
    z = model.encoder((x.float() - model.mean) / model.std).flatten(2).transpose(1, 2)
    codebook = model.quantizer.codebook
    nearest = (z.detach().double()[:, :, None] - codebook.double()).square().sum(-1).argmin(-1)
    return z, codebook, nearest


def test_the_commitment_loss_is_beta_times_the_distance_to_the_code():
    model, x = new_model(commitment_weight=0.7), images(6)
    z, codebook, nearest = latents_and_codes(model, x)
    expected = 0.7 * F.mse_loss(z, codebook[nearest])
    output = copy.deepcopy(model)(x)
    assert torch.equal(output.indices.flatten(1), nearest)
    torch.testing.assert_close(output.quantizer_loss, expected)
    assert output.loss == output.reconstruction_loss + output.quantizer_loss


def test_a_gradient_codebook_learns_by_its_own_term_with_weight_one():
    """The gradients of the paper's loss |sg(z) - e|^2 + beta |z - sg(e)|^2: beta only on the encoder's side."""
    model, x = new_model(quantizer="gradient", commitment_weight=0.25, threshold_ema_dead_code=0), images(6)
    z, codebook, nearest = latents_and_codes(model, x)
    expected = F.mse_loss(codebook[nearest], z.detach()) + 0.25 * F.mse_loss(z, codebook[nearest].detach())
    loss = model(x).quantizer_loss
    torch.testing.assert_close(loss, F.mse_loss(z, codebook[nearest]))
    ours, theirs = (torch.autograd.grad(value, list(model.encoder.parameters()) + [model.quantizer._codebook.embed],
                                        retain_graph=True) for value in (loss, expected))  # fmt: skip
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda options: options["quantizer"])
@pytest.mark.parametrize("rotation_trick", (False, True))
def test_every_parameter_gets_a_gradient(quantizer, rotation_trick):
    model = new_model(rotation_trick=rotation_trick, **quantizer)
    model.loss(images(16)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.encoder[0].weight.grad.abs().sum() > 0, "through the codebook"


def test_the_gradient_passes_the_codebook_straight_through():
    model, x = new_model(commitment_weight=0.0, threshold_ema_dead_code=0), images(4)
    z, codebook, nearest = latents_and_codes(model, x)
    codes = codebook[nearest].clone().requires_grad_()
    image = model.decoder(codes.transpose(1, 2).unflatten(2, (2, 2)))
    (at_code,) = torch.autograd.grad(F.mse_loss(image, (x.float() - model.mean) / model.std), codes)
    expected = torch.autograd.grad(z, list(model.encoder.parameters()), at_code)
    ours = torch.autograd.grad(model.loss(x), list(model.encoder.parameters()))
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda options: options["quantizer"])
def test_looking_at_codes_changes_nothing_and_a_training_step_does(quantizer, training):
    model = new_model(**quantizer).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(8)
    model.decode(model.encode(x))
    model.reconstruct(x)
    model.statistics(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(x)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert bool(changed) == training and all(name.startswith("quantizer") for name in changed)


def test_perplexity_is_the_exponential_of_the_entropy_and_the_rest_is_not_counted():
    indices = torch.tensor([[0, 3], [0, -1], [2, 3], [1, 3]])  # two quantisers of four codes; -1 is no code
    counts = code_counts(indices, 2, 4)
    assert counts.tolist() == [[2, 1, 1, 0], [0, 0, 0, 3]]
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert perplexity(counts).tolist() == pytest.approx([math.exp(entropy), 1.0])
    assert perplexity(torch.ones(1, 512)).item() == pytest.approx(512, rel=1e-5)
    assert perplexity(torch.zeros(1, 4)).tolist() == [1.0]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda options: options["quantizer"])
def test_metrics_of_parts_add_up_to_those_of_the_whole(quantizer):
    model, x = new_model(**quantizer).eval(), images(50)
    statistics = model.statistics(x)
    assert torch.equal(statistics, sum(model.statistics(part) for part in x.split(7)))
    codes = model.encode(x).numpy().reshape(len(x) * 4, -1)
    entropies = []
    for column in codes.T:
        p = np.unique(column, return_counts=True)[1] / len(column)
        entropies.append(-(p * np.log(p)).sum())
    metrics = model.metrics(statistics)
    assert metrics["perplexity"] == pytest.approx(np.exp(entropies).mean())
    assert metrics["active_codes"] == pytest.approx(np.mean([len(np.unique(column)) for column in codes.T]))
    if quantizer["quantizer"] != "residual":
        assert model(x).perplexity.item() == pytest.approx(metrics["perplexity"], rel=1e-5)


def test_bfloat16_autocast_gives_a_finite_loss_in_float32_and_the_codebook_stays_float32():
    model = new_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(images(16))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert model.quantizer.codebook.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def step(model, x):
    output = model(x)
    output.loss.backward()
    return output


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda options: options["quantizer"])
@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_a_compiled_training_step_is_one_graph_and_the_eager_one(quantizer, compiler):
    """Forward, backward and the codebook's update: two steps, and everything that they leave behind."""
    torch._dynamo.reset()
    # Revival draws random vectors, in another order where the compiler makes its own generator.
    eager = new_model(threshold_ema_dead_code=0, num_residual_layers=1, downsamplings=1, **quantizer)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for seed in range(2):
        x = images(8, seed=seed)
        expected, got = step(eager, x), step(compiled, x)
        assert torch.equal(got.indices, expected.indices)
        # The compiler may sum in another order: a few units of the last place, which the mean square takes up.
        for name in ("loss", "reconstruction", "perplexity", "reconstruction_loss", "quantizer_loss"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_step_that_revives_codes_compiles_too():
    torch._dynamo.reset()
    model = new_model(threshold_ema_dead_code=1.0, num_residual_layers=1, downsamplings=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = model.quantizer.codebook.clone()
    step(compiled, images(8))
    moved = (model.quantizer.codebook - before).norm(dim=-1)
    assert (moved > 0).sum() > 8 and model.quantizer.codebook.isfinite().all()


def test_the_config_rebuilds_the_model():
    for options in QUANTIZERS:
        model = new_model((3, 9, 6), levels=256, mean=3.0, std=2.0, **options).eval()
        again = models.create("vqvae", model.config)
        again.load_state_dict(model.state_dict())
        x = images(2, (3, 9, 6), 256)
        assert torch.equal(again.eval().reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"shape": (7,)}, r"shape must be an image's, \(H, W\) or \(C, H, W\), got \(7,\)"),
        ({"quantizer": "kmeans"}, "quantizer must be one of ema, gradient, residual, got 'kmeans'"),
        ({"num_quantizers": 2}, "num_quantizers=2 needs quantizer='residual', got 'ema'"),
        ({"codebook_size": 0}, "codebook_size must be a whole number, at least 1, got 0"),
        ({"num_hiddens": 2.5}, "num_hiddens must be a whole number, at least 2, got 2.5"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"commitment_weight": -1.0}, "commitment_weight must not be negative, got -1.0"),
    ),
)
def test_options_out_of_range_are_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        models.VQVAE(**({"shape": (1, 8, 8)} | options))


def test_wrong_images_and_codes_are_a_sentence():
    model = new_model()
    with pytest.raises(ValueError, match=r"expected x \(B, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match="without levels, x must be floating point, got torch.int64"):
        new_model(levels=None)(images(2))
    with pytest.raises(ValueError, match=r"indices must be \(B, 2, 2\), got \(2, 4\)"):
        model.decode(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must be in 0 .. 15, got -1 .. 16"):
        model.decode(torch.tensor([[[0, 16], [-1, 3]]]))
    with pytest.raises(TypeError, match="indices must be int64, got torch.float32"):
        model.decode(torch.zeros(1, 2, 2))

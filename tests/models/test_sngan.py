"""SNGAN: the networks against the paper's tables, who learns in which turn, weights of norm 1, and the distance."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pygen import data, models
from pygen.models import _sngan_networks as networks
from pygen.models.sngan import SNGAN, discriminator_weights

SMALL = {"width": 4, "latent_dim": 8}
SIZES = ((8, 8), (16, 16), (28, 28), (32, 32), (64, 64))


def new_model(shape=(1, 8, 8), levels=17, **options):
    torch.manual_seed(0)
    return SNGAN(shape, levels=levels, **(SMALL | options))


def images(n, shape=(1, 8, 8), levels=17, seed=0):
    return torch.randint(0, levels, (n, *shape), generator=torch.Generator().manual_seed(seed))


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
@pytest.mark.parametrize("shape", [(c, *size) for c in (1, 3) for size in SIZES] + [(20, 9), (3, 48, 48), (1, 4, 5)])
def test_every_size_is_scored_and_sampled_by_both_architectures(shape, architecture):
    model = new_model(shape, levels=256, architecture=architecture)
    image = (1, *shape) if len(shape) == 2 else shape
    z = torch.randn(2, 8)
    made = model.generator(z)
    assert made.shape == (2, *image) and made.abs().max() <= 1
    assert model(z).shape == (2, *shape)
    assert model.discriminator(made).shape == (2,)
    sampled = model.eval().sample(3)
    assert sampled.shape == (3, *shape) and sampled.dtype == torch.int64
    assert sampled.min() >= 0 and sampled.max() < 256
    for player in model.players:
        assert model.train().player_loss(player, images(2, shape, 256)).isfinite()


def sizes(network, kinds=(nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
    return [tuple(m.weight.shape) for m in network.modules() if isinstance(m, kinds)]


def test_the_plain_networks_for_32_x_32_are_those_of_table_3():
    image = (3, 32, 32)
    scored, made = networks.discriminator("cnn", image, 64), networks.generator("cnn", image, 64, 128)
    # (channels out, channels in, side of the kernel): the table from top to bottom
    expected = [(64, 3, 3), (64, 64, 4), (128, 64, 3), (128, 128, 4), (256, 128, 3), (256, 256, 4), (512, 256, 3)]
    assert sizes(scored) == [(o, i, k, k) for o, i, k in expected] + [(1, 4 * 4 * 512)]
    weights = sum(o * i * k * k for o, i, k in expected) + 8192
    assert weights == 2_934_464
    assert sum(p.numel() for p in scored.parameters()) == weights + 64 + 64 + 128 + 128 + 256 + 256 + 512 + 1
    assert sizes(made) == [(8192, 128), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (3, 64, 3, 3)]
    assert [m.num_features for m in made.modules() if isinstance(m, nn.BatchNorm2d)] == [256, 128, 64]


def test_the_plain_generator_of_48_x_48_begins_at_6_x_6_as_in_table_3():
    assert sizes(networks.generator("cnn", (3, 48, 48), 64, 128))[0] == (6 * 6 * 512, 128)


def test_the_residual_networks_for_32_x_32_are_those_of_table_4():
    scored = networks.discriminator("resnet", (3, 32, 32), 64)
    blocks = [(m.conv1.in_channels, m.conv1.out_channels, m.halve) for m in scored.blocks]
    assert blocks == [(3, 128, True), (128, 128, True), (128, 128, False), (128, 128, False)]
    made = networks.generator("resnet", (3, 32, 32), 64, 128)
    assert made.first.weight.shape == (4 * 4 * 256, 128)
    assert [(m.conv1.in_channels, m.conv1.out_channels) for m in made.blocks] == [(256, 256)] * 3


def test_the_discriminator_of_the_benchmark_has_11_7_megabytes():
    shapes = discriminator_weights()
    assert shapes == sizes(networks.discriminator("cnn", (3, 32, 32), 64))
    assert 4 * sum(math.prod(shape) for shape in shapes) == 11_737_856


@pytest.mark.parametrize(("shape", "side"), (((1, 28, 28), 28), ((1, 30, 30), 32), ((1, 8, 8), 8)))
def test_sides_that_cannot_be_halved_are_padded_by_their_edge(shape, side):
    seen = []
    scored = networks.discriminator("cnn", shape, 4)
    scored.features.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(1, *shape)
    scored(x)
    assert seen[0].shape[-2:] == (side, side)
    np.testing.assert_array_equal(seen[0], np.pad(x, [(0, 0)] * 2 + [(0, side - shape[-1])] * 2, "edge"))


# ---- spectral normalisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
def test_the_state_dict_has_the_keys_and_numbers_of_torchs_spectral_norm(architecture):
    ours = new_model((3, 16, 16), architecture=architecture).discriminator
    torch.manual_seed(0)
    theirs = networks.discriminator(architecture, (3, 16, 16), 4)
    for layer in theirs.modules():
        if isinstance(layer, networks.NORMALIZED):
            parametrizations.spectral_norm(layer)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 16, 16)
    for mode in (True, True, False):
        # Each forward is a step of the power iteration in both; they differ by rounding.
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-4, atol=1e-6)
    ours.load_state_dict(theirs.state_dict())


def test_all_weights_of_the_discriminator_have_norm_1_and_no_other_has():
    model = new_model((3, 16, 16)).train()
    for _ in range(60):
        model.discriminator(torch.zeros(1, 3, 16, 16))
    weights = [m.weight for m in model.eval().discriminator.modules() if isinstance(m, networks.NORMALIZED)]
    assert [torch.linalg.svdvals(w.flatten(1))[0].item() for w in weights] == pytest.approx(
        [1] * len(weights), rel=1e-4
    )
    assert model.sigmas() == pytest.approx([1] * len(weights), rel=1e-4)
    assert not any("parametrizations" in name for name in model.generator.state_dict())


def test_norms_stay_within_1_percent_while_the_players_train():
    """One step of power iteration a pass follows weights that a usual learning rate moves."""
    model = new_model(width=16, latent_dim=16).train()
    optimizers = {
        player: torch.optim.Adam(model.get_submodule(player).parameters(), 2e-4, betas=(0.0, 0.9))
        for player in model.players
    }
    largest = []
    for step in range(60):
        for player, optimizer in optimizers.items():
            model.player_loss(player, images(16, seed=step)).backward()
            optimizer.step()
            model.zero_grad()
        if step >= 20:
            # In eval mode: to look at the weights must not improve them.
            model.eval()
            norms = [torch.linalg.svdvals(m.weight.flatten(1))[0].item() for m in model.discriminator.modules()
                     if isinstance(m, networks.NORMALIZED)]  # fmt: skip
            largest += norms
            model.train()
    assert min(largest) > 0.99 and max(largest) < 1.01


def test_without_spectral_norm_weights_are_plain_parameters():
    model = new_model(spectral_norm=False)
    assert not any("parametrizations" in name for name in model.state_dict())
    assert max(model.sigmas()) > 1.01


def test_one_pass_over_data_and_samples_is_one_step_of_the_power_iteration():
    """Data and samples are scored by the same weights: u and v move as in one forward of the discriminator."""
    model = new_model().train()
    once = copy.deepcopy(model.discriminator)
    once(torch.zeros(1, 1, 8, 8))
    model.player_loss("discriminator", images(4))
    vectors = {name: tensor for name, tensor in model.discriminator.state_dict().items() if name.endswith(("_u", "_v"))}
    assert len(vectors) == 8
    assert all(torch.equal(once.state_dict()[name], tensor) for name, tensor in vectors.items())


# ---- the game --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ("hinge", "non_saturating", "wasserstein", "least_squares"))
def test_the_players_losses_are_formulas_of_the_scores(loss):
    model = new_model(loss=loss, spectral_norm=False).eval()  # eval: no statistics of a batch
    x = torch.rand(5, 1, 8, 8) * 17
    torch.manual_seed(3)
    found = model.player_loss("discriminator", x).item()
    torch.manual_seed(3)
    samples = model.generator(torch.randn(5, 8))
    real, fake = model.discriminator(x * 2 / 17 - 1).double(), model.discriminator(samples).double()
    real, fake = real.detach().numpy(), fake.detach().numpy()
    log = np.log1p
    expected, of_generator = {
        "hinge": (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean(), -fake.mean()),
        "non_saturating": (log(np.exp(-real)).mean() + log(np.exp(fake)).mean(), log(np.exp(-fake)).mean()),
        "wasserstein": (fake.mean() - real.mean(), -fake.mean()),
        "least_squares": ((np.square(real - 1).mean() + np.square(fake).mean()) / 2, np.square(fake - 1).mean() / 2),
    }[loss]
    assert found == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(3)
    assert model.player_loss("generator", x).item() == pytest.approx(of_generator, rel=1e-5)


def test_the_discriminators_loss_sends_no_gradient_to_the_generator():
    model = new_model().train()
    model.player_loss("discriminator", images(4)).backward()
    assert all(p.grad is None for p in model.generator.parameters())
    # Within the margin a constant added to all scores costs nothing.
    learn = {name for name, p in model.discriminator.named_parameters() if p.grad.any()}
    assert learn == {name for name, _ in model.discriminator.named_parameters()} - {"score.bias"}
    model.zero_grad()
    model.player_loss("generator", images(4)).backward()
    assert all(p.grad is not None for p in model.generator.parameters())


def test_a_gradient_penalty_is_added_times_its_factor():
    pytest.importorskip("pygen.functional.gradient_penalties")
    x = torch.rand(5, 1, 8, 8) * 17
    losses = []
    for factor in (0.0, 1.0, 10.0):
        model = new_model(loss="wasserstein", spectral_norm=False, gradient_penalty=factor).eval()
        torch.manual_seed(3)
        losses.append(model.player_loss("discriminator", x))
    plain, one, ten = (loss.item() for loss in losses)
    assert one - plain > 1e-3 and ten - plain == pytest.approx(10 * (one - plain), rel=1e-4)
    losses[-1].backward()
    assert all(p.grad.isfinite().all() for name, p in model.discriminator.named_parameters() if name != "score.bias")


def test_the_generator_moves_once_in_n_critic_steps():
    model = new_model(n_critic=3)
    turns = [tuple(model.turns(step)) for step in range(6)]
    both, alone = ("discriminator", "generator"), ("discriminator",)
    assert turns == [alone, alone, both] * 2
    assert tuple(new_model().turns(0)) == both


# ---- distance and metrics --------------------------------------------------------------------------------------------


def distance(x, y, scale):
    """1000 times the unbiased squared MMD, pair by pair."""
    x, y = x.double().flatten(1).numpy(), y.double().flatten(1).numpy()

    def kernel(a, b):
        square = ((a - b) ** 2).sum()
        return np.mean([np.exp(-square / (2 * (c * scale) ** 2)) for c in (0.2, 0.3, 0.4)])

    def among(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    return 1000 * (among(x) + among(y) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_the_loss_of_validation_is_the_kernel_distance_of_data_and_samples(monkeypatch):
    monkeypatch.setattr("pygen.models.sngan._SAMPLES", 20)
    model = new_model(distance_scale=6.0).eval()
    x = images(7)
    torch.manual_seed(5)
    found = model.loss(x).item()
    torch.manual_seed(5)
    samples = model.sample(20)
    middle = [(t.float() + 0.5) * 2 / 17 - 1 for t in (x, samples)]
    assert found == pytest.approx(distance(*middle, 6.0), rel=1e-4, abs=1e-3)


def test_the_distance_is_small_between_halves_of_the_data_and_large_for_noise(monkeypatch):
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    model = SNGAN(**(SNGAN.arguments_for(digits) | SMALL)).eval()
    losses = {}
    for name, x in (("data", digits.train[:512]), ("pixels shuffled", None), ("noise", images(512))):
        if x is None:
            generator = torch.Generator().manual_seed(0)
            x = torch.rand(512, 64, generator=generator).argsort(0).reshape(512, 1, 8, 8)
            x = digits.train[:512].gather(0, x)
        monkeypatch.setattr(model, "sample", lambda n, x=x: x.long())
        losses[name] = model.loss(digits.test).item()
    # About zero, with a standard deviation of 0.3 over choices of 512 and 300 samples.
    assert abs(losses["data"]) < 1.5 and losses["pixels shuffled"] > 5 and losses["noise"] > 20


def test_the_distance_scale_of_the_data_is_their_root_mean_square_distance():
    x = images(30)
    found = SNGAN.arguments_for(data.Dataset(x, x, x, 17, (1, 8, 8), "noise"))["distance_scale"]
    scaled = x.double().flatten(1) * 2 / 17
    assert found == pytest.approx(torch.cdist(scaled, scaled).square().mean().sqrt().item())
    constant = torch.zeros(4, 1, 8, 8, dtype=torch.int64)
    assert SNGAN.arguments_for(data.Dataset(constant, constant, constant, 17, (1, 8, 8), "0"))["distance_scale"] == 1.0


def test_a_single_image_of_validation_has_a_distance():
    assert new_model().eval().loss(images(1)).isfinite()


def test_metrics_are_mean_scores_and_the_largest_singular_value():
    model = new_model().eval()
    x = images(6)
    torch.manual_seed(7)
    sums = [model.statistics(part) for part in x.split(4)]
    found = model.metrics(torch.stack(sums).sum(0))
    torch.manual_seed(7)
    made = torch.cat([model.generator(torch.randn(n, 8)) for n in (4, 2)])
    assert found["score_real"] == pytest.approx(
        model.discriminator((x.float() + 0.5) * 2 / 17 - 1).mean().item(), rel=1e-4
    )
    assert found["score_fake"] == pytest.approx(model.discriminator(made).mean().item(), rel=1e-4)
    assert found["largest_sigma"] == max(model.sigmas())
    assert tuple(found) == tuple(model.metric_names)


# ---- samples, copies, configs, refusals ------------------------------------------------------------------------------


def test_samples_are_the_integers_whose_cells_the_images_lie_in():
    model = new_model(levels=5).eval()
    images_ = model.generator(torch.randn(9, 8, generator=torch.Generator().manual_seed(1)))
    sampled = model.sample(9, generator=torch.Generator().manual_seed(1))
    edges = np.linspace(-1, 1, 6)[1:-1]
    np.testing.assert_array_equal(sampled, np.digitize(images_.detach(), edges))
    assert torch.equal(sampled, model.sample(9, generator=torch.Generator().manual_seed(1)))
    assert len(model.sample(2, temperature=0.0).unique(dim=0)) == 1
    assert model.sample(0).shape == (0, 1, 8, 8)


def test_real_data_are_taken_and_given_in_minus_1_to_1():
    model = new_model(levels=None).eval()
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    assert model.sample(3).dtype == torch.float32
    assert model.player_loss("discriminator", x).isfinite() and model.loss(x).isfinite()
    with pytest.raises(TypeError, match="without levels, x must be floating point, got torch.int64"):
        model.player_loss("discriminator", images(4))


def test_a_copy_trains_by_itself():
    model = new_model().train()
    model.player_loss("discriminator", images(4))
    other = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for player in other.players:
        other.player_loss(player, images(4)).backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    changed = [name for name, tensor in other.state_dict().items() if not torch.equal(before[name], tensor)]
    assert {name.split(".")[0] for name in changed} == set(model.players)


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"architecture": "resnet", "loss": "wasserstein", "n_critic": 5},
        {"spectral_norm": False, "gradient_penalty": 10.0, "distance_scale": 3.0},
    ),
)
def test_a_model_is_rebuilt_from_its_name_and_config(options):
    model = new_model(**options).eval()
    again = models.create(model.name, model.config).eval()
    again.load_state_dict(model.state_dict())
    z = torch.randn(2, 8)
    assert again.config == model.config and torch.equal(again(z), model(z))


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"architecture": "vgg"}, "architecture must be one of cnn, resnet, got 'vgg'"),
        ({"loss": "l2"}, "loss must be one of hinge"),
        ({"width": 0}, "width must be a whole number, at least 1, got 0"),
        ({"n_critic": 1.5}, "n_critic must be a whole number, at least 1, got 1.5"),
        ({"shape": (3,)}, r"shape must be an image's, .* with sides of 4 at least, got \(3,\)"),
        ({"shape": (1, 3, 8)}, r"sides of 4 at least, got \(1, 3, 8\)"),
        ({"gradient_penalty": -1.0}, "gradient_penalty must not be negative"),
        ({"distance_scale": 0.0}, "distance_scale must be positive"),
        ({"levels": 0}, "levels must be at least 1"),
    ),
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SNGAN(**({"shape": (1, 8, 8)} | options))


def test_data_of_another_shape_and_impossible_samples_are_refused():
    model = new_model().eval()
    with pytest.raises(ValueError, match=r"expected x \(B, 1, 8, 8\), got \(2, 8, 8\)"):
        model.player_loss("discriminator", images(2, (8, 8)))
    with pytest.raises(ValueError, match="n must not be negative, got -1"):
        model.sample(-1)
    with pytest.raises(ValueError, match="temperature must be a number >= 0"):
        model.sample(1, temperature=math.nan)

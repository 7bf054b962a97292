"""IResNet: a density whose Jacobian, bounds and inverses are what they are said to be, and a classifier on top."""

import copy
import json
import math

import pytest
import torch
from torch.nn import functional as F

from pygen import models
from pygen.models._iresnet_blocks import ACTIVATIONS, Steep, bounded_weights
from pygen.models.iresnet import IResNet, NotConverged
from pygen.nn.invertible_residual import InvertibleResidual
from pygen.nn.utils._conv_operator import dense_matrix
from pygen.nn.utils._spectral_norm import SpectralNorm

DENSE = {"blocks": 3, "hidden": (8, 8)}
CONV = {"blocks": 2, "hidden": (6,), "scales": 2}
VARIANTS = {
    "vector": ((5,), DENSE),
    "plane": ((2,), {**DENSE, "activation": "lipswish"}),
    "flat image": ((2, 3), {**DENSE, "architecture": "mlp", "activation": "tanh"}),
    "image": ((1, 4, 4), CONV),
    "grey image": ((4, 4), {**CONV, "hidden": (6, 4), "activation": "elu", "scales": 1}),
}


def iresnet(variant="vector", gain=4.0, **arguments):
    """A model whose layers all are at their bounds: weights far larger than allowed, and no identity ActNorm."""
    torch.manual_seed(0)
    shape, own = VARIANTS[variant]
    model = IResNet(shape, **{**own, "log_det": "exact", **arguments})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("original"):
                parameter.normal_().mul_(gain)
            elif "bias" in name or "log_scale" in name:
                parameter.normal_().mul_(0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("initialized"):
                buffer.fill_(True)
    return model.eval()


def data_for(model, n, dtype=torch.float64):
    return (model.levels or 1) * torch.rand(n, *model.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def norm_of(norm, bounded):
    """The largest singular value of a layer, from the whole matrix of it: no iteration is involved."""
    if isinstance(norm, SpectralNorm):
        return torch.linalg.matrix_norm(bounded.double(), 2).item()
    return torch.linalg.svdvals(dense_matrix(norm.operator, bounded.double()))[0].item()


def branch_bounds(model):
    """For each block, the product of its layers' true norms; the activations' slopes are at most 1."""
    return [
        math.prod(norm_of(norm, norm(weight)) for norm, weight in bounded_weights(block))
        for block in model.modules()
        if isinstance(block, InvertibleResidual)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", (None, 5))
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(variant, levels):
    model = iresnet(variant, levels=levels, inverse_tolerance=1e-13).double()
    x = data_for(model, 2)
    z, log_det = model(x)
    assert z.shape[1:] == model.latent_shape
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda s: model.features(s[None])[0].flatten(), x[i])
        expected = torch.linalg.slogdet(jacobian.reshape(z[i].numel(), -1)).logabsdet
        torch.testing.assert_close(log_det[i].detach(), expected, rtol=0, atol=1e-8)
    back, inverse_log_det = model.inverse(z)
    # Every block multiplies the error of its output by at most 1 / (1 - c) = 10 on the way back.
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_product_of_a_branchs_singular_values_is_at_most_c(variant):
    """invertible-resnet#14: with few power iterations the trained model has singular values above 1."""
    model = iresnet(variant, coefficient=0.7)
    model(data_for(model, 2, torch.float32))
    bounds = branch_bounds(model)
    assert max(bounds) <= 0.7 * (1 + 2e-4)  # the norms of three convolutions at most, each computed to 5e-5
    assert min(bounds) > 0.69, "the bound is used, and not only kept"


@pytest.mark.parametrize("variant", ("vector", "image"))
def test_the_bounds_hold_for_averaged_weights_whose_u_and_v_are_of_others(variant):
    model = iresnet(variant)
    model(data_for(model, 2, torch.float32))
    with torch.no_grad():
        for _, weight in bounded_weights(model):
            weight.copy_(torch.randn_like(weight))  # in place, as an average is updated
    assert max(branch_bounds(model)) > 1, "with the old u and v the blocks are no contractions"
    model(data_for(model, 2, torch.float32))
    assert max(branch_bounds(model)) <= 0.9 * (1 + 2e-4)


@pytest.mark.parametrize("variant", ("vector", "image"))
def test_u_and_v_are_settled_once_and_a_loaded_model_gives_the_same_bits(variant):
    model = iresnet(variant)
    x = data_for(model, 3, torch.float32)
    z, log_det = model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        model.train().eval()
        assert torch.equal(model(x)[0], z)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(7)
    again = models.create("iresnet", json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(state)
    assert torch.equal(again(x)[0], z) and torch.equal(again(x)[1], log_det)


@pytest.mark.parametrize("variant", ("vector", "image"))
def test_u_and_v_are_in_the_state_dict_before_any_data(variant):
    """residual-flows creates them in the first forward, and load_state_dict of a new model breaks."""
    shape, own = VARIANTS[variant]
    new = IResNet(shape, **own)
    used = iresnet(variant)
    used(data_for(used, 2, torch.float32))
    assert set(new.state_dict()) == set(used.state_dict())
    assert sum(name.endswith(("._u", "._v")) for name in new.state_dict()) == 2 * len(list(bounded_weights(new)))
    new.load_state_dict(used.state_dict())


@pytest.mark.parametrize("variant", ("vector", "image"))
def test_all_weights_learn_where_the_norm_is_above_its_bound(variant):
    """invertible-resnet#4: in-place division cut the gradient where sigma was larger than c."""
    model = iresnet(variant).train()
    model.loss(data_for(model, 4, torch.float32)).backward()
    for _, weight in bounded_weights(model):
        assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_a_two_dimensional_density_integrates_to_one():
    model = iresnet("plane").double()
    line = torch.linspace(-12, 12, 241, dtype=torch.float64)
    with torch.no_grad():
        density = model.log_prob(torch.cartesian_prod(line, line)).exp()
    assert density.sum().item() * (line[1] - line[0]).item() ** 2 == pytest.approx(1, abs=1e-3)


def test_samples_have_the_density_that_log_prob_says():
    """E exp(i t x) of samples against its integral by the density, at a few t."""
    model = iresnet("plane").double()
    x = model.sample(20_000, generator=torch.Generator().manual_seed(0))
    line = torch.linspace(-12, 12, 241, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        mass = model.log_prob(points).exp() * (line[1] - line[0]) ** 2
    for t in ((0.5, 0.0), (0.0, 0.5), (0.7, -0.7), (1.5, 1.0)):
        t = torch.tensor(t, dtype=torch.float64)
        for function in (torch.cos, torch.sin):
            expected = (mass * function(points @ t)).sum().item()
            # The spread of a cosine is at most 1: four standard errors.
            assert function(x @ t).mean().item() == pytest.approx(expected, abs=4 / math.sqrt(len(x)))


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_have_continuous_slopes_of_at_most_one(function):
    for raw in (-2.0, 1.0, 5.0):
        activation = Steep(function).double()
        torch.nn.init.constant_(activation.raw_steepness, raw)
        x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
        slopes = activation(x).diff() / x.diff()
        assert slopes.abs().max() <= 1 + 1e-9
        steepness = F.softplus(torch.tensor(raw)).item()
        assert slopes.diff().abs().max() <= 2 * steepness * 3e-4, "no jump: the second derivative is bounded"


def test_features_are_the_z_of_forward_without_its_log_det():
    for variant in ("vector", "image"):
        model = iresnet(variant, levels=5)
        x = data_for(model, 3, torch.float32)
        torch.testing.assert_close(model.features(x), model(x)[0], rtol=0, atol=1e-6)
        integers = x.floor().long()
        assert torch.equal(model.features(integers), model.features(integers + 0.5)), "the middle, and no noise"


def test_reconstruct_finds_integers_again():
    model = iresnet("image", levels=5)
    x = torch.randint(0, 5, (6, 1, 4, 4))
    assert torch.equal(model.reconstruct(x), x)
    found = model.invert(model.features(x))
    assert found.converged.all() and found.error.max() < 1e-4 and (found.iterations > 1).all()


def test_an_inverse_that_did_not_converge_says_so():
    """invertible-resnet#3: an inverse error of about 1 after training, and nobody was told."""
    model = iresnet("vector", max_inverse_iterations=2)
    z = torch.randn(3, 5)
    found = model.invert(z)
    assert not found.converged.any() and (found.iterations == 2).all() and (found.error > 1e-3).all()
    with pytest.raises(NotConverged, match="the inverse of 3 of 3 samples did not converge: after 2 iterations"):
        model.sample(3)
    with pytest.raises(RuntimeError, match="did not converge"):
        model.inverse(z)


def test_samples_depend_on_the_generator_alone():
    model = iresnet("image", levels=5)
    one, two = (model.sample(3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.int64 and one.shape == (3, 1, 4, 4)
    assert one.min() >= 0 and one.max() <= 4


def test_hybrid_loss_is_cross_entropy_plus_weighted_bits():
    model = iresnet("vector", objective="hybrid", num_classes=3, density_weight=0.25)
    x, labels = data_for(model, 8, torch.float32), torch.arange(8) % 3
    expected = F.cross_entropy(model.classify(x), labels) + 0.25 * model.bits_per_dim(x).mean()
    torch.testing.assert_close(model.loss(x, labels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ("classifier", "hybrid"))
@pytest.mark.parametrize("variant", ("vector", "image"))
def test_metrics_are_accuracy_and_cross_entropy_of_all_data(objective, variant):
    model = iresnet(variant, objective=objective, num_classes=4)
    x, labels = data_for(model, 10, torch.float32), torch.arange(10) % 4
    logits = model.classify(x)
    sums = model.statistics(x[:3], labels[:3]) + model.statistics(x[3:], labels[3:])
    found = model.metrics(sums)
    assert tuple(found) == tuple(model.metric_names)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert found["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)


def test_a_copy_in_eval_mode_serves_itself():
    model = iresnet("vector")
    x = data_for(model, 3, torch.float32)
    z = model(x)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert torch.equal(twin(x)[0], z) and not torch.equal(model(x)[0], z)


def test_images_have_estimated_log_dets_and_small_vectors_exact_ones():
    def kinds(model):
        return {block.log_det for block in model.modules() if isinstance(block, InvertibleResidual)}

    assert kinds(IResNet((2,), blocks=1)) == {"exact"}
    assert kinds(IResNet((1, 4, 4), blocks=1)) == {"russian_roulette"}
    assert kinds(IResNet((1, 4, 4), blocks=1, log_det="truncated")) == {"truncated"}


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    (
        ((2,), {"objective": "regression"}, "objective must be one of density, classifier, hybrid"),
        ((2,), {"objective": "classifier"}, "objective='classifier' needs num_classes, at least 2, got None"),
        ((2,), {"architecture": "resnet"}, "architecture must be one of mlp, conv"),
        ((2,), {"coefficient": 1.0}, "coefficient must be between 0 and 1, or a block has no inverse, got 1.0"),
        ((2,), {"activation": "relu"}, "activation must be one of sine, lipswish, elu, tanh"),
        ((2,), {"blocks": 0}, "blocks must be at least 1, got 0"),
        ((2,), {"hidden": (0,)}, "hidden must be a list of positive widths"),
        ((2,), {"log_det": "guess"}, "log_det must be one of"),
        ((2,), {"density_weight": -1}, "density_weight must be a number >= 0"),
        ((2,), {"architecture": "conv"}, "shape must be an image's"),
        ((1, 6, 6), {"scales": 2}, "scales=2 needs images with a height and width divisible by 4"),
        ((1, 4, 4), {"hidden": []}, "hidden must name the channels of at least one layer"),
    ),
)
def test_bad_options_are_sentences(shape, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.create("iresnet", {"shape": shape, **options})


def test_what_a_model_was_not_built_for_is_a_sentence():
    density = iresnet("vector")
    with pytest.raises(ValueError, match="objective='density' has no classifier"):
        density.classify(torch.zeros(1, 5))
    classifier = iresnet("vector", objective="classifier", num_classes=2)
    with pytest.raises(ValueError, match="trained as a classifier has no density"):
        classifier.sample(1)
    for labels in (None, torch.zeros(3), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"objective='classifier' needs labels, int64 \(3,\), got"):
            classifier.loss(torch.zeros(3, 5), labels)


def test_scales_are_as_many_as_the_sides_allow_up_to_three():
    sizes = {(1, 2, 6): 4, (3, 8, 8): 3 * 4**3, (1, 32, 32): 4**3, (4, 4): 16}
    for shape, channels in sizes.items():
        assert IResNet(shape, blocks=1, hidden=(4,)).latent_shape[0] == channels
    with pytest.raises(ValueError, match="scales=1 needs images with a height and width divisible by 2, got 3 x 4"):
        IResNet((1, 3, 4))

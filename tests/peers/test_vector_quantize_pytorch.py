"""VectorQuantize beside vector-quantize-pytorch, step by step: the same state and input give the same everything."""

import copy
import inspect

import pytest
import torch

from pygen.nn import vector_quantize
from pygen.nn.vector_quantize import VectorQuantize

peer = pytest.importorskip("vector_quantize_pytorch")

# Both compute in float32; what they sum in different order are at most a few hundred terms of size 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

OPTIONS = {
    "defaults": {},
    "decay": {"decay": 0.99, "eps": 1e-3},
    "straight-through": {"rotation_trick": False},
    "gumbel straight-through": {"rotation_trick": False, "straight_through": True},
    "no gradient to the input": {"route_gradients_to_input": False},
    "cosine": {"use_cosine_sim": True},
    "cosine straight-through": {"use_cosine_sim": True, "rotation_trick": False},
    "commitment": {"commitment_weight": 0.25},
    "no commitment": {"commitment_weight": 0.0},
    "projections": {"codebook_dim": 5},
    "projections and LayerNorm": {"codebook_dim": 5, "layernorm_after_project_in": True},
    "projections of cosine": {"codebook_dim": 5, "use_cosine_sim": True},
    "heads": {"heads": 2, "codebook_dim": 4},
    "heads with projections": {"heads": 3, "codebook_dim": 5},
    "separate codebooks": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "separate codebooks of cosine": {
        "heads": 2,
        "codebook_dim": 6,
        "separate_codebook_per_head": True,
        "use_cosine_sim": True,
    },
    "one separate codebook": {"separate_codebook_per_head": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, separate": {
        "learnable_codebook": True,
        "ema_update": False,
        "heads": 2,
        "codebook_dim": 4,
        "separate_codebook_per_head": True,
    },
    "learnable, no gradient to the input": {
        "learnable_codebook": True,
        "ema_update": False,
        "route_gradients_to_input": False,
    },
    "orthogonal": {"orthogonal_reg_weight": 10.0},
    "orthogonal, learnable": {"orthogonal_reg_weight": 10.0, "learnable_codebook": True, "ema_update": False},
    "orthogonal, few codes": {"orthogonal_reg_weight": 10.0, "codebook_size": 3},
    "orthogonal, active codes": {"orthogonal_reg_weight": 10.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal, separate codebooks": {
        "orthogonal_reg_weight": 10.0,
        "heads": 2,
        "codebook_dim": 4,
        "separate_codebook_per_head": True,
    },
    "frozen": {"freeze_codebook": True},
    "manual": {"manual_ema_update": True},
    "no average": {"ema_update": False},
    "sampling without temperature": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.0},
}
DIM, CODES = 8, 24


def pair(**options):
    """The two modules in the same state, and optimisers for what they learn by gradients."""
    torch.manual_seed(0)
    options = {"dim": DIM, "codebook_size": CODES} | options
    theirs = peer.VectorQuantize(**options)
    ours = VectorQuantize(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(module, x, weight, **arguments):
    """A training step by SGD -> results, the input's gradient, the parameters' gradients."""
    x = x.clone().requires_grad_()
    quantized, indices, loss, breakdown = module(x, return_loss_breakdown=True, **arguments)
    total = (quantized * weight).sum() + loss
    parameters = dict(module.named_parameters())
    if total.requires_grad:
        grads = torch.autograd.grad(total, [x, *parameters.values()], allow_unused=True, materialize_grads=True)
    else:
        grads = [torch.zeros_like(v) for v in (x, *parameters.values())]
    with torch.no_grad():
        for parameter, grad in zip(parameters.values(), grads[1:], strict=True):
            parameter -= 0.01 * grad
    named = dict(zip(["x", *parameters], grads, strict=True))
    return quantized, indices, loss, breakdown.commitment, breakdown.orthogonal_reg, named


def assert_same_steps(theirs, ours, batches, **arguments):
    for x in batches:
        weight = torch.randn(x.shape)
        torch.testing.assert_close(step(ours, x, weight, **arguments), step(theirs, x, weight, **arguments), **CLOSE)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **CLOSE)
    x = batches[0]
    torch.testing.assert_close(ours.eval()(x, **arguments), theirs.eval()(x, **arguments), **CLOSE)


def batches(*shape, n=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_steps_are_the_same(options):
    assert_same_steps(*pair(**options), batches(3, 20, DIM))


@pytest.mark.parametrize(
    ("options", "shape"),
    (
        ({"accept_image_fmap": True}, (2, DIM, 5, 6)),
        ({"accept_image_fmap": True, "heads": 2, "codebook_dim": 3}, (2, DIM, 5, 6)),
        ({"accept_3d_fmap": True}, (2, DIM, 3, 2, 4)),
        ({"channel_last": False}, (2, DIM, 30)),
        ({}, (30, DIM)),
        ({"heads": 2, "codebook_dim": 4}, (30, DIM)),
        ({"dim": 1}, (3, 30, 1)),
    ),
)
def test_layouts_are_the_same(options, shape):
    assert_same_steps(*pair(**options), batches(*shape))


@pytest.mark.parametrize("zeros", (True, False))
@pytest.mark.parametrize("options", ({}, {"rotation_trick": False}, {"learnable_codebook": True, "ema_update": False}))
def test_masked_steps_are_the_same(options, zeros):
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    modules = pair(**options, return_zeros_for_masked_padding=zeros)
    assert_same_steps(*modules, batches(3, 20, DIM), mask=mask)


def test_lengths_are_the_same():
    assert_same_steps(*pair(), batches(3, 20, DIM), lens=torch.tensor([20, 7, 1]))


@pytest.mark.parametrize(
    "options", ({"codebook_dim": 5}, {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True})
)
def test_masked_codes_are_the_same_where_the_masked_loss_is_not(options):
    """Theirs takes the loss of a masked batch to the input before its projection or cut into heads."""
    theirs, ours = pair(**options, commitment_weight=0.0)
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    assert_same_steps(theirs, ours, batches(3, 20, DIM), mask=mask)


@pytest.mark.parametrize("cosine", (False, True))
@pytest.mark.parametrize("dim", (DIM, 3, 40))
def test_k_means_finds_the_same_codes_from_the_same_vectors(cosine, dim):
    options = {"dim": dim, "kmeans_init": True, "kmeans_iters": 5, "use_cosine_sim": cosine}
    theirs, ours = pair(**options)
    x = batches(4, 50, dim, n=1)[0]
    for module in (theirs, ours):
        torch.manual_seed(3)  # both draw the first centres by one torch.randperm
        module(x)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **CLOSE)
    assert ours._codebook.initted


def test_masked_k_means_finds_the_same_codes():
    theirs, ours = pair(kmeans_init=True)
    x = batches(4, 50, DIM, n=1)[0]
    mask = torch.rand(4, 50, generator=torch.Generator().manual_seed(2)) < 0.6
    for module in (theirs, ours):
        torch.manual_seed(3)
        module(x, mask=mask)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **CLOSE)


def test_as_many_codes_are_revived_with_the_same_state():
    """Which vectors are drawn is up to each; everything else is not."""
    theirs, ours = pair(threshold_ema_dead_code=2, codebook_size=20)
    x = batches(4, 50, DIM, n=1)[0]
    for module in (theirs, ours):
        module(x)
    torch.testing.assert_close(ours._codebook.cluster_size, theirs._codebook.cluster_size, **CLOSE)
    revived = ours._codebook.cluster_size == 2
    assert 0 < revived.sum() < 20
    kept = ~revived
    torch.testing.assert_close(ours._codebook.embed[kept], theirs._codebook.embed[kept], **CLOSE)
    for module in (theirs, ours):
        book = module._codebook
        torch.testing.assert_close(book.embed_avg[revived], 2 * book.embed[revived], rtol=0, atol=0)
        assert (
            torch.cdist(book.embed[revived], x.view(-1, DIM), compute_mode="donot_use_mm_for_euclid_dist")
            .amin(1)
            .eq(0)
            .all()
        )


@pytest.mark.parametrize("options", ({}, {"use_cosine_sim": True}), ids=("euclidean", "cosine"))
def test_codes_are_drawn_with_the_same_frequencies(options):
    theirs, ours = pair(stochastic_sample_codes=True, sample_codebook_temp=0.5, freeze_codebook=True, **options)
    x = batches(1, 1, DIM, n=1)[0].expand(1, 40_000, DIM)
    torch.manual_seed(4)
    frequencies = [torch.bincount(m(x)[1].flatten(), minlength=CODES) / x.size(1) for m in (theirs, ours)]
    # Of two samples of this size the standard deviation of the difference is below 0.0036.
    torch.testing.assert_close(*frequencies, rtol=0, atol=5 * 0.0036)


@pytest.mark.parametrize("name", ("defaults", "projections and LayerNorm", "separate codebooks", "orthogonal"))
def test_state_dict_loads_both_ways(name):
    theirs, ours = pair(**OPTIONS[name])
    ours(torch.randn(2, 9, DIM))
    theirs.load_state_dict(ours.state_dict())
    fresh = copy.deepcopy(ours)
    fresh.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k for k, _ in ours.named_parameters()} == {k for k, _ in theirs.named_parameters()}


@pytest.mark.parametrize("name", ("defaults", "cosine", "projections", "separate codebooks"))
def test_the_same_seed_makes_the_same_module(name):
    options = {"dim": DIM, "codebook_size": CODES} | OPTIONS[name]
    states = []
    for make in (peer.VectorQuantize, VectorQuantize):
        torch.manual_seed(5)
        states.append(dict(make(**options).state_dict()))
    torch.testing.assert_close(*states, **CLOSE)


@pytest.mark.parametrize("name", ("defaults", "projections", "separate codebooks"))
def test_codes_and_outputs_of_indices_are_the_same(name):
    theirs, ours = pair(**OPTIONS[name])
    _, indices, _ = ours.eval()(torch.randn(2, 9, DIM))
    torch.testing.assert_close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices), **CLOSE)
    torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices), **CLOSE)
    torch.testing.assert_close(ours.codebook, theirs.codebook)


@pytest.mark.parametrize("name", ("defaults", "projections", "heads", "separate codebooks"))
def test_learning_from_given_indices_is_the_same(name):
    theirs, ours = pair(**OPTIONS[name])
    x = torch.randn(2, 9, DIM)
    _, indices, _ = ours.eval()(x)
    for module in (theirs, ours):
        module.train().update_indices(x, indices.flip(1))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **CLOSE)


def test_every_argument_of_theirs_is_known_here():
    def names(function):
        return [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]

    ours = {*names(VectorQuantize.__init__), *vector_quantize._REFUSED_OPTIONS}
    assert ours == {*names(peer.VectorQuantize.__init__)}
    assert names(VectorQuantize.forward) == [*names(peer.VectorQuantize.forward), "return_metrics"]
    theirs = inspect.signature(peer.VectorQuantize.__init__).parameters
    for name, default in vector_quantize._REFUSED_OPTIONS.items():
        assert theirs[name].default == default, name
    for name, parameter in inspect.signature(VectorQuantize.__init__).parameters.items():
        if name in theirs:
            assert theirs[name].default == parameter.default, name

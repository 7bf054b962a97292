"""vector-quantize-pytorch 1.32: its ResidualVQ and ours with the same state, step by step."""

import copy

import pytest
import torch

from pygen.nn.product_vq import ProductVQ
from pygen.nn.residual_vq import ResidualVQ

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed", exc_type=ImportError
)

DIM = 8
STEPS = 4

OPTIONS = [
    {},
    {"decay": 0.99, "eps": 1e-3, "commitment_weight": 0.25},
    {"codebook_size": (16, 7, 5), "num_quantizers": None},
    {"codebook_dim": 5},
    {"shared_codebook": True},
    {"shared_codebook": True, "use_cosine_sim": True},
    {"use_cosine_sim": True},
    {"rotation_trick": False},
    {"straight_through": False, "rotation_trick": False, "quant_grad_frac": 0.5},
    {"learnable_codebook": True, "ema_update": False},
    {"learnable_codebook": True, "ema_update": False, "rotation_trick": False},
    {"quantize_dropout": True},
    {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2},
]


def pair(**options):
    """The peer's module and ours with its state."""
    options = {"dim": DIM, "num_quantizers": 3, "codebook_size": 16} | options
    torch.manual_seed(0)
    theirs = peer.ResidualVQ(**options)
    mine = ResidualVQ(**options)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def data(step, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def assert_same_state(mine, theirs):
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_step(mine, theirs, x, **arguments):
    """The same results, gradients and state after a step on x."""
    weight, results = data(99, *x.shape), []
    for module in (mine, theirs):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        quantized, indices, losses, codes = module(inputs, return_all_codes=True, **arguments)
        ((quantized * weight).sum() + losses.sum()).backward()
        gradients = [p.grad for p in module.parameters()]
        results.append((quantized, indices, losses, codes, inputs.grad, gradients))
    (quantized, indices, losses, codes, grad, gradients), expected = results
    assert torch.equal(indices, expected[1])
    # The peer's distances are rounded; where it chooses the same code all the rest agrees to float32.
    for a, b in zip((quantized, losses, codes, grad), (expected[0], *expected[2:5]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, expected[5], strict=True):
        # A layer that was dropped has a gradient of zeros here and none there.
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4)
    assert_same_state(mine, theirs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_steps_agree(options):
    mine, theirs = pair(**options)
    for step in range(STEPS):
        assert_same_step(mine, theirs, data(step, 2, 30, DIM), rand_quantize_dropout_fixed_seed=step)


# Not with cosine codes: there the peer's loss compares codes of length 1 with vectors as they are if there is a mask.
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 5}, {"shared_codebook": True}], ids=str)
@pytest.mark.parametrize("zeros", [True, False])
def test_training_steps_with_a_mask_agree(options, zeros):
    mine, theirs = pair(return_zeros_for_masked_padding=zeros, **options)
    for step in range(STEPS):
        x, mask = data(step, 2, 30, DIM), data(step + 50, 2, 30) > 0
        assert_same_step(mine, theirs, x, mask=mask)


def test_a_frozen_codebook_stays_frozen():
    """The peer's forward has freeze_codebook=False, which overrides what its constructor was told."""
    mine, theirs = pair(freeze_codebook=True)
    before = copy.deepcopy(mine.state_dict())
    mine(data(0, 2, 30, DIM)), theirs(data(0, 2, 30, DIM), freeze_codebook=True)
    assert_same_state(mine, theirs)
    assert all(torch.equal(t, before[name]) for name, t in mine.state_dict().items())


@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_evaluation_and_decoding_agree(options):
    mine, theirs = pair(quantize_dropout=True, **options)
    mine.eval(), theirs.eval()
    for shape in ((2, 30, DIM), (5, DIM)):
        x = data(0, *shape)
        (quantized, indices, losses), expected = mine(x), theirs(x)
        assert torch.equal(indices, expected[1]) and torch.equal(losses, expected[2])
        torch.testing.assert_close(quantized, expected[0], rtol=1e-5, atol=1e-5)
    indices = theirs(data(0, 2, 30, DIM))[1]
    for given in (indices, indices[..., :1], indices.masked_fill(data(1, 2, 30, 3) > 0, -1)):
        for name in ("get_codes_from_indices", "get_output_from_indices"):
            torch.testing.assert_close(getattr(mine, name)(given), getattr(theirs, name)(given), rtol=1e-5, atol=1e-5)


def test_dead_codes_are_revived_when_the_peer_revives_them():
    """Which vectors they become is random in both; that they do, and the state they get, is not."""
    mine, theirs = pair(threshold_ema_dead_code=1.5, num_quantizers=2, codebook_size=64)
    x = data(0, 4, 50, DIM)
    mine(x), theirs(x)
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        revived = b._codebook.cluster_size == 1.5
        assert revived.any() and torch.equal(a._codebook.cluster_size == 1.5, revived)
        for codebook in (a._codebook, b._codebook):
            torch.testing.assert_close(codebook.embed_avg[revived], codebook.embed[revived] * 1.5)
        torch.testing.assert_close(a._codebook.embed[~revived], b._codebook.embed[~revived], rtol=1e-5, atol=1e-5)


def test_a_product_quantiser_is_the_peers_with_separate_heads():
    torch.manual_seed(0)
    theirs = peer.VectorQuantize(DIM, 16, codebook_dim=2, heads=4, separate_codebook_per_head=True)
    mine = ProductVQ(DIM, 4, 16)
    mine.load_state_dict(theirs.state_dict())
    for step in range(STEPS):
        x = data(step, 2, 30, DIM)
        (quantized, indices, loss), expected = mine(x), theirs(x)
        assert torch.equal(indices, expected[1])
        torch.testing.assert_close(quantized, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, expected[2])
        assert_same_state(mine, theirs)


def test_our_state_loads_into_the_peer():
    mine, theirs = pair()
    mine(data(0, 2, 30, DIM))
    other = copy.deepcopy(theirs)
    other.load_state_dict(mine.state_dict())
    assert_same_state(mine, other)

"""ProductVQ against a VectorQuantize for each group."""

import pytest
import torch

from pygen import ops
from pygen.nn.product_vq import ProductVQ
from pygen.nn.vector_quantize import VectorQuantize

DIM, GROUPS, CODES = 12, 3, 10


def make(seed=0, **options):
    torch.manual_seed(seed)
    return ProductVQ(**{"dim": DIM, "groups": GROUPS, "codebook_size": CODES} | options)


def singles(vq, **options):
    """A quantiser for each group, with the group's state."""
    width = vq._codebook.embed.size(2)
    quantizers = [VectorQuantize(width, CODES, **options) for _ in range(vq.groups)]
    for group, quantizer in enumerate(quantizers):
        for name, state in vq._codebook.state_dict().items():
            quantizer._codebook.state_dict()[name].copy_(state[group : group + 1] if state.dim() else state)
    return quantizers


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"learnable_codebook": True}], ids=str)
def test_every_group_is_quantised_by_a_codebook_of_its_own(options):
    vq = make(**options)
    quantizers = singles(vq, **options)
    for step in range(3):
        x = data(2, 40, DIM, seed=step)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        quantized, indices, loss = vq(mine)
        parts = [one(part) for one, part in zip(quantizers, theirs.chunk(GROUPS, -1), strict=True)]
        assert torch.equal(indices, torch.stack([part[1] for part in parts], -1))
        expected = torch.cat([part[0] for part in parts], -1)
        torch.testing.assert_close(quantized, expected)
        torch.testing.assert_close(loss, torch.stack([part[2] for part in parts]).mean())
        (quantized.square().sum() + loss).backward()
        (expected.square().sum() + sum(part[2] for part in parts) / GROUPS).backward()
        torch.testing.assert_close(mine.grad, theirs.grad)
        for group, one in enumerate(quantizers):
            for name in ("embed", "embed_avg", "cluster_size"):
                state, other = getattr(vq._codebook, name), getattr(one._codebook, name)
                torch.testing.assert_close(state[group], other[0], rtol=1e-6, atol=1e-6)


def test_a_step_makes_one_search_and_one_pass_of_statistics(monkeypatch):
    calls = []

    def counting(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("nearest_codebook", "codebook_statistics"):
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    make()(data(2, 40, DIM))
    assert sorted(calls) == ["codebook_statistics", "nearest_codebook"]


def test_indices_decode_to_what_was_quantised():
    for options in ({}, {"groups": 1}, {"codebook_dim": 5}, {"groups": DIM}):
        vq = make(**options).eval()
        quantized, indices, loss = vq(data(2, 9, DIM))
        assert indices.shape == (2, 9, vq.groups) and loss == 0
        torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)
        assert vq.get_codes_from_indices(indices).shape == (
            2,
            9,
            options.get("codebook_dim", DIM // vq.groups) * vq.groups,
        )


def test_images_masks_and_metrics():
    vq = make(accept_image_fmap=True)
    quantized, indices, _ = vq(data(2, DIM, 4, 5))
    assert quantized.shape == (2, DIM, 4, 5) and indices.shape == (2, 4, 5, GROUPS)
    mask = torch.arange(20).expand(2, 20) < 12
    for groups in (1, GROUPS):
        quantized, indices, _, metrics = make(groups=groups)(data(2, 20, DIM), mask=mask, return_metrics=True)
        assert (indices[~mask] == -1).all() and (indices[mask] >= 0).all() and (quantized[~mask] == 0).all()
        assert 1 <= metrics.perplexity <= CODES and 0 < metrics.usage <= 1


def test_an_empty_batch_gives_zero_loss():
    vq = make()
    quantized, indices, loss = vq(data(2, 0, DIM))
    assert quantized.shape == (2, 0, DIM) and indices.shape == (2, 0, GROUPS) and loss == 0


def test_kmeans_starts_every_group_from_its_own_features():
    vq = make(kmeans_init=True)
    scale = torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(DIM // GROUPS)
    vq(data(2, 40, DIM) * scale)
    size = vq.codebook.norm(dim=-1).mean(-1)
    assert (size / torch.tensor([1.0, 100.0, 0.01]) > 0.5).all() and (size / torch.tensor([1.0, 100.0, 0.01]) < 5).all()


def test_the_state_is_that_of_a_quantiser_with_heads():
    heads = VectorQuantize(DIM, CODES, codebook_dim=DIM // GROUPS, heads=GROUPS, separate_codebook_per_head=True)
    vq = make()
    vq.load_state_dict(heads.state_dict())
    x = data(2, 9, DIM)
    assert torch.equal(vq.eval()(x)[1], heads.eval()(x)[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": 5}, "groups must be at least 1 and divide dim=12, got 5"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"heads": 2}, "heads is given by groups, got 2"),
        ({"separate_codebook_per_head": True}, "separate_codebook_per_head is given by groups"),
        ({"affine_param": True}, "affine_param is not implemented"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)

"""Chaining, permuting, reshaping: layers that only move elements."""

import pytest
import torch

from pygen import nn


def test_permutation_reorders_and_restores_along_its_dimension():
    x = torch.randn(3, 5, 4)
    for dim, n in ((1, 5), (2, 4), (-1, 4)):
        layer = nn.Permutation.random(n, dim, generator=torch.Generator().manual_seed(0))
        z, log_det = layer(x)
        assert not torch.equal(z, x) and torch.equal(log_det, torch.zeros(3))
        assert torch.equal(z.sort(dim).values, x.sort(dim).values)
        assert torch.equal(layer.inverse(z)[0], x)
    assert torch.equal(nn.Permutation.reverse(5)(x)[0], x.flip(1))


def test_random_permutation_is_saved_with_the_model():
    first, second = nn.Permutation.random(64), nn.Permutation.random(64)
    assert not torch.equal(first.indices, second.indices)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(first(x)[0], second(x)[0])


@pytest.mark.parametrize("indices", ([0, 0, 1], [1, 2, 3], [[0, 1]]))
def test_permutation_refuses_what_is_none(indices):
    with pytest.raises(ValueError, match="must be a permutation of 0"):
        nn.Permutation(torch.tensor(indices))


def test_reshape_goes_there_and_back():
    layer = nn.Reshape((2, 3), (6,))
    x = torch.randn(4, 2, 3)
    z, log_det = layer(x)
    assert torch.equal(z, x.flatten(1)) and torch.equal(layer.inverse(z)[0], x) and log_det.shape == (4,)
    with pytest.raises(ValueError, match="number of elements"):
        nn.Reshape((2, 3), (5,))
    with pytest.raises(ValueError, match=r"expected \(B, 2, 3\), got \(4, 3, 2\)"):
        layer(torch.randn(4, 3, 2))


def test_empty_sequential_is_the_identity():
    x = torch.randn(3, 2)
    z, log_det = nn.Sequential()(x)
    assert z is x and torch.equal(log_det, torch.zeros(3))


def test_sequential_is_a_container():
    flow = nn.Sequential(nn.Permutation.reverse(2), nn.AffineCoupling(nn.MLP(1, 2)))
    assert len(flow) == 2 and flow[0] is list(flow)[0]


def test_a_transform_without_a_direction_says_so():
    with pytest.raises(NotImplementedError, match="Transform does not define inverse"):
        nn.Transform().inverse(torch.zeros(1, 1))


def test_unknown_activation_lists_what_exists():
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu, tanh, got 'sine'"):
        nn.MLP(1, 1, activation="sine")

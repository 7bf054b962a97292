"""The layers that converted flows are made of, without the libraries that flows are converted from."""

import pytest
import torch
from torch import nn

from pygen.nn._converted import AdditiveOfFeatures, AffineOfFeatures

ACTIVE = torch.tensor([4, 0, 3])


@pytest.mark.parametrize("kind, chunks", ((AffineOfFeatures, 2), (AdditiveOfFeatures, 1)))
def test_any_features_are_transformed_and_the_conditioner_sees_the_others_alone(kind, chunks):
    torch.manual_seed(0)
    net = nn.Linear(2, chunks * len(ACTIVE)).double()
    layer = kind(net, ACTIVE, 5)
    x = torch.randn(7, 5, dtype=torch.float64)
    z, log_det = layer(x)
    parameters = net(x[:, [1, 2]])
    scale = parameters[:, :3].tanh() if chunks == 2 else torch.zeros(7, 3)
    want = x.clone()
    want[:, ACTIVE] = x[:, ACTIVE] * scale.exp() + parameters[:, -3:]
    torch.testing.assert_close(z, want)
    torch.testing.assert_close(log_det.double(), scale.sum(1).double())
    torch.testing.assert_close(layer.inverse(z)[0], x)

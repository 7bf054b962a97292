"""Right-hand sides that the tests of ODERNN share, and the counts of the competition model."""

import torch
from torch import nn

F64 = torch.float64

TIMES = [10.0, 15.0, 30.0, 36.0, 40.0, 42.0]
TABLE = torch.tensor([[165, 283], [197, 290], [280, 276], [305, 269], [318, 266], [324, 264]], dtype=F64)
TRUE = {"r": [0.1, 0.3], "a": [1e-4, 2e-4], "i": [0.002, 0.003]}
START = {"r": [0.1, 0.1], "a": [0.001, 0.001], "i": [0.001, 0.001]}


def competition(x, t, p):
    return x * (p["r"] * (1 - p["i"] * x) - p["a"] * x.flip(-1))


def oscillator(x, t, p):
    return torch.stack((x[..., 1], -(p["w"] ** 2) * x[..., 0]), -1)


def decay(x, t, p):
    return -p["k"] * x


def forced(x, t, p):
    """Nonlinear, and different at every time."""
    return torch.cat((x[:, 1:], p["mu"] * (1 - x[:, :1] ** 2) * x[:, 1:] - x[:, :1] + torch.sin(t)), 1)


def net(inputs=2, seed=0):
    torch.manual_seed(seed)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(inputs + 1, 16), nn.Tanh(), nn.Linear(16, inputs))

        def forward(self, x, t):
            return self.layers(torch.cat((x, t), 1))

    return Field()


def nn_with_time(layers):
    """layers of x alone, as a function of x and t."""

    class Autonomous(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, t):
            return self.layers(x)

    return Autonomous()

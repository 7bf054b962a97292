"""Two processes under DistributedDataParallel; fails unless weights and vectors of both stay those of one process that
averages the same gradients.

Run by test_spectral_norm.py with a folder to meet in. It forks itself: importing torch once is enough.
"""

import copy
import os
import sys
from datetime import timedelta
from functools import partial

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pygen.nn.utils.spectral_norm import spectral_norm, spectral_norm_all

LIMIT = timedelta(seconds=60)


class Critic(nn.Module):
    """With a layer that is not used where `head` is False."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)
        self.other = nn.Linear(8, 1)

    def forward(self, x, head=True):
        return self.head(self.body(x)) if head else self.body(x).sum(1)


def one_by_one(model):
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            spectral_norm(layer)
    return model


def critic(normalize, used=True):
    """The same on every process, whose generators differ."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Critic().double()
        if used:
            del model.other
        return normalize(model)


def batch(step, rank):
    """More samples on the second rank: (3 + 4 rank, 4)."""
    return torch.randn(3 + 4 * rank, 4, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def assert_same_everywhere(model):
    for name, tensor in model.state_dict().items():
        everyones = [torch.empty_like(tensor) for _ in range(2)]
        distributed.all_gather(everyones, tensor)
        assert torch.equal(*everyones), name


def loss_of(model, step, rank, options):
    """As a critic's, D(real) - D(fake): two forwards before the backward."""
    real, fake = model(batch(step, rank), **options), model(batch(step + 100, rank), **options)
    return (1 + real).relu().mean() + (1 - fake).relu().mean()


def train(rank, normalize, broadcast_buffers, **options):
    used = not options
    alone = critic(normalize, used)
    ours = copy.deepcopy(alone)
    reducing = DistributedDataParallel(ours, broadcast_buffers=broadcast_buffers, find_unused_parameters=not used)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (alone, ours)]
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(reducing, step, rank, options).backward()
        # One process computes both ranks' losses with the same weights: the vectors move once, as on each rank.
        start = copy.deepcopy(alone.state_dict())
        for r in range(2):
            for name, buffer in alone.named_buffers():
                buffer.copy_(start[name])
            (loss_of(alone, step, r, options) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_same_everywhere(ours)
        for (name, mine), theirs in zip(ours.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def main(folder: str, rank: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=LIMIT)
    torch.manual_seed(100 + rank)
    torch.set_num_threads(1)
    for broadcast_buffers in (True, False):
        train(rank, one_by_one, broadcast_buffers)
        train(rank, spectral_norm_all, broadcast_buffers)
        # A layer that is not used in a forward is no reason to wait for its gradient.
        train(rank, partial(spectral_norm_all, bound=0.5), broadcast_buffers, head=False)
    distributed.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()
    main(sys.argv[1], rank=1 if child else 0)
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

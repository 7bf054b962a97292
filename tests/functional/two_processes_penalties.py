"""A gradient penalty and a spectral penalty under DistributedDataParallel; fails unless gradients are the mean of both
processes' own.

Run by test_gradient_penalties.py with a folder to meet in. It forks itself: importing torch once is enough.
"""

import copy
import os
import sys
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pygen.functional.gradient_penalties import gradient_penalty
from pygen.functional.regularizers import SpectralPenalty
from pygen.nn.utils.spectral_norm import spectral_norm_all

LIMIT = timedelta(seconds=60)


def batch(rank):
    """(4, 3) real and (4, 3) fake, others on each process."""
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss_of(critic, penalty, rank):
    real, fake = batch(rank)
    slope = gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(10 + rank))
    return critic(fake).mean() - critic(real).mean() + 10 * slope + 0.1 * penalty(critic)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def check(rank, normalize):
    torch.manual_seed(1)  # the same weights and vectors everywhere
    critic = normalize(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    penalty = SpectralPenalty(critic)
    expected = []
    for r in range(2):
        alone = copy.deepcopy(critic)
        loss_of(alone, copy.deepcopy(penalty), r).backward()
        expected.append(gradients(alone))
    reducing = DistributedDataParallel(critic)
    loss_of(reducing, penalty, rank).backward()
    for found, first, second in zip(gradients(critic), *expected, strict=True):
        torch.testing.assert_close(found, (first + second) / 2, rtol=1e-10, atol=1e-12)


def main(folder: str, rank: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=LIMIT)
    torch.set_num_threads(1)
    check(rank, lambda critic: critic)
    check(rank, spectral_norm_all)
    distributed.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()
    main(sys.argv[1], rank=1 if child else 0)
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

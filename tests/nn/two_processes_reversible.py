"""Two processes under DistributedDataParallel; fails unless their gradient is that of the joined batch.

Run by test_reversible.py with the path of a file to meet at. It forks itself: importing torch once is enough.
"""

import copy
import os
import sys
from datetime import timedelta

import torch
from torch import distributed

from pygen import nn


def loss(flow, x):
    z, log_det = flow(x)
    return (z.square().sum(1) / 2 - log_det).mean()


def main(store: str, rank: int) -> None:
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    torch.manual_seed(0)
    layers = [nn.AffineCoupling(nn.MLP(2, 4, (8,)), swap=i % 2 == 1) for i in range(3)]
    for parameter in torch.nn.ModuleList(layers).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(10, 4, dtype=torch.float64)
    alone = nn.Sequential(*copy.deepcopy(layers)).double()
    loss(alone, x).backward()
    flow = torch.nn.parallel.DistributedDataParallel(nn.ReversibleSequential(*layers).double())
    loss(flow, x[rank::2]).backward()
    for mine, theirs in zip(flow.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    distributed.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()
    main(sys.argv[1], rank=1 if child else 0)
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

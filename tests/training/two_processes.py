"""Trains under torchrun; fails unless both processes hold the same weights at every step. Run by test_training.py."""

import os
import sys

import torch
from torch import Tensor, distributed

from pygen import data, models, training


def gathered(x: Tensor) -> list[Tensor]:
    """x of every process."""
    everyones = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyones, x.contiguous())
    return everyones


class Checked(models.RealNVP):
    steps = 0

    def loss(self, x, context=None):
        if self.training:
            self.steps += 1
            first, second = gathered(torch.cat([p.detach().flatten() for p in self.parameters()]))
            assert torch.equal(first, second), f"weights differ at step {self.steps}"
            first, second = gathered(x)
            assert not torch.equal(first, second), "both processes train on the same samples"
        return super().loss(x, context)


def main(folder: str) -> None:
    x = torch.randint(0, 4, (64, 6), generator=torch.Generator().manual_seed(0))
    dataset = data.Dataset(x[:40], x[40:53], x[53:], 4, (6,), "noise")
    for epochs in (2, 4):
        torch.manual_seed(int(os.environ["RANK"]))  # they must start from one process's weights all the same
        model = Checked((6,), levels=4, depth=2, hidden=(8,), dropout=0.2)
        torch.nn.init.normal_(next(model.parameters()))
        config = training.TrainConfig(epochs=epochs, batch_size=10, device="cpu", progress=False, learning_rate=1e-2)
        result = training.train(model, dataset, config, folder, resume=epochs > 2)
        assert (model.steps, result.steps) == (4, 2 * epochs), (model.steps, result)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

"""Trains IResNets under torchrun, dense and convolutional; fails unless both processes hold the same bits at every
step, singular vectors included, though each has its own data. Run by tests/models/test_iresnet_training.py."""

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


def assert_equal(model: models.IResNet, when: str) -> None:
    for name, tensor in model.state_dict().items():
        first, second = gathered(tensor.detach().double())
        assert torch.equal(first, second), f"{name} differs {when}"


class Checked(models.IResNet):
    losses_taken = 0

    def loss(self, x, *labels):
        if self.training:
            if self.losses_taken:  # in the first one, ActNorm has not looked at the data yet
                assert_equal(self, f"before step {self.losses_taken + 1}")
            first, second = gathered(x)
            assert not torch.equal(first, second), "both processes train on the same samples"
            self.losses_taken += 1
        return super().loss(x, *labels)


def dense() -> tuple[data.Dataset, dict]:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    return data.Dataset(x[:40], x[40:53], x[53:], None, (2,), "noise"), {"blocks": 2, "hidden": [8]}


def convolutional() -> tuple[data.Dataset, dict]:
    x = torch.randint(0, 8, (64, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    options = {"blocks": 1, "hidden": [4, 4], "log_det": "russian_roulette"}
    return data.Dataset(x[:40], x[40:53], x[53:], 8, (1, 4, 4), "noise"), options


def main(folder: str) -> None:
    for which in (dense, convolutional):
        dataset, options = which()
        torch.manual_seed(int(os.environ["RANK"]))  # they must start from one process's weights all the same
        model = Checked(**(Checked.arguments_for(dataset) | options))
        config = training.TrainConfig(epochs=2, batch_size=5, device="cpu", progress=False, learning_rate=1e-2,
                                      validate_epochs=2)  # fmt: skip
        training.train(model, dataset, config, f"{folder}/{which.__name__}")
        assert model.losses_taken == 8, model.losses_taken
        assert_equal(model, "at the end")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

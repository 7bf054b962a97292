"""Trains an SN-GAN under torchrun; fails unless both processes hold the same bits at every step, running statistics and
singular vectors included, though each has its own data and noise. Run by test_sngan_training.py."""

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


class Checked(models.SNGAN):
    turns_taken = 0

    def player_loss(self, player, x):
        if self.turns_taken % 2 == 0:  # within a step the discriminator comes first
            for name, tensor in self.state_dict().items():
                first, second = gathered(tensor.detach().double())
                assert torch.equal(first, second), f"{name} differs before turn {self.turns_taken + 1}"
            first, second = gathered(x)
            assert not torch.equal(first, second), "both processes train on the same samples"
        self.turns_taken += 1
        return super().player_loss(player, x)


def main(folder: str) -> None:
    x = torch.randint(0, 8, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    dataset = data.Dataset(x[:40], x[40:53], x[53:], 8, (1, 8, 8), "noise")
    arguments = Checked.arguments_for(dataset) | {"width": 4, "latent_dim": 4}
    for epochs in (2, 4):
        torch.manual_seed(int(os.environ["RANK"]))  # they must start from one process's weights all the same
        model = Checked(**arguments)
        started = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = training.TrainConfig(epochs=epochs, batch_size=5, device="cpu", progress=False, learning_rate=1e-2,
                                      validate_epochs=epochs, weight_decay=0.0)  # fmt: skip
        result = training.train(model, dataset, config, folder, resume=epochs > 2)
        assert (model.turns_taken, result.steps) == (16, 4 * epochs), (model.turns_taken, result)
        same = [name for name, tensor in started.items() if torch.equal(tensor, model.state_dict()[name])]
        assert all(name.startswith("discriminator.score.") for name in same), same  # one row: u is 1, v may be there
        for name, tensor in model.state_dict().items():
            first, second = gathered(tensor.detach().double())
            assert torch.equal(first, second), f"{name} differs at the end"
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

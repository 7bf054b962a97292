"""Trains a VQ-VAE under torchrun; fails unless both processes hold the same bits at every step, after one all-reduce of
the codebooks. Run by test_vqvae_training.py."""

import os
import sys

import torch
from torch import Tensor, distributed

from pygen import data, models, training

OPTIONS = {"ema": {"quantizer": "ema"}, "residual": {"quantizer": "residual", "num_quantizers": 3}}
_AGREEMENT = 2  # numbers in the loop's own all-reduce, which says when to stop


def gathered(x: Tensor) -> list[Tensor]:
    """x of every process."""
    everyones = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyones, x.contiguous())
    return everyones


class Checked(models.VQVAE):
    steps = 0
    reduced: list[int] = []

    def loss(self, x):
        if self.training:
            if self.steps:
                assert len(self.reduced) == 1, f"all-reduces of {self.reduced} numbers in step {self.steps}"
            self.check(x)
            self.steps += 1
            self.reduced.clear()
        return super().loss(x)

    def check(self, x):
        for name, tensor in self.state_dict().items():
            first, second = gathered(tensor.detach().double())
            assert torch.equal(first, second), f"{name} differs before step {self.steps + 1}"
        first, second = gathered(x)
        assert not torch.equal(first, second), "both processes train on the same samples"


def count_all_reduces(reduced: list[int]) -> None:
    """Write down the sizes of what Python code reduces; DDP's gradients do not pass here."""
    all_reduce = distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        if tensor.numel() > _AGREEMENT:
            reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted


def main(folder: str, options: str) -> None:
    count_all_reduces(Checked.reduced)
    x = torch.randint(0, 8, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    dataset = data.Dataset(x[:40], x[40:53], x[53:], 8, (1, 8, 8), "noise")
    small = {"num_hiddens": 8, "num_residual_hiddens": 4, "codebook_size": 16, "codebook_dim": 4}
    arguments = Checked.arguments_for(dataset) | small | OPTIONS[options]
    for epochs in (2, 4):
        torch.manual_seed(int(os.environ["RANK"]))  # they must start from one process's weights and codes all the same
        model = Checked(**arguments)
        started = {name: tensor.clone() for name, tensor in model.state_dict().items() if "embed" in name}
        config = training.TrainConfig(epochs=epochs, batch_size=5, device="cpu", progress=False, learning_rate=1e-2,
                                      validate_epochs=epochs)  # fmt: skip
        result = training.train(model, dataset, config, folder, resume=epochs > 2)
        assert (model.steps, result.steps) == (8, 4 * epochs), (model.steps, result)
        assert all(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in started.items())
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

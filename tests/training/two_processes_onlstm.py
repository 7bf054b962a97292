"""Trains a language model under torchrun: each process has streams of its own. Run by test_text_training.py."""

import sys
from pathlib import Path

import torch
from torch import distributed
from two_processes import gathered

from pygen import data, training
from pygen.models.onlstm import ONLSTMLanguageModel
from pygen.training import checkpoint

STREAMS, EPOCHS = 3, 2


class Checked(ONLSTMLanguageModel):
    steps = 0

    def loss(self, x):
        if self.training:
            self.steps += 1
            first, second = gathered(torch.cat([p.detach().flatten() for p in self.parameters()]))
            assert torch.equal(first, second), f"weights differ at step {self.steps}"
            everyones = torch.cat(gathered(x))
            assert len(everyones.unique(dim=0)) == 2 * STREAMS, "every stream is somewhere else in the text"
            if self.steps > 1 and self.seen is not None and self.carried:
                assert torch.equal(self.seen[:, -1], x[:, 0]), "a stream goes on where it was"
            self.seen = x
        return super().loss(x)


def main(folder: str, path: str) -> None:
    text = data.load(path, window=4)
    for epochs in range(1, EPOCHS + 1):
        torch.manual_seed(0)
        arguments = Checked.arguments_for(text) | {"embedding_size": 4, "hidden_size": 6, "chunk_size": 2}
        model = Checked(**arguments)
        model.seen = None
        config = training.TrainConfig(epochs=epochs, batch_size=STREAMS, device="cpu", progress=False)
        result = training.train(model, text, config, folder, resume=epochs > 1)
        per_epoch = len(text.train) // 2 // STREAMS
        assert (model.steps, result.steps) == (per_epoch, epochs * per_epoch), (model.steps, result)
    tensors, _ = checkpoint.load_tensors(Path(folder) / "last.safetensors")
    states = [tensors[f"carried.{rank}.0"] for rank in range(2)]
    assert states[0].shape == (STREAMS, 6) and not torch.equal(*states)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A model with vector_quantize_pytorch.VectorQuantize, and the same with pygen's: equal results, and the times of both.

    python examples/swap_vector_quantize.py

One line changes: which `VectorQuantize` the model is given. Its arguments, its return values and its state_dict stay.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.nn.vector_quantize import VectorQuantize

WARM_UP = 2  # rounds


class Autoencoder(nn.Module):
    """x: (B, N, features) -> a scalar loss, with codes in between."""

    def __init__(self, quantizer: Callable[..., nn.Module], features: int, dim: int, codes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(features, dim), nn.Linear(dim, features)
        self.quantizer = quantizer(dim=dim, codebook_size=codes, decay=0.99, commitment_weight=0.25)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, indices, commitment = self.quantizer(self.encoder(x))
        return F.mse_loss(self.decoder(quantized), x) + commitment, indices


def training_step(model: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Forward, backward and the codebook's update; the optimizer does not know who computed the gradients."""
    loss, indices = model(x)
    return loss.detach(), indices, list(torch.autograd.grad(loss, list(model.parameters())))


def compare(after: Autoencoder, before: Autoencoder, x: Tensor) -> str:
    """Fail unless a training step of both gives the same loss, codes, gradients and codebook.

    Two codes may be equally near up to float32's rounding, and then it is the peer that is free to choose: such
    vectors are counted, and only a few are taken for that.
    """
    loss, indices, gradients = training_step(after, x)
    peer_loss, peer_indices, peer_gradients = training_step(before, x)
    different = (indices != peer_indices).sum().item()
    assert different <= 1e-4 * indices.numel(), f"{different} of {indices.numel()} vectors chose another code"
    exactly = {"rtol": 1e-4, "atol": 1e-5} if not different else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(loss, peer_loss, **exactly)
    for ours, theirs in zip(gradients, peer_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **exactly)
    for name, state in after.state_dict().items():
        torch.testing.assert_close(state, before.state_dict()[name], **exactly)
    return f"same loss {loss.item():.4f}, gradients and codebook; {different} of {indices.numel()} codes differ"


def median_milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The calls take turns, so that a busy moment of the machine hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + WARM_UP):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= WARM_UP:
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) * 1e3 for name, seconds in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="vectors of a sample")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    try:
        from vector_quantize_pytorch import VectorQuantize as PeerVectorQuantize
    except ImportError as error:
        print(f"nothing to compare with: pip install vector-quantize-pytorch ({error})")
        return

    torch.manual_seed(0)
    sizes = (options.features, options.dim, options.codes)
    before = Autoencoder(PeerVectorQuantize, *sizes)
    after = Autoencoder(VectorQuantize, *sizes)  # the line that changes
    after.load_state_dict(before.state_dict())
    x = torch.randn(options.batch, options.length, options.features)
    print(compare(copy.deepcopy(after), copy.deepcopy(before), x))

    print(
        f"{options.batch * options.length} vectors, {options.codes} codes of {options.dim}, "
        f"{torch.get_num_threads()} threads"
    )
    steps = {"before": lambda: training_step(before, x), "after": lambda: training_step(after, x)}
    times = median_milliseconds(steps, options.rounds)
    ratio = times["before"] / times["after"]
    print(f"  training step   before {times['before']:7.2f} ms   after {times['after']:7.2f} ms   {ratio:.2f}x as fast")


if __name__ == "__main__":
    main()

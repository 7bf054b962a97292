"""An eager RealNVP, and the same model with its coupling computed by pygen: same result, shorter training step.

    python examples/swap_affine_coupling.py

`EagerCoupling` is what one finds in model code. `FusedCoupling` replaces its four lines of arithmetic by one call.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from pygen import ops


class EagerCoupling(nn.Module):
    """x: (B, D) -> (z: (B, D), log_det: (B,)); the first half scales and shifts the second."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.conditioner = nn.Sequential(nn.Linear(size // 2, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        passive, active = x.chunk(2, 1)
        scale, shift = self.conditioner(passive).chunk(2, 1)
        active, log_det = self.couple(active, scale, shift)
        return torch.cat((active, passive), 1), log_det  # exchanged, so that the next layer transforms the other half

    def couple(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        log_s = scale.tanh()
        y = x * log_s.exp() + shift
        log_det = log_s.sum(1)
        return y, log_det


class FusedCoupling(EagerCoupling):
    def couple(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(x, scale, shift, scale_map="tanh")


class Flow(nn.Module):
    def __init__(self, coupling: type[EagerCoupling], size: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(coupling(size, hidden) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The negative log-likelihood under N(0, 1), a scalar; the normalising constant is left out."""
        log_det = x.new_zeros(len(x))
        for layer in self.layers:
            x, step = layer(x)
            log_det = log_det + step
        return (0.5 * x.square().sum(1) - log_det).mean()


def median_seconds(models: dict[str, Flow], x: Tensor, rounds: int) -> dict[str, float]:
    """Of one forward and backward pass. The models take turns, so that a busy moment hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 3):
        for name, model in models.items():
            start = time.perf_counter()
            model(x).backward()
            if round_ >= 3:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in seconds.items()}


def gradients(model: Flow, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x), list(model.parameters())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--size", type=int, default=64, help="dimensions of a sample, even")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()

    torch.manual_seed(0)
    shape = (options.size, options.depth, options.hidden)
    before, after = Flow(EagerCoupling, *shape), Flow(FusedCoupling, *shape)
    after.load_state_dict(before.state_dict())
    x = torch.randn(options.batch, options.size)

    torch.testing.assert_close(after(x), before(x))
    for ours, theirs in zip(gradients(after, x), gradients(before, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    print(f"same loss and gradients: {before(x).item():.4f}")

    seconds = median_seconds({"before": before, "after": after}, x, options.rounds)
    threads = torch.get_num_threads()
    print(f"forward + backward, batch {options.batch}, {options.depth} couplings of {options.size}, {threads} threads")
    for name, value in seconds.items():
        print(f"  {name:<7}{value * 1e3:8.2f} ms")
    print(f"  speed-up {seconds['before'] / seconds['after']:.2f}x")


if __name__ == "__main__":
    main()

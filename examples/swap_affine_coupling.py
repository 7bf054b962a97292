"""An eager RealNVP beside the same model with its coupling computed by pygen: same result, and the times of both.

    python examples/swap_affine_coupling.py

`EagerCoupling` is what one finds in model code. `FusedCoupling` replaces its arithmetic by one call.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pygen import ops

WARM_UP = 3  # rounds


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


def training_step(model: Flow, x: Tensor) -> Callable[[], object]:
    """Forward and backward pass; the optimizer does not know which coupling it trains."""
    return lambda: gradients(model, x)


def couplings_alone(model: Flow, x: Tensor) -> Callable[[], object]:
    """What is exchanged, without the networks around it: each layer's arithmetic on views as the layers make them."""
    x = x.detach().requires_grad_()
    parameters = torch.randn_like(x).requires_grad_()
    grad_y, grad_log_det = torch.randn_like(x[:, : x.size(1) // 2]), torch.randn_like(x[:, 0])

    def all_layers() -> None:
        for layer in model.layers:
            outputs = layer.couple(x.chunk(2, 1)[1], *parameters.chunk(2, 1))
            torch.autograd.grad(outputs, (x, parameters), (grad_y, grad_log_det))

    return all_layers


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

    threads = torch.get_num_threads()
    print(f"batch {options.batch}, {options.depth} couplings of {options.size} dimensions, {threads} threads")
    for name, work in (("training step", training_step), ("its couplings alone", couplings_alone)):
        times = median_milliseconds({"before": work(before, x), "after": work(after, x)}, options.rounds)
        ratio = times["before"] / times["after"]
        print(f"  {name:<20} before {times['before']:7.2f} ms   after {times['after']:7.2f} ms   {ratio:.2f}x as fast")


if __name__ == "__main__":
    main()

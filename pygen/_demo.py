"""`pygen demo`: RealNVP and Glow on real digits, a minute each, next to two baselines; and what fused kernels save."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pygen import _plots, backends, data, models, training
from pygen.models.baselines import FullGaussian, PixelHistogram

SAMPLES, TEMPERATURE = 64, 0.7
INTERPOLATIONS, INTERPOLATION_STEPS = 8, 10
TIMED_STEPS, TIMED_ROUNDS = 5, 15

# 1,347 training images are few. What keeps flows of this size from learning them by heart is dropout first (without it
# RealNVP's validation ends 1.5 bits/dim above its best), then choosing the best averaged weights by validation.
FLOWS: dict[str, tuple[Callable[..., models.Flow], dict[str, Any]]] = {
    "RealNVP": (models.RealNVP, {"alpha": 0.01, "depth": 8, "hidden": (128, 128), "dropout": 0.3}),
    "Glow": (models.Glow, {"alpha": 0.01, "steps": 4, "hidden": (32,), "dropout": 0.1}),
}


def _settings(minutes: float, seed: int) -> training.TrainConfig:
    return training.TrainConfig(
        epochs=None,
        max_minutes=minutes,
        seed=seed,
        device="cpu",
        learning_rate=5e-3,
        weight_decay=1e-2,
        ema=0.995,
        validation_draws=2,
    )


def run(console: Console, *, minutes: float, out: Path, seed: int) -> bool:
    """Show doctor, train, compare, draw, time, and write the pictures into `out`.

    Args:
        minutes: of training, for each flow.

    Returns:
        True when Ctrl-C ended a training; the checkpoint is kept and the rest is skipped.
    """
    settings = _settings(minutes, seed)  # first, to complain about them before anything is printed
    console.print(backends.report(), markup=False, highlight=False, soft_wrap=True)
    digits = data.load("digits")
    run_dir = _next_run(out)
    console.print(
        f"\n{' and '.join(FLOWS)} on scikit-learn's digits: {len(digits.train)} images to train on, "
        f"{len(digits.valid)} to choose the best weights by, {len(digits.test)} to test on; {minutes:g} min "
        "of training for each",
        highlight=False,
    )
    # The layers are small: measured on two busy cores, a step takes 27 ms with one thread and 45 to 270 with two.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flows: dict[str, models.Flow] = {}
        for title, (kind, arguments) in FLOWS.items():
            console.print(f"\n{title}", highlight=False)
            torch.manual_seed(seed)
            flow = flows[title] = kind(digits.shape, levels=digits.levels, **arguments)
            run = run_dir / flow.name
            if training.train(flow, digits, settings, run).interrupted:
                console.print(f"interrupted; continue with: pygen train --resume {run}", highlight=False)
                return True
        _compare(console, flows, digits)
        _draw(flows["Glow"], digits, out, seed)
        times = _time_kernels(flows["RealNVP"], digits.train[: settings.batch_size])
    finally:
        torch.set_num_threads(threads)
    _show_times(console, times)
    _plots.save_times(out / "bench.png", times, "RealNVP on digits, one CPU thread")
    glow = run_dir / flows["Glow"].name
    console.print(
        f"\nsamples of Glow: {out / 'samples.png'} (temperature {TEMPERATURE})\n"
        f"interpolations:  {out / 'interpolations.png'}\n"
        f"times:           {out / 'bench.png'}\n"
        f"the runs:        {run_dir} (pygen sample {glow} draws more, with --interpolate 8 in between)",
        highlight=False,
        soft_wrap=True,
    )
    return False


def _next_run(out: Path) -> Path:
    """A folder for this run: demos do not overwrite each other's weights."""
    number = 1
    while (out / f"run-{number}").exists():
        number += 1
    return out / f"run-{number}"


def _compare(console: Console, flows: Mapping[str, models.Flow], digits: data.Dataset) -> None:
    """Print test bits per dimension of the baselines and the flows, all of the same images on the same scale."""
    assert digits.levels is not None
    baselines = {
        "Gaussian, full covariance": FullGaussian(digits.train).bits_per_dim(digits.test).mean().item(),
        "histogram of every pixel": PixelHistogram(digits.train, digits.levels).bits_per_dim(digits.test).mean().item(),
    }
    bits = {name: training.evaluate(flow, digits.test, draws=20) for name, flow in flows.items()}
    table = Table("density", "test bits/dim", title="lower is better")
    for name, value in (baselines | bits).items():
        table.add_row(name, f"{value:.3f}", style="bold" if name in flows else None)
    console.print(table)
    for name, value in bits.items():
        if value >= min(baselines.values()):
            console.print(f"{name} does not beat the baselines: it trained too briefly. Try a larger --minutes.")


def _draw(flow: models.Flow, digits: data.Dataset, out: Path, seed: int) -> None:
    """Samples beside real digits, and what lies between pairs of them."""
    samples = flow.sample(SAMPLES, temperature=TEMPERATURE, generator=torch.Generator().manual_seed(seed))
    _plots.save_samples(
        out / "samples.png", samples, digits.levels, beside=digits.test[:SAMPLES], title="samples of Glow"
    )
    first, second = digits.test[: 2 * INTERPOLATIONS].chunk(2)
    between = flow.interpolate(first, second, INTERPOLATION_STEPS)
    _plots.save_interpolations(out / "interpolations.png", between, digits.levels)


def _training_step(model: models.Flow, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # timed, and nothing learned

    def step() -> None:
        model.loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _couplings(model: models.Flow, batch: int) -> Callable[[], None]:
    """The model's coupling ops alone, forward and backward, on tensors of the shapes they have in it."""
    from pygen import ops

    size = model.latent_shape[0]
    # The second half of a wider tensor and two halves of one tensor: the strided views that the layers pass.
    x = torch.randn(batch, size, requires_grad=True)
    parameters = torch.randn(batch, 2 * (size // 2), requires_grad=True)
    grad_y = torch.randn(batch, size // 2)
    grad_log_det = torch.randn(batch)

    def all_couplings() -> None:
        for _ in range(model.config["depth"]):
            scale, shift = parameters.chunk(2, 1)
            y, log_det = ops.affine_coupling(x[:, size - size // 2 :], scale, shift, scale_map="tanh")
            torch.autograd.grad((y, log_det), (x, parameters), (grad_y, grad_log_det))

    return all_couplings


def _time_kernels(model: models.Flow, x: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step, and of the coupling ops in it, with the reference and with the fused kernels."""
    model.train()
    work = {"a training step": _training_step(model, x), "the coupling ops in it": _couplings(model, len(x))}
    times = {name: _interleaved(function) for name, function in work.items()}
    model.eval()
    return times


def _interleaved(function: Callable[[], None]) -> dict[str, float]:
    """Median milliseconds with either kernel, taken in turn, so that a busy machine disturbs both alike."""
    measured: dict[str, list[float]] = {"reference": [], "fused": []}
    for round_ in range(TIMED_ROUNDS + 1):
        for kernels, samples in measured.items():
            with backends.use_kernels("reference") if kernels == "reference" else contextlib.nullcontext():
                start = time.perf_counter()
                for _ in range(TIMED_STEPS):
                    function()
                if round_ > 0:  # the first round warms up
                    samples.append((time.perf_counter() - start) * 1e3 / TIMED_STEPS)
    return {kernels: statistics.median(samples) for kernels, samples in measured.items()}


def _show_times(console: Console, times: dict[str, dict[str, float]]) -> None:
    table = Table("milliseconds, 1 thread", "plain PyTorch", "fused", "speed-up", title="the same model, two kernels")
    for name, pair in times.items():
        reference, fused = pair["reference"], pair["fused"]
        table.add_row(name, f"{reference:.2f}", f"{fused:.2f}", f"{reference / fused:.2f}x")
    console.print(table)

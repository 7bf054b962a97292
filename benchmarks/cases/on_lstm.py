"""A layer of ON-LSTM against the loop over its published cell, and nn.LSTM of the same sizes beside them.

nn.LSTM is the yardstick of the targets: it has 4 H gates where ON-LSTM has 4 H + 2 H / C, and no cumax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pygen.benchmarks.registry import COMPILED, EAGER, OURS, Call, Case, Factory, Floor, Inputs, Target, register
from pygen.nn.on_lstm import ONLSTM

LSTM = "nn.LSTM"
# Where the targets of two cores hold; a GPU has its own.
CPU = ("default", "avx2", "avx512", "avx512_vnni", "amx")

# gates of the inputs, hidden state, cell state, recurrent weight -> hidden state, cell state
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _published_step(chunk: int) -> Step:
    """The cell in eager operations, with the recurrent product."""

    def step(x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        gates = x + h @ weight.T
        n = c.shape[1] // chunk
        to_write, to_keep = gates[:, : 2 * n].chunk(2, 1)
        out, candidate, write, keep = gates[:, 2 * n :].reshape(-1, 4 * n, chunk).chunk(4, 1)
        to_write = 1 - to_write.softmax(-1).cumsum(-1).unsqueeze(-1)
        to_keep = to_keep.softmax(-1).cumsum(-1).unsqueeze(-1)
        overlap = to_keep * to_write
        keep = keep.sigmoid() * overlap + (to_keep - overlap)
        write = write.sigmoid() * overlap + (to_write - overlap)
        new = keep * c.view(-1, n, chunk) + write * candidate.tanh()
        return (out.sigmoid() * new.tanh()).flatten(1), new.flatten(1)

    return step


def _loop(step: Step) -> Callable[..., Tensor]:
    """One product for the inputs of all steps, then step by step."""

    def run(x: Tensor, ih: Tensor, ih_bias: Tensor, hh: Tensor, hh_bias: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], hh.shape[1])
        outputs = []
        for gates in nn.functional.linear(x, ih, ih_bias + hh_bias).unbind():
            h, c = step(gates, h, c, hh)
            outputs.append(h)
        return torch.stack(outputs)

    return run


def _differentiated(run: Callable[[], Tensor], leaves: list[Tensor], grads: tuple[Tensor, ...]) -> Call:
    """The output and, with an incoming gradient, those of `leaves`: the input and all weights."""

    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return (run(),)

    def forward_backward() -> tuple[Tensor, ...]:
        output = run()
        return output.detach(), *torch.autograd.grad(output, leaves, grads)

    return forward_backward if grads else forward


def _published(chunk: int, *, compile: bool = False) -> Factory:
    """The loop; compiled, it calls one compiled step: unrolled over 70 of them, a graph compiles for minutes."""

    def factory(inputs: Inputs) -> Call:
        step = _published_step(chunk)
        run = _loop(torch.compile(step, dynamic=False) if compile else step)
        return _differentiated(lambda: run(*inputs.tensors), list(inputs.tensors), inputs.grads)

    return factory


def _module(build: Callable[[], nn.Module], *, weights: bool) -> Factory:
    """`build()`, with the weights of the inputs or with its own."""

    def factory(inputs: Inputs) -> Call:
        x, *values = inputs.tensors
        module = build().to(x)
        if weights:
            with torch.no_grad():
                for parameter, value in zip(module.parameters(), values, strict=True):
                    parameter.copy_(value)
        return _differentiated(lambda: module(x)[0], [x, *module.parameters()], inputs.grads)

    return factory


def _case(
    steps: int, batch: int, inputs: int, hidden: int, chunk: int, *targets: Target, backward: bool = False
) -> Case:
    width = 4 * hidden + 2 * (hidden // chunk)
    shape = (steps, batch, inputs)

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def uniform(*size: int) -> Tensor:
            return (2 * torch.rand(size, device=device, generator=generator) - 1) / hidden**0.5

        x = torch.randn(shape, device=device, generator=generator)
        weights = uniform(width, inputs), uniform(width), uniform(width, hidden), uniform(width)
        grad = torch.randn((steps, batch, hidden), device=device, generator=generator)
        return Inputs((x, *weights), (grad,) if backward else ())

    return Case(
        op="on_lstm",
        name=f"T{steps} B{batch} I{inputs} H{hidden} C{chunk} {'forward+backward' if backward else 'forward'}",
        shape=shape,
        make=make,
        implementations={
            OURS: _module(lambda: ONLSTM(inputs, hidden, chunk_size=chunk), weights=True),
            EAGER: _published(chunk),
            COMPILED: _published(chunk, compile=True),
        },
        yardsticks={LSTM: _module(lambda: nn.LSTM(inputs, hidden), weights=False)},
        reference=_published(chunk),
        # The products of inputs and of hidden states with their weights; backward, each is two.
        floor=Floor(flops=(3 if backward else 1) * 2 * steps * batch * width * (inputs + hidden)),
        targets=targets,
    )


def _layer(*sizes: int, at_most: float) -> list[Case]:
    """Both directions of a layer; nobody specified the forward pass alone."""
    targets = (
        Target(LSTM, at_most=at_most, on=CPU),
        Target(LSTM, at_most=1.5, on=("cuda",)),
        Target(EAGER, at_least=5, on=("cuda",)),
    )
    return [_case(*sizes, *targets, backward=True), _case(*sizes)]


register(
    *_layer(70, 20, 400, 1150, 10, at_most=1.15),
    *_layer(35, 32, 128, 256, 16, at_most=1.3),
    *_layer(100, 64, 128, 128, 8, at_most=1.3),
)

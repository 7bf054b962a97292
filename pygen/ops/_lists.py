"""Lists of tensors in an operator's arguments and results: torch.autograd.Function sees only the tensors that are
arguments themselves. Used by `_operator`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A value's place in the flat sequence: the length of a list, or -1 for the value itself.
Layout = tuple[int, ...]


def flatten(values: Sequence[Any]) -> tuple[Layout, list[Any]]:
    """The values with the lists of tensors among them opened (a list of numbers is one value)."""
    layout, flat = [], []
    for value in values:
        if isinstance(value, list) and all(x is None or isinstance(x, Tensor) for x in value):
            layout.append(len(value))
            flat += value
        else:
            layout.append(-1)
            flat.append(value)
    return tuple(layout), flat


def unflatten(layout: Layout, flat: Sequence[Any]) -> list[Any]:
    values, at = [], 0
    for length in layout:
        values.append(flat[at] if length < 0 else list(flat[at : at + length]))
        at += abs(length)
    return values


def _padded(layout: Layout, values: Sequence[Any]) -> list[Any]:
    """`unflatten`'s reverse for gradients and batch dimensions: a None for a list is a None for each of its tensors."""
    flat: list[Any] = []
    for length, value in zip(layout, values, strict=True):
        if length < 0:
            flat.append(value)
        else:
            flat += [None] * length if value is None else value
    return flat


class _Results:
    """Tells the caller of a Function how its flat results are laid out; an object, which torch.func leaves alone."""

    layout: Layout
    single: bool  # one result, not a tuple

    def flatten(self, output: Any) -> list[Any]:
        self.single = not isinstance(output, tuple)
        self.layout, flat = flatten((output,) if self.single else output)
        return flat

    def unflatten(self, flat: Sequence[Any]) -> Any:
        structured = unflatten(self.layout, flat)
        return structured[0] if self.single else tuple(structured)


def functions(name: str, compute: Callable[..., Any], rules: Any) -> tuple[Any, Any]:
    """(eager, transformable) as in `_operator._functions`; both take a layout first and return flat tuples.

    The layout of the results goes to the caller through their second argument.
    """

    def forward(layout, results, *flat):
        return tuple(results.flatten(compute(*unflatten(layout, flat))))

    def setup_context(ctx, inputs, output):
        layout, results, *flat = inputs
        ctx.layout, ctx.out_layout = layout, results.layout
        rules.setup_context(ctx, tuple(unflatten(layout, flat)), results.unflatten(output))

    def eager_forward(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def backward(ctx, *grads):
        found = rules.backward(ctx, *unflatten(ctx.out_layout, grads))
        return (None, None, *_padded(ctx.layout, found))

    def vmap(info, in_dims, layout, results, *flat):
        output, dims = rules.vmap(info, unflatten(layout, in_dims[2:]), *unflatten(layout, flat))
        flat_output = tuple(results.flatten(output))
        return flat_output, tuple(_padded(results.layout, (dims,) if results.single else dims))

    base = (torch.autograd.Function,)
    plain = {"forward": staticmethod(eager_forward), "backward": staticmethod(backward)}
    transformable = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "vmap": staticmethod(vmap),
    }
    return type(f"{name}_function", base, plain), type(f"{name}_transformable", base, transformable)


def applied(function: Any) -> Callable[..., Any]:
    """`function.apply` for arguments and results with lists."""

    def apply(*args):
        layout, flat = flatten(args)
        results = _Results()
        return results.unflatten(function.apply(layout, results, *flat))

    return apply

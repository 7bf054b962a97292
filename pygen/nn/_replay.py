"""What the backward of `ReversibleSequential` is made of: running single steps again, and measuring the error."""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pygen.nn.transform import Retraced, Transform, trace, zero_log_det
from pygen.reference._dtypes import compute_dtype, widen

if TYPE_CHECKING:
    from pygen.nn.reversible import ReversibleSequential

# The largest error, relative to the root mean square of a step's input, with which that input may be found again:
# what a round trip through 32 layers is held to. docs/reversible.md has what flows really drift by.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Replay:
    """One forward pass, and what it takes to run each of its steps again exactly as it ran.

    Random numbers, autocast and parameters are put back as they were; what the steps' inputs were is recorded as one
    number per sample, a projection, against which the inputs found again are compared.
    """

    def __init__(self, flow: "ReversibleSequential", x: Tensor) -> None:
        self.flow = flow
        self.steps = flow.steps
        self.devices = [kind for kind in dict.fromkeys(("cpu", x.device.type)) if torch.amp.is_autocast_available(kind)]
        self.autocast_state = self._current_autocast()
        low = any(enabled for enabled, _ in self.autocast_state.values())
        if x.dtype not in TOLERANCES:
            raise TypeError(f"ReversibleSequential: x must be floating point, got {x.dtype}")
        default = TOLERANCES[torch.bfloat16 if low else x.dtype]
        self.tolerance = default if flow.tolerance is None else flow.tolerance
        accelerator = getattr(torch, x.device.type, None)  # the CPU and the meta device have no index
        of_devices = () if x.device.index is None else getattr(accelerator, "default_generators", ())
        self.generators = [torch.default_generator, *of_devices[x.device.index :][:1]]
        self.random: list[list[Tensor] | None] = []  # of every step, if it drew: the generators' states before
        self.prints: list[Tensor] = []  # projections of every step's input and of z, (B,) each
        self._directions: dict[int, Tensor] = {}
        self._collect_parameters()

    # ---- the first time ----

    def run(self, x: Tensor, context: Tensor | None, keep: Collection[int], check: bool) -> tuple[Tensor, Tensor, dict]:
        """z, log_det and the inputs of the steps in `keep`."""
        log_det = zero_log_det(x)
        kept = {}
        states = [generator.get_state() for generator in self.generators]
        with self.autocast():
            for k, step in enumerate(self.steps):
                if k in keep:
                    kept[k] = x
                if check:
                    self.prints.append(self._project(x))
                x, of_step = step(x, context)
                log_det = log_det + of_step
                before, states = states, [generator.get_state() for generator in self.generators]
                drew = not all(map(torch.equal, before, states))
                self.random.append(before if drew else None)
        if check:
            self.prints.append(self._project(x))
        # Only now: a data-dependent initialisation writes parameters in its first forward.
        self._versions = [parameter._version for parameter in self.parameters]
        return x, log_det, kept

    def _collect_parameters(self) -> None:
        """`parameters`: those that require a gradient, each once. `slots`: where each step's modules have them."""
        self.parameters: list[Tensor] = []
        self.slots: list[list[tuple[nn.Module, str, int]]] = []
        index_of: dict[int, int] = {}
        for step in self.steps:
            self.slots.append([])
            for module in step.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter.requires_grad:
                        if id(parameter) not in index_of:
                            index_of[id(parameter)] = len(self.parameters)
                            self.parameters.append(parameter)
                        self.slots[-1].append((module, name, index_of[id(parameter)]))

    # ---- again ----

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """Around everything that runs steps again: afterwards the world is as it was before."""
        changed = [i for i, p in enumerate(self.parameters) if p._version != self._versions[i]]
        if changed:
            raise RuntimeError(
                f"ReversibleSequential: a parameter of shape {tuple(self.parameters[changed[0]].shape)} was modified "
                "between forward and backward (by an optimizer step?), so the forward cannot be repeated"
            )
        # They update their running statistics in every forward; the second run of the same batch must not count.
        norms = [m for m in self.flow.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        norms = [norm for norm in norms if norm.track_running_stats]
        states = [generator.get_state() for generator in self.generators] if any(self.random) else []
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True
            for generator, state in zip(self.generators, states, strict=False):
                generator.set_state(state)

    @contextlib.contextmanager
    def step(self, k: int, wanted: Sequence[bool] = ()) -> Iterator[dict[int, Tensor]]:
        """Step k as it was; yields the aliases of its parameters by index, leaves of a graph where wanted.

        Aliases, because gradients with respect to the parameters themselves would run the hooks on them, and they run
        when the gradients reach the parameters. And because `torch.func.functional_call` may have put others there.
        """
        self.seed(k)
        aliases: dict[int, Tensor] = {}
        present = []
        for module, name, i in self.slots[k]:
            if i not in aliases:
                aliases[i] = nn.Parameter(self.parameters[i].detach(), bool(wanted) and wanted[i])
            present.append((module, name, module._parameters[name]))
            _put(module, name, aliases[i])
        try:
            yield aliases
        finally:
            for module, name, tensor in present:
                _put(module, name, tensor)

    def seed(self, k: int) -> None:
        for generator, state in zip(self.generators, self.random[k] or (), strict=False):
            generator.set_state(state)

    def _current_autocast(self) -> dict[str, tuple[bool, torch.dtype]]:
        return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self.devices}

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The forward's autocast, without its cache: that would hand weights cast under no_grad to whoever is next."""
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast_state.items():
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield

    def retrace(self, k: int, z: Tensor, x: Tensor | None, context: Tensor | None) -> Retraced:
        step = self.steps[k]
        with self.autocast():
            if x is None and self.random[k] is not None and type(step).retrace is Transform.retrace:
                x, _ = step.inverse(z, context)
                self.seed(k)  # both directions draw the same numbers
            return step.retrace(z, context) if x is None else trace(step, x, context)

    def pull_back(
        self,
        z: Tensor,
        context: Tensor | None,
        inputs: Mapping[int, Tensor],
        grad_z: Tensor | None,
        grad_log_det: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[tuple[Tensor | None, ...], float]:
        """Gradients of (x, context, *parameters) where wanted, and the largest error of what was found again.

        `inputs`: the steps' inputs that need not be found again.
        """
        of_x, of_context, *of_parameters = wanted
        grads: list[Tensor | None] = [None] * len(self.parameters)
        grad_context: Tensor | None = None
        compared = []
        # Without x and context, the steps below the last trainable one have nothing to say.
        down_to = 0
        if not (of_x or of_context):
            down_to = min(k for k, slots in enumerate(self.slots) if any(of_parameters[i] for *_, i in slots))
        for k in reversed(range(down_to, len(self.steps))):
            known = inputs.get(k)
            leaf_context = None if context is None else context.detach().requires_grad_(of_context)
            with self.step(k, of_parameters) as aliases:
                step = self.retrace(k, z, known, leaf_context)
                if self.prints:  # of a stored step the input is right, but is its forward the same function?
                    compared.append((k, *self._print(step.x)) if known is None else (k + 1, *self._print(step.z)))
                leaves = step.leaves if of_x or k > down_to else ()
                indices = [i for i in aliases if of_parameters[i]]
                sources = [*leaves, *(aliases[i] for i in indices), *([leaf_context] if of_context else [])]
                self.flow._refuse_foreign_tensors(k, step, {*step.leaves, *aliases.values(), leaf_context})
                found = _gradients(step, sources, grad_z, grad_log_det)
            of_leaves, of_aliases = found[: len(leaves)], found[len(leaves) :]
            if of_context:
                grad_context = _sum(grad_context, of_aliases[-1])
            for i, grad in zip(indices, of_aliases, strict=False):
                grads[i] = _sum(grads[i], grad)
            grad_z = step.join(of_leaves) if any(grad is not None for grad in of_leaves) else None
            z = step.x
            del step, found, of_leaves, of_aliases, sources, leaves  # the graph goes before the next one comes
        return (grad_z if of_x else None, grad_context, *grads), self._largest_error(compared)

    # ---- how far off ----

    def _project(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B,): the inner product of every sample with one fixed direction of generic entries."""
        size = x.shape[1:].numel()
        if size not in self._directions:
            random = torch.rand(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
            direction = random[0].sign() * (1 + random[1])
            direction /= direction.square().mean().sqrt()
            self._directions[size] = direction.to(x.device, compute_dtype(x.dtype))
        return (x.reshape(x.size(0), size) * self._directions[size]).sum(1)

    def _print(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The projections of x and its root mean square; its errors are put together at the end, in few kernels."""
        x = x.detach()
        return self._project(x), torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype)) / math.sqrt(len(x) or 1)

    def _largest_error(self, compared: Sequence[tuple[int, Tensor, Tensor]]) -> float:
        """Of the tensors k with the projections and norms given: the largest root mean square error of a sample.

        Relative to the norm. The projection of an error e has the expected square |e|^2.
        """
        if not compared or compared[0][1].numel() == 0:
            return 0.0
        indices, found, norms = zip(*compared, strict=True)
        errors = (torch.stack(found) - torch.stack([self.prints[k] for k in indices])).abs().amax(1)
        norm = torch.stack(norms)
        return (errors / norm.clamp_min(torch.finfo(norm.dtype).tiny)).amax().item()

    def inputs_again(self, x: Tensor, z: Tensor, context: Tensor | None) -> dict[int, Tensor]:
        """Every step's input, by another forward.

        Raises:
            RuntimeError: it is not the forward that was.
        """
        inputs = {}
        for k, step in enumerate(self.steps):
            inputs[k] = x
            with self.step(k), self.autocast():
                x, _ = step(x, context)
            before = self.prints[k + 1]
            finite = before.isfinite()
            off, scale = (self._project(x) - before)[finite], before[finite].square().mean().sqrt()
            if off.numel() and not off.abs().amax() <= self.tolerance * scale.clamp_min(_tiny(x)):
                raise RuntimeError(
                    f"ReversibleSequential: step {k} ({type(step).__name__}) computes something else when it runs "
                    "again on the same input, so its gradient is unknown; does a buffer change in every forward? Put "
                    "such a step into an nn.Sequential"
                )
        return inputs

    def drift(self, inputs: Mapping[int, Tensor], z: Tensor, context: Tensor | None, bound: float) -> list[float]:
        """The error of every step's input, found again from z, or from the next input whose error was above `bound`.

        Samples that are not finite do not count: no invertible function can do better.
        """
        finite = torch.stack([x.flatten(1).isfinite().all(1) for x in (*inputs.values(), z)]).all(0)
        errors = [0.0] * len(self.steps)
        for k in reversed(range(len(self.steps))):
            if has_inverse(self.steps[k]):
                with self.step(k), self.autocast():
                    z, _ = self.steps[k].inverse(z, context)
                errors[k] = _relative_error(z[finite], inputs[k][finite])
            else:
                errors[k] = math.inf
            if not errors[k] <= bound:
                z = inputs[k]
        return errors


def _put(module: nn.Module, name: str, tensor: Any) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__ or not isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        setattr(module, name, tensor)  # an RNN keeps a list of its weights as well


def has_inverse(step: Transform) -> bool:
    return type(step).inverse is not Transform.inverse


def _tiny(x: Tensor) -> float:
    return torch.finfo(compute_dtype(x.dtype)).tiny


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return grad if total is None else total if grad is None else total + grad


def _gradients(
    step: Retraced, sources: Sequence[Any], grad_z: Tensor | None, grad_log_det: Tensor | None
) -> tuple[Tensor | None, ...]:
    pairs = [
        (output, grad)
        for output, grad in ((step.z, grad_z), (step.log_det, grad_log_det))
        if grad is not None and output.requires_grad
    ]
    if not pairs or not sources:
        return (None,) * len(sources)
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, sources, grads, allow_unused=True)


def _relative_error(found: Tensor, x: Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    found, x = widen(found).flatten(1), widen(x).flatten(1)
    scale = x.square().mean().sqrt().clamp_min(_tiny(x))
    return ((found - x).square().mean(1).amax().sqrt() / scale).item()

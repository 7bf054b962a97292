"""Files of a run, each written whole or not at all: `last.safetensors` to resume from, `best.safetensors` to use."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygen.models.model import Model

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save as _serialize
except ImportError as error:
    raise ImportError("pygen.training needs accelerate and safetensors: pip install 'pygen[train]'") from error

LAST, BEST, CONFIG, METRICS = "last.safetensors", "best.safetensors", "config.json", "metrics.csv"


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name and rename, so that `path` is the old file or the new one and never half of one.

    Raises:
        OSError: with a sentence that says what could not be written and that the old file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = "no space left on the device" if error.errno == errno.ENOSPC else error.strerror
        kept = "; the previous file is unchanged" if path.exists() else ""
        raise OSError(error.errno, f"could not write {path} ({len(content) / 1e6:.1f} MB): {reason}{kept}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and a dict of JSON types to one safetensors file, atomically."""
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    write_atomically(path, _serialize(plain, {"pygen": json.dumps(info)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: (tensors on the CPU, info).

    Raises:
        ValueError: the file is missing, damaged, or not one of pygen's.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}")
    try:
        with safe_open(str(path), "pt") as file:
            info = (file.metadata() or {})["pygen"]
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(info)  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable pygen checkpoint ({type(error).__name__}: {error})") from error


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors; Adam's moments and step counts."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; the settings (learning rate, ...) stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_model(run: str | Path, *, which: str = "best", device: str | torch.device = "cpu") -> Model:
    """The model of a run, built from its saved config, with its weights, in eval mode.

    Args:
        run: a run's folder, or one of its `.safetensors` files.
        which: "best" (averaged weights of the lowest validation loss) or "last" (averaged weights at the end).
        device: where to put it.

    Raises:
        ValueError: the folder holds no run, or its checkpoint is damaged.

    Example:
        >>> from pygen import training
        >>> model = training.load_model("runs/digits")  # doctest: +SKIP
        >>> model.sample(4)  # doctest: +SKIP
    """
    from pygen import models

    path = Path(run)
    if path.suffix != ".safetensors":
        path = path / {"best": BEST, "last": LAST}[which]
        if not path.is_file():
            raise ValueError(f"{run} holds no trained model ({path.name} is missing); `pygen train` makes one")
    tensors, info = load_tensors(path)
    model = models.create(info["model"], info["config"])
    model.load_state_dict(without_prefix("ema.", tensors))
    return model.to(device).eval()

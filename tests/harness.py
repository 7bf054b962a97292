"""Which kernels a test session can run, and how to run on one; the fixtures are in conftest.py."""

import contextlib
import os

import torch

from pygen import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    levels = [f"cpu-{level}" for level in backends.cpu_capabilities()]
    return ["reference", *levels, *(["cuda"] if torch.cuda.is_available() else [])]


@contextlib.contextmanager
def running_on(backend: str):
    """Compute on `backend`; yields the device that tensors belong on."""
    if backend == "cuda":
        yield torch.device("cuda")
    elif backend in ("reference", "triton"):
        with backends.use_kernels(backend):
            yield torch.device("cpu")
    else:
        with backends.cpu_capability(backend.removeprefix("cpu-")):
            yield torch.device("cpu")

"""Which kernels a test session can run, and how to run on one; the fixtures are in conftest.py."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from pygen import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Levels above these have kernels of their own for the search of codebooks alone; all other ops run "avx512" there.
ORDINARY_LEVELS = ("default", "avx2", "avx512")


def search_backends() -> list[str]:
    """All kernels: those that the search of codebooks tells apart."""
    if INTERPRETED:
        return ["triton"]
    levels = [f"cpu-{level}" for level in backends.cpu_capabilities()]
    return ["reference", *levels, *(["cuda"] if torch.cuda.is_available() else [])]


def ordinary_levels() -> list[str]:
    """The levels of the CPU kernels that an ordinary op tells apart."""
    return [level for level in backends.cpu_capabilities() if level in ORDINARY_LEVELS]


def available_backends() -> list[str]:
    """The kernels that an ordinary op tells apart."""
    levels = [f"cpu-{level}" for level in ordinary_levels()]
    return [name for name in search_backends() if name in levels or not name.startswith("cpu-")]


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


def torchrun(program: Path, *words: object, processes: int = 2, seconds: int = 240) -> None:
    """Run a program in processes that know each other; fails with what they said if it does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    done = subprocess.run(
        [*command, str(program), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]

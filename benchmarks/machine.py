"""The facts of the machine and of the software that a timing depends on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import pygen
from pygen import _native


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    """The commit of this source tree, "-dirty" when tracked files differ from it; None for an installed copy."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    # An environment inside somebody else's repository must not borrow that repository's commit.
    if _output(*git, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _capability() -> str | None:
    """The instruction-set level that the CPU kernels run at; None without compiled kernels."""
    return None if _native.C is None else _native.C.cpu_capability()


def place(device: torch.device) -> str:
    """What targets tell machines apart by: the level of the CPU kernels ("reference" without any), or "cuda"."""
    return _capability() or "reference" if device.type == "cpu" else device.type


def has_matrix_unit(device: torch.device) -> bool:
    """Whether products of bfloat16 have hardware of their own: tensor cores, or AMX that the kernels can use."""
    return device.type == "cuda" or (_native.C is not None and "amx" in _native.C.cpu_capabilities())


def _busy_seconds() -> float:
    """Processor seconds that all processes together have used since boot, from Linux."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Bystanders:
    """A context that finds how many cores other processes kept busy meanwhile: the first suspect of an odd timing.

    `cores` is None where the system does not say.
    """

    cores: float | None = None

    def __enter__(self) -> Bystanders:
        self._before = self._now()
        return self

    def __exit__(self, *exception) -> None:
        after = self._now()
        if self._before and after and after[0] > self._before[0]:
            (start, others), (end, others_after) = self._before, after
            self.cores = max(0.0, (others_after - others) / (end - start))

    @staticmethod
    def _now() -> tuple[float, float] | None:
        try:
            own = time.process_time() + sum(os.times()[2:4])  # and of the children that ended: peers may run as such
            return time.monotonic(), _busy_seconds() - own
        except (OSError, ValueError):
            return None


def facts(device: torch.device) -> dict[str, Any]:
    """CPU, GPU, threads, versions, commit and date, as they are written into every result."""
    cuda = device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": _capability(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "compiled_kernels": _native.C is not None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "pygen": pygen.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }

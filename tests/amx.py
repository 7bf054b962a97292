"""AMX for tests on machines without it: builds the emulator of amx_emulator.cpp and gives processes it.

library = amx.emulator(tmp_path)
subprocess.run([sys.executable, "-c", "..."], env=amx.preloaded(library))
"""

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
INSTRUCTIONS = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")


def compiler() -> list[str] | None:
    """As setup.py finds it."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None


@functools.cache
def missing() -> str:
    """Why the emulator cannot be had here; empty where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "AMX is of x86-64, and the emulator of Linux"
    command = compiler()
    if command is None:
        return "no C++ compiler"
    probe = [*command, *INSTRUCTIONS, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    if subprocess.run(probe, capture_output=True).returncode:
        return f"{command[0]} knows no AMX"
    return ""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the kernel says of the CPU; empty where it says it otherwise than Linux on x86."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@functools.cache
def in_hardware() -> bool:
    """Whether the CPU has AMX and Linux lets this process use it: then nothing faults, and nothing is emulated."""
    if missing() or not {"amx_tile", "amx_bf16", "amx_int8"} <= cpu_flags():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _compile(source: str, target: Path, *flags: str) -> Path:
    command = [
        *(compiler() or ["c++"]),
        "-std=c++17",
        "-Wall",
        "-Wextra",
        *flags,
        str(HERE / source),
        "-o",
        str(target),
    ]
    done = subprocess.run([*command, "-ldl", "-lpthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def emulator(folder: Path) -> Path:
    """The shared library, compiled into `folder`."""
    # All symbols are bound at load: the handler must not wait for the dynamic linker's lock.
    flags = ("-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,now")
    return _compile("amx_emulator.cpp", folder / "libamx_emulator.so", *flags)


def program(folder: Path) -> Path:
    """The program of amx_program.cpp, compiled into `folder`."""
    return _compile("amx_program.cpp", folder / "amx_program", "-O2", *INSTRUCTIONS)


def preloaded(library: Path, **variables: str) -> dict[str, str]:
    """The environment of a process that has AMX, by the emulator where the CPU has none.

    What is preloaded already (sanitizers) stays first.
    """
    libraries = os.environ.get("LD_PRELOAD", "").split() + ([] if in_hardware() else [str(library)])
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), **variables}

"""Loads `pygen._C`, the compiled kernels, or says what is missing when it cannot be loaded."""

import warnings

import torch

MINIMUM_TORCH = (2, 10)

REBUILD = (
    "rebuild with a C++17 compiler on PATH and torch >= 2.10 installed: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _load():
    """(module, None), or (None, why not)."""
    if _torch_version() < MINIMUM_TORCH:
        raise ImportError(f"pygen needs torch >= 2.10, this is torch {torch.__version__}: pip install 'torch>=2.10'")
    try:
        from pygen import _C
    except ImportError as error:
        return None, str(error)
    return _C, None


C, missing_because = _load()

if C is None:
    warnings.warn(
        f"pygen runs on its plain PyTorch reference: the compiled kernels are missing ({missing_because}); {REBUILD}",
        stacklevel=2,
    )

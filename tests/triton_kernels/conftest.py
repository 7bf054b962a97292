"""Where the kernels run here: on a CUDA device, or on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

triton = pytest.importorskip("triton")


@pytest.fixture
def device():
    if triton.knobs.runtime.interpret:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("Triton kernels need a CUDA device, or TRITON_INTERPRET=1")


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN, so that an element which a kernel forgets to write shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", filled)

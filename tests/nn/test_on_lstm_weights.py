"""Weights of ON-LSTM: the published names, which load on every machine, and kernels that need no compiler there."""

import io
import subprocess
import sys

import pytest
import torch
from nn import on_lstm_loop
from torch import nn

from harness import INTERPRETED, ordinary_levels, running_on
from pygen.nn.on_lstm import ONLSTM, ONLSTMStack

EXACTLY = {"rtol": 0, "atol": 0}


def published(layer_sizes, chunk_size, seed=0):
    """The published language model's state_dict, by its names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    state = {"encoder.weight": torch.randn(11, layer_sizes[0], generator=generator)}
    for i, (size, hidden) in enumerate(zip(layer_sizes, layer_sizes[1:], strict=False)):
        width = 2 * hidden // chunk_size + 4 * hidden
        for name, shape in (
            ("ih.0.weight", (width, size)),
            ("ih.0.bias", (width,)),
            ("hh.weight", (width, hidden)),
            ("hh.bias", (width,)),
        ):
            state[f"rnn.cells.{i}.{name}"] = torch.randn(shape, generator=generator)
    return state | {"decoder.weight": state["encoder.weight"], "decoder.bias": torch.zeros(11)}


@pytest.mark.parametrize("whole", (True, False), ids=("the whole model's", "the stack's"))
def test_published_weights_load_and_compute_what_they_did(whole):
    state = published([4, 6, 6, 4], 2)
    if not whole:
        state = {key.removeprefix("rnn."): value for key, value in state.items() if key.startswith("rnn.")}
    names = list(state)
    stack = ONLSTMStack([4, 6, 6, 4], 2)
    assert str(stack.load_state_dict(state)) == "<All keys matched successfully>"
    assert list(state) == names  # the caller's dict is left alone
    double = {key.removeprefix("rnn."): value.double() for key, value in state.items()}
    x = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(1))
    start = [(torch.zeros(size).double(),) * 2 for size in (6, 6, 4)]
    output, _, distances = on_lstm_loop.layers(x[:, 0].double(), start, double, 2)
    found = stack(x)
    torch.testing.assert_close(found.output[:, 0].double(), output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.distances[..., 0].double(), distances, rtol=1e-5, atol=1e-5)


def test_published_weights_load_into_onlstm_by_themselves_and_inside_a_model():
    state = published([6, 6, 6], 2)
    alone = ONLSTM(6, 6, 2, 2)
    alone.load_state_dict(state)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = ONLSTM(6, 6, 2, 2)

    model = Model()
    model.load_state_dict({key: value for key, value in state.items() if key.startswith("rnn.")})
    x = torch.randn(3, 2, 6)
    torch.testing.assert_close(model.rnn(x), alone(x), **EXACTLY)


def test_from_state_dict_reads_the_sizes_from_the_weights():
    state = published([4, 6, 9, 4 * 3], 3)
    stack = ONLSTMStack.from_state_dict(state, dropout=0.3)
    assert stack.layer_sizes == (4, 6, 9, 12) and stack.chunk_size == 3 and stack.dropout == 0.3
    torch.testing.assert_close(stack.state_dict()["cells.1.hh.weight"], state["rnn.cells.1.hh.weight"])
    without = {key: value for key, value in stack.state_dict().items() if not key.endswith("bias")}
    assert not ONLSTMStack.from_state_dict(without).cells[0].bias
    with pytest.raises(ValueError, match="cells.0.hh.weight expected, got"):
        ONLSTMStack.from_state_dict({"weight": torch.zeros(3)})


def test_missing_and_foreign_keys_are_still_reported():
    state = published([4, 6], 2)
    del state["rnn.cells.0.hh.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*cells.0.hh.bias"):
        ONLSTMStack([4, 6], 2).load_state_dict(state)
    state = ONLSTMStack([4, 6], 2).state_dict() | {"decoder.weight": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="Unexpected key.*decoder.weight"):
        ONLSTMStack([4, 6], 2).load_state_dict(state)


def test_parameter_names_are_fixed():
    module = ONLSTM(3, 4, 2, 2, bidirectional=True)
    parts = ("ih.0.weight", "ih.0.bias", "hh.weight", "hh.bias")
    expected = {f"{cells}.{i}.{part}" for cells in ("cells", "cells_reverse") for i in (0, 1) for part in parts}
    assert set(module.state_dict()) == expected


@pytest.mark.skipif(INTERPRETED, reason="saves on one level of the CPU kernels and loads on another")
def test_weights_saved_on_one_level_of_kernels_load_and_compute_on_every_other():
    x = torch.randn(9, 3, 5)
    file, found = io.BytesIO(), []
    with running_on(f"cpu-{ordinary_levels()[-1]}"):
        module = ONLSTM(5, 12, 2, 3)
        torch.save(module.state_dict(), file)
        found.append(module(x))
    for backend in ("reference", *(f"cpu-{level}" for level in ordinary_levels())):
        file.seek(0)
        with running_on(backend):
            other = ONLSTM(5, 12, 2, 3)
            other.load_state_dict(torch.load(file))
            torch.testing.assert_close(other(x), found[0], rtol=1e-5, atol=1e-6)


def test_it_computes_without_a_gpu_and_without_compiling_anything():
    """In a process where a compiler cannot be started, and no GPU is seen."""
    program = """
import os, subprocess
def refuse(*args, **kwargs):
    raise AssertionError(f"started {args}")
subprocess.Popen.__init__ = os.system = os.posix_spawn = refuse
import torch
from pygen.nn.on_lstm import ONLSTM
module = ONLSTM(8, 20, 2)
output, _ = module(torch.randn(6, 2, 8))
output.sum().backward()
assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
import sys
assert "torch.utils.cpp_extension" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})

"""ON-LSTM's modules compute the published cell, step by step: outputs, states, distances and every gradient."""

import copy

import pytest
import torch
from nn import on_lstm_loop
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from harness import INTERPRETED
from pygen.nn.on_lstm import ONLSTM, ONLSTMCell, ONLSTMStack

EXACTLY = {"rtol": 0, "atol": 0}
# Float64: sums of some ten terms in another order. Float32: its rounding through at most 8 steps and 3 layers.
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}

# steps, batch, input, hidden, chunk_size, layers: one step, one sequence, T <= 8, one unit, one chunk, chunks of one.
SHAPES = (
    (1, 1, 3, 4, 2, 1),
    (1, 5, 3, 4, 1, 2),
    (7, 1, 2, 6, 6, 1),
    (5, 3, 4, 10, 5, 3),
    (8, 2, 1, 3, 1, 2),
    (4, 3, 70, 33, 11, 1),
    (2, 2, 3, 1, 1, 1),
    (13, 17, 5, 20, 4, 1),
)
# The interpreter takes seconds for what takes milliseconds; the op's own tests run all its shapes there.
SHAPES_HERE = SHAPES[2:4] if INTERPRETED else SHAPES


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def onlstm(*args, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    module = ONLSTM(*args, return_distances=True, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():  # gates far from their middle as well
            parameter.mul_(3)
    return module


def results(module, x, h, c, **given):
    """Output, states and distances, and the gradients of a weighted sum of all of them."""
    leaves = [one.detach().clone().requires_grad_() for one in (x, h, c)]
    output, (last_h, last_c), distances = module(leaves[0], tuple(leaves[1:]), **given)
    return gradients((output, last_h, last_c, torch.stack(distances)), leaves, dict(module.named_parameters()))


def gradients(found, leaves, parameters):
    total = sum((one * normal(*one.shape, seed=i, dtype=one.dtype).to(one.device)).sum() for i, one in enumerate(found))
    found_gradients = torch.autograd.grad(total, (*leaves, *parameters.values()))
    names = ("output", "h", "c", "distances", "of x", "of h", "of c", *parameters)
    return dict(zip(names, (*found, *found_gradients), strict=True))


def looped(module, x, h, c, lengths=None):
    """`results` of the published loop in float64."""
    parameters = {name: one.detach().cpu().double().requires_grad_() for name, one in module.named_parameters()}
    leaves = [one.detach().cpu().double().requires_grad_() for one in (x, h, c)]
    return gradients(on_lstm_loop.batch(*leaves, parameters, module.chunk_size, lengths), leaves, parameters)


def assert_agree(found, expected, **tolerance):
    for name, one in found.items():
        torch.testing.assert_close(
            one.cpu().double(), expected[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance
        )


def inputs(steps, batch, size, hidden, layers, dtype=torch.float64, device="cpu"):
    shapes = (steps, batch, size), (layers, batch, hidden), (layers, batch, hidden)
    return [normal(*shape, seed=i, dtype=dtype).to(device) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES_HERE, ids=str)
def test_everything_and_every_gradient_is_the_published_loops(shape, dtype, backend_device):
    steps, batch, size, hidden, chunk_size, layers = shape
    module = onlstm(size, hidden, layers, chunk_size, dtype=dtype).to(backend_device)
    given = inputs(steps, batch, size, hidden, layers, dtype, backend_device)
    assert_agree(results(module, *given), looped(module, *given), **CLOSE[dtype])


def test_float32_stays_within_1e_5_over_100_steps():
    """Where FlashRNN's own tests allow 0.1."""
    module = ONLSTM(16, 70, 2, dtype=torch.float32, return_distances=True)
    given = inputs(100, 2, 16, 70, 2, torch.float32)
    expected = looped(module, *given)
    found = results(module, *given)
    for name in ("output", "h", "c", "distances", "of x", "of h", "of c"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    for name, _ in module.named_parameters():  # sums over 200 rows: relative to the largest
        scale = expected[name].abs().max()
        torch.testing.assert_close(found[name].double() / scale, expected[name] / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bidirectional", (False, True))
def test_lengths_are_each_sequence_alone(bidirectional):
    layers, lengths = 2, [4, 7, 1, 7, 3]
    module = onlstm(3, 6, layers, 2, bidirectional=bidirectional)
    x, h, c = inputs(7, 5, 3, 6, layers * (1 + bidirectional))
    found = results(module, x, h, c, lengths=lengths)
    assert_agree(found, looped(module, x, h, c, lengths), **CLOSE[torch.float64])
    # Padding neither counts nor is counted.
    for b, length in enumerate(lengths):
        for name in ("output", "of x"):
            assert not found[name][length:, b].any()
        assert not found["distances"][:, :, length:, b].any()
    x[4:, 0] = torch.nan
    assert_agree(results(module, x, h, c, lengths=torch.tensor(lengths)), found, **EXACTLY)


def test_a_sequence_of_length_0_keeps_its_state():
    module = onlstm(3, 6, 2, 2, bidirectional=True)
    x, h, c = inputs(4, 3, 3, 6, 4)
    output, (last_h, last_c), _ = module(x, (h, c), lengths=[2, 0, 4])
    assert not output[:, 1].any()
    torch.testing.assert_close((last_h[:, 1], last_c[:, 1]), (h[:, 1], c[:, 1]), **EXACTLY)
    alone, _, _ = module(x[:2, :1], (h[:, :1], c[:, :1]))
    torch.testing.assert_close(output[:2, :1], alone)
    output, (last_h, _), distances = module(x, (h, c), lengths=[0, 0, 0])
    assert not output.any() and not distances[0].any()
    torch.testing.assert_close(last_h, h, **EXACTLY)


def test_lengths_that_are_all_full_change_nothing():
    module = onlstm(3, 6, 2, 2)
    given = inputs(4, 3, 3, 6, 2)
    assert_agree(results(module, *given, lengths=[4, 4, 4]), results(module, *given), **EXACTLY)


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("lengths", ([7, 4, 4, 1], [2, 7, 1, 5]), ids=("sorted", "unsorted"))
def test_packed_is_each_sequence_alone(lengths, bidirectional):
    module = onlstm(3, 6, 2, 3, bidirectional=bidirectional)
    x, h, c = inputs(7, 4, 3, 6, 2 * (1 + bidirectional))

    def packed(x, hx):
        given = pack_padded_sequence(x, lengths, enforce_sorted=lengths == sorted(lengths, reverse=True))
        output, states, distances = module(given, hx)
        return pad_packed_sequence(output)[0], states, distances

    packed.named_parameters = module.named_parameters
    assert_agree(results(packed, x, h, c), looped(module, x, h, c, lengths), **CLOSE[torch.float64])


def test_a_packed_output_is_packed_as_the_input_was():
    sequences = [normal(length, 3, seed=length) for length in (2, 5, 3)]
    given = pack_sequence(sequences, enforce_sorted=False)
    output, _, _ = onlstm(3, 6, 1, 3)(given)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, name), getattr(given, name))


def test_both_directions_are_the_published_loop_from_both_ends():
    module = onlstm(3, 4, 2, 2, bidirectional=True)
    given = inputs(5, 3, 3, 4, 4)
    assert_agree(results(module, *given), looped(module, *given), **CLOSE[torch.float64])


def test_without_biases_it_is_the_published_loop():
    module = onlstm(3, 4, 2, 2, bias=False)
    assert set(module.state_dict()) == {f"cells.{i}.{name}.weight" for i in (0, 1) for name in ("ih.0", "hh")}
    given = inputs(5, 3, 3, 4, 2)
    assert_agree(results(module, *given), looped(module, *given), **CLOSE[torch.float64])


def test_a_state_carried_on_is_one_long_sequence():
    module = onlstm(3, 6, 2, 2)
    x, h, c = inputs(9, 2, 3, 6, 2)
    whole, last, distances = module(x, (h, c))
    state, pieces, measured = (h, c), [], []
    for piece in x.split(4):
        output, state, found = module(piece, state)
        pieces.append(output)
        measured.append(torch.stack(found))
    torch.testing.assert_close(torch.cat(pieces), whole)
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(torch.cat(measured, 2), torch.stack(distances))


# DropConnect, zoneout and dropout


def test_dropconnect_leaves_out_entries_of_the_recurrent_weight_in_training_one_draw_a_call(monkeypatch):
    module = onlstm(3, 6, 2, 2, dropconnect=0.5)
    masks = [cell.sample_mask() for cell in module.cells]
    assert all(0.3 < mask.double().mean() < 0.7 and mask.shape == (30, 6) for mask in masks)
    assert not torch.equal(*masks)
    given = iter(masks)
    monkeypatch.setattr(ONLSTMCell, "sample_mask", lambda self: next(given))
    x, h, c = inputs(5, 3, 3, 6, 2)
    masked = {name: one.detach().clone().requires_grad_() for name, one in module.named_parameters()}
    effective = {
        name: one.masked_fill(masks[int(name[6])], 0) if name.endswith("hh.weight") else one
        for name, one in masked.items()
    }
    leaves = [one.requires_grad_() for one in (x, h, c)]
    expected = gradients(on_lstm_loop.batch(*leaves, effective, 2), leaves, masked)
    assert_agree(results(module, x, h, c), expected, **CLOSE[torch.float64])
    assert next(given, None) is None


def test_dropconnect_in_evaluation_multiplies_the_recurrent_weight_by_what_stays():
    module = onlstm(3, 6, 1, 2, dropconnect=0.45).eval()
    scaled = copy.deepcopy(module)
    scaled.cells[0].dropconnect = 0.0
    with torch.no_grad():
        scaled.cells[0].hh.weight.mul_(0.55)
    x, h, c = inputs(5, 3, 3, 6, 1)
    torch.testing.assert_close(module(x, (h, c)), scaled(x, (h, c)))
    torch.testing.assert_close(module(x), module(x), **EXACTLY)


def test_dropconnect_is_another_draw_every_call():
    module = onlstm(3, 6, 1, 2, dropconnect=0.5)
    x = normal(5, 3, 3)
    assert not torch.equal(module(x)[0], module(x)[0])
    torch.manual_seed(1)
    first = module(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(module(x)[0], first, **EXACTLY)


@pytest.mark.parametrize("zoneout", (0.3, (0.5, 0.1)))
def test_zoneout_in_evaluation_mixes_the_states_at_its_rate(zoneout):
    keep_c, keep_h = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    module = onlstm(3, 6, 1, 2, zoneout=zoneout).eval()
    x, h, c = inputs(5, 1, 3, 6, 1)
    found = module(x, (h, c))[0][:, 0]
    weights = on_lstm_loop.weights_of(module.state_dict(), "cells", 0)
    h, c, expected = h[0, 0], c[0, 0], []
    for one in x[:, 0]:
        new_h, new_c, _ = on_lstm_loop.step(one, h, c, weights, 2)
        h, c = keep_h * h + (1 - keep_h) * new_h, keep_c * c + (1 - keep_c) * new_c
        expected.append(h)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_zoneout_in_training_keeps_units_at_its_rate():
    module = onlstm(3, 50, 1, 10, zoneout=(0.0, 0.3))
    # The last chunk's master input gate is 0: from a state of 0 it stays the same without zoneout as well.
    output = module(normal(40, 20, 3))[0][..., :40]
    # new + 1 (old - new) is old up to its rounding.
    kept = output[1:].isclose(output[:-1], rtol=1e-12, atol=1e-14).double()
    # 31200 draws: three standard deviations are 0.008.
    assert abs(kept.mean() - 0.3) < 0.01
    assert kept.mean((1, 2)).min() > 0.05 and kept.mean((0, 1)).min() > 0.05  # of every step and unit


def test_zoneout_of_1_keeps_the_first_state():
    module = onlstm(3, 6, 1, 2, zoneout=1.0)
    x, h, c = inputs(5, 3, 3, 6, 1)
    for mode in (True, False):
        _, last, _ = module.train(mode)(x, (h, c))
        torch.testing.assert_close(last, (h, c))


def test_dropout_between_layers_is_one_draw_for_all_steps():
    torch.manual_seed(0)
    stack = ONLSTMStack([3, 40, 40], chunk_size=4, dropout=0.5, dtype=torch.float64)
    found = stack(normal(6, 5, 3))
    # Without the last chunk: it is never written, and 0.
    factors = (found.outputs[0] / found.raw_outputs[0])[..., :36]
    assert set(factors.round(decimals=9).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(factors[:1].round().expand_as(factors), factors.round())
    assert 0.3 < (factors[0] == 0).double().mean() < 0.7
    assert found.outputs[1] is found.raw_outputs[1]  # none behind the last layer
    stack.eval()
    found = stack(normal(6, 5, 3))
    assert found.outputs[0] is found.raw_outputs[0]


def test_dropout_of_packed_sequences_is_one_draw_a_sequence():
    stack = ONLSTMStack([3, 40, 40], chunk_size=4, dropout=0.5, dtype=torch.float64)
    found = stack(pack_sequence([normal(length, 3) for length in (4, 6, 2)], enforce_sorted=False))
    after, before = (pad_packed_sequence(one)[0] for one in (found.outputs[0], found.raw_outputs[0]))
    for b, length in enumerate((4, 6, 2)):
        factors = (after / before)[:length, b, :36].round()
        assert torch.equal(factors, factors[:1].expand_as(factors)) and len(factors.unique()) == 2


# The stack and the cell


def test_a_stack_is_the_published_loop_with_a_size_per_layer():
    torch.manual_seed(0)
    stack = ONLSTMStack([3, 8, 4, 12], chunk_size=4, dtype=torch.float64)
    x = normal(6, 2, 3)
    states = [(normal(2, size, seed=1), normal(2, size, seed=2)) for size in (8, 4, 12)]
    found = stack(x, states)
    for b in range(2):
        expected = on_lstm_loop.layers(x[:, b], [(h[b], c[b]) for h, c in states], stack.state_dict(), 4)
        torch.testing.assert_close(found.output[:, b], expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close([(h[b], c[b]) for h, c in found.states], expected[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.distances[..., b], expected[2], rtol=1e-10, atol=1e-10)
    assert [one.shape[2] for one in found.raw_outputs] == [8, 4, 12]


def test_a_stack_of_equal_layers_is_the_onlstm_dense_and_packed():
    module = onlstm(3, 8, 2, 4)
    stack = ONLSTMStack([3, 8, 8], chunk_size=4, dtype=torch.float64)
    stack.load_state_dict(module.state_dict())
    x, h, c = inputs(6, 2, 3, 8, 2)
    for given in (x, pack_padded_sequence(x, [3, 6], enforce_sorted=False)):
        output, (last_h, last_c), distances = module(given, (h, c))
        found = stack(given, list(zip(h, c, strict=True)))
        torch.testing.assert_close(found.output, output, **EXACTLY)
        torch.testing.assert_close(found.states, list(zip(last_h, last_c, strict=True)), **EXACTLY)
        torch.testing.assert_close(found.distances, torch.stack(distances), **EXACTLY)


def test_a_sequence_of_cells_is_the_layer():
    module = onlstm(3, 6, 1, 2, zoneout=(0.2, 0.1), dropconnect=0.3).eval()
    x, h, c = inputs(5, 4, 3, 6, 1)
    output, _, (forget, into) = module(x, (h, c))
    state = (h[0], c[0])
    for t, one in enumerate(x):
        *state, (distance_forget, distance_in) = module.cells[0](one, tuple(state), return_distances=True)
        torch.testing.assert_close(state[0], output[t], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close((distance_forget, distance_in), (forget[0, t], into[0, t]), rtol=1e-10, atol=1e-10)


def test_a_sequence_of_one_step_is_the_cell_and_so_are_its_gradients():
    module = onlstm(3, 6, 1, 2)
    x, h, c = inputs(1, 4, 3, 6, 1)
    parameters = list(module.parameters())
    output, (_, last_c), _ = module(x, (h, c))
    cell_h, cell_c = module.cells[0](x[0], (h[0], c[0]))
    torch.testing.assert_close((cell_h, cell_c), (output[0], last_c[0]), rtol=1e-12, atol=1e-12)
    of_layer = torch.autograd.grad((output * output).sum() + last_c.sin().sum(), parameters)
    of_cell = torch.autograd.grad((cell_h * cell_h).sum() + cell_c.sin().sum(), parameters)
    torch.testing.assert_close(of_layer, of_cell, rtol=1e-10, atol=1e-12)


def test_a_cell_in_training_wants_the_mask_of_its_sequence():
    cell = ONLSTMCell(3, 6, 2, dropconnect=0.5)
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"draw it with sample_mask\(\)"):
        cell(x)
    mask = cell.sample_mask()
    torch.testing.assert_close(cell(x, None, mask), cell(x, None, mask), **EXACTLY)
    cell.eval()
    assert cell.sample_mask() is None
    cell(x)


def test_a_cell_takes_one_sequence_as_nn_lstm_cell_does():
    cell = ONLSTMCell(3, 6, 2, dtype=torch.float64)
    x, h, c = normal(3), normal(6), normal(6, seed=1)
    one = cell(x, (h, c), return_distances=True)
    batch = cell(x[None], (h[None], c[None]), return_distances=True)
    torch.testing.assert_close(one[:2], (batch[0][0], batch[1][0]))
    assert one[2][0].shape == () and batch[2][0].shape == (1,)
    assert torch.nn.LSTMCell(3, 6).double()(x, (h, c))[0].shape == one[0].shape

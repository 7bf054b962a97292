"""nn.ONLSTM in nn.LSTM's place: the same forms of input and output, the same refusals, and torch's transformations."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from harness import INTERPRETED
from pygen.nn.on_lstm import ONLSTM, ONLSTMCell, ONLSTMStack

EXACTLY = {"rtol": 0, "atol": 0}


def shapes(value):
    """The shapes in a nested result; a PackedSequence is its data and its batch sizes."""
    if isinstance(value, PackedSequence):
        return "packed", value.data.shape, value.batch_sizes.tolist()
    return tuple(map(shapes, value)) if isinstance(value, tuple) else value.shape


# In nn.LSTM's place


@pytest.mark.parametrize("given_state", (False, True), ids=("zeros", "hx"))
@pytest.mark.parametrize("form", ("batched", "unbatched", "packed", "empty batch"))
@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("layers", (1, 2))
@pytest.mark.parametrize("bias", (False, True))
def test_shapes_are_nn_lstms_in_every_form(bias, layers, bidirectional, batch_first, form, given_state):
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    ours, theirs = ONLSTM(3, 4, layers, 2, **options), nn.LSTM(3, 4, layers, **options)
    batch = 0 if form == "empty batch" else 3
    if form == "packed":
        x = pack_sequence([torch.randn(length, 3) for length in (2, 5, 4)], enforce_sorted=False)
    else:
        x = torch.randn((5, 3) if form == "unbatched" else (batch, 5, 3) if batch_first else (5, batch, 3))
    state = torch.randn(layers * (1 + bidirectional), *(() if form == "unbatched" else (batch,)), 4)
    hx = (state, state) if given_state else None
    assert shapes(ours(x, hx)) == shapes(theirs(x, hx))
    assert shapes(ours(input=x, hx=hx)) == shapes(theirs(input=x, hx=hx))


def test_batch_first_is_the_same_computation():
    torch.manual_seed(0)
    first = ONLSTM(3, 4, 2, 2, batch_first=True, return_distances=True, dtype=torch.float64)
    other = ONLSTM(3, 4, 2, 2, return_distances=True, dtype=torch.float64)
    other.load_state_dict(first.state_dict())
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    for lengths in (None, [7, 2, 5, 1, 3]):
        output, states, distances = first(x, lengths=lengths)
        expected, expected_states, expected_distances = other(x.transpose(0, 1), lengths=lengths)
        torch.testing.assert_close(output, expected.transpose(0, 1))
        torch.testing.assert_close(states, expected_states)
        torch.testing.assert_close(distances, tuple(one.transpose(1, 2) for one in expected_distances))
        assert distances[0].shape == (2, 5, 7)


def test_one_sequence_without_a_batch_is_a_batch_of_one():
    module = ONLSTM(3, 4, 2, 2, return_distances=True)
    x, h, c = torch.randn(5, 3), torch.randn(2, 4), torch.randn(2, 4)
    output, states, distances = module(x, (h, c))
    batched, batched_states, batched_distances = module(x[:, None], (h[:, None], c[:, None]))
    torch.testing.assert_close(output, batched[:, 0], **EXACTLY)
    torch.testing.assert_close(states, tuple(one[:, 0] for one in batched_states), **EXACTLY)
    torch.testing.assert_close(distances, tuple(one[..., 0] for one in batched_distances), **EXACTLY)


def test_without_a_state_it_begins_at_zero():
    module = ONLSTM(3, 4, 2, 2)
    x, zeros = torch.randn(5, 3, 3), torch.zeros(2, 3, 4)
    torch.testing.assert_close(module(x), module(x, (zeros, zeros)), **EXACTLY)


def test_any_strides_of_input_and_gradient_are_right():
    module = ONLSTM(3, 4, 2, 2, dtype=torch.float64)
    x = torch.randn(3, 5, 7, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    state = torch.randn(2, 1, 4, dtype=torch.float64).expand(2, 5, 4)
    output, _ = module(x, (state, state))
    (found,) = torch.autograd.grad(output.sum(), x)  # an expanded gradient
    dense = x.detach().contiguous().requires_grad_()
    expected, _ = module(dense, (state.contiguous(), state.contiguous()))
    torch.testing.assert_close(output, expected, **EXACTLY)
    torch.testing.assert_close(found, torch.autograd.grad((expected * torch.ones_like(expected)).sum(), dense)[0])


def test_code_for_nn_lstm_may_flatten_parameters_and_print():
    module = ONLSTM(3, 4, 2, 2, batch_first=True, dropout=0.1)
    module.flatten_parameters()
    assert "3, 4, num_layers=2, chunk_size=2, batch_first=True, dropout=0.1" in repr(module)
    assert "[3, 4], chunk_size=2" in repr(ONLSTMStack([3, 4], 2))
    assert "3, 4, chunk_size=2, dropconnect=0.5, zoneout=(0.1, 0.1)" in repr(
        ONLSTMCell(3, 4, 2, dropconnect=0.5, zoneout=0.1)
    )


def test_dropout_without_a_place_for_it_warns_as_nn_lstm_does():
    for make in (nn.LSTM, lambda *args, **options: ONLSTM(*args, chunk_size=2, **options)):
        with pytest.warns(UserWarning, match="dropout"):
            make(3, 4, 1, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ONLSTM(3, 4, 2, 2, dropout=0.5)


# Refusals


def test_a_hidden_size_that_chunk_size_does_not_divide_is_refused_by_both_names():
    for make in (
        lambda: ONLSTM(3, 25, chunk_size=10),
        lambda: ONLSTMCell(3, 25, 10),
        lambda: ONLSTMStack([3, 30, 25], 10),
    ):
        with pytest.raises(ValueError, match="hidden_size must be a multiple of chunk_size.*25 and chunk_size 10"):
            make()


@pytest.mark.parametrize("module", (ONLSTM, ONLSTMCell, ONLSTMStack))
def test_the_docstring_says_what_chunk_size_means(module):
    assert "how many neighbouring hidden units share one pair of master gates" in module.__doc__


@pytest.mark.parametrize(
    ("error", "match", "make"),
    (
        (TypeError, "chunk_size must be an int, got True", lambda: ONLSTM(3, 10, 1, True)),  # nn.LSTM's bias
        (ValueError, "num_layers must be at least 1, got 0", lambda: ONLSTM(3, 10, 0)),
        (ValueError, "input_size must be at least 1, got 0", lambda: ONLSTM(0, 10)),
        (ValueError, "hidden_size must be at least 1, got -10", lambda: ONLSTM(3, -10)),
        (ValueError, "chunk_size must be at least 1, got 0", lambda: ONLSTM(3, 10, 1, 0)),
        (ValueError, "dropout must be a number from 0 to 1, got 1.5", lambda: ONLSTM(3, 10, dropout=1.5)),
        (ValueError, "dropconnect must be a number from 0 to 1, got -1", lambda: ONLSTM(3, 10, dropconnect=-1)),
        (ValueError, "zoneout must be a number from 0 to 1, got 2", lambda: ONLSTM(3, 10, zoneout=(0, 2))),
        (ValueError, r"zoneout must be a number or a pair \(cell, hidden\)", lambda: ONLSTM(3, 10, zoneout=(0, 0, 0))),
        (TypeError, "bidirectional must be a bool, got 'no'", lambda: ONLSTM(3, 10, bidirectional="no")),
        (TypeError, "batch_first must be a bool, got 1", lambda: ONLSTM(3, 10, batch_first=1)),
        (TypeError, "bias must be a bool, got None", lambda: ONLSTM(3, 10, bias=None)),
        (TypeError, "proj_size", lambda: ONLSTM(3, 10, proj_size=2)),
        (ValueError, r"layer_sizes must be \(input, hidden, ...\), got \(3,\)", lambda: ONLSTMStack([3])),
    ),
)
def test_impossible_arguments_are_refused(error, match, make):
    with pytest.raises(error, match=match):
        make()


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    (
        (ValueError, r"input_size = 3 features, got \(5, 2, 4\)", lambda m: m(zeros(5, 2, 4))),
        (ValueError, r"input must be \(T, B, I\) or \(T, I\), got \(3,\)", lambda m: m(zeros(3))),
        (ValueError, r"input must be \(T, B, I\) or \(T, I\), got \(1, 5, 2, 3\)", lambda m: m(zeros(1, 5, 2, 3))),
        (ValueError, "at least one step", lambda m: m(zeros(0, 2, 3))),
        (TypeError, "must be a torch.Tensor, got list", lambda m: m([1.0])),
        (
            TypeError,
            "torch.float32 as the weights are, got torch.float64",
            lambda m: m(zeros(5, 2, 3, dtype=torch.float64)),
        ),
        (TypeError, "pair", lambda m: m(zeros(5, 2, 3), zeros(1, 2, 4))),
        (
            ValueError,
            r"h must be \(1, 2, 4\), got \(1, 3, 4\)",
            lambda m: m(zeros(5, 2, 3), (zeros(1, 3, 4), zeros(1, 2, 4))),
        ),
        (
            ValueError,
            r"c must be \(1, 2, 4\), got \(2, 4\)",
            lambda m: m(zeros(5, 2, 3), (zeros(1, 2, 4), zeros(2, 4))),
        ),
        (
            ValueError,
            r"h must be \(1, 4\), got \(1, 1, 4\)",
            lambda m: m(zeros(5, 3), (zeros(1, 1, 4), zeros(1, 1, 4))),
        ),
        (
            TypeError,
            "h must be torch.float32 for an input of torch.float32, got torch.bfloat16",
            lambda m: m(zeros(5, 2, 3), (zeros(1, 2, 4).bfloat16(), zeros(1, 2, 4))),
        ),
        (ValueError, "lengths must be 2 integers", lambda m: m(zeros(5, 2, 3), lengths=[1, 2, 3])),
        (ValueError, "lengths must be 2 integers, got torch.float32", lambda m: m(zeros(5, 2, 3), lengths=[1.0, 2.0])),
        (ValueError, "lengths must be from 0 to 5 steps, got .6, 1.", lambda m: m(zeros(5, 2, 3), lengths=[6, 1])),
        (ValueError, "lengths must be from 0 to 5 steps", lambda m: m(zeros(5, 2, 3), lengths=[-1, 1])),
        (ValueError, "lengths are of a batch", lambda m: m(zeros(5, 3), lengths=[5])),
        (ValueError, "lengths must be None", lambda m: m(pack_sequence([zeros(5, 3)]), lengths=[5])),
    ),
)
def test_what_does_not_fit_is_refused_with_a_sentence(error, match, call):
    with pytest.raises(error, match=match):
        call(ONLSTM(3, 4, chunk_size=2))


def test_a_stack_and_a_cell_refuse_what_does_not_fit():
    stack, cell = ONLSTMStack([3, 4, 6], 2), ONLSTMCell(3, 4, 2)
    states = [(zeros(2, 4), zeros(2, 4)), (zeros(2, 4), zeros(2, 4))]
    with pytest.raises(ValueError, match=r"states must be 2 pairs \(h, c\), got 1"):
        stack(zeros(5, 2, 3), states[:1])
    with pytest.raises(ValueError, match=r"h must be \(2, 6\), got \(2, 4\)"):
        stack(zeros(5, 2, 3), states)
    with pytest.raises(ValueError, match=r"input must be \(T, B, I\), got \(5, 3\)"):
        stack(zeros(5, 3))
    with pytest.raises(ValueError, match=r"input must be \(B, I\) or \(I,\), got \(5, 2, 3\)"):
        cell(zeros(5, 2, 3))
    with pytest.raises(ValueError, match=r"c must be \(2, 4\), got \(3, 4\)"):
        cell(zeros(2, 3), (zeros(2, 4), zeros(3, 4)))


# Distances


def saturated(bias, dtype=torch.float32):
    """Master gates driven by biases of +-`bias` (forget at the last chunk, input at the first, and the reverse)."""
    module = ONLSTM(3, 40, 1, 4, return_distances=True, dtype=dtype)
    with torch.no_grad():
        for sign, rows in ((1, slice(0, 10)), (-1, slice(10, 20))):
            module.cells[0].ih[0].bias[rows] = sign * torch.linspace(-bias, bias, 10)
    return module


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bias", (0.0, 30.0, -30.0, 1e4, -1e4))
def test_distances_stay_from_0_to_1_and_gradients_finite_where_the_gates_saturate(bias, dtype):
    module = saturated(bias, dtype)
    _, _, distances = module(torch.randn(6, 2, 3, dtype=dtype))
    for one in distances:
        # The mean of ten sums may be an ulp or two beyond its end.
        ulp = torch.finfo(one.dtype).eps
        assert one.isfinite().all() and one.min() >= -4 * ulp and one.max() <= 1 + 4 * ulp
    sum(one.sum() for one in distances).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())


def test_distances_still_tell_steps_apart_where_the_gates_are_nearly_saturated():
    """Near 0.9 = 1 - 1 / n, as far as a forget distance goes, float32 follows float64 to its rounding."""
    torch.manual_seed(0)
    module = saturated(-30.0, torch.float64)
    x = torch.randn(20, 1, 3, dtype=torch.float64)
    exact = torch.stack(module(x)[2])[:, 0, :, 0]
    single = torch.stack(copy.deepcopy(module).float()(x.float())[2])[:, 0, :, 0]
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-6)
    order = exact[0].argsort()
    apart = exact[0][order].diff() > 1e-6
    assert exact[0].min() > 0.8 and apart.sum() >= 15
    assert (single[0][order].diff() > 0)[apart].all()


# Dtypes


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_16_bit_module_keeps_its_cell_state_in_float32_and_takes_it_again(dtype):
    torch.manual_seed(0)
    module = ONLSTM(3, 8, 2, 2, return_distances=True).to(dtype)
    x = torch.randn(5, 2, 3).to(dtype)
    output, (h, c), distances = module(x)
    assert output.dtype == h.dtype == dtype and c.dtype == distances[0].dtype == torch.float32
    again, (_, later), _ = module(x, (h, c))
    whole, (_, last), _ = module(torch.cat((x, x)))
    # h is rounded to 16 bits where the sequence is cut.
    torch.testing.assert_close(again, whole[5:], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(later, last, rtol=2e-2, atol=2e-2)
    (again.float().sum() + later.sum()).backward()
    assert module.cells[1].hh.weight.grad.dtype == dtype
    exact = copy.deepcopy(module).double()(x.double())[0]
    torch.testing.assert_close(output.double(), exact, rtol=2e-2, atol=2e-2)
    module(x, (h, c.to(dtype)))  # nn.LSTM's convention


def test_a_16_bit_cell_keeps_its_cell_state_in_float32_and_takes_it_again():
    cell = ONLSTMCell(3, 8, 2, zoneout=0.3).bfloat16()
    state = None
    for mode in (True, False):
        for x in torch.randn(3, 2, 3).bfloat16():
            state = cell.train(mode)(x, state)
            assert [one.dtype for one in state] == [torch.bfloat16, torch.float32]


def test_autocast_takes_and_returns_its_own_states():
    module = ONLSTM(3, 8, 2, 2, dropconnect=0.2, zoneout=0.1, bidirectional=True)
    x = torch.randn(5, 2, 3)
    expected, _ = module.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = module(x)
        assert state[1].dtype == torch.float32
        module(x, state)
        module(x.bfloat16(), state)
        module.train()
        loss = module(x, state)[0].float().sum()
        cell_state = module.cells[0](x[0], None, module.cells[0].sample_mask())
        module.cells[0](x[0], cell_state, module.cells[0].sample_mask())
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_device_and_dtype_are_factory_arguments():
    module = ONLSTM(3, 4, 2, 2, device="meta", dtype=torch.float64, bidirectional=True)
    assert all(one.is_meta and one.dtype == torch.float64 for one in module.parameters())
    module.to_empty(device="cpu").reset_parameters()
    bound = 1 / 4**0.5  # nn.Linear's, of 4 inputs
    assert 0 < module.cells_reverse[1].hh.weight.abs().max() <= bound


# torch's transformations


@pytest.mark.parametrize("training", (False, True))
def test_it_is_one_graph_to_torch_compile(training):
    module = ONLSTM(3, 8, 2, 2, dropout=0.2, dropconnect=0.3, zoneout=0.1, bidirectional=True, return_distances=True)
    module.train(training)
    x, state = torch.randn(5, 2, 3), torch.randn(4, 2, 8)

    def step(x, state):
        output, (h, c), (forget, into) = module(x, (state, state))
        return output.sum() + h.sum() + c.sum() + forget.sum() + into.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, state), list(module.parameters()))
    assert all(one.isfinite().all() for one in found)
    if not training:
        expected = torch.autograd.grad(step(x, state), list(module.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="torch.export traces with fake tensors")
@pytest.mark.parametrize("batch_first", (False, True))
def test_it_exports_with_any_number_of_steps_and_sequences(batch_first):
    module = ONLSTM(3, 8, 2, 2, dropconnect=0.3, batch_first=batch_first).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, None)
    exported = torch.export.export(module, (torch.randn(5, 4, 3), None), dynamic_shapes=dynamic).module()
    for shape in ((5, 4, 3), (7, 2, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x, None), module(x), **EXACTLY)


def test_copies_and_pickles_compute_the_same():
    module = ONLSTM(3, 8, 2, 2, bidirectional=True, zoneout=0.1).eval()
    x = torch.randn(5, 2, 3)
    packed = pack_sequence([torch.randn(length, 3) for length in (5, 2)])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), module(x), **EXACTLY)
        torch.testing.assert_close(other(packed)[0].data, module(packed)[0].data, **EXACTLY)


def test_functional_call_and_per_sample_gradients():
    module = ONLSTM(3, 4, 1, 2, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    x = torch.randn(5, 3, 3, dtype=torch.float64)

    def loss(parameters, one):
        return torch.func.functional_call(module, parameters, (one[:, None],))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(3):
        expected = torch.autograd.grad(module(x[:, b : b + 1])[0].square().sum(), list(parameters.values()))
        torch.testing.assert_close([one[b] for one in found.values()], list(expected))


def test_a_second_derivative_is_right():
    module = ONLSTM(2, 4, 1, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0].square().sum(), x)


def test_training_memorises_a_sequence():
    torch.manual_seed(0)
    module, head = ONLSTM(4, 20, 2, 5), nn.Linear(20, 4)
    tokens = torch.randint(4, (30, 1))
    x = nn.functional.one_hot(tokens, 4).float()
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(module(x[:-1])[0]).flatten(0, 1), tokens[1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.2

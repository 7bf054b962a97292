"""FrEIA 0.2: a trained SequenceINN becomes a flow of ours with the same log_prob."""

import pytest
import torch

from peers.trained import assert_same_flow, trained
from pygen.nn import convert

framework = pytest.importorskip("FrEIA.framework", reason="FrEIA is not installed")
modules = pytest.importorskip("FrEIA.modules", reason="FrEIA is not installed")


def dense(n_in, n_out):
    return torch.nn.Sequential(torch.nn.Linear(n_in, 16), torch.nn.ReLU(), torch.nn.Linear(16, n_out))


def conv(n_in, n_out):
    return torch.nn.Sequential(
        torch.nn.Conv2d(n_in, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, n_out, 3, padding=1)
    )


def inn(shape, *blocks):
    network = framework.SequenceINN(*shape)
    for block, options in blocks:
        network.append(block, **options)
        if block is modules.ActNorm:
            network.module_list[-1].init_on_next_batch = False
    return trained(network)


def assert_converts(network, shape, context=None, tolerance=1e-9):
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, context = (t if t is None else t.to(next(network.parameters()).dtype) for t in (x, context))
    conditions = None if context is None else [context]
    flow = convert.from_freia(network)

    def run(t, rev):
        y, log_det = network(t, c=conditions, rev=rev)
        # Blocks of constant volume answer with a number.
        return y, torch.as_tensor(log_det, dtype=t.dtype).expand(len(t))

    assert_same_flow(flow, lambda t: run(t, False), lambda t: run(t, True), x, context, tolerance)
    return flow


GLOW = (modules.GLOWCouplingBlock, {"subnet_constructor": dense})
SHUFFLE = (modules.PermuteRandom, {})


@pytest.mark.parametrize("features", [2, 5, 6])
@pytest.mark.parametrize("options", [{}, {"clamp": 0.7}, {"split_len": 1}, {"split_len": 0.7}], ids=str)
def test_a_glow_block_converts(features, options):
    assert_converts(inn((features,), (GLOW[0], GLOW[1] | options)), (features,))


@pytest.mark.parametrize("activation", ["TANH", "SIGMOID", torch.sin], ids=("TANH", "SIGMOID", "sin"))
def test_a_glow_block_that_clamps_in_another_way_converts(activation):
    block = GLOW[0], GLOW[1] | {"clamp_activation": activation, "clamp": 1.3}
    assert_converts(inn((5,), block), (5,))


def test_the_clamp_by_atan_is_the_ops_own():
    flow = convert.from_freia(inn((4,), GLOW))
    assert [layer.scale_map for layer in flow] == ["atan", "atan"]


def test_a_trained_stack_converts():
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    linear = (modules.FixedLinearTransform, {"M": 1.5 * rotation, "b": torch.arange(6.0)})
    network = inn((6,), GLOW, SHUFFLE, (modules.ActNorm, {}), GLOW, linear, SHUFFLE, GLOW)
    # trained() moved the matrix, but neither the inverse nor the determinant that FrEIA keeps beside it.
    fixed = network.module_list[4]
    fixed.M.data = (1.5 * rotation).t().double()
    fixed.M_inv.data, fixed.logDetM.data = fixed.M.data.inverse(), torch.linalg.slogdet(fixed.M.data)[1]
    flow = assert_converts(network, (6,), tolerance=1e-8)
    assert not any(p.requires_grad for name, p in flow.named_parameters() if "upper" in name)


def test_a_stack_of_image_layers_converts():
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2))).Q
    block = (modules.GLOWCouplingBlock, {"subnet_constructor": conv})
    network = inn((4, 3, 5), block, SHUFFLE, (modules.Fixed1x1Conv, {"M": rotation}), (modules.ActNorm, {}), block)
    fixed = network.module_list[2]
    fixed.M_inv.data = fixed.M.data[:, :, 0, 0].inverse()[:, :, None, None]
    fixed.logDetM.data = torch.linalg.slogdet(fixed.M.data[:, :, 0, 0])[1]
    assert_converts(network, (4, 3, 5))


def test_a_condition_becomes_the_context():
    conditional = GLOW[0], GLOW[1] | {"cond": 0, "cond_shape": (3,)}
    network = inn((5,), conditional, SHUFFLE, GLOW, conditional)
    flow = assert_converts(network, (5,), torch.randn(40, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="conditional, context must be given"):
        flow(torch.zeros(2, 5, dtype=torch.float64))


def test_in_float32_a_stack_agrees_to_1e_5():
    assert_converts(inn((6,), GLOW, SHUFFLE, GLOW).float(), (6,), tolerance=1e-5)


def test_an_actnorm_that_saw_no_data_yet_is_set_by_the_first_batch_here_as_well():
    network = framework.SequenceINN(3)
    network.append(modules.ActNorm)
    z, _ = convert.from_freia(network).train()(5 + 3 * torch.randn(200, 3))
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)


def two_conditions():
    network = framework.SequenceINN(4)
    for index in (0, 1):
        network.append(*GLOW[:1], cond=index, cond_shape=(2,), **GLOW[1])
    return network


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda: inn((4,), (modules.AllInOneBlock, GLOW[1])),
            TypeError,
            "cannot convert a FrEIA.*AllInOneBlock; it con",
        ),
        (lambda: torch.nn.Linear(2, 2), TypeError, "cannot convert a torch.nn.modules.linear.Linear"),
        (two_conditions, ValueError, r"at most one condition, got conditions \[0, 1\]"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        convert.from_freia(make())

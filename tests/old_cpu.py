"""Imports pygen and runs every op on a CPU without AVX: `make test-old-cpu` starts this under qemu-user.

A function compiled for a newer CPU that slipped into the baseline, or into a static initialiser, ends this script with
an illegal instruction.
"""

import torch

from pygen import backends, ops, reference, ssa

assert backends.cpu_capabilities() == ["default"], backends.cpu_capabilities()
x, scale, shift = torch.randn(3, 5, 70, dtype=torch.float64).unbind()
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for complement in (False, True):
        y = ops.cumax(x.to(dtype), complement=complement)
        torch.testing.assert_close(y, reference.cumax(x.to(dtype), -1, complement), rtol=1e-2, atol=1e-3)
    for scale_map in reference.SCALE_MAPS:
        leaves = [v.to(dtype).requires_grad_() for v in (x, scale, shift)]
        y, log_det = ops.affine_coupling(*leaves, scale_map=scale_map)
        want, _ = reference.affine_coupling(*leaves, scale_map)
        torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
        torch.autograd.grad(y.sum() + log_det.sum(), leaves)
    for tails, count in (("linear", 4), ("circular", 5), ("none", 6)):
        shapes = ((7, 9), (7, 9, 5), (7, 9, 5), (7, 9, count))
        leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        for inverse in (False, True):
            y, log_det = ops.rational_quadratic_spline(
                *leaves, inverse=inverse, tails=None if tails == "none" else tails
            )
            want, _ = reference.rational_quadratic_spline(*leaves, inverse, tails)
            torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
            torch.autograd.grad(y.sum() + log_det.sum(), leaves)
for dtype in (torch.float64, torch.float32):
    vector, matrix = torch.zeros(6, dtype=dtype), torch.eye(6, dtype=dtype)
    leaves = [t.requires_grad_() for t in (torch.randn(3, 6, 5, dtype=dtype), vector, matrix)]
    y, log_det = ops.actnorm_conv1x1(leaves[0], vector, vector, matrix, matrix, vector, vector + 1, matrix.detach())
    torch.testing.assert_close(y, leaves[0])
    torch.autograd.grad(y.sum() + log_det.sum(), leaves)
rows, codes = torch.randn(70, 33), torch.randn(50, 33)
for metric in reference.METRICS:
    found = ops.nearest_codebook(rows, codes, metric=metric)
    assert torch.equal(found, reference.nearest_codebook(rows[None], codes[None], metric, None, False, False)[1][0])
counts, sums = ops.codebook_statistics(rows, found, 50)
torch.testing.assert_close(sums, torch.zeros(50, 33).index_add(0, found, rows))
# The same trajectories as on a machine with AVX-512, where this sum was taken.
network = ssa.Network(
    {"A": 40, "B": 3},
    {"k": 0.01, "h": 2.5},
    [
        ssa.Reaction({"A": 2}, {"B": 1}, rate="k"),
        ssa.Reaction({"B": 1}, {"A": 2}, propensity="exp(-h/2) * B + 1/(1 + B^h)"),
        ssa.Reaction({}, {"A": 1}, rate="log(h)"),
    ],
)
run = ssa.simulate(network, t=range(50), trajectories=100, seed=1)
weights = torch.arange(run.counts.numel()).view_as(run.counts) % 8191
assert (run.counts * weights).sum() == 899169717, (run.counts * weights).sum()
print("every op runs without AVX")

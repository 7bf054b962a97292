"""Codebooks of several processes: each scenario of codebook_processes.py is a test here. What needs no second process
is tested in this one."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from pygen.nn import _codebook_sync as sync
from pygen.nn.residual_vq import ResidualVQ
from pygen.nn.vector_quantize import VectorQuantize

SCRIPT = Path(__file__).with_name("codebook_processes.py")
SCENARIOS = re.findall(r"^@scenario\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)
SLOW = ("a_compiled_step_has_one_graph_and_one_all_reduce",)
# All scenarios take a tenth of it; one that hangs ends here at the latest.
LIMIT = 200

needs_processes = pytest.mark.skipif(
    not hasattr(os, "fork") or not distributed.is_available(), reason="needs fork and torch.distributed"
)


def run(folder, names):
    """{(processes, rank): {scenario: report}} of two and three processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, *names], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One run of all scenarios for all tests: also where pytest-xdist spreads the tests over workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "codebook_processes"
    finished = folder / "finished"
    try:
        folder.mkdir()
    except FileExistsError:
        until = time.monotonic() + LIMIT
        while not finished.exists() and time.monotonic() < until:
            time.sleep(0.1)
        return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    try:
        return run(folder, [name for name in SCENARIOS if name not in SLOW])
    finally:
        finished.touch()


def assert_passed(reports, name):
    assert sorted(reports) == ["2-0", "2-1", "3-0", "3-1", "3-2"], "a process ended without a report"
    failures = [report[name]["failure"] for report in reports.values() if report[name]["failure"]]
    assert not failures, "\n".join(failures)


@needs_processes
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in SLOW])
def test_two_and_three_processes(reports, name):
    assert_passed(reports, name)


@needs_processes
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_compiled_processes(tmp_path, name):
    assert_passed(run(tmp_path, [name]), name)


def trained(model, batches, block):
    """The model after the batches: each in a block of its own, all in one block, or without."""
    if block == "one":
        with sync.packed_codebook_updates(model):
            for x in batches:
                model(x)
    else:
        for x in batches:
            with sync.packed_codebook_updates(*([model] if block == "each" else [])):
                model(x)
    return model


def assert_same_state(a, b, exactly=True):
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        # Sums that are only ordered differently differ by a few roundings of float32.
        tolerance = 0 if exactly else 1e-6
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return VectorQuantize(4, 16)


@pytest.fixture
def batches():
    return list(torch.randn(3, 2, 30, 4, generator=torch.Generator().manual_seed(1)))


def test_a_block_around_each_step_changes_nothing_in_one_process(quantizer, batches):
    other = copy.deepcopy(quantizer)
    assert_same_state(trained(quantizer, batches, "each"), trained(other, batches, None))


def test_codes_stay_as_they_are_until_the_block_ends(quantizer, batches):
    before = copy.deepcopy(quantizer.state_dict())
    with sync.packed_codebook_updates(quantizer):
        _, first, _ = quantizer(batches[0])
        _, second, _ = quantizer(batches[0])
        assert all(torch.equal(t, before[name]) for name, t in quantizer.state_dict().items())
    assert torch.equal(first, second)
    assert not torch.equal(quantizer.codebook, before["_codebook.embed"][0])


def test_several_uses_in_one_block_are_averages_one_after_the_other(quantizer, batches):
    expected = copy.deepcopy(quantizer._codebook)
    for x in batches:
        # By the definition of an exponential moving average, with the indices of the codes as they were.
        index = torch.cdist(x.flatten(0, 1), quantizer.codebook).argmin(1)
        one_hot = torch.nn.functional.one_hot(index, 16).float()
        expected.cluster_size.lerp_(one_hot.sum(0), 0.2)
        expected.embed_avg.lerp_(one_hot.T @ x.flatten(0, 1), 0.2)
    expected.update_ema()
    assert_same_state(trained(quantizer, batches, "one")._codebook, expected, exactly=False)


def test_the_outermost_block_counts(quantizer, batches):
    other = copy.deepcopy(quantizer)
    with sync.packed_codebook_updates(quantizer):
        for x in batches:
            with sync.packed_codebook_updates(quantizer):
                quantizer(x)
    assert_same_state(quantizer, trained(other, batches, "one"))


def test_a_module_given_twice_is_updated_once(quantizer, batches):
    other = copy.deepcopy(quantizer)
    with sync.packed_codebook_updates(quantizer, torch.nn.Sequential(quantizer), quantizer._codebook):
        quantizer(batches[0])
    assert_same_state(quantizer, trained(other, batches[:1], "each"))


def test_an_error_in_the_block_leaves_the_codebook_alone(quantizer, batches):
    before = sync.codebook_checksums(quantizer)
    with pytest.raises(KeyError), sync.packed_codebook_updates(quantizer):
        quantizer(batches[0])
        raise KeyError
    assert sync.codebook_checksums(quantizer) == before and quantizer._codebook.pending is None
    quantizer(batches[0])
    assert sync.codebook_checksums(quantizer) != before


def test_the_checksum_sees_every_bit_of_every_buffer(quantizer):
    before = sync.codebook_checksums(quantizer)
    assert list(before) == ["_codebook"] and sync.codebook_checksums(copy.deepcopy(quantizer)) == before
    for name, tensor in quantizer._codebook.state_dict().items():
        bits = tensor.flatten().view(torch.uint8)
        for place in (0, len(bits) // 2, len(bits) - 1):
            bits[place] ^= 1
            assert sync.codebook_checksums(quantizer) != before, (name, place)
            bits[place] ^= 1
    assert sync.codebook_checksums(quantizer) == before
    codes = quantizer.codebook
    codes[0], codes[1] = codes[1].clone(), codes[0].clone()
    assert sync.codebook_checksums(quantizer) != before, "the same codes in another order"


def test_checksums_name_every_codebook_once():
    model = torch.nn.ModuleDict(
        {
            "one": VectorQuantize(4, 5),
            "shared": ResidualVQ(dim=4, num_quantizers=3, codebook_size=5, shared_codebook=True),
        }
    )
    assert list(sync.codebook_checksums(model)) == ["one._codebook", "shared.layers.0._codebook"]


def rows_of(heads=2, n=50, d=3):
    return torch.randn(heads, n, d), torch.rand(heads, n) > 0.5


def test_proposals_are_different_valid_rows():
    rows, valid = rows_of()
    proposals, keys = sync.propose_rows(rows, valid, 10)
    assert proposals.shape == (2, 10, 3) and (keys > 0).all() and (keys <= 1).all()
    for head in range(2):
        found = (proposals[head][:, None] == rows[head][valid[head]]).all(-1)
        assert (found.sum(1) == 1).all() and (found.sum(0) <= 1).all()


def test_proposals_are_as_many_as_there_are_valid_rows():
    rows, valid = rows_of(n=4)
    valid[:] = torch.tensor([[True, False, True, True], [False] * 4])
    rows[1] = torch.nan
    proposals, keys = sync.propose_rows(rows, valid, 10)
    assert (keys > 0).sum(1).tolist() == [3, 0]
    assert (proposals[keys == 0] == 0).all(), "a masked row, whatever it holds, must not reach the sum"
    assert sync.propose_rows(rows[:, :0], valid[:, :0], 10)[0].shape == (2, 10, 3)


def test_every_row_is_as_likely_to_be_proposed():
    rows = torch.arange(20.0).view(1, 20, 1)
    torch.manual_seed(0)
    drawn = torch.cat([sync.propose_rows(rows, torch.ones(1, 20) > 0, 5)[0].flatten() for _ in range(2000)])
    counts = torch.bincount(drawn.long(), minlength=20)
    assert (counts - 500).abs().max() < 4.5 * (2000 * 0.25 * 0.75) ** 0.5  # 4.5 standard deviations of a binomial


def test_dead_codes_get_different_proposals_and_the_rest_wait():
    proposals, keys = torch.randn(1, 3, 2), torch.tensor([[0.2, 0.0, 0.9]])
    dead = torch.tensor([[False, True, True, False, True]])
    vectors, revived = sync.choose_replacements(proposals, keys, dead)
    assert revived.tolist() == [[False, True, True, False, False]]
    assert torch.equal(vectors[0, 1], proposals[0, 2]) and torch.equal(vectors[0, 2], proposals[0, 0])
    vectors, revived = sync.choose_replacements(proposals, keys, dead, torch.tensor([[0.0, 3.0, 1.0, 0.0, 2.0]]))
    assert revived.tolist() == [[False, False, True, False, True]], "the smallest first"
    assert torch.equal(vectors[0, 2], proposals[0, 2]) and torch.equal(vectors[0, 4], proposals[0, 0])
    assert not sync.choose_replacements(proposals[:, :0], keys[:, :0], dead)[1].any()


def test_sampled_rows_are_different_while_there_are_enough():
    rows, valid = rows_of()
    for num in (5, int(valid.sum(1).min())):
        sampled = sync.sample_rows(rows, valid, num)
        for head in range(2):
            found = (sampled[head][:, None] == rows[head][valid[head]]).all(-1)
            assert (found.sum(1) == 1).all() and (found.sum(0) <= 1).all()
    repeated = sync.sample_rows(rows[:, :3], torch.ones(2, 3) > 0, 7)
    assert len(repeated[0].unique(dim=0)) == 3


def test_one_process_reduces_nothing():
    tensors = [torch.ones(2), torch.ones(0, dtype=torch.int64)]
    reduced = sync.all_reduce_packed(tensors)
    assert all(a is b for a, b in zip(reduced, tensors, strict=True))
    sync.assert_codebooks_equal(VectorQuantize(2, 3))

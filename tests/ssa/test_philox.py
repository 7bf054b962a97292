"""The random numbers of the compiled engine: the published ones, and those of the plain Python reference."""

import numpy as np
import pytest
import torch

from pygen.ssa import engine
from pygen.ssa.reference import philox4x32, uniforms

pytestmark = pytest.mark.skipif(not engine.is_compiled(), reason="built without the compiled engine")

# Random123's known answers (kat_vectors of its distribution): counter, key, the four numbers.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def compiled(counters, key):
    return torch.ops.pygen.ssa_philox(torch.tensor(counters, dtype=torch.int64), *key)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_engine_gives_the_published_numbers(counter, key, answer):
    assert " ".join(f"{word:08x}" for word in compiled([counter], key)[0].tolist()) == answer


def test_the_engine_and_the_reference_agree_on_random_counters_and_keys():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 1 << 32, (500, 4))
    counters[:20] >>= 31  # carries between words show near 0 and near 2^32
    counters[20:40] |= 0xFFFFFFFE
    for key in [*rng.integers(0, 1 << 32, (4, 2)).tolist(), [0, 0xFFFFFFFF]]:
        truth = [list(philox4x32(counter, key)) for counter in counters.tolist()]
        assert compiled(counters.tolist(), key).tolist() == truth


def test_every_word_of_counter_and_key_matters():
    base = compiled([[1, 2, 3, 4]], [5, 6])[0].tolist()
    others = [compiled([[1 + (i == j) for j in range(4)]], [5, 6])[0].tolist() for i in range(4)]
    others += [compiled([[1, 2, 3, 4]], key)[0].tolist() for key in ([4, 6], [5, 7])]
    assert all(set(base).isdisjoint(other) for other in others)


def test_a_counter_of_another_shape_or_dtype_is_refused():
    for wrong in (torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(4, 2, dtype=torch.int64).T):
        with pytest.raises(RuntimeError, match=r"ssa_philox: counter must be a contiguous int64 tensor \[n, 4\]"):
            torch.ops.pygen.ssa_philox(wrong, 0, 0)


# ---- the two uniforms of a pass, seen through trajectories -----------------------------------------------------------


class OnePass:
    """A network of one jump: its time is -log(u1), and its reaction is the bin of width 1/64 that u2 lies in."""

    bins = 64

    def __init__(self, seed, stream, first, n):
        from pygen.ssa import Network, Reaction, simulate

        species = {f"S{j}": 0 for j in range(self.bins)}
        reactions = [Reaction({}, {f"S{j}": 1}, rate=1 / self.bins) for j in range(self.bins)]
        options = {"stream": stream, "first": first, "stop": " + ".join(species) + " == 1", "method": "direct"}
        run = simulate(Network(species, {}, reactions), [99.0], n, seed, **options)
        self.time, self.bin = run.stop_time.tolist(), run.counts[:, 0].argmax(1).tolist()


def engine_log(x):
    one = torch.tensor([x], dtype=torch.float64)
    return torch.ops.pygen.ssa_math(19, one, one).item()


@pytest.mark.parametrize(
    ("seed", "stream", "first"),
    [(0, 0, 0), (1, 2, 3), (0xFFFFFFFF, 0xFFFFFFFE, (1 << 32) - 5), (7, 0, (1 << 62) - 10)],
)
def test_waiting_time_and_choice_are_those_of_the_uniforms_at_any_trajectory_index(seed, stream, first):
    n = 10
    ensemble = OnePass(seed, stream, first, n)
    for i in range(n):
        u1, u2 = uniforms(seed, stream, first + i, 0)
        assert ensemble.time[i] == -engine_log(u1)
        assert ensemble.bin[i] == int(u2 * OnePass.bins)


def test_uniforms_of_extreme_words_stay_in_their_intervals(monkeypatch):
    """u1 in (0, 1], so that its logarithm is finite and not positive; u2 in [0, 1), so that it chooses a reaction."""
    monkeypatch.setattr("pygen.ssa.reference.philox4x32", lambda counter, key: (0, 0, 0, 0))
    u1, u2 = uniforms(0, 0, 0, 0)
    assert (u1, u2) == (2.0**-53, 0.0) and 36 < -engine_log(u1) < 37
    monkeypatch.setattr("pygen.ssa.reference.philox4x32", lambda counter, key: (0xFFFFFFFF,) * 4)
    u1, u2 = uniforms(0, 0, 0, 0)
    assert (u1, u2) == (1.0, 1.0 - 2.0**-53) and engine_log(u1) == 0.0

"""The software AMX does what Intel's manual says, and pygen's search in AMX code is exact under it.

Where the CPU has AMX nothing is emulated, and the search's own tests run on it.
"""

import json
import math
import re
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import amx
import numpy as np
import pytest

from pygen import _native

pytestmark = pytest.mark.skipif(bool(amx.missing()), reason=amx.missing())

emulated = pytest.mark.skipif(amx.in_hardware(), reason="this CPU has AMX: nothing is emulated")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(the emulator, the program), compiled side by side."""
    folder = tmp_path_factory.mktemp("amx")
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(lambda build: build(folder), (amx.emulator, amx.program)))


@pytest.fixture
def run(compiled):
    """Runs the program with arguments, its AMX instructions in software."""
    if amx.in_hardware():
        pytest.skip("this CPU has AMX: nothing is emulated")
    emulator, program = compiled

    def run(*arguments, stdin=b""):
        return subprocess.run(
            [program, *arguments], input=stdin, capture_output=True, env=amx.preloaded(emulator), timeout=60
        )

    return run


def succeeded(done) -> bytes:
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr.decode()}"
    return done.stdout


# ---- the manual's arithmetic -----------------------------------------------------------------------------------------

BFLOAT16, SIGNED_SIGNED, SIGNED_UNSIGNED, UNSIGNED_SIGNED, UNSIGNED_UNSIGNED = range(5)
# Finest unit of a product of two bfloat16 numbers that are not denormal: 2^-133 squared.
UNIT = 266


def multiplied(run, kind, a, b, c, strides=(64, 64, 64)):
    """C + A B by the program; a: (m, 4k) bytes, b: (k, 4n) bytes, c: (m, n) of 4 bytes."""
    a, b = a.view(np.uint8), b.view(np.uint8)
    header = struct.pack("7i", kind, *a.shape, b.shape[1], *strides)
    done = run("multiply", stdin=header + a.tobytes() + b.tobytes() + c.tobytes())
    return np.frombuffer(succeeded(done), c.dtype).reshape(c.shape)


def rounded(numerator: int, zero: float) -> float:
    """numerator * 2^-266 to the nearest float32, ties to even, denormals to zero; `zero` if it is exactly that."""
    magnitude = abs(numerator)
    if magnitude == 0:
        return zero
    shift = max(magnitude.bit_length() - 24, 0)
    kept, rest = magnitude >> shift, magnitude & ((1 << shift) - 1)
    kept += rest * 2 + (kept & 1) > 1 << shift
    value = kept << shift
    if value < 1 << (UNIT - 126):
        value = 0
    result = math.inf if value >= 1 << (UNIT + 128) else math.ldexp(float(value), -UNIT)
    return math.copysign(result, numerator)


def fused(a: float, b: float, c: float) -> float:
    """a * b + c rounded once; a and b of bfloat16, or 1, c of float32, no denormals among them."""
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c
    exact = int(math.ldexp(a, 133)) * int(math.ldexp(b, 133)) + (int(math.ldexp(c, 149)) << (UNIT - 149))
    return rounded(exact, a * b + c if a * b == 0 else 0.0)


def added(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    return rounded((int(math.ldexp(a, 149)) + int(math.ldexp(b, 149))) << (UNIT - 149), a + b)


def without_denormals(x: np.ndarray) -> list[list[float]]:
    with np.errstate(invalid="ignore"):  # of signalling NaN
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0, x), x).astype(float).tolist()


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def by_the_manual(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """TDPBF16PS in exact integers: a (m, 2k), b (k, 2n) bfloat16 bits, c (m, n) float32."""
    a, b, c = without_denormals(widened(a)), without_denormals(widened(b)), without_denormals(c)
    result = [row[:] for row in c]
    for m, row in enumerate(result):
        for n in range(len(row)):
            even = odd = 0.0
            for k in range(len(b)):
                even = fused(a[m][2 * k], b[k][2 * n], even)
                odd = fused(a[m][2 * k + 1], b[k][2 * n + 1], odd)
            row[n] = added(row[n], added(even, odd))
    return np.array(result, dtype=np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits, cut off."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def random_bits(rng, *shape) -> np.ndarray:
    """Every sign, exponent and mantissa; infinities and NaN among them."""
    return rng.integers(0, 1 << 16, shape, dtype=np.uint16)


def near_underflow(rng, *shape) -> np.ndarray:
    """Products on both sides of the least normal number, denormals among the factors."""
    exponents = np.where(rng.random(shape) < 0.1, 0, rng.integers(59, 69, shape))
    return (rng.integers(0, 2, shape) << 15 | exponents << 7 | rng.integers(0, 128, shape)).astype(np.uint16)


def of_size(size):
    return lambda rng, *shape: to_bfloat16(size * rng.standard_normal(shape))


FACTORS = {
    "gaussian": of_size(1),
    "overflowing": of_size(2e19),
    "near underflow": near_underflow,
    "random bits": random_bits,
    "signed zeros": lambda rng, *shape: (rng.integers(0, 2, shape) << 15).astype(np.uint16),
    # Large terms that cancel: every order of summation gives another result.
    "cancelling": lambda rng, *shape: to_bfloat16(
        np.ldexp(rng.integers(128, 256, shape), rng.integers(-10, 11, shape)) * rng.choice([-1, 1], shape)
    ),
}
SHAPES = [(16, 16, 16), (16, 16, 5), (3, 16, 16), (16, 1, 16), (7, 9, 11), (1, 1, 1)]  # m, k pairs, n


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[4:5], ids=str)
def test_every_rounding_is_the_manuals(run, factors, shape):
    rng = np.random.default_rng(1)
    m, k, n = shape
    a, b = FACTORS[factors](rng, m, 2 * k), FACTORS[factors](rng, k, 2 * n)
    with np.errstate(all="ignore"):
        c = (widened(FACTORS[factors](rng, m, n)) * widened(FACTORS[factors](rng, m, n))).astype(np.float32)
    result, expected = multiplied(run, BFLOAT16, a, b, c), by_the_manual(a, b, c)
    # Of NaN the manual gives no bits.
    assert np.array_equal(np.isnan(result), np.isnan(expected))
    assert np.array_equal(np.nan_to_num(result).view(np.uint32), np.nan_to_num(expected).view(np.uint32))


@pytest.mark.parametrize(
    ("factors", "expected"),
    # 2^-126 (1 - 2^-25) is a tie, and even is up; three quarters of a unit below it is not, and vanishes.
    [((2.0**-63, 2.0**-63, 2.0**-76, -(2.0**-75)), 2.0**-126), ((2.0**-63, 2.0**-63, 1.5 * 2.0**-76, -(2.0**-75)), 0)],
)
def test_a_sum_is_flushed_where_it_is_tiny_after_rounding(run, factors, expected):
    a = to_bfloat16(np.array([[factors[0], 0, factors[2], 0]]))
    b = to_bfloat16(np.array([[factors[1], 0], [factors[3], 0]]))
    c = np.zeros((1, 1), np.float32)
    assert multiplied(run, BFLOAT16, a, b, c).item() == expected
    assert by_the_manual(a, b, c).item() == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strides", [(64, 64, 64), (100, 68, 1000), (-64, -72, 128), (4096, 64, -640)], ids=str)
def test_small_integers_multiply_exactly_at_every_size_and_stride(run, shape, strides):
    rng = np.random.default_rng(2)
    m, k, n = shape
    a, b = rng.integers(-8, 9, (m, 2 * k)), rng.integers(-8, 9, (k, 2 * n))
    c = rng.integers(-99, 100, (m, n)).astype(np.float32)
    result = multiplied(run, BFLOAT16, to_bfloat16(a), to_bfloat16(b), c, strides)
    # Row k of B holds, for each column, the elements 2k and 2k + 1.
    assert np.array_equal(result, c + a @ b.reshape(k, n, 2).transpose(0, 2, 1).reshape(2 * k, n))


def test_products_are_near_those_in_float64(run):
    rng = np.random.default_rng(3)
    a, b = of_size(1)(rng, 16, 32), of_size(1)(rng, 16, 32)
    c = rng.standard_normal((16, 16)).astype(np.float32)
    wide_a, wide_b = widened(a).astype(float), widened(b).astype(float).reshape(16, 16, 2).transpose(0, 2, 1)
    wide_b = wide_b.reshape(32, 16)
    difference = np.abs(multiplied(run, BFLOAT16, a, b, c) - (c + wide_a @ wide_b))
    # Eighteen roundings on the way of each product, half a unit each.
    assert np.all(difference <= 18 * 2.0**-24 * (np.abs(c) + np.abs(wide_a) @ np.abs(wide_b)))


@pytest.mark.parametrize(
    ("kind", "a_type", "b_type"),
    [
        (SIGNED_SIGNED, np.int8, np.int8),
        (SIGNED_UNSIGNED, np.int8, np.uint8),
        (UNSIGNED_SIGNED, np.uint8, np.int8),
        (UNSIGNED_UNSIGNED, np.uint8, np.uint8),
    ],
)
@pytest.mark.parametrize("shape", [(16, 16, 16), (5, 7, 9)], ids=str)
def test_bytes_multiply_modulo_two_to_the_32(run, kind, a_type, b_type, shape):
    rng = np.random.default_rng(4)
    m, k, n = shape
    a, b = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((m, 4 * k), (k, 4 * n)))
    a[0], b[:, :4] = 255, 255
    c = rng.integers(-(2**31), 2**31, (m, n)).astype(np.int32)
    wide_b = b.view(b_type).astype(np.int64).reshape(k, n, 4).transpose(0, 2, 1).reshape(4 * k, n)
    expected = (c + a.view(a_type).astype(np.int64) @ wide_b).astype(np.int32)
    assert np.array_equal(multiplied(run, kind, a, b, c), expected)


# ---- the machine around it -------------------------------------------------------------------------------------------


def test_every_form_of_memory_operand_is_understood(run):
    succeeded(run("operands"))


def test_each_thread_has_its_own_tiles(run):
    succeeded(run("threads"))


def test_registers_flags_and_rounding_mode_are_left_alone(run):
    succeeded(run("state"))


def test_a_load_may_start_at_a_later_row(run):
    succeeded(run("start_row"))


@emulated
def test_without_the_emulator_the_first_instruction_kills(compiled):
    done = subprocess.run([compiled[1], "start_row"], capture_output=True)
    assert done.returncode == -signal.SIGILL


@pytest.mark.parametrize(
    ("how", "sentence"),
    {
        "palette": "LDTILECFG at 0x.*: palette must be 0 or 1, got 2",
        "reserved": "LDTILECFG .* bytes 2-15, 32-47 and 56-63 of the configuration must be 0",
        "reserved tile": "LDTILECFG .* bytes 2-15, 32-47 and 56-63 of the configuration must be 0",
        "rows": "LDTILECFG .* tile 3 .* got 17 of 64",
        "columns": "LDTILECFG .* tile 3 .* got 16 of 65",
        "rows without columns": "LDTILECFG .* tile 3 .* got 16 of 0",
        "missing tile": "TILELOADD .* tile 3 is not part of the configuration",
        "zero of a missing tile": "TILEZERO .* tile 3 is not part of the configuration",
        "odd bytes": "TILELOADD .* tile 3 must have rows of whole 4-byte elements, got 62",
        "start row": "TILELOADD .* start_row must be below the tile's 16 rows, got 16",
        "destination rows": "TDPBF16PS .* got 15 x 64, 16 x 64, 16 x 64",
        "destination columns": "TDPBF16PS .* got 16 x 60, 16 x 64, 16 x 64",
        "depth": "TDPBF16PS .* got 16 x 64, 16 x 60, 16 x 64",
        "same tile": "TDPBF16PS .* the three tiles must be different",
        "not configured": "TILELOADD .* no tiles are configured in this thread",
        "released": "TILELOADD .* no tiles are configured in this thread",
    }.items(),
)
def test_misuse_dies_and_the_emulator_says_of_what(run, how, sentence):
    done = run("misuse", how)
    assert done.returncode == -signal.SIGABRT
    (line,) = done.stderr.decode().splitlines()
    assert re.match("AMX emulator: " + sentence, line), line


def test_correct_use_does_not_die(run):
    succeeded(run("misuse", "not at all"))


def test_other_illegal_instructions_still_kill(run):
    assert run("ud2").returncode == -signal.SIGILL


def test_the_process_keeps_its_own_sigill_handler(run):
    done = run("handler")  # ends by raising the signal with the default action
    assert done.returncode == -signal.SIGILL, done.stderr.decode()


# ---- pygen -----------------------------------------------------------------------------------------------------------

SEARCH = """
import ctypes, json
import torch
from codebook_data import KINDS, METRICS, codebook_set
from pygen import backends, ops, reference

report = {"offered": backends.cpu_capabilities(), "differences": [], "searches": 0}
torch.set_num_threads(2)

def compare(name, x, codebook, metric):
    with backends.cpu_capability("amx"):
        found = ops.nearest_codebook(x, codebook, metric=metric)
    _, expected, _ = reference.nearest_codebook(x[None], codebook[None], metric, None, False, False)
    report["searches"] += 1
    if not torch.equal(found, expected[0]):
        report["differences"].append([name, x.size(1), metric, (found != expected[0]).sum().item()])

if "amx" in report["offered"]:
    for i, kind in enumerate(KINDS):
        for d in (5, 24, 32, 33, 64, 100)[i % 2 :: 2]:
            x, codebook = codebook_set(kind, 40, 70, d, torch.bfloat16 if d == 64 else torch.float32)
            for metric in METRICS:
                compare(kind, x, codebook, metric)
    # The products of the nearest code's elements are below the least normal float32, and zero to AMX; in float64 they
    # add up. The last code is of ordinary size and sets the scale of all.
    for d in (4096, 16384):
        code = torch.full((1, d), 255 / 256 * 2.0**-63)
        codebook = torch.cat([torch.zeros(32, d), code.expand(32, d), torch.eye(1, d)])
        compare("vanishing products", code.expand(20, d), codebook, "euclidean")
this = ctypes.CDLL(None)
if hasattr(this, "pygen_amx_emulated_instructions"):
    this.pygen_amx_emulated_instructions.restype = ctypes.c_ulonglong
    report["instructions"] = this.pygen_amx_emulated_instructions()
print(json.dumps(report))
"""


@pytest.fixture(scope="session")
def search_report(compiled):
    if _native.C is None or "amx" not in _native.C.build_info()["cpu_levels"].split(","):
        pytest.skip("pygen was built without its AMX level")
    if "avx512_vnni" not in amx.cpu_flags():
        pytest.skip("the AMX level is for CPUs that have AVX-512 with VNNI as well")
    environment = amx.preloaded(compiled[0], PYTHONPATH=str(Path(__file__).parent / "ops"), OMP_NUM_THREADS="2")
    # faulthandler asks for SIGILL too, as it does under pytest.
    command = [sys.executable, "-X", "faulthandler", "-c", SEARCH]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


def test_pygen_offers_its_amx_level(search_report):
    assert search_report["offered"][-1] == "amx"


def test_the_search_in_amx_code_is_exact(search_report):
    assert search_report["searches"] > 200
    assert search_report["differences"] == []


@emulated
def test_the_search_has_executed_amx_instructions(search_report):
    assert search_report["instructions"] > search_report["searches"] > 0

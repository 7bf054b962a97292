"""The benchmark harness: what it refuses to time, what it writes down, what it says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pygen import backends, models, ops, ssa
from pygen.benchmarks import machine, measure, memory, registry, results, runner, simulators, table
from pygen.benchmarks.cases import kmeans, nearest_codebook, on_lstm, spectral_norm, vector_quantize
from pygen.benchmarks.cases import ssa as ssa_cases
from pygen.benchmarks.registry import BEST, Case, Floor, Inputs, Target, Unavailable, as_tuple, call, max_error

pytest.importorskip("typer")
typer_testing = pytest.importorskip("typer.testing")

CPU = torch.device("cpu")
QUICK = 0.02  # seconds of timing

# From the specifications: (op, case, peer, at least so many times as fast, at most so many times its time).
SPECIFIED = [
    ("cumax", "4096x4096 forward", "clone", None, 1.2),
    ("cumax", "4096x4096 forward", "compiled", 1.7, None),
    ("cumax", "512x512 forward", "eager", 3, None),
    ("cumax", "512x512 forward", "compiled", 3, None),
    ("cumax", "512x512 forward+backward", "eager", 3, None),
    ("cumax", "512x512 forward+backward", "compiled", 3, None),
    ("cumax", "4x4 call overhead", "softmax", None, 1.5),
    ("affine_coupling", "64x24x32x32 forward+backward", "compiled", 2, None),
    ("affine_coupling", "4096x32 forward+backward", "eager", 2.5, None),
    ("affine_coupling", "4096x32 forward+backward", "compiled", 2.5, None),
    ("rational_quadratic_spline", "65536x8 forward", "nflows", 20, None),
    ("rational_quadratic_spline", "65536x8 forward", "compiled", 4, None),
    ("rational_quadratic_spline", "65536x16 forward", "nflows", 15, None),
    ("rational_quadratic_spline", "65536x16 forward", "compiled", 5, None),
    ("rational_quadratic_spline", "65536x8 forward+backward", "nflows", 15, None),
    ("rational_quadratic_spline", "65536x8 forward+backward", "compiled", 3, None),
    ("rational_quadratic_spline", "65536x16 forward+backward", "nflows", 12, None),
    ("rational_quadratic_spline", "65536x16 forward+backward", "compiled", 3, None),
    ("glow", "step 64x12x16x16 but for the conditioner forward+backward", "eager", 3, None),
    ("glow", "step 64x24x8x8 but for the conditioner forward+backward", "eager", 3, None),
    ("glow", "step 64x48x4x4 but for the conditioner forward+backward", "eager", 3, None),
    ("glow", "training step depth 32 32x12x16x16 reversible", "storing", None, 1.4),
    ("vector_quantize", "training step 8192x1024x64", "vector-quantize-pytorch", 10, None),
    ("vector_quantize", "training step 16384x8192x256", "vector-quantize-pytorch", 30, None),
    ("power_iteration", "1024x1024 one step", "W v and W^T u", None, 1.15),
    ("power_iteration", "512x4608 one step", "W v and W^T u", None, 1.15),
    ("spectral_norm", "weight 1024x1024 forward", "eager", 1.6, None),
    ("spectral_norm", "weight 512x4608 forward", "eager", 1.3, None),
    ("spectral_norm", "weight 128x1024 forward", "eager", 2, None),
    ("spectral_norm", "weight 64x27 forward", "eager", 3, None),
    ("spectral_norm", "weight 1024x1024 forward+backward", "eager", 2, None),
    ("spectral_norm", "weight 512x4608 forward+backward", "eager", 2, None),
    ("spectral_norm", "weight 128x1024 forward+backward", "eager", 2, None),
    ("spectral_norm", "weight 64x27 forward+backward", "eager", 2, None),
    ("spectral_norm", "weights of an SN-GAN discriminator forward", "eager", 4.5, None),
    ("spectral_norm", "weights of an SN-GAN discriminator forward+backward", "eager", 3, None),
    ("ssa", "immigration-death to t = 100", "gillespy2", 20, None),
    ("ssa", "dimer-decay to t = 30", "gillespy2", 25, None),
    ("ssa", "Vilar oscillator to t = 200", "gillespy2", 25, None),
    ("ssa", "heat shock to t = 1", "gillespy2", 10, None),
    ("ssa", "EGFR to t = 0.1", "gillespy2 -O3", 5, None),
    ("ssa", "immigration-death to t = 100, two threads", "one thread", 1.9, None),
    ("ssa", "start to first result, Vilar oscillator", None, None, 0.05),
    ("ssa", "start to first result, EGFR", None, None, 0.05),
]
# The same of what is not a time: (case, of, at least, at most).
SPECIFIED_SIMULATIONS = [
    ("immigration-death to t = 100", "events", 150e6, None),
    ("immigration-death to t = 0.1, 10^6 trajectories reduced", "memory", None, 200e6),
    ("immigration-death to t = 10, 10^6 trajectories reduced", "events", 1e10, None),
]
# Of the search for the nearest code, what holds where: (case, at least so many times as fast as the best peer, on).
SPECIFIED_SEARCHES = [
    ("65536x512x64", 5, ("amx",)),
    ("16384x8192x256", 10, ("amx",)),
    ("65536x1024x8", 1.5, ("amx",)),
    ("16384x65536x32", 4, ("amx",)),
    *(
        (name, 1.5, ("avx2", "avx512", "avx512_vnni"))
        for name in ("65536x512x64", "16384x8192x256", "65536x1024x8", "16384x65536x32")
    ),
]
# Of a layer of ON-LSTM, forward and backward, on the CPU: (case, at most so many times the time of nn.LSTM).
SPECIFIED_LAYERS = [
    ("T70 B20 I400 H1150 C10", 1.15),
    ("T35 B32 I128 H256 C16", 1.3),
    ("T100 B64 I128 H128 C8", 1.3),
]
OPS = [case for case in registry.cases() if case.op != "ssa"]
# What is measured that is neither an op nor a model. Of the first two there is no eager form: the peers are libraries.
OTHERS = {"vector_quantize", "kmeans", "spectral_norm"}
SIMULATIONS = {case.name: case for case in registry.cases() if case.op == "ssa"}
# A deep model's training step takes seconds.
SMALL_CASES = [case for case in OPS if torch.Size(case.shape).numel() <= 1 << 18 and "depth" not in case.name]


@pytest.fixture(autouse=True, scope="module")
def short_warm_up():
    """Nothing here depends on how well a timing is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "WARM_UP", 2e-3)
        patch.setattr(runner, "RATE_COPY_BYTES", 1 << 20)
        patch.setattr(runner, "RATE_GEMM_FLOPS", 1 << 25)
        yield


def square(x):
    return x * x


def a_case(name="case", backward=False, **changes):
    """Squares of eight numbers, with fields changed."""

    def make(device, generator):
        x = torch.randn(8, device=device, generator=generator)
        return Inputs((x,), (torch.ones(8),) if backward else ())

    fields = {
        "op": "square",
        "name": name,
        "shape": (8,),
        "make": make,
        "implementations": {"pygen": call(square), "eager": call(lambda x: x**2)},
        "reference": call(square),
        "floor": Floor(bytes=64),
    }
    return Case(**(fields | changes))


def run_one(case, **options):
    return runner.run_case(case, CPU, QUICK, **options)


class Counted:
    """A function that remembers how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def interrupt(*_):
    raise KeyboardInterrupt


# The registry


@pytest.mark.parametrize(("op", "name", "peer", "at_least", "at_most"), SPECIFIED)
def test_every_specified_target_is_measured(op, name, peer, at_least, at_most):
    (case,) = [case for case in registry.cases() if (case.op, case.name) == (op, name)]
    assert Target(peer, at_least, at_most) in case.targets


def test_the_reversible_glow_has_its_bound_on_memory():
    (case,) = [case for case in registry.cases() if case.name.endswith("reversible")]
    assert Target("storing", at_most=1 / 8, of="memory") in case.targets


def search_case(name):
    (case,) = [case for case in OPS if (case.op, case.name) == ("nearest_codebook", name)]
    return case


@pytest.mark.parametrize(("name", "at_least", "on"), SPECIFIED_SEARCHES)
def test_every_search_is_measured_against_the_best_of_its_peers(name, at_least, on):
    case = search_case(name)
    assert Target(BEST, at_least, on=on) in case.targets
    assert Target("compiled", 3, on=("cuda",)) in case.targets
    peers = {"eager", "compiled", "cdist", "faiss", "vector-quantize-pytorch"}
    assert peers < set(case.implementations) and {"SGEMM", "bf16 GEMM"} == set(case.yardsticks)


def test_the_search_of_a_million_rows_has_its_bound_on_memory():
    assert Target(None, at_most=1.5e9, of="memory") in search_case("1048576x16384x64 memory").targets


@pytest.mark.parametrize(("name", "at_most"), SPECIFIED_LAYERS)
def test_every_layer_is_measured_against_the_lstm_of_its_sizes(name, at_most):
    (case,) = [case for case in OPS if (case.op, case.name) == ("on_lstm", f"{name} forward+backward")]
    assert set(backends.cpu_capabilities()) <= set(on_lstm.CPU)
    gpu = {Target("nn.LSTM", at_most=1.5, on=("cuda",)), Target("eager", 5, on=("cuda",))}
    assert {Target("nn.LSTM", at_most=at_most, on=on_lstm.CPU)} | gpu == set(case.targets)


def test_the_lstm_beside_a_layer_has_its_sizes_and_its_gradients():
    case = on_lstm._case(3, 2, 6, 10, 5, backward=True)
    inputs = case.make(CPU, torch.Generator().manual_seed(0))
    output, of_input, *of_weights = case.yardsticks["nn.LSTM"](inputs)()
    assert output.shape == (3, 2, 10) and of_input.shape == (3, 2, 6)
    assert [g.shape for g in of_weights] == [(40, 6), (40, 10), (40,), (40,)]


@pytest.mark.parametrize(("name", "of", "at_least", "at_most"), SPECIFIED_SIMULATIONS)
def test_every_specified_bound_of_a_simulation_is_measured(name, of, at_least, at_most):
    assert Target(None, at_least, at_most, of) in SIMULATIONS[name].targets


def test_every_case_measures_a_public_op_or_model_beside_eager_and_compiled():
    for case in OPS:
        assert hasattr(ops, case.op) or case.op in models.MODELS or case.op in OTHERS, case.label
        if case.name.endswith(("reversible", "memory")) or case.op in OTHERS:
            continue  # the question there is what inverting costs beside storing, or what a library takes
        assert {"pygen", "eager", "compiled"} <= set(case.implementations), case.label
        assert case.overhead or case.floor.bytes or case.floor.flops, case.label


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.label)
def test_inputs_have_the_declared_shape_and_eager_and_ours_pass_the_check(case):
    inputs = case.make(CPU, torch.Generator(CPU).manual_seed(0))
    assert inputs.tensors[0].shape == case.shape and inputs.tensors[0].dtype == case.dtype
    assert ("backward" in case.name) == bool(inputs.grads)
    expected = case.reference(inputs.double())()
    assert all(output.dtype == torch.float64 for output in as_tuple(expected))
    for name in ("pygen", "eager"):
        assert case.error(case.implementations[name](inputs)(), expected) <= case.allowed_error, name


def test_forward_backward_returns_outputs_and_the_gradient_of_every_input():
    a, b, grad = torch.randn(3, 5).unbind()
    product, grad_a, grad_b = call(torch.mul)(Inputs((a, b), (grad,)))()
    assert torch.equal(product, a * b)
    assert torch.equal(grad_a, grad * b) and torch.equal(grad_b, grad * a)


def test_a_second_case_of_the_same_name_is_refused():
    existing = registry.cases()[0]
    with pytest.raises(ValueError, match="two benchmark cases"):
        registry.register(existing)


def test_a_target_against_nobody_is_refused():
    with pytest.raises(ValueError, match="names nobody"):
        a_case(targets=(Target("nobody", 2.0),))


def test_a_target_is_a_bound_from_one_side():
    assert Target("peer", 2.0).met(ours=1.0, peer=2.0) and not Target("peer", 2.0).met(ours=1.0, peer=1.9)
    assert Target("peer", at_most=1.2).met(ours=1.2, peer=1.0) and not Target("peer", at_most=1.2).met(1.3, 1.0)
    with pytest.raises(ValueError, match="either at_least or at_most"):
        Target("peer", 1.0, 2.0)
    assert Target("peer", at_most=0.5, of="memory").sentence() == "<= 0.5x the memory of peer"
    with pytest.raises(ValueError, match="at_most of time or memory"):
        Target("peer", 2.0, of="memory")


def test_a_target_without_a_peer_is_a_number():
    assert Target(None, at_most=0.05).sentence() == "<= 50 ms"
    assert Target(None, at_most=2e8, of="memory").sentence() == "<= 200 MB"
    assert Target(None, at_least=1.5e8, of="events").sentence() == ">= 150 M events/s"
    assert Target(None, at_most=0.05).met(0.05) and not Target(None, at_most=0.05).met(0.051)
    assert Target(None, at_least=1e6, of="events").met(1e6) and not Target(None, at_least=1e6, of="events").met(9e5)
    with pytest.raises(ValueError, match="without a peer"):
        Target("peer", 1e6, of="events")
    with pytest.raises(ValueError, match="at_most of time or memory"):
        Target(None, 2.0)


def test_a_target_may_hold_on_some_machines_only(monkeypatch):
    fast, slow = Target("eager", 1e9, on=("amx",)), Target("eager", 1e-9, on=("avx2", "default"))
    assert fast.sentence() == ">= 1e+09x as fast as eager (amx)"
    for place, expected in (("amx", [False]), ("avx2", [True]), ("avx512", [])):
        monkeypatch.setattr(machine, "place", lambda device, place=place: place)
        assert [target["met"] for target in run_one(a_case(targets=(fast, slow)))["targets"]] == expected


def test_places_are_the_levels_of_the_kernels_and_kinds_of_devices():
    assert machine.place(CPU) == str(machine.facts(CPU)["cpu_capability"] or "reference")
    assert machine.place(torch.device("cuda", 1)) == "cuda" and machine.has_matrix_unit(torch.device("cuda"))


def test_the_best_peer_is_whoever_is_the_fastest_and_nobody_knows_without_the_peers():
    def sleeping(seconds):
        return call(lambda x: (time.sleep(seconds), x * x)[1])

    peers = {"pygen": sleeping(4e-3), "eager": sleeping(16e-3), "fast": call(square)}
    case = a_case(implementations=peers, targets=(Target(BEST, 2),))
    (target,) = run_one(case)["targets"]
    assert target["met"] is False and target["speedup"] < 1 and target["peer"] == BEST
    assert run_one(case, peers=False)["targets"][0]["met"] is None


def test_figures_of_ours_are_written_down_and_shown():
    case = a_case(figures=lambda inputs: {"elements": float(inputs.tensors[0].numel())})
    found = json.loads(json.dumps(runner.run([case], seconds=QUICK)))
    assert found["cases"][0]["implementations"]["pygen"]["figures"] == {"elements": 8.0}
    assert "(8 elements)" in table.markdown(found).splitlines()[2]


@pytest.mark.parametrize(("unit", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_floor_of_any_precision_is_that_of_the_matrix_unit_where_there_is_one(unit, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "has_matrix_unit", lambda device: unit)
    monkeypatch.setattr(runner, "gemm_call", lambda flops, dtype, device: (asked.append(dtype) or time.time, flops))
    run_one(a_case(floor=Floor(flops=1 << 20, any_precision=True)))
    assert asked == [dtype]


# Checking


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * x + 1e-3,
        lambda x: torch.full_like(x, float("nan")),
        lambda x: torch.full_like(x, float("inf")),
        lambda x: (x * x)[:4],
        lambda x: (x * x, x),
    ],
    ids=["off by a little", "nan", "inf", "too short", "an output too many"],
)
def test_a_wrong_implementation_is_caught_and_not_timed(wrong):
    counted = Counted(wrong)
    record = run_one(a_case(implementations={"pygen": call(square), "eager": call(square), "liar": call(counted)}))
    liar = record["implementations"]["liar"]
    assert liar["status"] == "wrong" and liar["reason"].startswith("wrong: max error")
    assert "seconds" not in liar and counted.calls == 1
    assert "seconds" in record["implementations"]["eager"]
    json.dumps(record, allow_nan=False)


def test_a_wrong_gradient_is_caught():
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]  # the factor 2 is missing

    case = a_case(backward=True, implementations={"pygen": call(Careless.apply), "eager": call(square)})
    record = run_one(case)
    assert record["implementations"]["pygen"]["status"] == "wrong"
    assert record["implementations"]["eager"]["status"] == "ok"


def test_a_target_of_a_wrong_implementation_is_not_met():
    wrong = {"pygen": call(torch.neg), "eager": call(square)}
    assert run_one(a_case(implementations=wrong, targets=(Target("eager", 1e-9),)))["targets"][0]["met"] is False


def test_the_error_is_relative_to_the_largest_value_and_knows_infinities():
    expected = torch.tensor([1.0, -4.0, float("inf")])
    assert max_error(torch.tensor([1.0, -4.2, float("inf")]), expected) == pytest.approx(0.05, rel=1e-5)
    assert max_error(torch.tensor([1.0, -4.0, 1e30]), expected) == float("inf")


def test_a_missing_or_broken_peer_does_not_stop_the_others():
    def missing(inputs):
        import a_library_that_nobody_has

        return a_library_that_nobody_has

    def broken(x):
        raise RuntimeError("no room\nand a long explanation")

    record = run_one(a_case(implementations={"pygen": call(square), "missing": missing, "broken": call(broken)}))
    found = record["implementations"]
    assert found["missing"]["status"] == "missing" and "a_library_that_nobody_has" in found["missing"]["reason"]
    assert found["broken"] == {"status": "failed", "reason": "RuntimeError: no room"}
    assert "seconds" in found["pygen"] and record["best_peer"] is None


# Measuring


class FakeClock:
    """Every call takes a millisecond; the order of the calls is kept."""

    def __init__(self):
        self.order = []

    def seconds_per_call(self, call, calls):
        self.order.append(call())
        time.sleep(1e-3)
        return 1e-3


def test_implementations_take_turns():
    clock = FakeClock()
    measure.measure({name: (lambda name=name: name) for name in "abc"}, QUICK, clock)
    assert "".join(clock.order).endswith("abcabcabcabcabc")


def test_short_calls_are_timed_in_batches_of_a_millisecond():
    timing = measure.measure({"short": lambda: None}, QUICK, measure.clock(CPU))["short"]
    assert timing.calls_per_round > 1000
    assert timing.rounds >= measure.FEWEST_ROUNDS
    assert timing.min <= timing.q1 <= timing.median <= timing.q3


def test_a_sleep_is_measured_as_long_as_it_is():
    timing = measure.measure({"sleep": lambda: time.sleep(5e-3)}, QUICK, measure.clock(CPU))["sleep"]
    assert timing.min >= 5e-3 and timing.min < 50e-3


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(1 << 18)  # 1 MiB
    slack = 1 << 12
    assert measure.peak_bytes(lambda: x.clone(), CPU) == pytest.approx(x.nbytes, abs=slack)
    assert measure.peak_bytes(lambda: x.neg().neg().neg(), CPU) == pytest.approx(2 * x.nbytes, abs=slack)
    assert measure.peak_bytes(lambda: (x.neg(), x.neg(), x.neg()), CPU) == pytest.approx(3 * x.nbytes, abs=slack)


def test_long_calls_are_not_warmed_up_again_and_few_rounds_do():
    counted = Counted(lambda: None)
    timing = measure.measure({"long": counted}, 1e-9, measure.clock(CPU), long=True)["long"]
    assert counted.calls == timing.rounds == measure.FEWEST_LONG_ROUNDS and timing.calls_per_round == 1


def test_peers_that_run_as_children_are_not_taken_for_other_processes(monkeypatch):
    monkeypatch.setattr(machine, "_busy_seconds", lambda: sum(os.times()[:4]))  # nobody else is on this machine
    with machine.Bystanders() as bystanders:
        spin = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
        subprocess.run([sys.executable, "-c", spin], check=True)
    assert bystanders.cores < 0.1


def test_the_floor_is_work_over_the_rate_measured_in_the_same_case():
    floor = run_one(a_case(floor=Floor(bytes=1 << 20, flops=1 << 24)))["floor"]
    by_bytes = (1 << 20) / floor["copy_bytes_per_second"]
    by_flops = (1 << 24) / floor["gemm_flops_per_second"]
    assert floor["seconds"] == pytest.approx(max(by_bytes, by_flops))


def test_the_copy_moves_the_bytes_it_says():
    copy, moved = measure.copy_call(1 << 20, CPU)
    assert moved == 1 << 20 and copy().nbytes == 1 << 19


# Results


def test_a_run_writes_every_field_and_its_ratios_follow_from_its_medians():
    slow = {"pygen": call(square), "eager": call(lambda x: (time.sleep(2e-3), x * x)[1])}
    case = a_case(
        implementations=slow,
        yardsticks={"clone": call(torch.clone)},
        targets=(Target("eager", 2.0), Target("clone", at_most=1e-9)),
    )
    found = json.loads(json.dumps(runner.run([case], seconds=QUICK), allow_nan=False))
    assert found["complete"] is True and found["schema"] == results.SCHEMA
    for fact in ("cpu", "cores", "threads", "torch", "pygen", "date", "commit", "cpu_capability", "gpu"):
        assert fact in found["machine"]
    assert found["rates"]["copy_bytes_per_second"] > 1e8 and found["rates"]["gemm_flops_per_second"] > 1e8
    (record,) = found["cases"]
    ours, eager = (record["implementations"][name] for name in ("pygen", "eager"))
    for entry in (ours, eager):
        assert set(entry["seconds"]) == {"median", "min", "q1", "q3", "rounds", "calls_per_round"}
        assert entry["peak_bytes"] >= 32 and entry["max_error"] < 1e-6
    assert record["best_peer"] == "eager"
    speedup = eager["seconds"]["median"] / ours["seconds"]["median"]
    assert record["speedup_over_best_peer"] == pytest.approx(speedup) and speedup > 2
    assert record["ratio_to_floor"] == pytest.approx(ours["seconds"]["median"] / record["floor"]["seconds"])
    assert [target["met"] for target in record["targets"]] == [True, False]


def test_without_peers_only_eager_is_measured_and_their_targets_stay_open():
    compiled = Counted(square)
    case = a_case(
        implementations={"pygen": call(square), "eager": call(square), "compiled": call(compiled)},
        targets=(Target("compiled", 2.0),),
    )
    record = run_one(case, peers=False)
    assert set(record["implementations"]) == {"pygen", "eager"} and compiled.calls == 0
    assert record["targets"][0]["met"] is None


def a_simulation(name="walk", **changes):
    """A call of ours does ten units of two events each, the peer's one unit; both sleep for 2 ms."""

    def ten(x):
        time.sleep(2e-3)
        return x * x

    fields = {
        "implementations": {"pygen": call(ten), "peer": call(ten)},
        "unit": "trajectory",
        "units": {"pygen": 10},
        "events": lambda outputs: 2.0,
        "baseline": "peer",
        "long": True,
        "weigh": None,
        "floor": None,
        "targets": (Target("peer", 5), Target(None, 1e3, of="events"), Target(None, 1e9, of="events")),
    }
    return a_case(name, **(fields | changes))


def test_times_of_a_simulation_are_those_of_a_unit():
    record = run_one(a_simulation())
    ours, peer = (record["implementations"][name] for name in ("pygen", "peer"))
    assert ours["units_per_call"] == 10 and peer["units_per_call"] == 1 and record["unit"] == "trajectory"
    assert 2e-4 <= ours["seconds"]["min"] <= ours["seconds"]["median"] <= ours["seconds"]["q3"] < 2e-3
    assert peer["seconds"]["min"] >= 2e-3 and "peak_bytes" not in ours
    assert results.events_per_second(record) == pytest.approx(2 / ours["seconds"]["median"])
    assert [target["met"] for target in record["targets"]] == [True, True, False]


def test_a_table_of_simulations_has_their_rates_and_ratios_and_no_empty_columns(tmp_path):
    found = runner.run([a_simulation()], seconds=QUICK)
    lines = table.markdown(found).splitlines()
    assert "eager" not in lines[0] and "floor" not in lines[0]
    assert "M events/s)" in lines[2] and "peer 2" in lines[2] and "NO (>= 1000 M events/s)" in lines[2]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_bars_of_a_simulation_are_measured_against_its_baseline(tmp_path):
    pytest.importorskip("matplotlib")
    from pygen.benchmarks import plot

    found = runner.run([a_simulation(), a_case("op")], seconds=QUICK)
    simulation, op = found["cases"]
    speedup = results.median(simulation, "peer") / results.median(simulation, "pygen")
    assert plot._bars(simulation) == {"pygen": pytest.approx(speedup)} and speedup > 5
    assert plot._bars(op)["pygen"] == pytest.approx(results.median(op, "eager") / results.median(op, "pygen"))
    plot.plot(found, tmp_path / "bench.png")


def test_results_from_before_there_were_simulations_can_still_be_read():
    kept = Path(table.__file__).parent / "results"
    for path in sorted(kept.glob("*.json")):
        if "memory" not in path.name:
            found = results.load(path)
            assert table.markdown(found).count("\n") > len(found["cases"])


def unavailable(*_):
    raise Unavailable("no such data")


def test_a_case_without_its_data_is_skipped_with_the_reason():
    def needs_oracle(inputs):
        raise ImportError("No module named 'oracle'")

    cases = [a_case("first", make=unavailable), a_case("second", reference=needs_oracle), a_case("third")]
    found = runner.run(cases, seconds=QUICK)
    assert found["complete"] is True and [case["name"] for case in found["cases"]] == ["third"]
    first, second = found["skipped"]
    assert first == {"op": "square", "name": "first", "reason": "no such data"}
    assert second["name"] == "second" and "'oracle'" in second["reason"]


def test_an_interrupted_run_keeps_the_cases_that_were_measured(tmp_path):
    path = tmp_path / "results.json"
    cases = [a_case("first"), a_case("second", make=interrupt), a_case("third")]
    found = runner.run(cases, seconds=QUICK, save=lambda r: results.save(r, path))
    assert found["complete"] is False
    assert [case["name"] for case in results.load(path)["cases"]] == ["first"]


def test_a_run_interrupted_before_its_first_result_leaves_the_former_file(tmp_path):
    path = tmp_path / "results.json"
    results.save({"schema": results.SCHEMA}, path)
    found = runner.run([a_case(make=interrupt)], seconds=QUICK, save=lambda r: results.save(r, path))
    assert found["complete"] is False and found["cases"] == []
    assert results.load(path) == {"schema": results.SCHEMA}


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    results.save({"schema": results.SCHEMA}, path)
    with pytest.raises(TypeError):
        results.save({"schema": object()}, path)
    assert results.load(path) == {"schema": results.SCHEMA}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["not json", "[]", '{"schema": 99}'])
def test_a_file_that_is_no_results_file_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a results file"):
        results.load(path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file with a right, a wrong and a missing implementation, a yardstick and targets."""
    path = tmp_path_factory.mktemp("results") / "results.json"
    implementations = {"pygen": call(square), "eager": call(square), "compiled": call(torch.neg)}
    cases = [
        a_case("one", implementations=implementations, yardsticks={"clone": call(torch.clone)}),
        a_case("two", targets=(Target("eager", 1e-9),), floor=None),
    ]
    runner.run(cases, seconds=QUICK, save=lambda r: results.save(r, path))
    return path


def test_the_markdown_table_has_a_row_per_case_and_shows_what_was_wrong(measured, capsys):
    assert table.main([str(measured)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.count("|") == len(table.HEADINGS) + 1 for line in lines[:4])
    assert lines[2].startswith("| square one |") and "wrong: max error" in lines[2] and "clone" in lines[2]
    assert lines[3].startswith("| square two |") and "yes (1e-09x eager)" in lines[3]
    assert f"torch {torch.__version__}" in lines[-1]


def test_a_table_of_a_file_that_is_not_there_is_a_sentence(capsys):
    assert table.main(["nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.214e-6, "3.21 us"), (0.0543, "54.3 ms"), (1.5, "1.5 s"), (None, "-"), (2e-9, "2 ns")]
)
def test_times_are_shown_with_three_digits_and_a_unit(seconds, text):
    assert table.time_text(seconds) == text


def test_the_plot_is_a_picture_with_something_drawn(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from pygen.benchmarks.plot import plot

    plot(results.load(measured), tmp_path / "bench.png")
    picture = imread(tmp_path / "bench.png")
    assert picture.shape[1] > 1000 and picture.std() > 0.01


def test_a_plot_of_nothing_says_so(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from pygen.benchmarks.plot import plot

    with pytest.raises(ValueError, match="nothing to plot"):
        plot(results.load(measured) | {"cases": []}, tmp_path / "bench.png")
    assert not (tmp_path / "bench.png").exists()


# The command


@pytest.fixture
def bench(monkeypatch):
    """Run `pygen bench ARGUMENTS`, on the given cases where there are any."""
    import typer

    from pygen.benchmarks import command

    app = typer.Typer()
    app.command()(command.bench)

    def invoke(*arguments, cases=None):
        if cases is not None:
            monkeypatch.setattr(registry, "cases", lambda: cases)
        return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


def test_the_command_prints_a_table_and_writes_json_and_picture(bench, tmp_path):
    pytest.importorskip("matplotlib")
    files = tmp_path / "r.json", tmp_path / "r.png"
    done = bench("square", "--seconds", QUICK, "--json", files[0], "--plot", files[1], cases=[a_case("toy")])
    assert done.exit_code == 0, done.output
    assert "square toy" in done.output and "vs best peer" in done.output
    assert results.load(files[0])["complete"] is True
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["'nonsense'", "affine_coupling, cumax"]),
        (["cumax", "--case", "17x17"], ["'17x17'", "--list"]),
        (["cumax", "--device", "toaster"], ["--device", "'toaster'"]),
        (["cumax", "--seconds", "0"], ["--seconds must be positive"]),
        (["cumax", "--threads", "0"], ["--threads must be at least 1"]),
        (["cumax", "--json", "no/such/directory/r.json"], ["--json", "no/such/directory does not exist"]),
        (["cumax", "--plot", "picture.doc"], ["--plot must end in .png", "picture.doc"]),
    ],
    ids=["op", "case", "device", "seconds", "threads", "json", "plot"],
)
def test_bad_arguments_are_a_sentence_and_exit_code_2(bench, arguments, words):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output and isinstance(done.exception, SystemExit)
    for word in words:
        assert word in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_a_missing_gpu_is_a_sentence(bench):
    done = bench("cumax", "--device", "cuda")
    assert done.exit_code == 2 and "finds no CUDA device" in done.output


def test_ctrl_c_keeps_the_finished_cases_and_says_so(bench, tmp_path):
    path = tmp_path / "r.json"
    cases = [a_case("first"), a_case("second", make=interrupt)]
    done = bench("--seconds", QUICK, "--json", path, cases=cases)
    assert done.exit_code == 130
    assert "interrupted after 1 of 2 cases" in done.output and "square first" in done.output
    assert results.load(path)["complete"] is False and len(results.load(path)["cases"]) == 1


def test_a_wrong_result_of_ours_is_an_exit_code_of_its_own(bench):
    wrong = a_case("bad", implementations={"pygen": call(torch.neg), "eager": call(square)})
    done = bench("--seconds", QUICK, cases=[wrong])
    assert done.exit_code == 1 and "no right result for square bad" in done.output


def test_the_list_shows_cases_and_targets_and_measures_nothing(bench):
    done = bench("--list")
    assert done.exit_code == 0
    assert "4096x4096 forward" in done.output and ">= 1.7x as fast as compiled" in done.output


def test_a_skipped_case_is_a_sentence_and_no_failure(bench):
    done = bench("--seconds", QUICK, cases=[a_case("toy", make=unavailable)])
    assert done.exit_code == 0 and "square toy was skipped: no such data" in done.output


# Simulations


def sample(net, t, **options):
    """What a simulator returns that simulates `net`, on a grid to t."""
    run = ssa.simulate(net, torch.linspace(0, t, 11), 200, 1, threads=1, **options)
    return ssa_cases.Sample(run.counts)


def truth_by_the_master_equation(net, t):
    return ssa_cases._master_equation(net, torch.tensor([0.0, t]))


@pytest.fixture(scope="module")
def pairs():
    """A homodimer that forms and falls apart: its mean differs between the conventions of mass action."""

    def network(mass_action="combinatorial"):
        reactions = [ssa.Reaction({"A": 2}, {"B": 1}, rate="k"), ssa.Reaction({"B": 1}, {"A": 2}, rate=1.0)]
        return ssa.Network({"A": 30, "B": 0}, {"k": 0.1}, reactions, mass_action=mass_action)

    return network


def test_a_right_simulator_is_within_five_standard_errors_and_one_of_the_other_convention_is_not(pairs):
    pytest.importorskip("scipy")
    truth = truth_by_the_master_equation(pairs(), 2.0)
    assert ssa_cases.largest_z(sample(pairs(), 2.0), truth) < 4
    assert ssa_cases.largest_z(sample(pairs("falling"), 2.0), truth) > 10


def test_a_simulator_that_is_right_only_at_the_end_is_wrong():
    grid = torch.zeros(100, 5, 1)
    values = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) + 10
    truth = ssa_cases.Truth(torch.tensor([[10.0]]), torch.tensor([[1.0]]), trajectories=100)
    assert ssa_cases.largest_z(ssa_cases.Sample(grid + values[:, None]), truth) < 4
    assert ssa_cases.largest_z(ssa_cases.Sample(torch.cat((grid, grid[:, :1] + values[:, None]), 1)), truth) > 10


@pytest.mark.parametrize("counts", [torch.full((4, 5, 1), -1), torch.ones(4, 5, 2), torch.ones(4, 5)])
def test_a_sample_with_gaps_or_of_another_shape_is_infinitely_wrong(counts):
    truth = ssa_cases.Truth(torch.tensor([[10.0]]), torch.tensor([[1.0]]))
    assert ssa_cases.largest_z(ssa_cases.Sample(counts), truth) == float("inf")


def test_ours_and_the_closed_form_of_the_scan_agree_in_every_parameter_set(monkeypatch):
    monkeypatch.setattr(ssa_cases, "SCAN_SETS", 50)
    inputs = Inputs((torch.linspace(0, ssa_cases.SCAN_END, 3, dtype=torch.float64),))
    truth = ssa_cases._scan_truth(inputs)()
    found = ssa_cases._our_scan(inputs)()
    assert truth.mean.shape == (50, 1) and found.counts.shape == (50 * ssa_cases.SCAN_TRAJECTORIES, 3, 1)
    assert ssa_cases.largest_z(found, truth) < 5
    assert ssa_cases.largest_z(ssa_cases.Sample(found.counts.roll(ssa_cases.SCAN_TRAJECTORIES, 0)), truth) > 10


@pytest.fixture(scope="module")
def all_laws():
    """Every kind of law that a benchmark has: constant, first order, homodimer, third order, expression."""
    reactions = [
        ssa.Reaction({}, {"A": 1}, rate="make"),
        ssa.Reaction({"A": 1}, {}, rate=1.0),
        ssa.Reaction({"A": 2}, {"B": 1}, rate="make / 100"),
        ssa.Reaction({"A": 2, "B": 1}, {"A": 3}, rate=0.02),
        ssa.Reaction({"B": 1}, {}, propensity="2 * B / (1 + B^2 / make)"),
    ]
    return ssa.Network({"A": 5, "B": 2}, {"make": 10.0}, reactions)


def check_sampler(sampler, net):
    """300 trajectories that differ, begin where they should, and have the means of the master equation."""
    counts = sampler(300, 3, {})
    assert counts.shape == (300, 11, 2) and (counts[:, 0] == torch.tensor([5.0, 2.0])).all()
    assert len(counts[:, -1].unique(dim=0)) > 20
    assert ssa_cases.largest_z(ssa_cases.Sample(counts), truth_by_the_master_equation(net, 2.0)) < 4.5


def test_rebop_gets_the_network_that_we_simulate(all_laws):
    pytest.importorskip("scipy")
    pytest.importorskip("rebop")
    check_sampler(simulators.rebop(all_laws, torch.linspace(0, 2, 11)), all_laws)


@pytest.mark.slow  # GillesPy2 compiles C++ for the network
def test_gillespy2_gets_the_network_that_we_simulate(all_laws):
    pytest.importorskip("scipy")
    pytest.importorskip("gillespy2")
    path = os.environ["PATH"]
    check_sampler(simulators.gillespy2(all_laws, torch.linspace(0, 2, 11), optimize=True), all_laws)
    assert os.environ["PATH"] == path


def test_a_network_that_takes_minutes_is_simulated_only_when_asked_for(monkeypatch):
    monkeypatch.delenv("PYGEN_BENCH_SLOW", raising=False)
    with pytest.raises(Unavailable, match="PYGEN_BENCH_SLOW=1"):
        SIMULATIONS["EGFR to t = 0.1"].make(CPU, torch.Generator())


def test_the_compiler_for_the_optimised_peer_gets_its_flag(tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    with simulators._compiler_flag("-O3"):
        said = subprocess.run(["g++", "-c", "a file.cpp"], capture_output=True, text=True, check=True).stdout
    assert said == "-O3 -c a file.cpp\n"


def test_a_model_whose_file_is_absent_is_unavailable(monkeypatch, tmp_path):
    monkeypatch.setenv("PYGEN_TEST_DATA", str(tmp_path))
    for name, file in (("EGFR to t = 0.01", "egfr_net.net"), ("heat shock to t = 1", "heat_shock_stochkit.xml")):
        with pytest.raises(Unavailable, match=file):
            SIMULATIONS[name].make(CPU, torch.Generator())


def test_the_work_of_a_gpu_is_not_done_on_the_cpu():
    with pytest.raises(Unavailable, match="--device cuda"):
        SIMULATIONS["immigration-death to t = 10, 10^6 trajectories reduced"].make(CPU, torch.Generator())


def test_every_simulation_has_a_unit_for_every_simulator():
    for case in SIMULATIONS.values():
        assert case.name.startswith("start") or set(case.units) == set(case.implementations), case.name
        assert case.error is ssa_cases.largest_z and case.allowed_error == 5


def test_a_simulation_is_checked_timed_and_rated():
    case = ssa_cases._throughput(
        "stationary", ssa.examples.immigration_death, 1, ssa_cases._closed_form, (64,), peers=()
    )
    record = run_one(case)
    ours = record["implementations"]["pygen"]
    assert ours["status"] == "ok" and ours["max_error"] < 5 and ours["units_per_call"] == 64
    # 1000 arrivals and as many deaths on average; their sum's variance is at most 4000.
    assert abs(ours["events_per_unit"] - 2000) < 5 * (4000 / 64) ** 0.5


def test_memory_of_a_reduced_run_is_measured_in_its_own_process(monkeypatch):
    monkeypatch.setattr(ssa_cases, "MILLION", 2000)
    growth = ssa_cases._peak_growth(lambda: None, CPU)
    assert 0 <= growth < 200e6


# Codebooks


@pytest.fixture(scope="module")
def nearest():
    """A small search: its inputs, and what its results are checked against, on all of its rows."""
    case = nearest_codebook._search(50, 20, 7, with_amx=1)
    inputs = case.make(CPU, torch.Generator().manual_seed(0))
    return case, inputs, case.reference(inputs.double())()


def test_an_exact_search_may_not_differ_in_any_index_and_a_peer_by_what_float32_rounds(nearest):
    _, inputs, expected = nearest
    x, codebook = inputs.tensors
    right = torch.cdist(x.double(), codebook.double()).argmin(1)
    assert nearest_codebook.farther(nearest_codebook.Exact(right), expected) == 0
    assert nearest_codebook.farther(right, expected) == 0
    other = right.clone()
    other[17] = (right[17] + 1) % 20
    assert nearest_codebook.farther(nearest_codebook.Exact(other), expected) == float("inf")
    assert nearest_codebook.farther(other, expected) > 1e-2
    copied = expected.codebook.clone()
    copied[other[17]] = copied[right[17]] * (1 + 1e-8)  # as near, for a float32 search
    near = nearest_codebook.Nearest(expected.x, expected.rows, copied, right)
    assert abs(nearest_codebook.farther(other, near)) < 1e-5


@pytest.mark.parametrize("wrong", [lambda i: i[:-1], lambda i: i + 20, lambda i: i - 20, lambda i: i[:, None]])
def test_indices_of_another_shape_or_of_no_code_are_infinitely_wrong(wrong, nearest):
    _, _, expected = nearest
    assert nearest_codebook.farther(wrong(expected.indices), expected) == float("inf")


def test_every_way_to_search_finds_the_nearest_codes_in_blocks_as_well(nearest, monkeypatch):
    case, inputs, expected = nearest
    monkeypatch.setattr(nearest_codebook, "MATRIX_ELEMENTS", 20 * 13)  # the last block is shorter
    for name in ("pygen", "eager", "cdist", "faiss", "vector-quantize-pytorch"):
        try:
            found = case.implementations[name](inputs)()
        except ImportError:
            continue
        assert case.error(found, expected) <= case.allowed_error, name
    for factory in case.yardsticks.values():
        factory(inputs)()


def test_a_search_says_how_many_codes_were_in_doubt(nearest):
    case, inputs, _ = nearest
    figures = case.figures(inputs)
    assert 1 <= figures["candidates a row"] <= 20 and 0 <= figures["rechecked"] <= 1


def test_large_searches_are_checked_on_rows_from_end_to_end(monkeypatch):
    monkeypatch.setattr(nearest_codebook, "CHECKED_ELEMENTS", 40 * 20 * 7)
    case = nearest_codebook._search(1000, 20, 7, with_amx=1)
    inputs = case.make(CPU, torch.Generator().manual_seed(0))
    assert case.reference(inputs.double())().rows.tolist() == list(range(0, 1000, 25))


def test_all_statistics_agree():
    case = nearest_codebook._statistics(60, 9, 5)
    inputs = case.make(CPU, torch.Generator().manual_seed(0))
    expected = case.reference(inputs.double())()
    for name in ("pygen", "eager", "one-hot"):
        assert case.error(case.implementations[name](inputs)(), expected) <= case.allowed_error


def test_both_quantisers_take_the_step_that_the_formulas_say():
    pytest.importorskip("pygen.nn.vector_quantize")
    case = vector_quantize._training_step(60, 16, 6, at_least=1)
    inputs = case.make(CPU, torch.Generator().manual_seed(0))
    expected = case.reference(inputs.double())()
    for name, factory in case.implementations.items():
        try:
            outputs = factory(inputs)()
        except ImportError:
            continue
        assert case.error(outputs, expected) <= case.allowed_error, name
        for i in range(3):  # codes, loss, gradient: each of them is looked at
            spoilt = [output.clone() for output in outputs]
            spoilt[i] = spoilt[i] + 0.01 * spoilt[i].abs().max()
            assert case.error(tuple(spoilt), expected) > case.allowed_error


def test_all_kmeans_end_with_the_same_inertia_and_one_iteration_less_shows():
    pytest.importorskip("pygen.cluster")
    case = kmeans._kmeans(400, 8, 5, iterations=4)
    inputs = case.make(CPU, torch.Generator().manual_seed(0))
    expected = case.reference(inputs.double())()
    for name, factory in case.implementations.items():
        try:
            assert case.error(factory(inputs)(), expected) <= case.allowed_error, name
        except ImportError:
            continue
    assert case.error(kmeans.plain_lloyd(*inputs.tensors, 3), expected) > case.allowed_error


# Spectral norm


def test_the_discriminator_has_its_targets_on_a_gpu():
    cases = [case for case in OPS if case.op == "spectral_norm" and "discriminator" in case.name]
    assert len(cases) == 2
    for case in cases:
        assert {Target("eager", 8, on=("cuda",)), Target("compiled", 3, on=("cuda",))} < set(case.targets)


def test_the_discriminator_is_that_of_the_model():
    networks = pytest.importorskip("pygen.models._sngan_networks")
    shapes = networks.weight_shapes(networks.discriminator("cnn", (3, 32, 32), 64))
    assert shapes == list(spectral_norm.DISCRIMINATOR)
    assert round(4e-6 * sum(torch.Size(shape).numel() for shape in shapes), 1) == 11.7


@pytest.mark.parametrize("normalize", [spectral_norm.spectral_norm, spectral_norm.parametrizations.spectral_norm])
def test_a_step_too_many_or_a_gradient_that_misses_sigma_is_not_timed(normalize):
    case = spectral_norm._case("toy", [(9, 20), (4, 3, 3, 3)], spectral_norm.spectral_norm_all, backward=True)
    inputs = case.make(CPU, torch.Generator().manual_seed(0))
    expected = case.reference(inputs.double())()
    for factory in (case.implementations["pygen"], spectral_norm._module(spectral_norm._each(normalize))):
        outputs = factory(inputs)()
        assert case.error(outputs, expected) <= case.allowed_error
    twice = spectral_norm._each(lambda layer: normalize(layer, n_power_iterations=2))
    assert case.error(spectral_norm._module(twice)(inputs)(), expected) > case.allowed_error
    # As if sigma were a constant: the gradient is the incoming one, divided.
    ratio = expected[0].flatten()[0] / inputs.tensors[0].detach().double().flatten()[0]
    assert case.error((*outputs[:2], inputs.grads[0] * ratio, outputs[3]), expected) > case.allowed_error


# Memory against depth


def test_memory_of_the_reversible_flow_does_not_grow_with_depth(tmp_path, monkeypatch, capsys):
    for name, value in (("DEPTHS", (2, 6)), ("SHAPE", (4, 4, 6, 6)), ("HIDDEN", 16)):
        monkeypatch.setattr(memory, name, value)
    memory.main(json_file=tmp_path / "memory.json", plot=tmp_path / "memory.png", seconds=0.01)
    depths = json.loads((tmp_path / "memory.json").read_text())["depths"]
    ours, theirs = (
        [depths[depth][kind]["peak_bytes"] for depth in ("2", "6")] for kind in ("ReversibleSequential", "Sequential")
    )
    assert ours[1] < 1.2 * ours[0] and theirs[1] > 2 * theirs[0]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 3

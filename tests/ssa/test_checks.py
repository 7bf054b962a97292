"""The op ssa_run refuses what it cannot run with a sentence, and never crashes: every index is checked beforehand.

Run as a program, this file damages packed programs at random; the tests do so in a process of its own.
"""

import os
import random
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from ssa.bit_cases import CASES

from pygen.ssa import engine
from pygen.ssa.program import HEADER, OPS

pytestmark = pytest.mark.skipif(not engine.is_compiled(), reason="built without the compiled engine")

LARGEST, SMALLEST = 2**31 - 1, -(2**31)
DAMAGED = CASES["events"]  # has something in every section but factor_offset
ARGUMENTS = (
    *("code", "literals", "initial", "parameters", "times", "recorded", "start", "first", "seed", "stream", "method"),
    *("tau_epsilon", "max_events", "threads", "control"),
    *("counts", "status", "n_events", "stop_time", "log_time", "log_reaction"),
)


def arguments(case=DAMAGED, rows=3, method="direct"):
    """A call of the op that works, argument by argument."""
    net = case.net
    program = net.program(case.arguments.get("stop"))
    times = torch.tensor(case.times, dtype=torch.float64)
    out = engine.allocate(rows, len(times), len(net.species), torch.device("cpu"))
    return {
        **{"code": program.code.clone(), "literals": program.literals, "times": times},
        "initial": torch.from_numpy(net.initial[None].astype("float64")),
        "parameters": torch.from_numpy(net.parameter_values[None]),
        "recorded": torch.arange(len(net.species), dtype=torch.int32),
        **{"start": case.arguments.get("t0", 0.0), "first": 0, "seed": 1, "stream": 0, "method": method},
        **{"tau_epsilon": 0.5, "max_events": 50, "threads": 1, "control": engine.new_control()},
        **{name: getattr(out, name) for name in ARGUMENTS[-6:]},
    }


def call(given):
    torch.ops.pygen.ssa_run(*(given[name] for name in ARGUMENTS))


def assert_refused(given, sentence=r"ssa_run: \w+"):
    with pytest.raises(RuntimeError, match=sentence):
        call(given)


def test_the_call_that_the_others_damage_works():
    given = arguments()
    call(given)
    assert (given["status"] <= 3).all() and (given["n_events"] > 0).all()


# ---- the program -----------------------------------------------------------------------------------------------------

SIZES = [name for name in HEADER if name.startswith("n_") and name != "n_slots"] + ["R"]
NOT_INDICES = ("check_laws", "reserved")


@pytest.mark.parametrize("field", [name for name in HEADER if name not in NOT_INDICES])
def test_a_damaged_header_is_refused(field):
    at = HEADER.index(field)
    right = int(arguments()["code"][at])
    wrong = {-2, SMALLEST, LARGEST}
    if field in SIZES or field in ("version", "S", "P", "time_slot"):
        wrong |= {right - 1, right + 1}
    if field == "n_slots":
        wrong |= {right - 1, 0, 2**30}
    for value in wrong:
        given = arguments()
        given["code"][at] = value
        assert_refused(given)


# section: (the smallest value that it may have, the name in the header of the number that all its values are below)
INDEX_SECTIONS = {
    **dict.fromkeys(("rate_slot", "factor_slot", "break_slot", "trigger_slot", "previous_slot"), (0, "n_slots")),
    **{"assignment_source": (0, "n_slots"), "priority_slot": (-1, "n_slots")},
    **{"change_slot": (0, "S"), "checked_slot": (0, "S"), "assignment_target": (0, "S", "P")},
}


def place_of(section, case=DAMAGED):
    """(where the section begins in code, its length)."""
    begin = len(HEADER)
    for name, table in case.net.program(None).sections().items():
        if name == section:
            assert table.size > 0
            return begin, table.size
        begin += table.size
    raise KeyError(section)


@pytest.mark.parametrize("section", INDEX_SECTIONS)
def test_an_index_out_of_range_is_refused_by_the_name_of_its_section(section):
    lowest, *bounds = INDEX_SECTIONS[section]
    case = DAMAGED if section != "checked_slot" else CASES["failures"]
    limit = sum(case.net.program(None).header[name] for name in bounds)
    begin, size = place_of(section, case)
    for at in range(begin, begin + size):
        for value in (lowest - 1, limit, SMALLEST, LARGEST):
            given = arguments(case)
            given["code"][at] = value
            assert_refused(given, rf"ssa_run: {section}\[\d+\] = {value} is not in \[{lowest}, {limit}\)")


def test_an_unknown_operation_or_operand_is_refused():
    begin, size = place_of("instructions")
    slots = DAMAGED.net.program(None).n_slots
    for at in range(begin, begin + size):
        is_operation = (at - begin) % 5 == 0
        for value in (-1, len(OPS) if is_operation else slots, LARGEST):
            given = arguments()
            given["code"][at] = value
            assert_refused(given, "operation" if is_operation else "operand")


@pytest.mark.parametrize(
    "section", ["factor_start", "change_start", "assignment_start", "program_begin", "program_end"]
)
def test_offsets_that_do_not_fit_are_refused(section):
    begin, size = place_of(section)
    for at in range(begin, begin + size):
        for value in (-1, 10_000, SMALLEST, LARGEST):
            given = arguments()
            given["code"][at] = value
            assert_refused(given, "damaged program")


def test_a_program_that_is_cut_off_or_too_long_is_refused():
    code = arguments()["code"]
    for wrong in (code[:0], code[:10], code[: len(HEADER)], code[:-1], torch.cat((code, code[:1]))):
        assert_refused({**arguments(), "code": wrong.clone()}, "damaged program")


# ---- the tensors and numbers -----------------------------------------------------------------------------------------


def wrong_tensors(x):
    """Of another dtype, of more and of fewer dimensions, and not contiguous."""
    yield x.to(torch.float32 if x.dtype == torch.int64 else torch.int64)
    yield x[None]
    yield torch.zeros((), dtype=x.dtype)
    yield torch.stack((x, x), dim=-1)[..., 0]


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if isinstance(arguments()[name], torch.Tensor)])
def test_a_tensor_of_another_kind_is_refused_by_name(name):
    for wrong in wrong_tensors(arguments()[name]):
        if wrong.is_contiguous() and wrong.dtype == arguments()[name].dtype and wrong.dim() == arguments()[name].dim():
            continue  # empty: contiguous whatever its strides
        assert_refused({**arguments(), name: wrong}, rf"ssa_run: {name} must be")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("initial", torch.zeros(*shape, dtype=torch.float64)) for shape in ((1, 1), (1, 3), (2, 2), (4, 2), (0, 2))),
        *(("parameters", torch.zeros(*shape, dtype=torch.float64)) for shape in ((1, 2), (1, 4), (2, 3), (0, 3))),
        ("literals", torch.zeros(1, dtype=torch.float64)),
        ("times", torch.zeros(0, dtype=torch.float64)),
        ("times", torch.zeros(8, dtype=torch.float64)),
        *(("counts", torch.zeros(*shape, dtype=torch.int64)) for shape in ((2, 9, 2), (3, 8, 2), (3, 9, 1))),
        ("status", torch.zeros(4, dtype=torch.int8)),
        ("n_events", torch.zeros(2, dtype=torch.int64)),
        ("stop_time", torch.zeros(4, dtype=torch.float64)),
        ("control", torch.zeros(1, dtype=torch.int64)),
        ("log_time", torch.zeros(5, dtype=torch.float64)),
        ("log_reaction", torch.zeros(5, dtype=torch.int32)),
        *(("recorded", torch.tensor(columns, dtype=torch.int32)) for columns in ([0, 2], [-1, 0], [0], [0, 1, 1])),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.shape)),
)  # fmt: skip
def test_a_tensor_of_another_size_is_refused(name, wrong):
    assert_refused({**arguments(), name: wrong})


def test_a_log_of_several_trajectories_is_refused():
    log = {"log_time": torch.zeros(5, dtype=torch.float64), "log_reaction": torch.zeros(5, dtype=torch.int32)}
    assert_refused({**arguments(rows=3), **log}, "the log is for one trajectory, got 3")


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("seed", -1, r"seed must be in \[0, 2\^32\), got -1"),
        ("seed", 2**32, r"seed must be in \[0, 2\^32\), got 4294967296"),
        ("stream", -1, r"stream must be in \[0, 2\^32\), got -1"),
        ("stream", 2**32, r"stream must be in \[0, 2\^32\), got 4294967296"),
        ("first", -1, "first must not be negative, got -1"),
        ("max_events", -2, "max_events must be -1 .* got -2"),
        ("threads", 0, "threads must be at least 1, got 0"),
        ("method", "fastest", "method must be direct, .* got fastest"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(name, wrong, sentence):
    assert_refused({**arguments(), name: wrong}, f"ssa_run: {sentence}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in ARGUMENTS if isinstance(arguments()[name], torch.Tensor)])
def test_a_tensor_on_another_device_is_refused(name):
    given = arguments()
    assert_refused({**given, name: given[name].cuda()}, "must be on")


# ---- damage at random ------------------------------------------------------------------------------------------------


def test_nothing_crashes_the_process_neither_damage_to_a_program_nor_a_lack_of_threads():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
    outcomes = dict(line.split() for line in done.stdout.splitlines())
    assert int(outcomes["refused"]) > 1000 and int(outcomes["ran"]) > 300, outcomes


def damage(rng, code):
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(HEADER)) if rng.random() < 0.3 else rng.randrange(len(code))
        near = int(code[at]) + rng.choice([-2, -1, 1, 2])
        far = rng.choice([0, -1, LARGEST, SMALLEST, rng.randrange(200), rng.randrange(SMALLEST, LARGEST)])
        code[at] = max(SMALLEST, min(LARGEST, rng.choice([near, far])))


def run_damaged_programs(number, current):
    """How many were refused and how many ran."""
    rng = random.Random(0)
    names = ["events", "expressions", "failures", "pulses", "stop", "third order", "20 reactions"]
    outcomes = Counter()
    for _ in range(number):
        given = arguments(CASES[rng.choice(names)], rng.choice([1, 3]), rng.choice(["direct", "lane"]))
        damage(rng, given["code"])
        current[engine.STOP] = 0
        try:
            call({**given, "control": current})
            outcomes["ran"] += 1
        except RuntimeError as error:
            assert "ssa_run: " in str(error), error
            outcomes["refused"] += 1
    return outcomes


def run_with_more_threads_than_there_are():
    """Threads take address space for their stacks: 2 GiB is not enough for 20,000 of them."""
    import resource

    few, many = arguments(rows=20_000), {**arguments(rows=20_000), "threads": 20_000}
    call(few)
    with open("/proc/self/statm") as status:
        used = int(status.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    call(many)
    assert all(torch.equal(few[name], many[name]) for name in ("counts", "status", "n_events", "stop_time"))


def main():
    current = engine.new_control()
    over = threading.Event()

    def ask_to_stop():
        # A program that is another one after the damage may run for ever: it is asked to stop as Ctrl-C would.
        while not over.wait(0.3):
            current[engine.STOP] = 1

    watchman = threading.Thread(target=ask_to_stop)
    watchman.start()
    try:
        outcomes = run_damaged_programs(3000, current)
    finally:
        over.set()
        watchman.join()
    if sys.platform == "linux":
        run_with_more_threads_than_there_are()
    for name, number in outcomes.items():
        print(name, number)


if __name__ == "__main__":
    main()

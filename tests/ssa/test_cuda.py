"""The CUDA engine: what can be said of it without a GPU, and, on one, that it has the CPU's bits."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ssa.bit_cases import CASES, N, assert_same, joined, times_of_third_jumps, values

from pygen import _native, ssa
from pygen.ssa import engine, examples

ROOT = Path(__file__).parents[2]
CHIPS = {"sm_80", "sm_90", "sm_100"}
KERNELS = {"run_ssaILb0E", "run_ssaILb1E", "forget"}  # InShared false and true

compiled_engine = pytest.mark.skipif(not engine.is_compiled(), reason="built without the compiled engine")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

# ---- what is said where there is none --------------------------------------------------------------------------------


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device cuda: torch sees no CUDA device here"):
        ssa.simulate(examples.birth_death(), [1.0], 2, 1, device="cuda")


def test_a_build_without_the_cuda_engine_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    with pytest.raises(RuntimeError, match="has no CUDA engine; set CUDA_HOME and") as error:
        ssa.simulate(examples.birth_death(), [1.0], 2, 1, device="cuda:0")
    assert _native.REBUILD in str(error.value)


def test_any_other_device_is_refused():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        ssa.simulate(examples.birth_death(), [1.0], 2, 1, device="meta")


# ---- compiled by the build's own rules, for every chip ---------------------------------------------------------------


def compiled_by_the_build(folder):
    """(ptxas' report, the PTX by file name) of everything in csrc/cuda."""
    import setuptools

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: None)
        patch.setenv("FORCE_CUDA", "1")
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        spec = importlib.util.spec_from_file_location("pygen_setup_for_cuda", ROOT / "setup.py")
        build = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "pygen_setup_for_cuda", build)
        spec.loader.exec_module(build)
        if build.find_nvcc() is None:
            pytest.skip("no nvcc: set CUDA_HOME to a CUDA toolkit")
        plan = build.make_plan()
        (folder / "build.ninja").write_text(plan.ninja(folder / "_C.so"))
        (folder / "build_config.h").write_text(plan.config_header())
        objects = [name for rule, _, name, _ in plan.objects if rule == "nvcc"]
        environment = {**os.environ, "NVCC_APPEND_FLAGS": f"-Xptxas -v --keep --keep-dir {folder}"}
        command = [build.checked_ninja(), "-C", str(folder), "-v", *objects]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout, {path.name: path.read_text() for path in folder.glob("*.ptx")}


def assert_state_in_registers(report):
    entries = re.findall(r"Compiling entry function '(\S+)' for '(\w+)'", report)
    assert {chip for _, chip in entries} == CHIPS
    for chip in CHIPS:
        names = [name for name, one in entries if one == chip]
        assert len(names) == len(KERNELS) and all(any(kernel in name for name in names) for kernel in KERNELS)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= len(entries) and set(frames) == {("0", "0", "0")}
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(entries) and max(registers) <= 128  # four blocks of 128 threads a processor


def assert_nothing_contracted(text):
    """A fused multiply-add rounds once where the CPU rounds twice. What says .rn, ptxas leaves as it is."""
    operations = re.findall(r"\b(add|sub|mul|div|sqrt|fma|mad)((?:\.\w+)*)\.f64", text)
    kinds = {kind for kind, _ in operations}
    assert kinds >= {"add", "mul", "div", "sqrt"} and not kinds & {"fma", "mad"}
    assert {mode for _, mode in operations} == {".rn"}


@pytest.mark.slow
def test_the_kernels_compile_for_every_chip_without_spills_and_without_fused_multiply_adds(tmp_path):
    report, texts = compiled_by_the_build(tmp_path)
    assert_state_in_registers(report)
    assert len(texts) == len(CHIPS)
    for text in texts.values():
        assert_nothing_contracted(text)


# ---- on a GPU: the CPU's bits ----------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    try:
        engine.check_device(torch.device("cuda"))
    except RuntimeError as error:
        pytest.skip(str(error))
    return "cuda"


@pytest.mark.gpu
@compiled_engine
@every_case
def test_a_gpu_has_the_bits_of_the_cpu(case, cuda):
    truth = case.simulate(threads=2)
    assert_same(case.simulate(device=cuda), truth)
    assert_same(joined(case.simulate(37, device=cuda), case.simulate(N - 37, first=37, device=cuda)), truth)
    assert_same(case.simulate(1, first=41, device=cuda), values(truth, slice(41, 42)), "in trajectory 41 alone")


@pytest.mark.gpu
@compiled_engine
def test_times_on_a_gpu_have_the_bits_of_the_cpu(cuda):
    assert torch.equal(times_of_third_jumps(device=cuda), times_of_third_jumps(threads=2))


@pytest.mark.gpu
@compiled_engine
def test_a_gpu_has_the_bits_of_the_cpu_over_many_launches_and_refills(cuda):
    """Long trajectories outlast a launch; with so many short ones every thread is refilled."""
    for net, times, n in (
        (examples.immigration_death(), [0.0, 5.0, 20.0], 300),
        (examples.birth_death(X=5), [0.0, 1.0, 30.0], 400_000),
    ):
        runs = [ssa.simulate(net, times, n, 3, device=device, threads=2, progress=False) for device in ("cpu", cuda)]
        assert_same(*runs)


@pytest.mark.gpu
@compiled_engine
@every_case
def test_statistics_on_a_gpu_have_the_bits_of_the_cpu(case, cuda):
    runs = [case.simulate(reduce="covariance", device=device) for device in ("cpu", cuda)]
    for statistic in ("mean", "var", "covariance"):
        a, b = (torch.as_tensor(getattr(run, statistic)()) for run in runs)
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    assert runs[0].status_counts == runs[1].status_counts


@pytest.mark.gpu
@compiled_engine
def test_bits_on_a_gpu_do_not_depend_on_the_grid(cuda):
    case = CASES["events"]
    fine = sorted([*case.times, *(0.02 * k for k in range(100))])
    finer, coarse = case.simulate(times=fine, device=cuda), case.simulate(device=cuda)
    at = torch.searchsorted(torch.tensor(fine), torch.tensor(case.times), right=True) - 1
    assert torch.equal(finer.counts.cpu()[:, at], coarse.counts.cpu())
    assert torch.equal(finer.n_events.cpu(), coarse.n_events.cpu())

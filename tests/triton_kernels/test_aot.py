"""Every Triton kernel compiles for every chip, without a GPU, and fits it."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# One small chip of each vendor always, the other two with the slow tests: they differ in little but the instructions.
CHIPS = ["sm_80", "gfx942", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("sm_90", "sm_100"))]
TIMEOUT_SECONDS = 900


def compile_for(*arguments, **environment):
    compiling = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pygen.triton_kernels.aot", *arguments]
    return subprocess.run(
        command, env={**compiling, **environment}, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )


@pytest.mark.parametrize("chip", CHIPS)
def test_no_kernel_spills_or_exceeds_shared_memory(chip, tmp_path):
    report = tmp_path / "aot.json"
    run = compile_for("--target", chip, "--json", str(report))
    assert run.returncode in (0, 1), run.stderr
    usages = json.loads(report.read_text())
    ops = {"cumax", "affine_coupling", "rational_quadratic_spline", "nearest_codebook", "codebook_statistics"}
    assert {u["op"] for u in usages} >= ops | {"power_iteration", "on_lstm"}
    assert {u["target"] for u in usages} == {chip}
    assert [u for u in usages if u["spilled"] or u["shared"] > u["shared_limit"]] == []
    assert run.returncode == 0


def test_compiling_under_the_interpreter_is_refused_with_a_sentence():
    run = compile_for(TRITON_INTERPRET="1")
    assert run.returncode == 2
    assert "TRITON_INTERPRET is set" in run.stderr


def test_every_dtype_direction_and_scale_map_is_compiled():
    listing = (
        "from pygen.triton_kernels import aot\n"
        "for op, cases in aot.KERNELS.items():\n"
        "    for name, call in cases():\n"
        "        for launch in aot.recorded(call):\n"
        "            c = launch.constants\n"
        "            print(launch.kernel.__name__, launch.args[0] is not None and launch.args[0].dtype,\n"
        "                  c.get('COMPLEMENT'), c.get('MAP'), c.get('INVERSE'))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", listing]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rows = {tuple(line.split()) for line in output.splitlines()}
    for kernel in ("cumax", "cumax_backward", "affine_coupling", "affine_coupling_backward"):
        mine = [row for row in rows if row[0] == f"{kernel}_kernel"]
        dtypes = {row[1] for row in mine}
        assert dtypes >= {f"torch.{name}" for name in ("float32", "float64", "bfloat16", "float16")}
        if kernel.startswith("cumax"):
            assert {row[2] for row in mine} == {"True", "False"}
        else:
            maps = ("exp", "tanh", "sigmoid", "nflows", "softplus", "atan")
            assert {row[3:] for row in mine} == {(m, i) for m in maps for i in ("True", "False")}

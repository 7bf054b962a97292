"""The build: what it says when it cannot, what the wheel holds, and that no level's code can replace another's."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pygen import _native

ROOT = Path(__file__).parents[1]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, without running it."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("pygen_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pygen_setup", module)
    spec.loader.exec_module(module)
    return module


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_an_older_torch_is_refused_by_the_build_with_what_to_do(build, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(SystemExit, match=r"needs torch >= 2.10, found 2.9.1.*pip install"):
        build.checked_torch()


def test_an_older_torch_is_refused_by_the_import_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch >= 2.10, this is torch 2.9.1.*pip install"):
        _native._load()


def test_a_missing_compiler_is_named_with_what_to_do(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found \(no-such-compiler\).*PYGEN_SKIP_KERNELS"):
        build.checked_compiler()


def test_force_cuda_without_nvcc_is_refused(build, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="no nvcc: set CUDA_HOME"):
        build.cuda_decision(torch)


def test_a_misspelt_architecture_list_is_refused(build, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match='must read like .* got "Hopper"'):
        build.cuda_archs()


# ---- what is planned -------------------------------------------------------------------------------------------------


def test_the_architecture_list_becomes_nvcc_flags(build, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0+PTX")
    assert build.cuda_archs() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize(
    ("force", "torch_cuda", "built"),
    [(None, None, False), ("1", None, True), ("0", "13.0", False), (None, "13.0", True)],
)
def test_cuda_is_built_for_cuda_torch_or_when_forced(build, monkeypatch, force, torch_cuda, built):
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    if force is not None:
        monkeypatch.setenv("FORCE_CUDA", force)
    monkeypatch.setattr(build, "find_nvcc", lambda: "/toolkit/bin/nvcc")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    nvcc, reason = build.cuda_decision(torch)
    assert (nvcc is not None) == built
    assert reason


@needs_compiler
def test_a_cuda_source_is_planned_for_nvcc_with_every_architecture(build, monkeypatch, tmp_path):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu").mkdir()
    (tmp_path / "csrc" / "cuda" / "probe.cu").write_text("")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: "/toolkit/bin/nvcc")
    monkeypatch.setattr(build, "cuda_libraries", lambda nvcc: ["-L/toolkit/lib", "-lcudart_static"])
    monkeypatch.setenv("FORCE_CUDA", "1")
    plan = build.make_plan()
    rules = plan.ninja(tmp_path / "_C.so")
    assert "build cuda_probe.o: nvcc" in rules
    assert (
        "sm_80" in rules and "sm_90" in rules and "--fmad=false" in rules and "-L/toolkit/lib -lcudart_static" in rules
    )
    assert "1 sources" in plan.summary()


# ---- what is built ---------------------------------------------------------------------------------------------------


def test_build_info_says_what_the_build_is():
    if _native.C is None:
        pytest.skip("built without kernels")
    info = _native.C.build_info()
    assert info["cpu_levels"].split(",")[0] == "default"
    assert {"compiler", "torch", "cuda", "sanitizers"} <= set(info)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("nm") is None, reason="reads x86-64 objects")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")))
def test_every_symbol_of_a_level_bears_the_levels_name(build, source, tmp_path):
    """A symbol without it could be the one that the linker keeps for the baseline, and crash an older CPU."""
    levels = {level: build.X86_LEVELS[level] for level in ("avx2", "avx512")}
    if only := build.ONLY_LEVEL.get(Path(source).stem):
        extra = build.understood_levels("c++")
        if only not in extra:
            pytest.skip(f"this compiler does not know {only}")
        levels = {only: [*build.X86_LEVELS["avx512"], *extra[only]]}
    for level, level_flags in levels.items():
        target = tmp_path / f"{level}.o"
        flags = [*build.COMMON_FLAGS, *build.KERNEL_FLAGS, "-O1", "-DPYGEN_X86_LEVELS", *level_flags]
        command = ["c++", *flags, "-c", str(ROOT / "csrc" / "cpu" / source), "-o", str(target)]
        subprocess.run(command, check=True)
        listing = subprocess.run(
            ["nm", "--demangle", "--defined-only", str(target)], capture_output=True, text=True, check=True
        ).stdout
        # Local symbols (lower case) stay in their object.
        shared = [line for line in listing.splitlines() if line[17].isupper() or line[17] in "uvw"]
        assert shared
        strangers = [line for line in shared if f"pygen::{level}::" not in line and "DW.ref" not in line]
        assert not strangers
        initialisers = [line for line in listing.splitlines() if "_GLOBAL__sub_I" in line]
        assert not initialisers, "code that runs at load time, before the CPU was asked"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, without the kernels: what is packed does not depend on them."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "__pycache__", "*.egg-info", "demo", "runs"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    environment = {**os.environ, "PYGEN_SKIP_KERNELS": "1"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    (path,) = wheel.glob("*.whl")
    names = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "pygen").rglob("*.py")}
    for folder in ("triton_kernels", "benchmarks"):
        expected |= {f"pygen/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*.py")}
    assert names == expected
    assert not any(name.startswith("triton_kernels/") for name in names), "would collide with another package"


def test_the_source_distribution_holds_what_the_build_needs(wheel):
    (path,) = wheel.glob("*.tar.gz")
    names = subprocess.run(["tar", "tzf", str(path)], capture_output=True, text=True, check=True).stdout
    for file in [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "LICENSE"]:
        assert f"/{file.relative_to(ROOT)}\n" in names


def test_without_compiled_kernels_the_package_warns_and_computes(wheel, tmp_path):
    (path,) = wheel.glob("*.whl")
    zipfile.ZipFile(path).extractall(tmp_path)
    script = (
        # An editable installation would lend its compiled module to the package under test.
        "import sys, warnings\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import pygen, torch\n"
        "assert any('compiled kernels are missing' in str(w.message) for w in seen), seen\n"
        "x = torch.zeros(4, requires_grad=True)\n"
        "y = pygen.ops.cumax(x)\n"
        "y.sum().backward()\n"
        "print(y.tolist(), pygen.ops.affine_coupling(torch.ones(1, 1), x[:1, None], x[:1, None])[0].item())\n"
        "print(pygen.backends.report())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[0.25, 0.5, 0.75, 1.0] 1.0" in done.stdout
    assert "rebuild with a C++17 compiler" in done.stdout

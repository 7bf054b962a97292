"""The whole build of pygen._C. Metadata is in pyproject.toml; here stand the sources, their flags and the rules.

Each csrc/cpu/*.cpp is compiled once per instruction-set level, everything else once; ninja runs the compilers and
recompiles only what changed. No torch header but the stable ABI's is included, so the result loads in every torch from
2.10 on, and compiling takes seconds.

Environment: CXX (compiler), MAX_JOBS (parallel compilers), CUDA_HOME and FORCE_CUDA (0 or 1), TORCH_CUDA_ARCH_LIST,
PYGEN_SANITIZE=1 (address and undefined-behaviour sanitizers), PYGEN_SKIP_KERNELS=1 (pure Python package).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 10)
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# -Wpsabi: vectors wider than the baseline's are passed between functions that are all inlined.
# -Wuninitialized: GCC 12's own AVX-512 headers read a variable that they deliberately leave unset.
# -Warray-bounds and -Wstringop: GCC 12 warns of the row-end branches in loops that it knows not to reach the row's end.
KERNEL_FLAGS = [
    "-O3", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-array-bounds",
    "-Wno-stringop-overflow", "-Wno-stringop-overread",
]  # fmt: skip
# GCC schedules before it assigns registers only when told to; without it unrolled chains run one after the other.
# Simulations, and the choice of the nearest code, are the same bits at every level and on every device: no fused
# multiply-add that the source does not name.
EXACT_FLAGS = {"ssa": ["-ffp-contract=off"], "nearest": ["-ffp-contract=off"]}  # by the first word of a file's name
GCC_SCHEDULING = ["-fschedule-insns", "-fsched-pressure"]
X86_LEVELS = {
    "default": [],
    "avx2": ["-DPYGEN_LEVEL_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DPYGEN_LEVEL_AVX512", "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip
# Sources with instructions that only some CPUs with AVX-512 have: compiled for that level alone.
EXTRA_LEVELS = {
    "avx512_vnni": ["-DPYGEN_LEVEL_AVX512_VNNI", "-mavx512vnni"],
    "amx": ["-DPYGEN_LEVEL_AMX", "-mamx-tile", "-mamx-bf16"],
}
ONLY_LEVEL = {"nearest_codebook_integers": "avx512_vnni", "nearest_codebook_bf16": "amx"}
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0+PTX"


def fail(sentence: str) -> None:
    raise SystemExit(f"\npygen cannot be built: {sentence}\n")


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def checked_torch():
    try:
        import torch
    except ImportError:
        fail(
            "torch is not installed in this environment. Install it first (pip install 'torch>=2.10') and build "
            "against it with: pip install --no-build-isolation ."
        )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        fail(f"it needs torch >= 2.10, found {torch.__version__}. Upgrade with: pip install --upgrade 'torch>=2.10'")
    return torch


def checked_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    fail(
        f"no C++ compiler found ({wanted or 'c++, g++, clang++'}). Install one (Debian, Ubuntu: apt install g++), name "
        "it in CXX, or build the slow pure Python package with PYGEN_SKIP_KERNELS=1."
    )


def checked_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            fail("ninja is missing: pip install ninja")
        return found


def cuda_archs() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, in torch's notation: "8.0;9.0a;10.0+PTX"."""
    flags = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS).replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        if not number.rstrip("af").isdigit():
            fail(f'TORCH_CUDA_ARCH_LIST must read like "8.0;9.0;10.0+PTX", got "{entry}"')
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = Path(home) / "bin" / "nvcc" if home else None
    return str(inside) if inside and inside.exists() else shutil.which("nvcc")


def cuda_libraries(nvcc: str) -> list[str]:
    """The static CUDA runtime, from where nvcc itself links: the module then imports where no CUDA is installed."""
    report = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = [line.partition("LIBRARIES=")[2] for line in report.splitlines() if "LIBRARIES=" in line]
    folders = [flag for line in found for flag in shlex.split(line) if flag.startswith("-L")]
    return [*folders, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def cuda_decision(torch) -> tuple[str | None, str]:
    """(nvcc, None) or (None, why the CUDA kernels are left out)."""
    force = os.environ.get("FORCE_CUDA")
    nvcc = find_nvcc()
    if force == "0":
        return None, "FORCE_CUDA=0"
    if nvcc is None:
        if force:
            fail("FORCE_CUDA=1, but there is no nvcc: set CUDA_HOME to the toolkit")
        return None, "no nvcc (set CUDA_HOME)"
    if torch.version.cuda is None and not force:
        return None, "this torch is a CPU build (FORCE_CUDA=1 builds all the same)"
    return nvcc, nvcc


def exact_flags(source: Path) -> list[str]:
    return EXACT_FLAGS.get(source.stem.partition("_")[0], [])


@dataclass
class Plan:
    """Everything that will be compiled, how, and why; printed before the build, and the source of build.ninja."""

    compiler: str
    torch_version: str
    includes: list[str]
    library_dir: str
    levels: dict[str, list[str]]
    extra_levels: dict[str, list[str]]
    nvcc: str | None
    nvcc_reason: str
    sanitize: bool
    objects: list[tuple[str, Path, str, list[str]]] = field(default_factory=list)  # rule, source, object, flags

    @property
    def sanitizers(self) -> list[str]:
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
        return flags if self.sanitize else []

    @property
    def cuda_sources(self) -> list[Path]:
        """Kernels (.cu) and what launches them (.cpp: nvcc compiles it for the host alone)."""
        folder = ROOT / "csrc" / "cuda"
        return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")]) if self.nvcc else []

    def add_objects(self) -> None:
        kernel_flags = KERNEL_FLAGS + ([] if "clang" in compiler_version(self.compiler) else GCC_SCHEDULING)
        x86 = ["-DPYGEN_X86_LEVELS"] if len(self.levels) > 1 else []
        x86 += [f"-DPYGEN_BUILT_{level.upper()}" for level in self.extra_levels]
        for source in sorted((ROOT / "csrc").glob("*.cpp")):
            self.objects.append(("cxx", source, f"{source.stem}.o", ["-O2", *x86, *exact_flags(source)]))
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            for level, flags in self.levels_of(source).items():
                flags = [*kernel_flags, *x86, *flags, *exact_flags(source)]
                self.objects.append(("cxx", source, f"cpu_{source.stem}.{level}.o", flags))
        for source in self.cuda_sources:
            self.objects.append(("nvcc", source, f"cuda_{source.stem}.o", cuda_archs()))

    def levels_of(self, source: Path) -> dict[str, list[str]]:
        only = ONLY_LEVEL.get(source.stem)
        if only is None:
            return self.levels
        return {only: [*self.levels["avx512"], *self.extra_levels[only]]} if only in self.extra_levels else {}

    def summary(self) -> str:
        cuda = f"{len(self.cuda_sources)} sources, {' '.join(cuda_archs())}" if self.nvcc else "left out"
        return "\n".join(
            [
                "pygen builds:",
                f"  compiler    {self.compiler}",
                f"  torch       {self.torch_version} (stable ABI of 2.10: the result loads in every later torch)",
                f"  CPU levels  {', '.join([*self.levels, *self.extra_levels])} on {platform.machine()}",
                f"  CUDA C++    {cuda} ({self.nvcc_reason})",
                f"  sanitizers  {'address, undefined' if self.sanitize else 'none'}",
                f"  objects     {len(self.objects)}",
            ]
        )

    def config_header(self) -> str:
        values = {
            "PYGEN_COMPILER": compiler_version(self.compiler),
            "PYGEN_BUILD_TORCH": self.torch_version,
            "PYGEN_CPU_LEVELS": ",".join([*self.levels, *self.extra_levels]),
            "PYGEN_CUDA": "built" if self.nvcc else self.nvcc_reason,
            "PYGEN_CUDA_ARCHS": " ".join(cuda_archs()) if self.cuda_sources else "",
            "PYGEN_SANITIZERS": "address,undefined" if self.sanitize else "",
        }
        return "".join(f'#define {name} "{value}"\n' for name, value in values.items())

    def ninja(self, output: Path) -> str:
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        compile_flags = shlex.join([*COMMON_FLAGS, *self.sanitizers, f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"])
        includes = " ".join(shlex.quote(f"-isystem{path}") for path in self.includes)
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10", *(cuda_libraries(self.nvcc) if self.cuda_sources else [])]
        host_flags = "-Xcompiler=-fPIC,-fvisibility=hidden"
        lines = [
            f"cxx_flags = {compile_flags} {includes} -I.",
            "rule cxx",
            f"  command = {self.compiler} $cxx_flags $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in ($level)",
            "rule nvcc",
            f"  command = {self.nvcc} -std=c++17 -O3 --fmad=false --threads 0 -DUSE_CUDA "
            f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET} {host_flags} {includes.replace('-isystem', '-I')} "
            "$flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  description = $in",
            "rule link",
            f"  command = {self.compiler} {shared} {shlex.join(self.sanitizers)} $in "
            f"-L{shlex.quote(self.library_dir)} {shlex.join(libraries)} -o $out",
        ]
        for rule, source, name, flags in self.objects:
            level = name.removesuffix(".o").rpartition(".")[2] if source.parent.name == "cpu" else "once"
            lines += [f"build {name}: {rule} {source}", f"  flags = {shlex.join(flags)}", f"  level = {level}"]
        lines.append(f"build {output}: link {' '.join(name for _, _, name, _ in self.objects)}")
        return "\n".join(lines) + "\n"


def compiler_version(compiler: str) -> str:
    first = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    return first.replace('"', "'")


def understood_levels(compiler: str) -> dict[str, list[str]]:
    """Those of EXTRA_LEVELS that the compiler has instructions for: AMX came with GCC 11 and Clang 12."""

    def understood(flags: list[str]) -> bool:
        command = [*shlex.split(compiler), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return {level: flags for level, flags in EXTRA_LEVELS.items() if understood(flags)}


def make_plan() -> Plan:
    torch = checked_torch()
    import pybind11

    torch_dir = Path(torch.__file__).parent
    includes = [str(torch_dir / "include"), pybind11.get_include(), sysconfig.get_paths()["include"]]
    nvcc, reason = cuda_decision(torch)
    x86 = platform.machine() in ("x86_64", "AMD64")
    compiler = checked_compiler()
    plan = Plan(
        compiler=compiler,
        torch_version=torch.__version__,
        includes=includes,
        library_dir=str(torch_dir / "lib"),
        levels=X86_LEVELS if x86 else {"default": []},
        extra_levels=understood_levels(compiler) if x86 else {},
        nvcc=nvcc,
        nvcc_reason=reason,
        sanitize=switched_on("PYGEN_SANITIZE"),
    )
    plan.add_objects()
    return plan


class BuildKernels(build_ext):
    """setuptools asks for pygen._C; ninja builds it."""

    def build_extension(self, extension: Extension) -> None:
        plan = make_plan()
        print(plan.summary(), flush=True)
        build_dir = Path(self.build_temp).resolve() / ("sanitize" if plan.sanitize else "release")
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.write_if_changed(build_dir / "build_config.h", plan.config_header())
        self.write_if_changed(build_dir / "build.ninja", plan.ninja(Path("_C.so")))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        code = subprocess.call([checked_ninja(), "-C", str(build_dir), "-j", jobs])
        if code:
            fail(f"a compiler stopped with an error (above). It was {plan.compiler} for torch {plan.torch_version}.")
        # Each kind of build keeps its own library: setuptools' copy may come from the other kind.
        shutil.copy2(build_dir / "_C.so", output)

    @staticmethod
    def write_if_changed(path: Path, text: str) -> None:
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


setup(
    ext_modules=[] if switched_on("PYGEN_SKIP_KERNELS") else [Extension("pygen._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)

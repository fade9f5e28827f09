"""Builds the optional extensions `wrn_fast._cpu` (csrc/cpu) and `wrn_fast._cuda` (csrc/cuda) with one ninja file each.

No torch header is used, so torch is not needed here and an upgrade of torch cannot break the binaries. What cannot be
built is a reason in `wrn_fast/_build_reasons.txt`, not a failed install, unless it was asked for by name:

    WRN_FAST_BUILD     auto (default: what the toolchain allows) | cpu | cuda | cpu,cuda (these, or exit 1) | none;
                       auto leaves _cuda out where the torch that is installed is a build without CUDA
    CXX, CXXFLAGS      the C++ compiler (default: g++, c++, clang++) and flags put before ours; LDFLAGS likewise
    CUDA_HOME          where nvcc is, if not on PATH
    WRN_FAST_CXXFLAGS  flags put after ours
    WRN_FAST_SANITIZE  for example address,undefined: an instrumented -O1 build of _cpu
    WRN_FAST_JOBS      parallel compilations (default: the CPUs this process may use)

Objects live in build/wrn_fast, so a second build compiles only what changed.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
REASONS = "_build_reasons.txt"

# csrc/cpu: these are compiled once, for any CPU; every other file once per instruction set.
CPU_ONCE = ("module.cpp", "plan.cpp", "isa.cpp", "scratch.cpp", "policy.cpp")
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -fno-math-errno -Wall -Wextra".split()
# -Wno-maybe-uninitialized: hundreds of false warnings in GCC 12's own avx512fintrin.h (GCC bug 105593).
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512vl -mavx512dq -mavx512bw -mavx2 -mfma -mf16c -mprefer-vector-width=512".split()
    + ["-Wno-maybe-uninitialized", "-Wno-uninitialized"],
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "portable": [],
}
# csrc/cuda: sm90_*.cu use instructions of sm_90a only; the other files also run elsewhere (PTX for what comes later).
# 7.5 is the oldest that CUDA 13 compiles for. The driver's functions are looked up when they are needed, so nothing
# links to libcuda and the module can be imported without it.
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -cudart static".split()
GENCODE_SM90 = ["-gencode=arch=compute_90a,code=sm_90a"]
GENCODE_PORTABLE = ["-gencode=arch=compute_75,code=[sm_75,compute_75]"]


class Unbuildable(Exception):
    """The sentence that says why an extension cannot be built here."""


def wishes() -> set[str] | None:
    """The extensions asked for by name in WRN_FAST_BUILD; None is `auto`."""
    value = os.environ.get("WRN_FAST_BUILD", "").strip().lower() or "auto"
    names = {name.strip() for name in value.split(",")}
    if value in ("auto", "none"):
        return None if value == "auto" else set()
    if not names <= {"cpu", "cuda"}:
        raise SystemExit(f"WRN_FAST_BUILD: expected auto, cpu, cuda, cpu,cuda or none, got {value!r}")
    return names


def flags_from(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def cxx_compiler() -> list[str]:
    wanted = flags_from("CXX")
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise Unbuildable(f"CXX={os.environ['CXX']} is not a command on this machine")
        return wanted
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Unbuildable("no C++ compiler (g++, c++, clang++) is on PATH and CXX is not set")


def nvcc_compiler() -> list[str]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            nvcc = Path(os.environ[variable], "bin", "nvcc")
            if not nvcc.is_file():
                raise Unbuildable(f"{variable}={os.environ[variable]} has no bin/nvcc")
            return [str(nvcc)]
    nvcc_on_path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc_on_path is None:
        raise Unbuildable("no nvcc is on PATH and CUDA_HOME is not set")
    return [nvcc_on_path, *(["-ccbin", flags_from("CXX")[0]] if flags_from("CXX") else [])]


def torch_without_cuda() -> str | None:
    """The version of the installed torch if it is a build without CUDA; its file is read, it is not imported."""
    found = importlib.util.find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    version = re.search(r"^__version__ *= *['\"](.+)['\"]", text, re.MULTILINE)
    without = re.search(r"^cuda\b[^=\n]*= *None", text, re.MULTILINE)
    return version.group(1) if version and without else None


def ninja_program() -> str:
    """ninja of the Python package (the build requirement), else one on PATH."""
    if importlib.util.find_spec("ninja"):
        import ninja

        name = Path(ninja.BIN_DIR, "ninja.exe" if os.name == "nt" else "ninja")
        if name.is_file():
            return str(name)
    found = shutil.which("ninja")
    if found is None:
        raise Unbuildable("ninja is not installed (pip install ninja)")
    return found


def python_includes() -> list[str]:
    if importlib.util.find_spec("pybind11") is None:
        raise Unbuildable("pybind11 is not installed (pip install pybind11)")
    import pybind11

    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").is_file():
        raise Unbuildable(f"Python.h is not in {python}: install this Python's development headers")
    return ["-isystem", pybind11.get_include(), "-isystem", python]


def compiles(command: list[str], source: str) -> str | None:
    """None if `source` compiles, else the first line of the complaint."""
    try:
        probe = subprocess.run(
            [*command, "-fsyntax-only", "-x", "c++", "-"], input=source, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if probe.returncode == 0 else complaint(probe.stderr, probe.returncode)


def complaint(output: str, status: int) -> str:
    """The most telling line of a compiler's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(("ninja:", "FAILED"))]
    for word in (r"\berror\b", "Killed", "No such file|not found|cannot"):
        for line in lines:
            if re.search(word, line):
                return line.replace(f"{ROOT}{os.sep}", "")
    return lines[-1] if lines else f"exit status {status} and no message"


class NinjaFile:
    """The edges of one extension; object names are relative to the folder of the ninja file."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]
        self.objects: list[str] = []

    @staticmethod
    def path(name: str | Path) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def rule(self, name: str, command: list[str], tail: str, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {shlex.join(command).replace('$', '$$')} {tail}"]
        self.lines.append(f"  description = {command[0]} $out")
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []

    def compile(self, name: str, command: list[str], source: Path) -> None:
        rule = f"compile{len(self.objects)}"
        self.rule(rule, command, "-MD -MF $out.d -c $in -o $out", depfile=True)
        self.lines.append(f"build {self.path(name)}: {rule} {self.path(source)}")
        self.objects.append(name)

    def link(self, name: str, command: list[str], tail: list[str]) -> None:
        self.rule("link", command, "$in -o $out " + shlex.join(tail).replace("$", "$$"), depfile=False)
        self.lines.append(f"build {self.path(name)}: link {' '.join(map(self.path, self.objects))}")
        self.lines.append(f"default {self.path(name)}")

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def sources(name: str) -> list[Path]:
    patterns = ("*.cpp",) if name == "cpu" else ("*.cu", "*.cpp")
    return sorted(path for pattern in patterns for path in (CSRC / name).glob(pattern))


def plan_cpu(library: str) -> NinjaFile:
    compiler, includes = cxx_compiler(), python_includes()
    common = [*flags_from("CXXFLAGS"), *CXX_FLAGS]
    link = [*compiler, "-shared", "-fopenmp"]
    sanitize = os.environ.get("WRN_FAST_SANITIZE", "")
    if sanitize:
        common += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
        link += [f"-fsanitize={sanitize}"]
    common += [*flags_from("WRN_FAST_CXXFLAGS"), f"-ffile-prefix-map={ROOT}=.", f"-I{CSRC}"]

    problem = compiles([*compiler, *common], "#include <cstdint>\nint wrn_fast;\n")
    if problem:
        raise Unbuildable(f"{compiler[0]} cannot compile an empty C++17 file: {problem}")
    x86 = "#ifndef __x86_64__\n#error not x86-64\n#endif\n"
    isas = [isa for isa, flags in ISA_FLAGS.items() if not flags or compiles([*compiler, *common, *flags], x86) is None]
    have = [f"-DWRN_HAVE_{isa.upper()}=1" for isa in isas]

    plan = NinjaFile()
    for source in sources("cpu"):
        if source.name in CPU_ONCE:
            plan.compile(f"{source.stem}.o", [*compiler, *common, *have, *includes], source)
            continue
        for isa in isas:
            names = [f"-DWRN_ISA={isa}", f"-DWRN_ISA_{isa.upper()}=1"]
            plan.compile(f"{source.stem}.{isa}.o", [*compiler, *common, *ISA_FLAGS[isa], *names], source)
    plan.link(library, link, flags_from("LDFLAGS"))
    return plan


def plan_cuda(library: str) -> NinjaFile:
    if not sources("cuda"):
        raise Unbuildable("this version has no CUDA sources (csrc/cuda)")
    if not list((CSRC / "cuda").glob("sm90_*.cu")):
        raise Unbuildable("this version has no Hopper kernels (csrc/cuda/sm90_*.cu)")
    torch = torch_without_cuda() if wishes() is None else None
    if torch:
        raise Unbuildable(f"torch {torch} is a build without CUDA (WRN_FAST_BUILD=cpu,cuda builds it all the same)")
    nvcc, includes = nvcc_compiler(), python_includes()
    plan = NinjaFile()
    for source in sources("cuda"):
        gencode = GENCODE_SM90 if source.name.startswith("sm90_") else GENCODE_PORTABLE + GENCODE_SM90
        command = [*nvcc, *CUDA_FLAGS, f"-I{CSRC}"]
        command += gencode if source.suffix == ".cu" else includes
        plan.compile(f"{source.stem}.o", command, source)
    plan.link(library, [*nvcc, "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"], [])
    return plan


PLANS = {"cpu": plan_cpu, "cuda": plan_cuda}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """One build at a time. The compilers inherit the lock, so the orphans of a killed build are waited for."""
    with open(folder / "lock", "w") as file:
        with contextlib.suppress(ImportError):  # fcntl: POSIX only
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"wrn_fast: another build is at work in {folder}; waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def object_folder(name: str, fallback: str) -> Path:
    """Where objects stay between builds: in build/ of the checkout, or in `fallback` if that cannot be written."""
    tag = f"{name}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    if os.environ.get("WRN_FAST_SANITIZE"):
        tag += "-" + os.environ["WRN_FAST_SANITIZE"].replace(",", "-")
    for parent in (ROOT / "build", Path(fallback), Path(tempfile.gettempdir())):
        folder = parent / "wrn_fast" / tag
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise Unbuildable("no folder for objects can be written")


def jobs() -> int:
    wanted = os.environ.get("WRN_FAST_JOBS") or os.environ.get("MAX_JOBS")
    if wanted:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_ninja(folder: Path, plan: NinjaFile, lock: int) -> None:
    text, file = str(plan), folder / "build.ninja"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    keep = {"pass_fds": (lock,)} if os.name == "posix" else {}
    command = [ninja_program(), "-j", str(jobs())]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **keep
    ) as ninja:
        output = []
        for line in ninja.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if ninja.returncode != 0:
        raise Unbuildable(f"compilation failed: {complaint(''.join(output), ninja.returncode)}")


def place(source: Path, target: Path) -> None:
    """Copies through a temporary name: a process that has the old library mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, partial)
    shutil.copymode(source, partial)
    os.replace(partial, target)


class BuildExtensions(build_ext):
    """One ninja run an extension; in `auto` a failure becomes a line of `_build_reasons.txt`."""

    def run(self) -> None:
        wanted = wishes()
        reasons = {}
        for extension in self.extensions:
            name = extension.name.rpartition("._")[2]
            product = Path(self.build_lib, self.get_ext_filename(extension.name))
            folders = [product.parent, *([self.package_folder()] if self.inplace else [])]
            try:
                if wanted is not None and name not in wanted:
                    raise Unbuildable(f"WRN_FAST_BUILD={os.environ['WRN_FAST_BUILD']} did not ask for it")
                objects = object_folder(name, self.build_temp)
                with locked(objects) as lock:
                    run_ninja(objects, PLANS[name](product.name), lock)
                    for folder in folders:
                        place(objects / product.name, folder / product.name)
            except (Unbuildable, OSError, subprocess.SubprocessError, ValueError) as error:
                reasons[f"_{name}"] = " ".join(str(error).split())
                if wanted and name in wanted:
                    raise SystemExit(f"wrn_fast._{name} was asked for and cannot be built: {error}") from error
                for folder in folders:
                    (folder / product.name).unlink(missing_ok=True)
        for folder in {Path(self.build_lib, "wrn_fast"), *([self.package_folder()] if self.inplace else [])}:
            self.write_reasons(folder / REASONS, reasons)
        for name, reason in reasons.items():
            print(f"wrn_fast: extension {name} is not built: {reason}. wrn_fast works without it.", file=sys.stderr)

    def package_folder(self) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("wrn_fast")).resolve()

    @staticmethod
    def write_reasons(file: Path, reasons: dict[str, str]) -> None:
        if reasons:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{name}: {reason}\n" for name, reason in reasons.items()), encoding="utf-8")
        else:
            file.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return sorted({*self.get_output_mapping(), *self.existing_outputs()})

    def existing_outputs(self) -> list[str]:
        names = [self.get_ext_filename(extension.name) for extension in self.extensions]
        files = [Path(self.build_lib, name) for name in (*names, os.path.join("wrn_fast", REASONS))]
        return [str(file) for file in files if file.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Built file -> its copy in the source tree, for an editable install."""
        if not self.inplace:
            return {}
        return {file: str(self.package_folder() / Path(file).name) for file in self.existing_outputs()}


class Build(build):
    """Starts from an empty package folder, so that no module deleted since the last build is shipped."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "wrn_fast"), ignore_errors=True)
        super().run()


def extension_modules() -> list[Extension]:
    wanted = wishes() or set()
    names = ["cpu", *(["cuda"] if sources("cuda") or "cuda" in wanted else [])]
    return [Extension(f"wrn_fast._{n}", [str(s.relative_to(ROOT)) for s in sources(n)]) for n in names]


setup(ext_modules=extension_modules(), cmdclass={"build": Build, "build_ext": BuildExtensions})

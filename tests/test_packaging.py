"""Building and installing, with the small csrc below in the place of the real one: what is tried is setup.py."""

import importlib.machinery
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]

MODULE = """
#include <Python.h>
#include "cpu/lanes.h"
static PyObject* lanes(PyObject*, PyObject*) { return PyLong_FromLong(wrn_fast::portable::lanes()); }
static PyMethodDef methods[] = {{"lanes", lanes, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
"""
HEADER = """
#pragma once
#define LANES 4
#ifdef WRN_ISA
namespace wrn_fast::WRN_ISA { int lanes(); }
#else
namespace wrn_fast::portable { int lanes(); }
#endif
"""
KERNEL = '#include "cpu/lanes.h"\nnamespace wrn_fast::WRN_ISA { int lanes() { return LANES; } }\n'
# A compiler that leaves a broken object behind and hangs, as one that is killed does. Probes read standard input.
HANGING = '#!/bin/sh\ncase "$*" in *lanes.cpp*) ;; *) exec {cxx} "$@";; esac\n'
HANGING += 'for last; do :; done; echo broken > "$last"; touch "{marks}/$$"; {then}\n'
BROKEN = '#!/bin/sh\necho "lanes.cpp:1: internal compiler error: out of luck" >&2\nexit 4\n'


def compiler():
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler is on PATH")


@pytest.fixture
def tree(tmp_path):
    """A checkout under a path with a space: the real package and setup, the small csrc."""
    tree = tmp_path / "a checkout"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("*.so", "_build_reasons.txt", "__pycache__")
    shutil.copytree(ROOT / "wrn_fast", tree / "wrn_fast", ignore=ignore)
    (tree / "csrc" / "cpu").mkdir(parents=True)
    for name, text in (("module.cpp", MODULE), ("lanes.h", HEADER), ("lanes.cpp", KERNEL)):
        (tree / "csrc" / "cpu" / name).write_text(text)
    return tree


def environment(**changes):
    dropped = ("WRN_FAST_", "CXX", "LDFLAGS", "PYTHONPATH", "CUDA_HOME", "CUDA_PATH")
    base = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return base | {key: str(value) for key, value in changes.items()}


def run(command, tree, **changes):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tree,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def build_in_place(tree, **changes):
    return run(["setup.py", "build_ext", "--inplace"], tree, **changes)


def hook(tree, name, folder, **changes):
    """Calls a PEP 517 hook as pip does, without isolation; returns the file it made."""
    folder.mkdir(exist_ok=True)
    result = run(["-c", f"from setuptools import build_meta as b; b.{name}({str(folder)!r})"], tree, **changes)
    assert result.returncode == 0, result.stdout
    (product,) = folder.iterdir()
    return product


def library(tree):
    return tree / "wrn_fast" / f"_cpu{SUFFIX}"


def lanes(tree):
    """What the built extension answers; the package around it is not imported."""
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('_cpu', {str(library(tree))!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.lanes())"
    )
    result = run(["-c", code], tree)
    assert result.returncode == 0, result.stdout
    return int(result.stdout)


def reason(package):
    file = package / "_build_reasons.txt"
    return file.read_text() if file.is_file() else None


def test_pip_install_without_a_compiler(tree, tmp_path):
    target = tmp_path / "target"
    pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", target, "."]
    result = run(pip, tree, CXX="/none/g++")
    assert result.returncode == 0, result.stdout
    assert not list((target / "wrn_fast").glob("*.so"))
    assert "CXX=/none/g++ is not a command" in reason(target / "wrn_fast")
    said = run(
        ["-c", "import wrn_fast._build as b; print(b.__file__, b.missing_extension_reason('_cpu'))"],
        tmp_path,
        PYTHONPATH=target,
    )
    assert said.returncode == 0, said.stdout
    assert str(target) in said.stdout and "extension _cpu is not built: CXX=/none/g++" in said.stdout
    assert (target / "bin" / "wrn-fast").is_file()
    # In a checkout the package beside setup.py comes before the installed one.
    said = run(["-c", "import wrn_fast._build as b; print(b.missing_extension_reason('_cpu'))"], tree)
    assert f"not built in {tree}, whose wrn_fast this is (pip install -e . there)" in said.stdout


def test_an_explicit_wish_fails_loudly(tree):
    result = build_in_place(tree, CXX="/none/g++", WRN_FAST_BUILD="cpu")
    assert result.returncode == 1
    assert "wrn_fast._cpu was asked for and cannot be built: CXX=/none/g++" in result.stdout


def test_cuda_by_name_needs_nvcc_or_sources(tree):
    result = build_in_place(tree, WRN_FAST_BUILD="cuda")
    assert result.returncode == 1 and "wrn_fast._cuda was asked for" in result.stdout


def with_cuda_sources(tree):
    """A checkout with one Hopper kernel."""
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "sm90_nothing.cu").write_text("")
    (tree / "csrc" / "cuda" / "module.cpp").write_text("")
    return tree


def installed_torch(folder, cuda):
    """A folder for PYTHONPATH in which a torch of this build is found; it cannot be imported."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('torch is not for building')")
    (folder / "torch" / "version.py").write_text(f"__version__ = '9.9'\ncuda: str | None = {cuda!r}\n")
    return folder


@pytest.mark.parametrize(
    "wish, cuda, said",
    [("auto", None, "torch 9.9 is a build without CUDA"), ("auto", "13.0", "has no bin/nvcc"),
     ("cuda", None, "has no bin/nvcc")],
)  # fmt: skip
def test_cuda_is_built_for_a_torch_with_cuda_or_by_name(tree, tmp_path, wish, cuda, said):
    torch = installed_torch(tmp_path / "site", cuda)
    result = build_in_place(
        with_cuda_sources(tree), WRN_FAST_BUILD=wish, CUDA_HOME="/none", CXX="/none/g++", PYTHONPATH=torch
    )
    assert result.returncode == (wish == "cuda") and said in result.stdout, result.stdout
    if wish == "auto":
        (line,) = [line for line in reason(tree / "wrn_fast").splitlines() if line.startswith("_cuda: ")]
        assert said in line


def test_none_builds_nothing_and_says_so(tree):
    result = build_in_place(tree, WRN_FAST_BUILD="none")
    assert result.returncode == 0, result.stdout
    assert not library(tree).exists() and "WRN_FAST_BUILD=none" in reason(tree / "wrn_fast")


def test_an_unknown_wish_is_refused(tree):
    result = build_in_place(tree, WRN_FAST_BUILD="gpu")
    assert result.returncode == 1 and "WRN_FAST_BUILD: expected auto, cpu" in result.stdout


@needs_compiler
def test_incremental_build(tree):
    first = build_in_place(tree)
    assert first.returncode == 0 and lanes(tree) == 4, first.stdout
    assert reason(tree / "wrn_fast") is None
    assert "no work to do" in build_in_place(tree).stdout
    header = tree / "csrc" / "cpu" / "lanes.h"
    header.write_text(HEADER.replace("LANES 4", "LANES 5"))
    os.utime(header, (time.time() + 2, time.time() + 2))
    again = build_in_place(tree)
    assert lanes(tree) == 5, again.stdout
    flags = build_in_place(tree, WRN_FAST_CXXFLAGS="-DUNUSED")
    assert "lanes" in flags.stdout, "a changed flag must recompile"


@needs_compiler
def test_a_broken_compiler_is_a_reason_and_takes_the_old_library_away(tree, tmp_path):
    assert build_in_place(tree).returncode == 0 and library(tree).exists()
    broken = tmp_path / "broken-g++"
    broken.write_text(BROKEN)
    broken.chmod(0o755)
    result = build_in_place(tree, CXX=broken)
    assert result.returncode == 0, result.stdout
    assert "internal compiler error" in reason(tree / "wrn_fast")
    assert not library(tree).exists(), "a library of older sources must not stay"
    assert build_in_place(tree).returncode == 0 and lanes(tree) == 4
    assert reason(tree / "wrn_fast") is None, "the reason must go when the build succeeds"


@needs_compiler
def test_an_error_in_a_source_is_named(tree):
    (tree / "csrc" / "cpu" / "lanes.cpp").write_text("namespace wrn_fast { int lanes( }\n")
    assert build_in_place(tree).returncode == 0
    assert re.search(r"csrc/cpu/lanes\.cpp:1:\d+: error", reason(tree / "wrn_fast"))
    assert build_in_place(tree, WRN_FAST_BUILD="cpu").returncode == 1


@needs_compiler
@pytest.mark.parametrize("everything", [True, False], ids=["with its compilers", "alone, its compilers live on"])
def test_a_killed_build_does_no_harm(tree, tmp_path, everything):
    hanging, marks = tmp_path / "hanging-g++", tmp_path / "marks"
    marks.mkdir()
    then = "exec sleep 60" if everything else "sleep 3; exit 1"
    hanging.write_text(HANGING.format(cxx=shutil.which(compiler()), marks=marks, then=then))
    hanging.chmod(0o755)
    build = subprocess.Popen(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=environment(CXX=hanging, WRN_FAST_JOBS=1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(marks.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    (mark,) = marks.iterdir()
    if everything:  # setup.py and ninja are one process group; ninja gives each compiler its own
        os.killpg(build.pid, signal.SIGKILL)
        os.kill(int(mark.name), signal.SIGKILL)
    else:
        build.kill()
    build.wait()
    result = build_in_place(tree)
    assert result.returncode == 0 and lanes(tree) == 4, result.stdout


@needs_compiler
def test_wheel_contents(tree, tmp_path):
    assert run(["setup.py", "build"], tree).returncode == 0
    (stale,) = (tree / "build").glob("lib*/wrn_fast")
    (stale / "deleted_long_ago.py").write_text("")
    wheel = zipfile.ZipFile(hook(tree, "build_wheel", tmp_path / "wheel"))
    names = set(wheel.namelist())
    assert f"wrn_fast/_cpu{SUFFIX}" in names and "wrn_fast/py.typed" in names
    assert {path.relative_to(tree).as_posix() for path in (tree / "wrn_fast").rglob("*.py")} <= names
    data = {path.relative_to(tree).as_posix() for path in (tree / "wrn_fast").rglob("*.json")}
    assert data <= names, "tuned tables travel with the package"
    assert not [n for n in names if n.startswith(("csrc", "tests", "build", "benchmarks")) or "deleted" in n]
    assert "wrn_fast/_build_reasons.txt" not in names
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    text = wheel.read(f"{info}/METADATA").decode()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "wrn_fast" / "__init__.py").read_text()).group(1)
    assert f"\nVersion: {version}\n" in text and "\nLicense-Expression: BSD-3-Clause\n" in text
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(re.split(r"[ <>=;]", line)[1] for line in required) == ["rich", "torch"]
    assert "wrn-fast = wrn_fast.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


@needs_compiler
def test_source_distribution_builds(tree, tmp_path):
    archive = hook(tree, "build_sdist", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(tmp_path)
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert (unpacked / "csrc" / "cpu" / "lanes.h").is_file(), "headers travel with the sources"
    result = build_in_place(unpacked, WRN_FAST_BUILD="cpu")
    assert result.returncode == 0 and lanes(unpacked) == 4, result.stdout


@needs_compiler
def test_editable_install_builds_in_place(tree, tmp_path):
    hook(tree, "build_editable", tmp_path / "editable")
    assert lanes(tree) == 4
    hook(tree, "build_editable", tmp_path / "without", CXX="/none/g++")
    assert not library(tree).exists() and "/none/g++" in reason(tree / "wrn_fast")


def test_building_needs_no_torch():
    """In build isolation there is none; and a binary with torch's symbols would be tied to one version of it."""
    assert not re.search(r"^\s*(import|from) torch", (ROOT / "setup.py").read_text(), re.MULTILINE)
    requires = re.search(r"^requires = (.+)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert "torch" not in requires
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name

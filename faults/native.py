"""Compiling csrc/cpu outside setup.py: for one instruction set, lightly optimised, objects kept between faults."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


class CannotCompile(Exception):
    """Why there is nothing to compile with."""


def setup_constant(name: str) -> Any:
    """A constant of setup.py, so that flags are written once."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:  # type: ignore[attr-defined]
            return eval(compile(ast.Expression(node.value), "setup.py", "eval"))
    raise AssertionError(f"setup.py has no {name}")


def compiler() -> str:
    """The C++ compiler."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CannotCompile("needs a C++ compiler")


def processor_flags() -> set[str]:
    """What the processor can, in the kernel's words."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text(encoding="utf-8").split()) if info.exists() else set()


def run(command: Iterable[str | Path]) -> None:
    """One compiler call.

    Raises:
        RuntimeError: it failed; the text is what it said.
    """
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{done.stderr[-4000:]}\nexit status {done.returncode}")


@cache
def flags() -> tuple[str, ...]:
    """-O1, and AVX2 under the name of the portable code: one instruction set has to be compiled, not two."""
    if importlib.util.find_spec("pybind11") is None:
        raise CannotCompile("needs pybind11")
    import pybind11

    avx2 = {"avx2", "fma", "f16c"} <= processor_flags()
    isa = setup_constant("ISA_FLAGS")["avx2" if avx2 else "portable"]
    includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    return (*setup_constant("CXX_FLAGS"), "-O1", "-D_GLIBCXX_ASSERTIONS", *isa, "-DWRN_ISA=portable", *includes)


def compile_source(source: Path, target: Path) -> None:
    """One object, complete or absent."""
    partial = target.with_suffix(f".{os.getpid()}")
    run([compiler(), *flags(), f"-I{source.parents[1]}", "-c", source, "-o", partial])
    os.replace(partial, target)


def link(objects: Iterable[Path], library: Path) -> None:
    """The extension."""
    run([compiler(), "-shared", "-fopenmp", *objects, "-o", library])


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def objects(root: Path = ROOT) -> dict[str, Path]:
    """The objects of the sources as they are, by the name of the source; compiled where they are not in build/."""
    sources = sorted((root / "csrc" / "cpu").glob("*.cpp"))
    key = hashlib.sha256("\0".join((compiler(), *flags())).encode())
    for file in sorted((root / "csrc").rglob("*.[ch]*")):
        key.update(file.read_bytes())
    parent = ROOT / "build" / "faults"
    folder = parent / key.hexdigest()[:16]
    found = {source.name: folder / f"{source.stem}.o" for source in sources}
    with alone(parent):
        for old in parent.iterdir():
            if old.is_dir() and old != folder:
                shutil.rmtree(old)
        folder.mkdir(exist_ok=True)
        missing = [source for source in sources if not found[source.name].exists()]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda source: compile_source(source, found[source.name]), missing))
    return found

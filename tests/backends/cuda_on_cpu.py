"""`_cuda` built for the CPU: its bindings and kernels over the layer of common_host.h, for tests without a GPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cuda"
CUDA = ROOT / "csrc" / "cuda"
CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}  # DType of csrc/problem.h
ACTS = {"identity": 0, "relu": 1, "silu": 2, "leaky_relu": 3}


@contextmanager
def locked(file):
    """One process of several at a time."""
    import fcntl

    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def compile_all(jobs):
    """Runs compiler commands in parallel; an error is the failure of the test."""

    def one(command):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, jobs))


@functools.cache
def build():
    """The extension as a module. Objects lie in build/ under the hash of what they are made of, for the next run."""
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").is_file():
        pytest.skip("needs Python's development headers")
    flags = [compiler, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-ffp-contract=off",
             '-DWRN_DEVICE_LAYER="common_host.h"', '-DWRN_DEVICE_TYPE="cpu"', "-isystem", pybind11.get_include(),
             "-isystem", python, "-x", "c++"]  # fmt: skip
    common = [*flags, f"-I{HERE}", f"-I{HERE / 'stub'}", f"-I{ROOT / 'csrc'}"]
    headers = sorted(
        [*CUDA.glob("*.h"), *CUDA.glob("common*.cuh"), HERE / "common_host.h", ROOT / "csrc" / "problem.h"]
    )
    sources = sorted([*CUDA.glob("common*.cu"), *CUDA.glob("module*.cpp"), *HERE.glob("*_host.cpp")])
    # Not by the folder of the checkout: a copy of it takes over what did not change.
    shared = b"".join(header.read_bytes() for header in headers) + " ".join(flags).encode()
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    hashes = [hashlib.sha256(shared + source.read_bytes()).hexdigest()[:16] for source in sources]
    objects = [folder / f"{source.stem}-{digest}.o" for source, digest in zip(sources, hashes, strict=True)]
    whole = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
    library = folder / f"_cuda-{whole}.so"
    with locked(folder / "lock"):
        if not library.exists():
            made = [(s, o) for s, o in zip(sources, objects, strict=True) if not o.exists()]
            compile_all([*common, "-c", str(s), "-o", f"{o}.part"] for s, o in made)
            for _, o in made:
                Path(f"{o}.part").rename(o)
            compile_all([[compiler, "-shared", *map(str, objects), "-o", f"{library}.part"]])
            Path(f"{library}.part").rename(library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_NO_KERNELS = ("Shape", "Weights", "refuses", "parts", "splits", "counters", "MOST_FEATURES")


class Recorder:
    """The extension for the CPU that keeps (name, arguments) of every call; `device` is what it says to serve."""

    def __init__(self, extension, device="cpu"):
        self.extension, self.calls, self.DEVICE = extension, [], device
        self.listener = None

    def __getattr__(self, name):
        function = getattr(self.extension, name)
        if name in ("Shape", "Weights", "refuses", "parts", "splits", "counters", "MOST_FEATURES") or name.endswith(
            ("_bytes", "_workspace")
        ):
            return function

        def call(*args, **kwargs):
            self.calls.append((name, kwargs))
            if self.listener is not None:
                self.listener(function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def names(self):
        return [name for name, _ in self.calls]

    def of(self, name):
        return next(kwargs for called, kwargs in self.calls if called == name)

"""The processes in which kernels are interpreted and compiled."""

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def interpreter():
    """Calls a function of a module in a process whose triton interprets.

    Triton decides when it is imported, and other tests of this process must not see a backend that serves the CPU.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    before = os.environ.get("TRITON_INTERPRET")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            pool.submit(int).result()
        finally:
            os.environ.pop("TRITON_INTERPRET")
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """A process whose triton compiles and does not interpret, with a cache of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    changed = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": ""}
    before = {name: os.environ.get(name) for name in changed}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        os.environ.update(changed)
        try:
            pool.submit(int).result()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield lambda function, *args: pool.submit(function, *args).result()

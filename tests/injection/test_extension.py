"""An extension that cannot be loaded, a GPU that goes away: a reason, one warning, the plain backend's result."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from injection.process import CALL, ROOT, run

from wrn_fast.backends import triton
from wrn_fast.problem import ConvProblem

LIBRARY = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
THREE_CALLS = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        exec({CALL!r})
    from wrn_fast import FallbackWarning
said = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
print(len(said), *said)
"""


def of_another_module() -> bytes:
    """A library that loads and is no `_cpu`: what an extension of another Python or package looks like."""
    for name in ("_decimal", "_json", "_struct", "_heapq", "_csv"):
        found = importlib.util.find_spec(name)
        if found and found.origin and found.origin.endswith(".so"):
            return Path(found.origin).read_bytes()
    return pytest.skip("this Python has every module built in")


def cut_short() -> bytes:
    """A header and nothing behind it. Of a longer piece the system's own loader dies; our build renames whole files."""
    library = ROOT / "wrn_fast" / LIBRARY
    return library.read_bytes()[:50] if library.exists() else b"\x7fELF"


BROKEN = {
    "of another module": of_another_module,
    "cut short": cut_short,
    "no library": lambda: b"this is text\n",
    "empty": lambda: b"",
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_extension_that_cannot_be_loaded_is_one_warning(what, tmp_path):
    data = BROKEN[what]()
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "wrn_fast", tmp_path / "wrn_fast", ignore=ignore)
    (tmp_path / "wrn_fast" / LIBRARY).write_bytes(data)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + THREE_CALLS
    *rights, said = run(code).strip().splitlines()
    assert rights == ["right"] * 3
    assert said.startswith("1 wrn_fast runs on plain PyTorch here, because cpu: extension _cpu cannot be loaded")


def test_a_gpu_that_is_lost_is_the_drivers_error_and_may_come_back(monkeypatch):
    problem = ConvProblem("cuda", torch.float32, torch.float32, 1, 8, 8, 16, 16, 3, 3, 1, (1, 1, 1, 1))
    monkeypatch.setattr(triton, "_missing", lambda: None)
    monkeypatch.setattr(triton, "_failed_proof", lambda op, problem: None)
    triton._refused_gpu.cache_clear()

    def lost():
        raise RuntimeError("CUDA error: GPU is lost")

    monkeypatch.setattr(torch.cuda, "device_count", lost)
    with pytest.raises(RuntimeError, match="GPU is lost"):
        triton.unsupported("fprop", problem)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert triton.unsupported("fprop", problem) is None
    triton._refused_gpu.cache_clear()

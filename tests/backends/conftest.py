"""The backend under test."""

from __future__ import annotations

import pytest
import torch
from backends import cuda_on_cpu

from wrn_fast import dispatch
from wrn_fast.backends import BACKENDS, cuda

# On the CPU the convolutions of `cuda` are plain loops: `make test` draws some of its cells, `make test-all` runs all.
CELLS = [pytest.param(name, marks=pytest.mark.rotate(20) if name == "cuda" else ()) for name in BACKENDS]


@pytest.fixture(params=CELLS)
def backend(request, monkeypatch):
    """A backend that is alone in the selection; what it allocates is full of NaN before it writes.

    Without a GPU `cuda` is its adapter, bindings and memory-bound kernels on the CPU, around convolutions that do what
    csrc/cuda/sm90.h says.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        built = cuda_on_cpu.build()
        monkeypatch.setattr(cuda, "_load", lambda: (built, None))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with dispatch.backend(request.param):
        dispatch.forget()
        yield request.param
        dispatch.forget()
    torch.use_deterministic_algorithms(before)

"""The backend under test."""

from __future__ import annotations

import pytest
import torch
from backends import cuda_on_cpu
from backends.harness import CELLS

from wrn_fast import dispatch, packing
from wrn_fast.backends import cuda
from wrn_fast.kernels import cuda_launch


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


@pytest.fixture
def clean_cuda():
    """No choice, pack or device that an earlier test left behind."""

    def forget():
        dispatch.forget()
        packing.refresh()
        cuda.forget()
        cuda._refused_gpu.cache_clear()
        cuda_launch.shape_of.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def recorder(clean_cuda, monkeypatch):
    """The cuda backend alone in the selection, on the CPU; what it calls is kept."""
    found = cuda_on_cpu.Recorder(cuda_on_cpu.build())
    monkeypatch.setattr(cuda, "_load", lambda: (found, None))
    with dispatch.backend("cuda"):
        yield found

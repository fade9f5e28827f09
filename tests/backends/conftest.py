"""The backend under test."""

from __future__ import annotations

import pytest
import torch

from wrn_fast import dispatch
from wrn_fast.backends import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """A backend that is alone in the selection; what it allocates is full of NaN before it writes."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with dispatch.backend(request.param):
        yield request.param
    torch.use_deterministic_algorithms(before)

"""A whole model through the triton backend in the interpreter, chosen by WRN_FAST_BACKEND: forward, backward, eval."""

import pytest
from kernels import whole_model

from wrn_fast import parity


@pytest.mark.parametrize("head", ["cosine", "classic"])
def test_the_model_is_the_reference(interpreter, seed, head):
    errors = interpreter(whole_model.errors, seed, head)
    assert {"out", "grad conv1.weight", "running_mean", "eval out"} <= set(errors)
    bad = {name: e for name, e in errors.items() if not e <= parity.FLOAT64}
    assert not bad


def test_the_backend_is_the_one_that_ran(interpreter):
    assert set(interpreter(whole_model.backends).values()) == {"triton"}

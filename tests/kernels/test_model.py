"""A whole model through the triton backend in the interpreter, chosen by WRN_FAST_BACKEND: forward, backward, eval."""

import pytest
import torch
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


def test_layers_that_write_the_next_ones_activations(interpreter, seed):
    found = [interpreter(whole_model.inference_in_halves, seed + i) for i in range(8)]
    rms = {name: parity.rms([row[name] for row in found]) for name in ("fast", "eager")}
    # 12 convolutions of narrow blocks: inside each block and where only a shortcut reads.
    assert {row["wrote"] for row in found} == {8}
    assert rms["fast"] <= parity.RATIO * rms["eager"] + parity.UNIT[torch.float16]

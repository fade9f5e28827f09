"""The Hopper convolutions with few kernels compiled, in seconds: faults/cuda.py plants its faults under these tests."""

from dataclasses import replace

import pytest
import torch
from cuda import conv_cases
from cuda.conv_cases import Call


def test_random_calls_are_exact(narrow, seed):
    conv_cases.fuzz(narrow, seed, 150, narrow=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_not_numbers_stay(narrow, dtype):
    """NaN passes the prologue's relu, as in PyTorch, and reaches the 9 outputs around it and no other."""
    call = Call(N=1, H=8, W=8, C=16, K=16, prologue=True, act="relu", dtype=dtype)
    exact = conv_cases.tensors_of(call)
    exact["x"][0, 3, 4, 5] = torch.nan
    exact["w"] = exact["w"].abs() + 1
    want, _ = conv_cases.fprop_oracle(call, exact)
    assert int(want.isnan().sum()) == 9 * 16
    got = conv_cases.fprop_output(narrow, call, exact)
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("splits", [1, 4])
def test_bits_do_not_depend_on_the_schedule(narrow, seed, splits):
    """Values whose sums round: threads, blocks and splits in any order give the same bits."""
    call = Call(N=2, H=9, W=9, C=64, K=32, prologue=True, dtype=torch.float16, blocks=5, splits=splits)
    exact = {name: torch.randn_like(v) for name, v in conv_cases.tensors_of(call).items()}
    first, *others = (conv_cases.fprop_output(narrow, replace(call, seed=seed + i), exact) for i in range(8))
    assert all(torch.equal(first, other) for other in others)

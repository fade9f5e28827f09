"""ConvProblem's arithmetic against PyTorch's own shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wrn_fast.problem import ConvProblem, FpropArgs

BASE = ConvProblem("cpu", torch.float32, torch.float32, 2, 8, 9, 4, 6, 3, 3, pad=(1, 1, 1, 1))
few = st.integers(0, 3)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), few, few, few, few
)
def test_output_size_and_flops_are_those_of_the_convolution(h, w, r, s, stride, left, right, top, bottom):
    problem = BASE._replace(H=h, W=w, R=r, S=s, stride=stride, pad=(left, right, top, bottom))
    if h + top + bottom < r or w + left + right < s:
        assert problem.P < 1 or problem.Q < 1
        return
    x = F.pad(torch.ones(2, 4, h, w), problem.pad)
    y = F.conv2d(x, torch.ones(6, 4, r, s), stride=stride)
    assert y.shape == (2, 6, problem.P, problem.Q)
    assert problem.flops == 2 * y.numel() * 4 * r * s


def test_shortcut_adds_its_reduction_steps_to_the_flops():
    assert BASE._replace(short_C=5).flops - BASE.flops == 2 * 2 * 6 * 8 * 9 * 5


def test_bytes_are_each_tensor_once():
    x, y, w = 2 * 4 * 8 * 9, 2 * 6 * 8 * 9, 6 * 4 * 9
    assert BASE.bytes == 4 * (x + y + w)
    assert BASE._replace(residual=True, act_out="relu").bytes == 4 * (x + 3 * y + w)
    half = BASE._replace(dtype=torch.bfloat16, short_C=2)
    assert half.bytes == 2 * (x + y + 2 * 2 * 8 * 9) + 4 * (w + 6 * 2)


@pytest.mark.parametrize(
    "elements, fields", [(288, {"K": 4}), (432, {}), (46_080, {"short_C": 160, "short_stride": 2})],
    ids=["x", "y", "source of the shortcut"],
)  # fmt: skip
def test_index64_turns_on_where_an_element_index_needs_it(elements, fields):
    largest = BASE._replace(N=(2**31 - 1) // elements, **fields)
    assert not largest.index64
    assert largest._replace(N=largest.N + 1).index64


def test_statistics_are_wider_than_the_data():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert BASE._replace(dtype=dtype).stats_dtype == torch.float32
    assert BASE._replace(dtype=torch.float64).stats_dtype == torch.float64
    assert BASE._replace(dtype=torch.bfloat16).compute_dtype == torch.bfloat16


def test_problems_are_keys_and_every_field_counts():
    other = {"device": "cuda", "dtype": torch.float16, "w_dtype": torch.float64, "act": "relu", "drop_at": "output",
             "short_act": "relu", "act_out": "relu", "pad": (0, 0, 0, 0)}  # fmt: skip
    assert hash(BASE) == hash(BASE._replace())
    for name, value in BASE._asdict().items():
        changed = other[name] if name in other else not value if isinstance(value, bool) else value + 1
        assert BASE._replace(**{name: changed}) != BASE, name


def test_arguments_start_with_the_tensors():
    tensors = ["Tensor" in str(annotation) for annotation in FpropArgs.__annotations__.values()]
    assert tensors == sorted(tensors, reverse=True) and sum(tensors) == 15

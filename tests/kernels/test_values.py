"""What no error bound sees: special values, a large mean, equal bits from run to run, one dropout mask."""

import pytest
import torch
from kernels import guards, special

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "leaky_relu"])
def test_nan_and_infinity_reach_what_they_reach_in_eager(interpreter, dtype, act, seed):
    for position, (eager, ours) in interpreter(special.reach, dtype, act, seed).items():
        assert eager == ours, position


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_a_mask_is_open_where_eager_lets_a_gradient_pass(interpreter, dtype, act):
    eager, ours = interpreter(special.mask_bits, dtype, act)
    assert eager == ours and any(eager) and not all(eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_keep_their_digits_at_a_large_mean(interpreter, dtype, seed):
    """Pooled over the channels: mean 1000, variance 1."""
    assert interpreter(special.large_mean, dtype, seed) == "ok"


def test_two_runs_give_the_same_bits(interpreter, seed):
    assert interpreter(special.repeats, seed)


@pytest.mark.parametrize("channels", [16, 6, 1])
@pytest.mark.parametrize("p", [0.3, 0.5, 0.999, 1.0])
def test_every_kernel_draws_the_mask_of_the_rule(interpreter, channels, p, seed):
    """channels off a multiple of 4 take the other way through the generator; seeds and offsets beyond 2^32."""
    masks = interpreter(special.masks, channels, p, seed)
    want = masks.pop("rule")
    assert len(masks) == 5
    for name, mask in masks.items():
        assert torch.equal(mask, want), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_integers_too_wide_are_rounded_once(interpreter, op, dtype, seed):
    reason = interpreter(guards.rounded_once, op, dtype, seed)
    assert reason is None, reason


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_nothing_past_the_end_and_inputs_stay(interpreter, op, seed):
    assert interpreter(guards.guarded, op, seed) == (True, 0, True)

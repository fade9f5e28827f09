"""The head's kernels in Triton's interpreter against float64, and how many launches a call takes."""

import random

import pytest
from kernels import faked, heads

from wrn_fast import parity

CASES, CHUNKS = 36, 3


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_float64(interpreter, chunk, request):
    rng = random.Random(f"{request.config.option.seed} head {chunk}")
    seeds = [rng.randrange(2**31) for _ in range(CASES // CHUNKS)]
    for seed, found in zip(seeds, interpreter(heads.errors, seeds)):
        bad = {name: e for name, e in found.items() if not e <= parity.FLOAT64}
        assert not bad and {"out", "feat"} <= set(found), f"{bad}: kernels.heads.drawn({seed}) = {heads.drawn(seed)}"


def test_memory_past_the_end_and_inputs_stay(interpreter, seed):
    assert interpreter(heads.guarded, seed) == (0, True)


def test_one_launch_forward_and_two_passes_backward_at_most(compiler):
    launches = compiler(faked.head_launches)
    assert launches == {"classic": 1, "cosine": 1, "1000 classes": 1, "eval": 1, "eval with sums": 2, "training": 3}

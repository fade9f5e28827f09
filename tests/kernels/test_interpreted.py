"""Every kernel in Triton's interpreter against float64: a right kernel is at 1e-15 there, a wrong index at 1."""

import random

import pytest
import torch
from kernels import combinations, interpreted

from wrn_fast import parity

OPS = ("fprop", "dgrad", "wgrad", "elementwise")
CHUNKS = 20
CASES = 320  # a run


def test_the_process_interprets_and_this_one_does_not(interpreter):
    assert interpreter(interpreted.interpreting) == ("1", True)


def test_the_cases_hold_every_pair_of_choices(seed):
    met = set()
    for choice in combinations.covering(seed):
        assert combinations.possible(choice)
        met |= combinations.pairs(choice)
    assert met >= combinations.feasible_pairs()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_float64(interpreter, chunk, request):
    run_seed = request.config.option.seed
    cases = combinations.cases(run_seed, CASES)[chunk::CHUNKS]
    rng = random.Random(f"{run_seed} {chunk}")
    seeds = [rng.randrange(2**31) for _ in cases]
    for at, found in enumerate(interpreter(interpreted.errors, seeds, torch.float64, cases, OPS)):
        bad = {name: e for name, e in found.items() if not e <= parity.FLOAT64}
        assert not bad, f"{bad}: kernels.interpreted.draw({seeds[at]}, torch.float64, {cases[at]})"


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_are_as_near_as_eager(interpreter, dtype, op, seed):
    seeds = list(range(seed, seed + 12))
    for name, pairs in interpreter(interpreted.errors_beside_eager, seeds, dtype, op).items():
        pool = parity.Pool(f"{op} {name}", dtype)
        for fast, eager in pairs:
            pool.add_errors(fast, eager)
        assert pool.judge().ok, pool.judge()

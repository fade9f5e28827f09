"""Every kernel in Triton's interpreter against float64: a right kernel is at 1e-15 there, a wrong index at 1."""

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import combinations, interpreted

from wrn_fast import parity

# A run, beside some forty that hold every pair of choices; in chunks, so that several processes share them.
CASES, CHUNKS = 360, 10


def test_the_process_interprets_and_this_one_does_not(interpreter):
    assert interpreter(interpreted.interpreting) == ("1", True)


def test_the_cases_hold_every_pair_of_choices(seed):
    met = set()
    for choice in combinations.covering(seed):
        assert combinations.possible(choice)
        met |= combinations.pairs(choice)
    assert met >= combinations.feasible_pairs()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_pair_of_choices(interpreter, chunk, request):
    run_seed = request.config.option.seed
    for at, values in enumerate(combinations.cases(run_seed, 0)[chunk::CHUNKS]):
        wrong = interpreter(interpreted.wrong, run_seed + at, values)
        assert wrong is None, wrong


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_cases(interpreter, chunk, seed, request):
    """`--fuzz-scale` times as many; what fails is shrunk."""
    count = int(CASES * request.config.getoption("--fuzz-scale") / CHUNKS)

    @hypothesis.seed(seed)
    @settings(
        max_examples=count, deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**31 - 1), combinations.drawn())
    def fuzz(values_seed, values):
        wrong = interpreter(interpreted.wrong, values_seed, values)
        assert wrong is None, wrong

    fuzz()


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_are_as_near_as_eager(interpreter, dtype, op, seed):
    seeds = list(range(seed, seed + 12))
    for name, pairs in interpreter(interpreted.errors_beside_eager, seeds, dtype, op).items():
        pool = parity.Pool(f"{op} {name}", dtype)
        for fast, eager in pairs:
            pool.add_errors(fast, eager)
        assert pool.judge().ok, pool.judge()

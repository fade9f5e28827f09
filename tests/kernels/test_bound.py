"""Bound kernels launch what Triton would, and ask it only where something may have changed. The driver is a fake."""

import random

import pytest
from kernels import combinations, faked


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_the_second_launch_asks_triton_for_nothing_and_is_the_first_again(compiler, op):
    dispatched, launched = compiler(faked.repeated, op)
    first, again, larger = dispatched
    assert first > 0 and again == 0
    assert launched[1] == launched[0]
    # Another batch only moves grids and numbers; one tile more may need one merging step more.
    assert larger <= 1 and launched[2] != launched[0]
    assert {kernel for kernel, *_ in launched[0]} <= {kernel for kernel, *_ in launched[2]}


def test_a_pointer_off_its_alignment_takes_the_kernel_compiled_for_it(compiler):
    dispatched, (aligned, off, off_again, aligned_again) = compiler(faked.misaligned)
    assert dispatched[0] > dispatched[1] == dispatched[2] == 1 and dispatched[3] == 0
    assert aligned == aligned_again and off == off_again
    assert [a[0] == b[0] for a, b in zip(aligned, off)].count(False) == 1


def test_another_dtype_is_another_kernel(compiler):
    dispatched, (wide, narrow, wide_again, narrow_again) = compiler(faked.other_dtypes)
    assert dispatched[1] == 1 and dispatched[2:] == [0, 0]
    assert wide == wide_again and narrow == narrow_again and wide != narrow


def test_another_gpu_has_kernels_and_a_stream_of_its_own(compiler):
    dispatched, launched = compiler(faked.devices)
    assert dispatched[0] == dispatched[1] > 0 and dispatched[2:] == [0, 0]
    assert [{stream for *_, stream in call} for call in launched] == [{10}, {11}, {10}, {11}]


def test_what_is_absent_follows_from_what_is_compiled_in_and_numbers_are_not_looked_at(compiler, seed):
    """A bound kernel is looked up by its compile-time values: two launches with equal ones need the same code."""
    choices = combinations.cases(seed, 150)
    rng = random.Random(seed)
    assert compiler(faked.patterns, [rng.randrange(2**31) for _ in choices], choices) > len(choices)

"""Tensors beyond 2^31 elements: the program at their end reads and writes there, in the interpreter."""

import pytest
from kernels import far


@pytest.mark.parametrize("giant", [False, True], ids=["many images", "one image"])
@pytest.mark.parametrize("c, k", [(far.WIDE, far.NARROW), (far.NARROW, far.WIDE)], ids=["C", "K"])
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_the_last_tile_is_exact(interpreter, op, c, k, giant):
    assert interpreter(far.convolution, op, c, k, giant)


@pytest.mark.parametrize("c, k", [(far.WIDE, far.NARROW), (far.NARROW, far.WIDE)], ids=["C", "K"])
def test_the_last_split_of_wgrad_is_exact(interpreter, c, k):
    assert interpreter(far.weight_gradient, c, k)


@pytest.mark.parametrize("op", ["apply", "channel_stats"])
def test_elementwise_passes_reach_the_end(interpreter, op):
    assert interpreter(far.elementwise, op)


@pytest.mark.parametrize("op", ["head", "head_bwd"])
def test_the_head_of_the_last_image_is_exact(interpreter, op):
    assert interpreter(far.last_image, op)

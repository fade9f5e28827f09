"""The Hopper convolutions on the host-run tool: whole kernels, exact results, random schedules of a block's threads."""

from dataclasses import replace

import pytest
import torch
from cuda import conv_cases
from cuda.conv_cases import SHIFT3_WIDTHS, WIDTHS, Call, check

SHIPPED = [("fetch9", k) for k in WIDTHS] + [("shift3", k) for k in SHIFT3_WIDTHS]

# The network's layers in small, one split and many, a width of each plane, images off the tiles.
WGRAD = [
    Call("wgrad", N=1, H=32, W=32, C=160, K=160, blocks=132),
    Call("wgrad", N=3, H=16, W=16, C=80, K=320, blocks=24),
    Call("wgrad", N=5, H=8, W=8, C=64, K=128, blocks=1),
    Call("wgrad", N=2, H=17, W=11, C=48, K=96, stride=2, pad=(0, 1, 0, 1), dtype=torch.float16, blocks=9),
    Call("wgrad", N=3, H=16, W=16, C=96, K=80, R=1, S=1, stride=2, pad=(0, 0, 0, 0), blocks=5),
    Call("wgrad", N=9, H=4, W=4, C=16, K=48, blocks=2),
]


# A run; in chunks, so that several processes share them.
CASES, CHUNKS = 300, 6


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_calls_are_exact(tool, seed, chunk, request):
    """Shapes off the tiles, strides, paddings, shortcuts, prologues, epilogues."""
    conv_cases.fuzz(tool, seed, int(CASES * request.config.getoption("--fuzz-scale") / CHUNKS))


@pytest.mark.parametrize("op", ["fprop", "dgrad"])
@pytest.mark.parametrize("tile, width", SHIPPED)
def test_every_compiled_kernel_is_exact(tool, seed, tile, width, op):
    """Each width, tile and dtype with everything that its epilogue can do, odd batches, the network's image sizes."""
    side = (8, 16, 32)[seed % 3]
    call = Call(
        op, tile, list(conv_cases.DTYPES)[seed // 3 % 2], (5, 3, 1)[seed % 3], side, side, 16, width,
        prologue=True, act="relu", bias=True, residual=True, act_out="relu", want_sums=True, seed=seed,
    )  # fmt: skip
    if op == "dgrad":
        call = replace(call, C=width, K=16, N=1)
    check(tool, call)


@pytest.mark.parametrize("tile, width", SHIPPED)
def test_every_kernel_of_8_bits_is_exact(tool, seed, tile, width):
    """e4m3 operands of both sources with factors of their own, and everything that the epilogue can do."""
    side = (8, 16, 32)[seed % 3]
    call = Call(
        "fprop", tile, list(conv_cases.DTYPES)[seed // 3 % 2], (5, 3, 1)[seed % 3], side, side, 48, width,
        short_C=144, bias=True, residual=True, act_out="relu", want_sums=True, seed=seed, e4m3=True,
    )  # fmt: skip
    check(tool, call)


@pytest.mark.parametrize("tile, channels", [("fetch9", c) for c in (16, 32, 112, 128, 144, 160, 320)]
                         + [("shift3", c) for c in (112, 144, 160)])  # fmt: skip
def test_every_remainder_of_the_reduction_in_8_bits_is_exact(tool, seed, tile, channels):
    """Chunks of 1 to 4 steps of 32 channels, the last of them half zeros where C is an odd multiple of 16."""
    check(tool, Call("fprop", tile, N=1, H=8, W=8, C=channels, K=64, seed=seed, e4m3=True))


@pytest.mark.parametrize("size", [(1, 32, 32), (1, 16, 16), (5, 8, 8), (2, 9, 13), (3, 7, 20)], ids=str)
def test_the_networks_images_in_8_bits_are_exact(tool, seed, size):
    """One patch of an image, whole images, four of them, sizes off the tile; 160 channels are 128 and 32."""
    n, h, w = size
    check(
        tool, Call("fprop", "shift3", torch.float16, n, h, w, 160, 64, short_C=16, want_sums=True, e4m3=True, seed=seed)
    )


@pytest.mark.parametrize("e4m3", [False, True], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("drop_at", ["output", "output_act"])
@pytest.mark.parametrize("tile, width", [("fetch9", 80), ("fetch9", 48), ("shift3", 160), ("shift3", 128)])
def test_dropout_is_the_mask_of_every_backend(tool, seed, tile, width, drop_at, e4m3):
    """More than one block of channels, tiles off the image, several jobs a block; moments of what was stored."""
    p = (0.5, 0.75, 1.0)[seed % 3]
    call = Call(
        "fprop", tile, torch.bfloat16, 3, 9, 11, 16, 2 * width, prologue=not e4m3, act="relu", residual=True,
        act_out="relu", want_sums=True, drop_at=drop_at, p=p, e4m3=e4m3, seed=seed,
    )  # fmt: skip
    check(tool, call)


@pytest.mark.parametrize("splits", [2, 5])
def test_dropout_of_a_split_reduction_is_exact(tool, seed, splits):
    call = Call(N=1, H=8, W=8, C=80, K=64, residual=True, want_sums=True, drop_at="output", seed=seed)
    check(tool, replace(call, blocks=3, splits=splits))


@pytest.mark.parametrize("splits", [2, 5, 9])
def test_a_split_reduction_in_8_bits_is_exact(tool, seed, splits):
    """Pieces before, across and behind the change of source, each made numbers by its own factor."""
    call = Call(N=1, H=8, W=8, C=144, K=64, short_C=272, bias=True, residual=True, want_sums=True, e4m3=True, seed=seed)
    check(tool, replace(call, blocks=5, splits=splits))


@pytest.mark.parametrize("channels", [16, 32, 48, 160, 320])
@pytest.mark.parametrize("tile", ["fetch9", "shift3"])
def test_every_remainder_of_the_reduction_is_exact(tool, seed, tile, channels):
    """C of 16 to 320: chunks of 1 to 4 steps of 16 channels; 160 is the network's 64 + 64 + 32."""
    check(tool, Call("fprop", tile, N=1, H=16, W=16, C=channels, K=64, prologue=True, act="relu", seed=seed))


@pytest.mark.parametrize("stride_pad", [(2, (1, 1, 1, 1)), (2, (0, 1, 0, 1)), (1, (1, 1, 1, 1))])
def test_the_networks_first_blocks_are_exact(tool, seed, stride_pad):
    """A strided conv1 with its dgrad, and conv2 with the strided shortcut as extra steps."""
    stride, pad = stride_pad
    conv1 = Call("fprop", N=2, H=16, W=16, C=32, K=64, stride=stride, pad=pad, prologue=True, act="relu", seed=seed)
    check(tool, replace(conv1, want_sums=True))
    check(tool, replace(conv1, op="dgrad", want_sums=True))
    check(
        tool, Call(N=2, H=8, W=8, C=64, K=64, tile="shift3", short_C=32, short_stride=stride, want_sums=True, seed=seed)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_silu_is_as_near_as_eager(tool, seed, op, dtype):
    """The smooth activation in the prologue, in the second output and in the gradient."""
    call = Call(op, N=2, H=9, W=7, C=48, K=32, prologue=True, act="silu", want_sums=True, dtype=dtype, seed=seed)
    check(tool, call if op == "dgrad" else replace(call, act_out="silu"))


@pytest.mark.parametrize("splits", [2, 3, 7, 12])
def test_a_split_reduction_is_exact(tool, seed, splits):
    """Batch 1: chunks, columns and the shortcut in pieces, also more pieces than there is work; all of the epilogue."""
    call = Call(N=1, H=8, W=8, C=80, K=64, short_C=32, prologue=True, act="relu", bias=True, residual=True, seed=seed)
    call = replace(call, act_out="relu", want_sums=True, blocks=5, splits=splits)
    check(tool, call)
    check(tool, replace(call, op="dgrad", short_C=0))


@pytest.mark.parametrize("call", WGRAD, ids=lambda c: f"{c.C}-{c.K}-{c.H}x{c.W}-{c.R}x{c.S}s{c.stride}")
def test_wgrad_is_exact(tool, seed, call):
    check(tool, replace(call, seed=seed))


def test_what_is_not_served_is_named(tool):
    assert "multiples of 16" in tool.refuses("fprop", Call(C=24).shape, torch.bfloat16, "fetch9")
    assert "3x3" in tool.refuses("fprop", Call(K=64, stride=2).shape, torch.bfloat16, "shift3")
    assert "blocks of" in tool.refuses("dgrad", Call(C=16).shape, torch.bfloat16, "shift3")
    assert "3x3" in tool.refuses("fprop_fp8", Call(K=64, R=1).shape, torch.bfloat16, "shift3")
    assert "stride" in tool.refuses("fprop", Call(stride=3).shape, torch.bfloat16, "fetch9")

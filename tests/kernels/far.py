"""What runs in the interpreting process for test_far.py: the last program of tensors beyond 2^31 elements.

Their memory is reserved and hardly touched: only the last images hold numbers, small integers, and only the program
that reads and writes the end runs. A 32-bit offset would wrap to an address far before the tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from wrn_fast.kernels import dgrad, dropout, fprop, head, stats, wgrad
from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.configs import TileConfig
from wrn_fast.problem import ConvProblem

ROWS, RED = 128, 16
TILE = TileConfig(ROWS, RED, (16, 0), 4, 1)
IMAGE, WIDE, NARROW = 8, 512, 16
IMAGES = 2**31 // (IMAGE * IMAGE * WIDE) + 34  # of 8x8x512: wgrad's last split begins beyond 2^31
SIDE = 2048  # one image of 2048x2048x512 is 2^31 elements


@contextmanager
def last_program(*kernels: Bound) -> Iterator[dict[str, tuple[int, ...]]]:
    """Runs the last program of `kernels` and nothing of others; gives the grids."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    at, dim = builder.set_grid_idx, builder.set_grid_dim
    grids: dict[str, tuple[int, ...]] = {}

    def launch(self, grid, tensors, numbers, constants, warps=4, stages=None):
        if self not in kernels:
            return
        grids[self.kernel.fn.__name__] = grid
        last = tuple(n - 1 for n in grid)
        with (
            mock.patch.object(builder, "set_grid_idx", lambda *_: at(*last)),
            mock.patch.object(builder, "set_grid_dim", lambda *_: dim(*grid)),
        ):
            self.kernel[(1, 1, 1)](*tensors, *numbers, *constants)

    # The interpreter copies every argument's storage back onto itself, all 4 GB of it.
    untouched = mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    with untouched, mock.patch.object(Bound, "__call__", launch):
        yield grids


def problem(c: int, k: int, n: int = IMAGES, side: int = IMAGE, **parts) -> ConvProblem:
    return ConvProblem("cpu", torch.float16, torch.float16, n, side, side, c, k, 3, 3, 1, (1, 1, 1, 1), **parts)


def ending(shape: tuple[int, int, int, int], rows: int) -> Tensor:
    """[N, C, H, W] in channels_last, integers in the last `rows` rows of pixels of the whole tensor, else untouched."""
    v = torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)
    end = v.permute(0, 2, 3, 1).reshape(-1, shape[3], shape[1])[-rows:]
    end.copy_(torch.randint(-2, 3, end.shape))
    return v


def tail(v: Tensor, rows: int) -> Tensor:
    """The last rows of pixels as one image [1, C, rows, W] in float64."""
    return v.permute(0, 2, 3, 1).reshape(-1, v.shape[3], v.shape[1])[-rows:].permute(2, 0, 1)[None].double()


def filters(k: int, c: int) -> Tensor:
    return torch.randint(-1, 2, (k, c, 3, 3)).half().contiguous(memory_format=torch.channels_last)


def _result(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.double(), want) and bool(want.any())


def convolution(op: str, c: int, k: int, giant: bool) -> bool:
    """The last tile of fprop or dgrad: many images, or one giant image. `c` and `k` say which tensor is beyond 2^31."""
    p = problem(c, k, 1, SIDE) if giant else problem(c, k)
    rows = 4 if giant else 2 * IMAGE
    read, written = (c, k) if op == "fprop" else (k, c)
    x, w = ending((p.N, read, p.H, p.W), rows), filters(k, c)
    from wrn_fast.kernels import conv

    with last_program(conv._conv_kernel) as grids:
        if op == "fprop":
            y = fprop.fprop(p, TILE, "ieee", x, w)[0]
        else:
            y = dgrad.dgrad(p, TILE, "ieee", x, torch.empty(0).half(), w)[0]
    assert grids["_conv_kernel"][0] == -(-p.N * p.H * p.W // ROWS) * (written // TILE.width)
    if giant:  # the last tile is a piece of the last row: its pixels see two rows
        want = _dense(op, tail(x, rows), w)[:, :, -1, -ROWS:]
        got = y.permute(0, 2, 3, 1).reshape(-1, written)[-ROWS:].T[None].double()
    else:
        images = tail(x, rows).unflatten(2, (2, IMAGE)).transpose(1, 2).flatten(0, 1)
        want, got = _dense(op, images, w), y[-2:]
    return _result(got[:, -TILE.width :], want[:, -TILE.width :])


def _dense(op: str, x: Tensor, w: Tensor) -> Tensor:
    w = w.double() if op == "fprop" else w.double().flip(2, 3).transpose(0, 1)
    return F.conv2d(x, w, padding=1)


def weight_gradient(c: int, k: int) -> bool:
    """The last tap, blocks and split of wgrad."""
    p = problem(c, k)
    tile = dataclasses.replace(TILE, rows=16, red=64, splits=IMAGES // 8)
    images = 16  # more than a split has
    x, dy = ending((p.N, c, p.H, p.W), images * IMAGE), ending((p.N, k, p.P, p.Q), images * IMAGE)
    seen: list[Tensor] = []
    empty = torch.empty

    def kept(*args, **kwargs):
        seen.append(empty(*args, **kwargs))
        return seen[-1]

    with last_program(wgrad._wgrad_kernel) as grids, mock.patch.object(torch, "empty", kept):
        wgrad.wgrad(p, tile, "ieee", dy, x)
    slab = next(v for v in seen if v.dim() == 4 and v.shape[1:] == (9, c, k))
    splits = grids["_wgrad_kernel"][1]
    pixels = p.N * IMAGE * IMAGE
    per_split = -(-pixels // tile.red // splits) * tile.red
    count = pixels - (splits - 1) * per_split
    a, g = (tail(v, images * IMAGE).unflatten(2, (images, IMAGE)).transpose(1, 2)[0].transpose(0, 1) for v in (x, dy))
    moved = F.pad(a, (1, 1, 1, 1))[:, :, 2:, 2:]  # the last tap
    flat = [v.flatten(1)[:, -count:] for v in (moved, g)]
    want = (flat[0][-16:] @ flat[1].T)[:, -16:]
    return _result(slab[-1, -1, -16:, -16:], want)


def elementwise(op: str) -> bool:
    """The last program of a pass over x."""
    p = problem(WIDE, WIDE)
    rows = 2 * IMAGE
    x = ending((p.N, WIDE, IMAGE, IMAGE), rows)
    if op == "apply":
        with last_program(dropout._apply_kernel):
            y = dropout.apply(x, None, None, "relu", 0.0, 0.0)
        got, want = y, F.relu(tail(x, rows))
        block = stats.channel_block(WIDE)
        count = dropout.BLOCK_ELEMENTS // block
        return _result(got.permute(0, 2, 3, 1).reshape(-1, WIDE)[-count:, -block:], _pixels(want)[-count:, -block:])
    seen: list[Tensor] = []
    with (
        last_program(stats._channel_stats_kernel),
        mock.patch.object(stats, "merge", lambda partial, *_: seen.append(partial)),
    ):
        stats.channel_stats(p, x)
    block = stats.channel_block(WIDE)
    tile_rows = min(8192 // block, rows * IMAGE)
    pivot, offset = seen[0][-1, :2, -block:].double()
    return _result((pivot + offset).float(), _pixels(tail(x, rows))[-tile_rows:, -block:].mean(0))


def last_image(op: str) -> bool:
    """The last program of the head: the feature of the last image, or its gradient."""
    p = problem(WIDE, WIDE)._replace(act="relu", K=NARROW, bias=False)
    y = ending((p.N, WIDE, IMAGE, IMAGE), IMAGE)
    image = y[-1:].double()
    if op == "head":
        w = torch.randint(-1, 2, (NARROW, WIDE)).half()
        with last_program(head._head_kernel):
            out, feature = head.head(p, y, None, None, None, w, None)
        want = F.relu(image).mean((2, 3))
        return _result(feature[-1:], want.half().double()) and _result(out[-1:], (want @ w.double().T).half().double())
    dfeat = torch.full((p.N, WIDE), 64.0)
    with last_program(head._head_bwd_kernel):
        dy, _ = head.head_bwd(p, dfeat, y, None, None, None)
    block = stats.channel_block(WIDE)
    return _result(dy[-1:, -block:], (image > 0).double()[:, -block:])


def _pixels(v: Tensor) -> Tensor:
    return v[0].permute(1, 2, 0).reshape(-1, v.shape[1])

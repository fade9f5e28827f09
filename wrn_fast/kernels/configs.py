"""Tile configurations: what is legal, and the written rule for a problem that nobody has measured. No Triton here.

The same names serve the three passes; what is tiled differs:

    pass    rows                       columns              reduction
    fprop   pixels of y (N*P*Q)        K                    C, once a tap
    dgrad   pixels of x (N*H*W)        C                    K, once a tap
    wgrad   C                          K                    pixels of y, cut into `splits`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from wrn_fast.problem import ConvProblem


@dataclass(frozen=True)
class Arch:
    """What the rule needs to know of a GPU."""

    name: str  # sm_80, sm_86, sm_90, gfx942, interpreter
    smem_bytes: int  # shared memory a block may have
    budget_bytes: int  # what the rule spends of it: on NVIDIA half an SM's, so that two blocks fit
    sms: int
    stages: int  # most pipeline stages that pay

    @property
    def warp(self) -> int:
        """Threads of a warp."""
        return 64 if self.name.startswith("gfx") else 32


ARCHS = {
    "sm_80": Arch("sm_80", 166_912, 82_000, 108, 3),
    "sm_86": Arch("sm_86", 101_376, 50_000, 84, 3),
    "sm_90": Arch("sm_90", 232_448, 112_000, 132, 4),
    "gfx942": Arch("gfx942", 65_536, 65_536, 304, 2),
    "interpreter": Arch("interpreter", 1 << 30, 1 << 30, 4, 1),
}


def arch_of(capability: tuple[int, int], sms: int) -> Arch:
    """What the rule knows of an NVIDIA GPU, from its compute capability (8.0 or more) and number of SMs.

    8.6, 8.9 and 12.x have 100 KB of shared memory a block; 10.x has what 9.0 has.
    """
    major, minor = capability
    small = (major == 8 and minor in (6, 9)) or major >= 12
    return replace(ARCHS["sm_86" if small else "sm_90" if major >= 9 else "sm_80"], sms=sms)


@dataclass(frozen=True)
class TileConfig:
    """Launch knobs of one convolution kernel."""

    rows: int
    red: int
    cols: tuple[int, int]  # widths of the two accumulators, the second 0 if there is one: 160 = 128 + 32
    warps: int
    stages: int
    apply: bool = False  # act(bn(x)) is written by a pass of its own instead of made in the loop
    splits: int = 1  # wgrad: partial sums, added in index order
    box: bool = False  # pixels arrive as 4-D boxes (TMA), zeros outside the image by the hardware

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return sum(self.cols)


def reduction(op: str, problem: ConvProblem) -> int:
    """Channels that a tap reduces over; pixels for wgrad."""
    return {"fprop": problem.C, "dgrad": problem.K, "wgrad": problem.N * problem.P * problem.Q}[op]


_BOX_EXTENT = 256  # most of one dimension of a box
_BOX_ALIGNMENT = 16  # bytes of the strides and the channels of a box


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def illegal(config: TileConfig, op: str, problem: ConvProblem, arch: Arch) -> str | None:
    """A sentence that says why `config` cannot run, or None: the one statement of legality."""
    for name, value in (("rows", config.rows), ("red", config.red), ("cols[0]", config.cols[0])):
        if not _power_of_two(value) or value < 16:
            return f"`{name}`: expected a power of two of at least 16, got {value}"
    if config.cols[1] and (not _power_of_two(config.cols[1]) or config.cols[1] < 16):
        return f"`cols[1]`: expected 0 or a power of two of at least 16, got {config.cols[1]}"
    if config.warps not in (1, 2, 4, 8, 16):
        return f"`warps`: expected 1, 2, 4, 8 or 16, got {config.warps}"
    if not 1 <= config.stages <= 8:
        return f"`stages`: expected 1 to 8, got {config.stages}"
    if config.splits < 1 or (op != "wgrad" and config.splits != 1):
        return f"`splits`: expected 1, or more for wgrad, got {config.splits}"
    if smem_bytes(config, problem.dtype.itemsize) > arch.smem_bytes:
        return f"`stages`: {config.stages} need more than {arch.smem_bytes} bytes of shared memory on {arch.name}"
    if config.box:
        reason = _no_box(config, op, problem, arch)
        if reason:
            return reason
    lanes = config.warps * arch.warp
    if arch.name != "interpreter" and config.rows * config.width > 208 * lanes:
        return f"`rows`: {config.rows} x {config.width} accumulators do not fit the registers of {config.warps} warps"
    return None


def box_shape(rows: int, rows_h: int, rows_w: int) -> tuple[int, int, int] | None:
    """(images, rows, columns) of `rows` pixels in a row of images of rows_h x rows_w; None where they are no box."""
    if not (_power_of_two(rows_h) and _power_of_two(rows_w) and rows_w <= min(rows, _BOX_EXTENT)):
        return None
    height = min(rows_h, rows // rows_w)
    images = rows // (height * rows_w)
    return (images, height, rows_w) if max(images, height) <= _BOX_EXTENT else None


def _no_box(config: TileConfig, op: str, problem: ConvProblem, arch: Arch) -> str | None:
    if arch.name not in ("sm_90", "interpreter"):
        return f"`box`: expected a GPU with tensor descriptors (sm_90), got {arch.name}"
    if op != "dgrad" and problem.stride != 1:
        return f"`box`: expected stride 1 or dgrad, got {op} of stride {problem.stride}"
    # fprop takes x in boxes, dgrad dy, wgrad both; their pixels are the rows of a tile, in wgrad those of a step.
    pixels, most = config.rows, config.red
    if op == "wgrad":
        pixels, most = config.red, max(config.rows, config.cols[0])
    if most > _BOX_EXTENT:
        return f"`box`: expected at most {_BOX_EXTENT} channels at once, got {most}"
    for channels in {"fprop": (problem.C,), "dgrad": (problem.K,), "wgrad": (problem.C, problem.K)}[op]:
        if channels * problem.dtype.itemsize % _BOX_ALIGNMENT:
            return f"`box`: expected channels in multiples of {_BOX_ALIGNMENT} bytes, got {channels} of {problem.dtype}"
    grids = {(problem.P, problem.Q)} if op != "dgrad" else {
        (-(-(problem.H - a) // problem.stride), -(-(problem.W - b) // problem.stride))
        for a in range(min(problem.stride, problem.H)) for b in range(min(problem.stride, problem.W))
    }  # fmt: skip
    for grid in grids:
        if box_shape(pixels, *grid) is None:
            return f"`box`: expected an image whose sides are powers of two, no wider than {pixels} pixels, got {grid}"
    return None


def legal(config: TileConfig, op: str, problem: ConvProblem, arch: Arch) -> bool:
    """Can `config` run?"""
    return illegal(config, op, problem, arch) is None


def smem_bytes(config: TileConfig, itemsize: int) -> int:
    """Shared memory of the pipeline: `stages` copies of both operand tiles."""
    return config.stages * config.red * (config.rows + config.width) * itemsize


_WIDTHS = (320, 256, 192, 160, 128, 96, 80, 64, 48, 32, 16)


def cut(columns: int, widest: int) -> tuple[int, int]:
    """Tile widths for `columns`: exact where 16..640 allow it (160 = 128 + 32, 640 = 2 x (256 + 64)).

    A tile costs its own columns and about 32 more for the rows it reads again.
    """
    width = min((w for w in _WIDTHS if w <= widest), key=lambda w: (-(-columns // w) * (w + 32), -w))
    first = 1 << (width.bit_length() - 1)
    return first, width - first


def block(red: int, choices: tuple[int, ...]) -> int:
    """Reduction step: a step costs its channels and about 16 more; of equal ones the exact."""
    return min(choices, key=lambda b: (-(-red // b) * (b + 16), -(-red // b) * b))


# Accumulators of half an SM's registers: a larger tile is alone there, so it may have all of the shared memory but what
# its epilogue needs.
_ALONE = 32_768
_EPILOGUE_BYTES = 32_768


def _stages(config: TileConfig, itemsize: int, arch: Arch) -> TileConfig:
    """As many stages as the budget holds, at least one."""
    alone = config.rows * config.width > _ALONE
    budget = max(arch.budget_bytes, arch.smem_bytes - _EPILOGUE_BYTES) if alone else arch.budget_bytes
    one = smem_bytes(replace(config, stages=1), itemsize)
    return replace(config, stages=max(1, min(arch.stages, budget // one)))


# Widths of a conv tile to try, widest first, for a problem that does not fill the GPU: each is exact for 160, 320, 640.
_SHRINK = ((128, 320), (64, 160), (64, 80), (64, 32))


def heuristic(op: str, problem: ConvProblem, arch: Arch) -> TileConfig:
    """The rule for a problem without a tuned row: a pure function of its arguments.

    Columns exact, 128 rows, as many stages as let two blocks share an SM; smaller tiles while less than 0.9 of the SMs
    have one (128 images of 8x8x640 make 128 tiles for 132 SMs, which is full enough).
    """
    if op == "wgrad":
        return _heuristic_wgrad(problem, arch)
    size = problem.dtype.itemsize
    forward = op == "fprop"
    pixels = problem.N * (problem.P * problem.Q if forward else problem.H * problem.W)
    columns = problem.K if forward else problem.C
    if arch.name == "interpreter":
        return TileConfig(128, block(reduction(op, problem), (64, 32, 16)), cut(columns, 160), 4, 1)
    steps: tuple[int, ...]
    if size > 2:  # float32: three tf32 or six bf16 products a step, so half the columns
        widest, steps = 80, (32, 16)
    elif arch.name == "sm_90":
        # The backward epilogue of 128 x 320 spills 664 to 888 bytes.
        widest, steps = (320 if forward else 160), (64, 32, 16)
    else:
        widest, steps = 160, (32, 16)
    for rows, width in _SHRINK:
        cols = cut(columns, min(widest, width))
        if -(-pixels // rows) * -(-columns // sum(cols)) >= 0.9 * arch.sms:
            break
    red = block(reduction(op, problem), steps)
    # Split float32 operands take twice the registers: 128 x 80 by 4 warps spills up to 152 bytes on sm_80.
    warps = 8 if rows * sum(cols) > (64 * 160 if size == 2 else 64 * 80) else 4
    # A 3x3 loop makes act(bn(x)) nine times. That starves the tensor cores of a tile of 160 columns (issue 1.5 against
    # 0.7 without), not of one of 320 (0.67); up to 64 channels a layer is bound by memory, and a pass of its own is two
    # more tensors of traffic.
    source = problem.prologue or problem.act != "identity"
    apply = forward and source and size == 2 and problem.R * problem.S > 1 and 64 < problem.K and sum(cols) < 320
    return _stages(TileConfig(rows, red, cols, warps, 1, apply), size, arch)


def _heuristic_wgrad(problem: ConvProblem, arch: Arch) -> TileConfig:
    size = problem.dtype.itemsize
    pixels = problem.N * problem.P * problem.Q
    if arch.name == "interpreter":
        rows, cols, red, warps = min(64, max(16, 1 << (problem.C - 1).bit_length())), cut(problem.K, 160), 64, 4
    else:
        # 64 rows are the least that a warp group multiplies at full rate.
        rows = 128 if problem.C % 128 == 0 and size == 2 else 64 if problem.C > 32 else 32 if problem.C > 16 else 16
        cols = cut(problem.K, 80 if size > 2 else 160)
        red = 32 if size > 2 else 64
        warps = 8 if rows * sum(cols) > 64 * 160 else 4
    steps = -(-pixels // red)
    programs = problem.R * problem.S * -(-problem.C // rows) * -(-problem.K // sum(cols))
    slab_bytes = 4 * problem.K * problem.C * problem.R * problem.S
    splits = max(1, min(2 * arch.sms // programs, steps // 4, (256 << 20) // slab_bytes))
    splits = -(-steps // -(-steps // splits))  # none without work
    # A loop that makes act(bn(x)) again for each tap and each column tile starves the tensor cores once they are busy.
    source = problem.prologue or problem.act != "identity"
    apply = source and size == 2 and problem.R * problem.S > 1 and problem.K >= 128
    return _stages(TileConfig(rows, red, cols, warps, 1, apply, splits), size, arch)


def in_fp8(config: TileConfig, problem: ConvProblem, arch: Arch) -> TileConfig:
    """The tile of fprop for e4m3 operands, which come from a pass of their own: 32 channels at least are multiplied."""
    return _stages(
        replace(config, red=block(problem.C, (128, 64) if problem.C > 32 else (32,)), apply=True, box=False), 1, arch
    )


# In the order in which `variations` are tried: what decides most comes first.
KNOBS = ("cols", "rows", "red", "apply", "box", "warps", "stages", "splits")


def variations(knob: str, config: TileConfig, op: str, problem: ConvProblem, arch: Arch) -> list[TileConfig]:
    """The legal tiles that differ from `config` in one knob; where the tile changes, the stages follow by the rule."""
    columns = problem.C if op == "dgrad" else problem.K
    source = problem.prologue or problem.act != "identity"
    choices: dict[str, list] = {
        "cols": [cut(columns, widest) for widest in (320, 256, 160, 128, 64, 32)],
        "rows": [32, 64, 128, 256],
        "red": [16, 32, 64, 128],
        "apply": [False, True] if source and op != "dgrad" else [config.apply],
        "box": [False, True],
        "warps": [4, 8],
        "stages": [1, 2, 3, 4, 5],
        "splits": [max(1, config.splits // 2), config.splits, config.splits * 2] if op == "wgrad" else [1],
    }
    found = []
    for value in dict.fromkeys(choices[knob]):
        other = replace(config, **{knob: value})
        if knob in ("cols", "rows", "red"):
            other = _stages(other, problem.dtype.itemsize, arch)
        if other != config and legal(other, op, problem, arch):
            found.append(other)
    return found


def from_row(tile: dict[str, Any]) -> TileConfig:
    """A TileConfig from the tile of a tuned row, whose fields `tuned.validate` has checked."""
    first, second = tile["cols"]
    return TileConfig(**{**tile, "cols": (first, second)})

"""Tile configurations: what is legal, and the written rule for a problem that nobody has measured. No Triton here.

The same names serve the three passes; what is tiled differs:

    pass    rows                       columns              reduction
    fprop   pixels of y (N*P*Q)        K                    C, once a tap
    dgrad   pixels of x (N*H*W)        C                    K, once a tap
    wgrad   C                          K                    pixels of y, cut into `splits`
"""

from __future__ import annotations

from dataclasses import dataclass

from wrn_fast.problem import ConvProblem


@dataclass(frozen=True)
class Arch:
    """What the rule needs to know of a GPU."""

    name: str  # sm_80, sm_90, gfx942, interpreter
    smem_bytes: int  # shared memory a block may have
    budget_bytes: int  # what the rule spends of it: on NVIDIA half an SM's, so that two blocks fit
    sms: int
    stages: int  # most pipeline stages that pay


ARCHS = {
    "sm_80": Arch("sm_80", 166_912, 82_000, 108, 3),
    "sm_90": Arch("sm_90", 232_448, 112_000, 132, 4),
    "gfx942": Arch("gfx942", 65_536, 65_536, 304, 2),
    "interpreter": Arch("interpreter", 1 << 30, 1 << 30, 4, 1),
}


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

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return sum(self.cols)


def reduction(op: str, problem: ConvProblem) -> int:
    """Channels that a tap reduces over; pixels for wgrad."""
    return {"fprop": problem.C, "dgrad": problem.K, "wgrad": problem.N * problem.P * problem.Q}[op]


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def illegal(config: TileConfig, op: str, problem: ConvProblem, arch: Arch) -> str | None:
    """A sentence that says why `config` cannot run, or None. The only statement of legality: rule, table and tuner ask it."""
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
    lanes = config.warps * (64 if arch.name.startswith("gfx") else 32)
    if arch.name != "interpreter" and config.rows * config.width > 208 * lanes:
        return f"`rows`: {config.rows} x {config.width} accumulators do not fit the registers of {config.warps} warps"
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


def _stages(config: TileConfig, itemsize: int, arch: Arch) -> TileConfig:
    """As many stages as the budget holds, at least one."""
    one = smem_bytes(config, itemsize)
    return TileConfig(config.rows, config.red, config.cols, config.warps,
                      max(1, min(arch.stages, arch.budget_bytes // one)), config.apply, config.splits)  # fmt: skip


def heuristic(op: str, problem: ConvProblem, arch: Arch) -> TileConfig:
    """The rule for a problem without a tuned row: a pure function of its arguments."""
    if op == "wgrad":
        return _heuristic_wgrad(problem, arch)
    size = problem.dtype.itemsize
    pixels, columns = (
        (problem.N * problem.P * problem.Q, problem.K) if op == "fprop" else (problem.N * problem.H * problem.W, problem.C)
    )
    if arch.name == "interpreter":
        return TileConfig(128, block(reduction(op, problem), (64, 32, 16)), cut(columns, 160), 4, 1)
    if size > 2:  # float32: three tf32 or six bf16 products a step, so half the columns
        widest, steps = 80, (32, 16)
    elif arch.name == "sm_90":
        # The backward epilogue of 128 x 320 spills 664 to 888 bytes.
        widest, steps = (320 if op == "fprop" else 160), (64, 32, 16)
    else:
        widest, steps = 160, (32, 16)
    cols = cut(columns, widest)
    red = block(reduction(op, problem), steps)
    tiles = -(-columns // sum(cols))
    rows = 128 if -(-pixels // 128) * tiles >= arch.sms else 64
    if rows == 64 and sum(cols) > 160:  # too few pixels to fill the GPU: more, smaller tiles
        cols = cut(columns, 160)
    warps = 8 if rows * sum(cols) > 64 * 160 else 4
    return _stages(TileConfig(rows, red, cols, warps, 1), size, arch)


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


def from_row(tile: dict) -> TileConfig:
    """A TileConfig from the fields of a tuned row. Raises TypeError or ValueError on a row that has others."""
    fields = dict(tile)
    fields["cols"] = tuple(int(c) for c in fields["cols"])
    if len(fields["cols"]) != 2:
        raise ValueError(f"`cols`: expected two widths, got {tile['cols']}")
    return TileConfig(**fields)

"""The argument checks of `_cuda`'s bindings: a ValueError that names the argument, before any kernel."""

from __future__ import annotations

import pytest
from backends import cuda_on_cpu

ALL_CALLS = {
    "apply": {"dtype": 0, "rows": 4, "C": 4, "x": 16, "y": 16, "stream": 0},
    "bn_bwd_apply": {"dtype": 0, "rows": 4, "C": 4, "g": 16, "x": 16, "stats": 16, "gamma": 0, "eps": 0.0, "sums": 0,
                     "dx": 16, "stream": 0},
    "channel_stats": {"dtype": 0, "rows": 4, "C": 4, "x": 16, "stats": 16, "workspace": 16, "stream": 0},
    "act_backward": {"dtype": 0, "rows": 4, "C": 4, "da": 16, "x": 16, "stats": 0, "gamma": 0, "beta": 0, "eps": 0.0,
                     "act": 1, "slope": 0.0, "rng": 0, "p": 0.0, "g": 16, "sums": 0, "workspace": 0, "stream": 0},
    "affine_table": {"wide": 0, "C": 4, "stats": 16, "gamma": 0, "beta": 0, "eps": 0.0, "table": 16, "stream": 0},
    "head": {"dtype": 0, "N": 1, "pixels": 4, "C": 4, "K": 2, "y": 16, "stats": 0, "gamma": 0, "beta": 0, "eps": 0.0,
             "act": 0, "slope": 0.0, "w": 16, "w_dtype": 0, "bias": 0, "cosine": False, "out": 16, "feat": 16,
             "stream": 0},
    "head_bwd": {"dtype": 0, "N": 1, "pixels": 4, "C": 4, "dfeat": 16, "y": 16, "stats": 16, "gamma": 0, "beta": 0,
                 "eps": 0.0, "act": 0, "slope": 0.0, "batch": True, "dy": 16, "sums": 16, "workspace": 16, "stream": 0},
    "merge_moments": {"wide": 0, "C": 4, "counts": 16, "moments": 16, "parts": 2, "stats": 16, "workspace": 16,
                      "stream": 0},
    "add_slabs": {"wide": 0, "from_": 16, "slabs": 2, "count": 4, "dtype": 0, "out": 16, "workspace": 16, "stream": 0},
}  # fmt: skip
WRONG = [
    ("apply", {"x": 0}, "`x`: expected a pointer, got null"),
    ("apply", {"y": 0}, "`y`"),
    ("apply", {"rows": 0}, "`rows`: expected a positive number, got 0"),
    ("apply", {"C": -1}, "`C`"),
    ("apply", {"dtype": 4}, "`dtype`: expected a code of problem.h's DType, got 4"),
    ("apply", {"act": 9}, "`act`"),
    ("apply", {"eps": -1.0, "stats": 16}, "`eps`"),
    ("apply", {"gamma": 16}, "`stats`"),
    ("apply", {"p": 0.5}, "`rng`"),
    ("apply", {"p": 1.5, "rng": 16}, "`p`: expected a probability"),
    ("bn_bwd_apply", {"stats": 0}, "`stats`"),
    ("bn_bwd_apply", {"g": 0}, "`g`"),
    ("bn_bwd_apply", {"dx": 0}, "`dx`"),
    ("channel_stats", {"workspace": 0}, "`workspace`"),
    ("act_backward", {"sums": 16}, "`workspace`"),
    ("act_backward", {"da": 0}, "`da`"),
    ("affine_table", {"wide": 1}, "`wide`: expected float32 or float64, got 1"),
    ("affine_table", {"table": 0}, "`table`"),
    ("head", {"C": 2049}, "`C`: expected at most 2048, got 2049"),
    ("head", {"w_dtype": 1}, "`w_dtype`"),
    ("head", {"feat": 0}, "`feat`"),
    ("head_bwd", {"sums": 0}, "`sums`"),
    ("head_bwd", {"stats": 0}, "`stats`"),
    ("head_bwd", {"N": 2**31, "pixels": 2}, "`N`: expected fewer than"),
    ("merge_moments", {"parts": 0}, "`parts`"),
    ("merge_moments", {"parts": 65, "workspace": 0}, "`workspace`"),
    ("add_slabs", {"slabs": -3}, "`slabs`"),
    ("add_slabs", {"out": 0}, "`out`"),
]


@pytest.mark.parametrize("name, change, message", WRONG, ids=[f"{n} {'+'.join(c)}" for n, c, _ in WRONG])
def test_bad_arguments_of_a_pass_are_named(name, change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        getattr(cuda_on_cpu.build(), name)(**{**ALL_CALLS[name], **change})


CALL = {"dtype": 1, "tile": 0, "x": 16, "scale": 0, "shift": 0, "act": 0, "slope": 0.0, "w": 16, "x_short": 0,
        "short_H": 0, "short_W": 0, "short_C": 0, "short_stride": 1, "short_scale": 0, "short_shift": 0, "short_act": 0,
        "w_short": 0, "bias": 0, "residual": 0, "y": 16, "y_act": 0, "act_out": 0, "out_scale": 0, "out_shift": 0,
        "counts": 0, "moments": 0, "splits": 1, "partials": 0, "counters": 0,
        "early": False, "stream": 0}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [({"x": 0}, "`x`: expected a pointer"), ({"x": 18}, "`x`: expected a multiple of 16, got 18"), ({"w": 8}, "`w`"),
     ({"tile": 2}, "`tile`"), ({"y": 0}, "`y`"), ({"y": 0, "y_act": 16, "counts": 16, "moments": 16}, "`y`"),
     ({"moments": 16}, "`moments`"), ({"scale": 16}, "`shift`"), ({"act": 1}, "`act`"),
     ({"residual": 20}, "`residual`"), ({"x_short": 16}, "`w_short`"), ({"x_short": 16, "w_short": 16}, "`short_H`"),
     ({"dtype": 0}, "bfloat16 or float16"), ({"tile": 1}, "shift3"), ({"splits": 0}, "`splits`"),
     ({"splits": 2}, "`partials`"), ({"splits": 2, "partials": 16}, "`counters`"), ({"p": 0.5}, "`rng`"),
     ({"p": 1.5, "rng": 16}, "`p`"), ({"p": 0.5, "rng": 16, "drop_act": True}, "`y_act`")],
)  # fmt: skip
def test_bad_arguments_of_a_convolution_are_named(change, message):
    extension = cuda_on_cpu.build()
    shape = extension.Shape(N=1, H=8, W=8, C=16, K=16, R=3, S=3, stride=1, pad_left=1, pad_right=1, pad_top=1,
                            pad_bottom=1)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        extension.fprop(shape, **{**CALL, **change})

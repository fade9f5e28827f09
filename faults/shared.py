"""Faults in the code above the backends: running statistics, and which gradients are computed."""

from __future__ import annotations

from faults.patch import Check, Patch

BLOCK, AUTOGRAD = "wrn_fast/block.py", "wrn_fast/autograd.py"
RUNNING = Check("tests/test_model.py", "float64_outputs_gradients_and_statistics and relu")

PATCHES = {
    24: Patch(
        BLOCK,
        "(var * (n / (n - 1))).to(dtype)",
        "var.to(dtype)",
        RUNNING,
    ),
    25: Patch(
        BLOCK,
        "factor: Any = bn.momentum if bn.momentum is not None",
        "factor: Any = 1 - bn.momentum if bn.momentum is not None",
        RUNNING,
    ),
    27: Patch(BLOCK, "[mean.to(dtype), (var", "[bn.running_mean, (var", RUNNING),
    31: Patch(
        BLOCK,
        "not (bn.training and bn.track_running_stats):\n        return",
        "bn.running_mean is None:\n        return",
        Check("tests/backends/test_metamorphic.py", "frozen_statistics_stay"),
    ),
    41: Patch(
        AUTOGRAD,
        "    if not ctx.needs_input_grad[1 + i]:\n        return False\n",
        "",
        Check("tests/test_ops.py", "backward_runs_what_is_wanted or frozen_weights or input_gradient_asks"),
    ),
}

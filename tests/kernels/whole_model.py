"""What runs in the interpreting process: the drop-in beside the reference, in float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from models import shake
from torch import Tensor

import wrn_fast
from wrn_fast import activated, dispatch, reference
from wrn_fast.parity import error
from wrn_fast.problem import ConvProblem


@contextmanager
def chosen() -> Iterator[None]:
    before = os.environ.get("WRN_FAST_BACKEND")
    os.environ["WRN_FAST_BACKEND"] = "triton"
    try:
        yield
    finally:
        os.environ.pop("WRN_FAST_BACKEND")
        if before is not None:
            os.environ["WRN_FAST_BACKEND"] = before


def backends() -> dict[str, str]:
    problem = ConvProblem("cpu", torch.float32, torch.float32, 1, 4, 4, 3, 3, 3, 3, 1, (1, 1, 1, 1))
    with chosen():
        return {op: dispatch.choose(op, problem).NAME for op in ("fprop", "dgrad", "wgrad", "head", "head_bwd")}


def errors(seed: int, head: str) -> dict[str, float]:
    """Relative L2 errors of outputs, gradients and running statistics of a WRN-10-1 on 8x8 images."""
    torch.manual_seed(seed)
    fast = wrn_fast.WideResNet(10, 10, 1, 0.0, head=head, pool="global").double()
    plain = reference.WideResNet(10, 10, 1, 0.0, head=head, pool="global").double()
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with chosen():
        found = _trace(fast, x)
    want = _trace(plain, x)
    assert found.keys() == want.keys()
    return {name: error(found[name], v) for name, v in want.items()}


def _trace(model: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    parts = output if isinstance(output, tuple) else (output,)
    sum(part.square().sum() for part in parts).backward()
    found = {"out": parts[0], "out_feat": parts[-1], "grad x": x.grad}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["running_mean"] = torch.cat([b for name, b in model.named_buffers() if name.endswith("running_mean")])
    found["running_var"] = torch.cat([b for name, b in model.named_buffers() if name.endswith("running_var")])
    frozen = copy.deepcopy(model).eval()
    with torch.no_grad():
        output = frozen(x.detach())
    found["eval out"] = output[0] if isinstance(output, tuple) else output
    return found


def inference_in_halves(seed: int) -> dict[str, float]:
    """Relative L2 errors of a float16 WRN-16-1 in eval, its layers writing the next one's activations, and of eager.

    And how many layers wrote.
    """
    torch.manual_seed(seed)
    plain = shake(reference.WideResNet(16, 10, 1, 0.0, head="classic", pool="global")).double().eval()
    fast = wrn_fast.WideResNet(16, 10, 1, 0.0, head="classic", pool="global").eval()
    fast.load_state_dict(plain.state_dict())
    for m in fast.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.half()
    fast.fc.half()
    x = torch.randn(2, 3, 8, 8)
    wrote = []
    run = activated.run
    activated.run = lambda x, steps: (wrote.append(sum(s.second is not None for s in steps)), run(x, steps))[1]
    try:
        with torch.no_grad(), chosen():
            got = fast(x.half())
    finally:
        activated.run = run
    with torch.no_grad():
        want, eager = plain(x.double()), copy.deepcopy(plain).half()(x.half())
    return {"fast": error(got, want), "eager": error(eager, want), "wrote": sum(wrote)}

"""Who competes: wrn_fast, eager PyTorch in both layouts, torch.compile, OpenVINO, ONNX Runtime; and the parity gate.

A peer is built from the reference module of a case. One that cannot run a case gives a sentence instead; one whose
result is not within the bound is refused, not timed.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import wrn_fast
from benchmarks.cases import Case, twin, with_weights_of
from benchmarks.tasks import Inputs, Variant
from wrn_fast import parity

FAST = "wrn_fast"
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Peer:
    """A competitor.

    Args:
        name: as in the table.
        unsupported: why it cannot run a case on a device, or None.
        build: (reference module, example input, case) -> (callable on x, the module whose parameters get gradients).
        channels_last: the layout that it is fed.
    """

    name: str
    unsupported: Callable[[Case, str], str | None]
    build: Callable[[nn.Module, Tensor, Case], tuple[Call, nn.Module | None]]
    channels_last: bool = True

    def variant(self, case: Case, module: nn.Module, inputs: Inputs) -> Variant:
        """The peer made ready for the case's task."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        call, owner = self.build(module, inputs.x.contiguous(memory_format=layout), case)
        return Variant(case, call, owner, inputs, self.channels_last)


def _anything(case: Case, device: str) -> str | None:
    return None


def _sampled(call: Call, case: Case) -> Call:
    """For mc_dropout: one forward after the other, as the reference is evaluated, and their mean feature."""
    if case.task != "mc_dropout":
        return call
    return lambda x: torch.stack([call(x)[1] for _ in range(case.samples)]).mean(0)


def _batched(call: Call, case: Case) -> Call:
    """For mc_dropout: all samples as one batch, each image of which draws its own masks, and their mean feature."""
    if case.task != "mc_dropout":
        return call
    return lambda x: call(x.repeat(case.samples, 1, 1, 1))[1].mean(0, keepdim=True)


def _ours(module: nn.Module, x: Tensor, case: Case) -> tuple[Call, nn.Module]:
    fast = with_weights_of(twin(case.subject.fast(), device=x.device, memory_format=torch.channels_last), module)
    if case.task == "mc_dropout":
        return lambda x: _mean_feature(wrn_fast.mc_predict(fast, x, case.samples)), fast
    return fast, fast


def _mean_feature(prediction: wrn_fast.MCPrediction) -> Tensor:
    assert prediction.features is not None
    return prediction.features.mean(0)


def _eager_nchw(module: nn.Module, x: Tensor, case: Case) -> tuple[Call, nn.Module]:
    plain = twin(module)
    return _sampled(plain, case), plain


def _eager(module: nn.Module, x: Tensor, case: Case) -> tuple[Call, nn.Module]:
    plain = twin(module, memory_format=torch.channels_last)
    return _sampled(plain, case), plain


def _eager_batched(module: nn.Module, x: Tensor, case: Case) -> tuple[Call, nn.Module]:
    plain = twin(module, memory_format=torch.channels_last)
    return _batched(plain, case), plain


def _eager_batched_unsupported(case: Case, device: str) -> str | None:
    return None if case.task == "mc_dropout" else "only for mc_dropout: all samples as one batch"


def _compiled(**options: Any) -> Callable[[nn.Module, Tensor, Case], tuple[Call, nn.Module]]:
    def build(module: nn.Module, x: Tensor, case: Case) -> tuple[Call, nn.Module]:
        torch._dynamo.reset()
        plain = twin(module, memory_format=torch.channels_last)
        forward_only = case.task in ("inference", "fprop_eval")
        chosen = options | ({"freezing": True} if forward_only and x.device.type == "cpu" else {})
        if x.device.type == "cuda" and case.batch <= 8:
            chosen["triton.cudagraphs"] = True
        plain.train(not forward_only)
        return _batched(torch.compile(plain, dynamic=False, options=chosen or None), case), plain

    return build


def _compile_unsupported(case: Case, device: str) -> str | None:
    if case.task in ("dgrad", "wgrad"):
        return "a compiled backward computes every gradient: see `backward`"
    if device == "cpu":
        from torch._inductor import config
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return f"no C++ compiler out of {', '.join(str(name) for name in config.cpp.cxx)}"
    return None


def _engine_unsupported(module: str, dtypes: tuple[str, ...]) -> Callable[[Case, str], str | None]:
    def unsupported(case: Case, device: str) -> str | None:
        if case.task != "inference":
            return "runs a whole network forward, and nothing else"
        if device != "cpu":
            return "compared on the CPU only"
        if case.dtype not in dtypes:
            return f"has no {case.dtype} convolution on the CPU"
        return None if importlib.util.find_spec(module) else f"{module} is not installed (pip install '.[bench]')"

    return unsupported


def _openvino(module: nn.Module, x: Tensor, case: Case) -> tuple[Call, None]:
    import openvino

    with torch.no_grad():
        graph = openvino.convert_model(twin(module).eval(), example_input=x, input=[tuple(x.shape)])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Otherwise it takes bfloat16 wherever the CPU has it.
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[case.dtype],
    }
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def call(x: Tensor) -> Tensor:
        request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call, None


def _onnxruntime(module: nn.Module, x: Tensor, case: Case) -> tuple[Call, None]:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(twin(module).eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), None


def _onnx_unsupported(case: Case, device: str) -> str | None:
    reason = _engine_unsupported("onnxruntime", ("fp32",))(case, device)
    if reason is None and not importlib.util.find_spec("onnxscript"):
        reason = "onnxscript is not installed, which exports for it (pip install '.[bench]')"
    return reason


EAGER_NCHW = Peer("eager-nchw", _anything, _eager_nchw, channels_last=False)
EAGER = Peer("eager-channels-last", _anything, _eager)
OURS = Peer(FAST, _anything, _ours)
PEERS = (
    OURS,
    EAGER_NCHW,
    EAGER,
    Peer("eager-batched", _eager_batched_unsupported, _eager_batched),
    Peer("compile", _compile_unsupported, _compiled()),
    Peer("compile-max-autotune", _compile_unsupported, _compiled(max_autotune=True)),
    Peer("openvino", _engine_unsupported("openvino", ("fp32", "bf16")), _openvino, channels_last=False),
    Peer("onnxruntime", _onnx_unsupported, _onnxruntime, channels_last=False),
)


@dataclass(frozen=True)
class Verdict:
    """A variant against the float64 oracle: the worst quantity's error and bound."""

    quantity: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.quantity}: error {self.error:.2g}, bound {self.bound:.2g}"


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each quantity; all parameters' gradients are one, the rms over the parameters."""
    missing = [name for name in want if name not in got]
    if missing:
        return dict.fromkeys(missing, math.inf)
    alone = ("y", "grad x")
    single: dict[str, float] = {name: parity.error(got[name], want[name]) for name in alone if name in want}
    names = [name for name in want if name not in alone]
    if names:
        single["gradients"] = parity.rms([parity.error(got[name], want[name]) for name in names])
    return single


def judge(found: dict[str, float], eager: list[dict[str, float]], dtype: torch.dtype) -> Verdict:
    """The quantity that is nearest to its bound or farthest beyond it.

    Args:
        found: `errors` of the variant.
        eager: `errors` of eager PyTorch, a dictionary for each layout; the worse one counts.
        dtype: the dtype under test.
    """
    bounds = {
        name: parity.one_seed_bound(max(e.get(name, math.inf) for e in eager), dtype, name.startswith("grad"))
        for name in found
    }
    worst = max(found, key=lambda name: found[name] / bounds[name] if math.isfinite(found[name]) else math.inf)
    return Verdict(worst, found[worst], bounds[worst])

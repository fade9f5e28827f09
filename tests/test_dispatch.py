"""Which backend serves, what narrows the choice, what is said about it, and threads."""

from __future__ import annotations

import inspect
import threading
import types
import warnings

import pytest
import torch

import wrn_fast
from wrn_fast import dispatch, ops
from wrn_fast.backends import BACKENDS, OPT_IN, aten
from wrn_fast.errors import FallbackWarning, WrnFastError
from wrn_fast.functional import bn_act_conv
from wrn_fast.problem import ConvProblem

PROBLEM = ConvProblem("cpu", torch.float32, torch.float32, 1, 8, 8, 4, 4, 3, 3, pad=(1, 1, 1, 1))


pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No narrowing from outside, no earlier choice, no warning said already."""
    monkeypatch.delenv("WRN_FAST_BACKEND", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


def fake(name, reason):
    """A backend that refuses everything with `reason`, or serves by aten's functions."""
    functions = {op: getattr(aten, op) for op in dispatch.OPS}
    return types.SimpleNamespace(NAME=name, unsupported=lambda op, problem: reason, **functions)


@pytest.fixture
def backends(monkeypatch):
    """Three backends: `cuda` and `cpu` refuse, each with its reason; `aten` serves."""
    modules = {"cuda": fake("cuda", "no GPU here"), "cpu": fake("cpu", "not today"), "aten": fake("aten", None)}
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(modules))
    monkeypatch.setattr(dispatch, "DEFAULT", tuple(modules))
    monkeypatch.setattr(dispatch, "OPT_IN", ())
    monkeypatch.setattr(dispatch, "load", modules.__getitem__)
    monkeypatch.setattr(dispatch, "_parsed", {})
    return modules


# The backends themselves.


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_the_functions_of_aten(name):
    module = dispatch.load(name)
    assert module.NAME == name
    small = [op for op in dispatch.SMALL_OPS if hasattr(module, op)]
    for function in (*dispatch.OPS, *small, "unsupported"):
        want, got = (list(inspect.signature(getattr(m, function)).parameters) for m in (aten, module))
        assert got == want, function


@pytest.mark.parametrize("name", BACKENDS)
def test_a_refusal_is_a_sentence_without_the_word_none(name):
    odd = PROBLEM._replace(device="meta", dtype=torch.float16, w_dtype=torch.float16, R=31, S=31, H=40, W=40)
    for op in dispatch.OPS:
        reason = dispatch.load(name).unsupported(op, odd)
        assert reason is None if name == "aten" else len(reason) > 10 and "None" not in reason


def test_order_is_fastest_first_and_aten_last():
    assert BACKENDS == tuple(name for name in ("cuda", "triton", "cpu", "aten") if name in BACKENDS)
    assert BACKENDS[-1] == "aten"


# The choice.


def test_first_backend_without_a_reason_serves(backends):
    assert dispatch.choose("fprop", PROBLEM) is backends["aten"]
    backends["cpu"].unsupported = lambda op, problem: "no dgrad" if op == "dgrad" else None
    dispatch.forget()
    assert dispatch.choose("fprop", PROBLEM) is backends["cpu"]
    assert dispatch.choose("dgrad", PROBLEM) is backends["aten"]


def test_a_problem_is_looked_at_once(backends):
    asked = []
    backends["cpu"].unsupported = lambda op, problem: asked.append(op)
    for _ in range(3):
        assert dispatch.choose("fprop", PROBLEM) is backends["cpu"]
    dispatch.choose("fprop", PROBLEM._replace(N=2))
    assert len(asked) == 2


def test_cache_of_choices_is_bounded(backends, monkeypatch):
    monkeypatch.setattr(dispatch, "_CACHE_LIMIT", 5)
    for n in range(1, 30):
        dispatch.choose("fprop", PROBLEM._replace(N=n))
    assert len(dispatch._chosen) <= 5


def test_explain_gives_each_reason(backends):
    assert dispatch.explain("fprop", PROBLEM) == {"cuda": "no GPU here", "cpu": "not today", "aten": None}


def test_no_backend_left_raises_with_every_reason(backends):
    backends["aten"].unsupported = lambda op, problem: "not even this"
    with pytest.raises(WrnFastError, match=r"cuda: no GPU here; cpu: not today; aten: not even this"):
        dispatch.choose("fprop", PROBLEM)


# Opt-in.


def test_an_opt_in_backend_serves_where_it_is_named_or_measured_faster(backends, monkeypatch):
    """`cuda` could serve; nobody named it."""
    cuda, problem = backends["cuda"], PROBLEM._replace(device="cuda")
    cuda.unsupported, cuda.faster = lambda op, problem: None, lambda op, problem: op == "dgrad"
    monkeypatch.setattr(dispatch, "OPT_IN", ("cuda",))
    monkeypatch.setattr(dispatch, "DEFAULT", ("cpu", "aten", "cuda"))
    assert dispatch.choose("fprop", problem) is backends["aten"]
    assert dispatch.choose("dgrad", problem) is cuda
    assert dispatch.choose("dgrad", PROBLEM) is backends["aten"]
    with wrn_fast.backend("cuda,cpu,aten"):
        assert dispatch.choose("fprop", problem) is cuda
    with wrn_fast.backend("cpu,aten"):
        assert dispatch.choose("dgrad", problem) is backends["aten"]


def test_cuda_is_opt_in():
    assert "cuda" in OPT_IN and dispatch.selection()[-1] == "cuda"
    assert dispatch.parse(",".join(BACKENDS)) == BACKENDS != dispatch.DEFAULT


# Narrowing.


def test_context_narrows_whatever_the_order_of_names(backends):
    with wrn_fast.backend(" aten,cuda"):
        assert dispatch.selection() == ("cuda", "aten")
        with wrn_fast.backend("cpu"):
            assert dispatch.selection() == ("cpu",)
        assert dispatch.selection() == ("cuda", "aten")
    assert dispatch.selection() == ("cuda", "cpu", "aten")


def test_environment_narrows_and_the_context_goes_first(backends, monkeypatch):
    monkeypatch.setenv("WRN_FAST_BACKEND", "cuda,aten")
    assert list(dispatch.explain("fprop", PROBLEM)) == ["cuda", "aten"]
    with wrn_fast.backend("cpu"):
        assert dispatch.selection() == ("cpu",)
    monkeypatch.setenv("WRN_FAST_BACKEND", "")
    assert dispatch.selection() == ("cuda", "cpu", "aten")


def test_one_name_alone_raises_with_its_reason(backends):
    with wrn_fast.backend("cuda"), pytest.raises(WrnFastError, match=r"no backend of cuda .* no GPU here"):
        dispatch.choose("fprop", PROBLEM)


@pytest.mark.parametrize("names", ["gpu", "cpu;aten", "cpu,,gpu", "CPU", 3, None, ["cpu"]])
def test_unknown_names_raise_where_they_are_said(names, monkeypatch):
    with pytest.raises(WrnFastError, match="`backend`"):
        wrn_fast.backend(names)
    if isinstance(names, str):
        monkeypatch.setenv("WRN_FAST_BACKEND", names)
        with pytest.raises(WrnFastError, match="`backend`"):
            dispatch.choose("fprop", PROBLEM)


def test_the_block_ends_with_an_exception_too(backends):
    with pytest.raises(KeyError), wrn_fast.backend("cpu"):
        raise KeyError
    assert len(dispatch.selection()) == 3


# Warnings.


def said(calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls()
    return [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]


def test_one_warning_a_reason(backends):
    def calls():
        for n in (1, 2, 3):
            dispatch.choose("fprop", PROBLEM._replace(N=n))

    first = said(calls)
    assert len(first) == 1 and "cpu: not today" in first[0]
    assert not said(calls)
    backends["cpu"].unsupported = lambda op, problem: "another reason"
    dispatch._chosen.clear()
    assert len(said(calls)) == 1


def test_no_warning_where_aten_was_asked_for_or_nothing_faster_exists(backends):
    def calls():
        with wrn_fast.backend("aten"):
            dispatch.choose("fprop", PROBLEM)
        dispatch.choose("fprop", PROBLEM._replace(device="xpu"))

    assert not said(calls)


def test_a_gpu_without_a_fast_backend_is_worth_a_warning(backends):
    assert len(said(lambda: dispatch.choose("fprop", PROBLEM._replace(device="cuda")))) == 1


# Backward and threads.


class Recorded:
    """The selections under which primitives were chosen."""

    def __init__(self, monkeypatch):
        self.seen = []
        choose = dispatch.choose
        monkeypatch.setattr(dispatch, "choose", lambda *a: self.seen.append((a[0], dispatch.selection())) or choose(*a))

    def of(self, *names):
        return {selection for op, selection in self.seen if op in names}


def loss():
    x, w = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    return bn_act_conv(x, w).y.square().sum()


def test_backward_uses_the_selection_of_its_forward(monkeypatch):
    recorded = Recorded(monkeypatch)
    with wrn_fast.backend("aten"):
        inside = loss()
    inside.backward()
    assert recorded.of("dgrad", "wgrad") == {("aten",)}
    recorded.seen.clear()
    outside = loss()
    with wrn_fast.backend("aten"):
        outside.backward()
    assert recorded.of("dgrad", "wgrad") == {dispatch.DEFAULT}


def test_backward_does_not_change_what_other_threads_see(monkeypatch):
    """Another thread chooses while this one is in the middle of a backward pass with a selection of its own."""
    entered, leave, other = threading.Event(), threading.Event(), []

    def in_backward():
        with dispatch.take_over(("aten",)):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=in_backward)
    thread.start()
    assert entered.wait(10)
    other.append(dispatch.selection())
    leave.set()
    thread.join()
    assert other == [dispatch.DEFAULT]


def test_blocks_of_two_threads_may_close_in_any_order():
    """First opened, first closed: each takes away its own."""
    opened, closed = threading.Event(), threading.Event()

    def second():
        with wrn_fast.backend("cpu,aten"):
            opened.set()
            closed.wait(10)

    thread = threading.Thread(target=second)
    with wrn_fast.backend("aten"):
        thread.start()
        assert opened.wait(10)
    assert dispatch.selection() == ("cpu", "aten")
    closed.set()
    thread.join()
    assert dispatch.selection() == dispatch.DEFAULT


def test_threads_share_a_block_and_give_equal_bits():
    """Four threads, each its own forward and backward, against the same work done alone."""
    generator = torch.Generator().manual_seed(7)
    inputs = [
        (torch.randn(2, 8, 9, 9, generator=generator), torch.randn(8, 8, 3, 3, generator=generator)) for _ in range(4)
    ]

    def work(x, w):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = bn_act_conv(x, w, act="silu").y
        return [y, *torch.autograd.grad(y, [x, w], torch.ones_like(y))]

    want = [work(*pair) for pair in inputs]
    got, seen = [None] * 4, set()

    def run(i):
        seen.add(dispatch.selection())
        for _ in range(20):
            got[i] = work(*inputs[i])

    with wrn_fast.backend(",".join(BACKENDS)):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {BACKENDS}
    for a, b in zip(got, want):
        assert all(map(torch.equal, a, b))


def test_every_operator_of_the_library_is_dispatched():
    assert {name for name in dispatch.OPS if not hasattr(ops, name)} == set()

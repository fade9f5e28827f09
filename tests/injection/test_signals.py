"""Ctrl-C at any moment, and exceptions from other people's hooks."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time

import pytest
import torch

import wrn_fast

MOMENTS = 200

on_main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"),
    reason="signals reach the main thread",
)


class Interrupted(KeyboardInterrupt):
    """Ours, so that a real Ctrl-C still ends the run."""


class Interrupts:
    """SIGUSR1 from a timer of another thread, as a terminal sends SIGINT; SIGALRM is pytest-timeout's."""

    armed = False

    def raise_it(self, *_):
        if self.armed:
            self.armed = False
            raise Interrupted

    @contextlib.contextmanager
    def after(self, seconds):
        """Interrupts the block so many seconds from now, unless it has ended."""
        main = threading.main_thread().ident
        timer = threading.Timer(seconds, lambda: self.armed and signal.pthread_kill(main, signal.SIGUSR1))
        self.armed = True
        timer.start()
        try:
            yield
        finally:
            self.armed = False
            timer.cancel()
            timer.join()


@pytest.fixture
def interrupts():
    """A source of interrupts."""
    found = Interrupts()
    before = signal.signal(signal.SIGUSR1, found.raise_it)
    yield found
    signal.signal(signal.SIGUSR1, before)


def norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def statistics(model):
    return [[m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()] for m in norms(model)]


def step(model, x, y):
    model.zero_grad(set_to_none=True)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


@on_main_thread
def test_an_interrupt_leaves_statistics_whole_and_the_next_step_right(interrupts, seed):
    """Running mean and variance move together or not at all; the model goes on as if nothing had been."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    model = wrn_fast.classic(10, 10, 1).train()
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    for _ in range(3):
        step(model, x, y)
    state = {name: v.clone() for name, v in model.state_dict().items()}
    begin = time.perf_counter()
    want = step(model, x, y)
    span = time.perf_counter() - begin
    after = statistics(model)
    hit = torn = 0
    for _ in range(MOMENTS):
        model.load_state_dict(state)
        old = statistics(model)
        try:
            with interrupts.after(rng.uniform(1e-5, span)):
                step(model, x, y)
        except Interrupted:
            hit += 1
        for now, was, moved in zip(statistics(model), old, after):
            mean, var = (torch.equal(now[i], moved[i]) for i in (0, 1))
            assert mean == var, "a running mean moved without its variance"
            assert all(torch.equal(now[i], (moved if mean else was)[i]) for i in (0, 1))
            # BatchNorm2d counts the batch just before, in a call of its own.
            torn += not torch.equal(now[2], (moved if mean else was)[2])
    assert hit >= MOMENTS // 4
    assert torn <= hit
    model.load_state_dict(state)
    assert torch.equal(step(model, x, y), want)


def test_an_exception_in_a_hook_leaves_nothing_behind():
    """The error comes through as it is, and the model computes what it computed."""
    x = torch.randn(2, 3, 32, 32)
    for make in (wrn_fast.classic, wrn_fast.reference.classic):
        model = make(10, 10, 1).eval()
        if make is wrn_fast.reference.classic:
            wrn_fast.accelerate(model)
        with torch.no_grad():
            want = model(x)

        def fail(*_):
            raise ZeroDivisionError("of the user")

        for module in (model.block2, model.block1.layer[0], model.block3.layer[0].conv2):
            handle = module.register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError, match="of the user"), torch.no_grad():
                model(x)
            handle.remove()
            with torch.no_grad():
                assert torch.equal(model(x), want)
    v = torch.randn(2, 3, 32, 32, requires_grad=True)
    out = model(v)
    handle = v.register_hook(fail)
    with pytest.raises(ZeroDivisionError, match="of the user"):
        out.sum().backward(retain_graph=True)
    handle.remove()
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert grad.isfinite().all() and grad.any()

"""For a while, anything goes: steps, switches of mode, dtype and backend, threads, models made and thrown away.

Every scene is compared with plain PyTorch or with its own solo run. `--soak 1800` goes on for half an hour.
"""

from __future__ import annotations

import copy
import gc
import random
import threading
import time

import pytest
import torch
import torch.nn.functional as F

import wrn_fast
from wrn_fast import dispatch, parity, reference

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")

CLASSES = 5


def pair(rng, dtype=torch.float32, act=None):
    """A drop-in and a reference of the same weights; the reference's twin in float64 is the oracle."""
    head, act = rng.choice(("classic", "cosine")), act or rng.choice(("relu", "silu"))
    torch.manual_seed(rng.randrange(2**31))
    make = {"head": head, "act": act, "pool": "global", "dropout_in_eval": False}
    fast = wrn_fast.WideResNet(10, CLASSES, rng.choice((1, 2)), **make).to(dtype)
    plain = reference.WideResNet(10, CLASSES, fast.nChannels // 64, **make).to(dtype)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def images(rng, dtype=torch.float32):
    return torch.randn(rng.choice((2, 3, 8)), 3, rng.choice((8, 12)), 8).to(dtype)


def out_of(model, x):
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def judge(fast, plain, x):
    """Outputs within the bound of a single run."""
    want = out_of(copy.deepcopy(plain).double(), x.double())
    error = parity.error(out_of(plain, x), want)
    assert parity.error(out_of(fast, x), want) <= parity.one_seed_bound(error, x.dtype)


def a_training_step(rng):
    """The loss of the step and the outputs after it."""
    act = rng.choice(("relu", "silu"))
    models = pair(rng, act=act)
    x, y = images(rng), None
    for model in models:
        torch.manual_seed(0)
        y = torch.randint(CLASSES, (len(x),))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(out_of(model.train(), x), y).backward()
            optimizer.step()
    fast, plain = models
    for (name, got), want in zip(fast.state_dict().items(), plain.state_dict().values()):
        # In a ReLU network a sign that differs in the last bit moves a small gradient by percents; silu has no signs.
        bound = parity.one_seed_bound(0.0, torch.float32, gradient=True) if act == "silu" else parity.MEANINGLESS
        assert parity.error(got, want.double()) <= bound or not got.is_floating_point(), name


def switches(rng):
    """Mode, backend, dtype and weights change between calls, each compared."""
    fast, plain = pair(rng)
    with torch.no_grad():
        for _ in range(4):
            what = rng.choice(("mode", "weights", "dtype", "backend"))
            if what == "weights":
                for p, q in zip(fast.parameters(), plain.parameters()):
                    p.mul_(1.25)
                    q.copy_(p)
            if what == "dtype":
                dtype = rng.choice((torch.float32, torch.bfloat16, torch.float64))
                fast, plain = fast.to(dtype), plain.to(dtype)
                plain.load_state_dict(fast.state_dict())
            training = rng.random() < 0.5
            fast.train(training), plain.train(training)
            state = copy.deepcopy(fast.state_dict())
            with dispatch.backend(rng.choice(("cpu,aten", "aten"))):
                judge(fast, plain, images(rng, next(fast.parameters()).dtype))
            fast.load_state_dict(state), plain.load_state_dict(state)


def four_threads(rng):
    """Four models in four threads, each bit-equal to its run alone."""
    work = []
    for i in range(4):
        model, _ = pair(rng, torch.bfloat16 if i == 3 else torch.float32)
        work.append((model.eval(), images(rng, next(model.parameters()).dtype)))
    with torch.no_grad():
        alone = [out_of(model, x) for model, x in work]
    found = [[] for _ in work]

    def run(i):
        model, x = work[i]
        with torch.no_grad():
            found[i] += [out_of(model, x) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, alone):
        assert len(got) == 3 and all(torch.equal(v, want) for v in got)


def made_and_thrown_away(rng):
    """Models that are used once, accelerated and restored among them."""
    for _ in range(5):
        fast, plain = pair(rng)
        x = images(rng)
        with torch.no_grad():
            want = out_of(plain.eval(), x)
            out_of(fast.eval(), x)
            out_of(wrn_fast.accelerate(plain), x)
            assert torch.equal(out_of(wrn_fast.restore(plain), x), want)


SCENES = (a_training_step, switches, four_threads, made_and_thrown_away)


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(v), torch.Tensor) for v in gc.get_objects())


def test_everything_for_a_while(seed, request):
    seconds = request.config.getoption("--soak")
    rng = random.Random(seed)
    for scene in SCENES:
        scene(random.Random(seed))
    alive = tensors_alive()
    end = time.monotonic() + seconds
    ran = 0
    while time.monotonic() < end:
        scene_seed = rng.randrange(2**31)
        scene = rng.choice(SCENES)
        try:
            scene(random.Random(scene_seed))
        except AssertionError as error:
            raise AssertionError(f"scene {ran}: {scene.__name__}(random.Random({scene_seed}))") from error
        ran += 1
    assert ran >= len(SCENES)
    assert tensors_alive() <= alive

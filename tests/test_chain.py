"""A run of blocks in one call: bit for bit what its operators give, and only where nobody could tell the difference."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import shake

from wrn_fast import block, chain, dispatch, packing
from wrn_fast.block import run_chain
from wrn_fast.errors import WrnFastError
from wrn_fast.model import WideResNet

pytestmark = pytest.mark.native


def network(**options):
    return shake(WideResNet(16, 10, 2, options.pop("dropRate", 0.0), **options).eval())


@pytest.fixture
def calls(monkeypatch):
    """How often a whole run was served."""
    served = []
    original = chain.run_blocks

    def counted(blocks, x):
        y = original(blocks, x)
        served.append(y is not None)
        return y

    monkeypatch.setattr(block, "run_blocks", counted)
    return served


def by_operators(model, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(block, "run_blocks", lambda blocks, x: None)
        return model(x)


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("options", ({}, {"act": "silu"}, {"act": "leaky_relu", "head": "classic"}), ids=str)
def test_bits_are_those_of_the_operators(options, batch, calls, monkeypatch):
    model, x = network(**options), torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            got, want = model(x), by_operators(model, x, monkeypatch)
            got, want = ((v,) if isinstance(v, torch.Tensor) else v for v in (got, want))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert calls == [True] * 3


@torch.no_grad()
@pytest.mark.parametrize("names", (("weight",), ("bias",), ("running_mean", "running_var")), ids=str)
def test_batch_norm_on_another_device_is_named(names, calls):
    """A kernel would read an address that means nothing here."""
    model = network()
    bn = model.block2.layer[0].bn2
    for name in names:
        kind = torch.nn.Parameter if name in bn._parameters else torch.Tensor.detach
        setattr(bn, name, kind(getattr(bn, name).to("meta")))
    with pytest.raises(WrnFastError, match="expected device cpu"):
        model(torch.randn(1, 3, 32, 32))
    assert calls == [False]


def test_bits_under_autocast(calls, monkeypatch):
    """The stem hands over bfloat16, which is what the operators would cast to."""
    model, x = network(head="classic"), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = model(x), by_operators(model, x, monkeypatch)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want) and calls == [True]


def test_dropout_in_inference_has_the_masks_of_the_operators(calls, monkeypatch):
    """Monte-Carlo dropout: the generator moves as block by block."""
    model, x = network(dropRate=0.3), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(5)
        got, state = model(x)[0], torch.get_rng_state()
        torch.manual_seed(5)
        want = by_operators(model, x, monkeypatch)[0]
        assert torch.equal(got, want)
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(model(x)[0], got)
    assert calls == [True, True]


def test_threads(monkeypatch):
    model, x = network(), torch.randn(2, 3, 32, 32)
    before = torch.get_num_threads()
    results = []
    try:
        with torch.inference_mode():
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                results.append(model(x)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bfloat16(calls):
    model = network()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.bfloat16()
    with torch.no_grad():
        y = run_chain(list(model.block1.layer), torch.randn(2, 16, 8, 8).bfloat16())
    assert y.dtype == torch.bfloat16 and calls == [True]


def test_where_it_may_not_serve(calls):
    """Autograd, training, a listener, a cast to come, another backend, statistics of another dtype."""
    model, x = network(), torch.randn(2, 3, 32, 32)
    model(x)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert chain.run_blocks([model.block1.layer[0].parts()], torch.randn(1, 16, 8, 8)) is None
        with dispatch.backend("aten"):
            model(x)
        model.train()
        model(x)
        model.eval()
        assert calls == [False] * 3
        seen = []
        handle = model.block2.layer[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        model(x)
        handle.remove()
        assert seen == [(2, 64, 16, 16)] and calls == [False] * 3
        model(x)
        assert calls[3:] == [True]
        model.block1.layer[0].bn1.double()
        model.block2.layer[0].bn1.bfloat16()
        half = torch.randn(1, 32, 8, 8).bfloat16()
        assert chain.run_blocks([model.block2.layer[0].parts()], half) is None
        del calls[:]
        with pytest.raises(RuntimeError):
            model.block1.layer[0].bn1(x[:, :1].expand(-1, 16, -1, -1))
        assert chain.run_blocks([model.block1.layer[0].parts()], torch.randn(1, 16, 8, 8)) is None


def test_weights_that_change_are_seen(monkeypatch):
    model, x = network(), torch.randn(2, 3, 32, 32)
    packing.refresh()
    with torch.no_grad():
        model(x), model(x)
        assert packing.kept_bytes() > 0
        for w in model.parameters():
            w.data.mul_(1.01)
        assert torch.equal(model(x)[0], by_operators(model, x, monkeypatch)[0])
        monkeypatch.setenv("WRN_FAST_PACK_CACHE", "0")
        assert torch.equal(model(x)[0], by_operators(model, x, monkeypatch)[0])


def test_two_python_threads_share_a_model():
    """Scratch memory is each calling thread's own."""
    model, images = network(), [torch.randn(2, 3, 32, 32) for _ in range(2)]
    with torch.no_grad():
        want = [model(x)[0] for x in images]

    def repeat(i):
        with torch.no_grad():
            return all(torch.equal(model(images[i])[0], want[i]) for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(repeat, range(2))) == [True, True]

"""The drop-in beside the reference: weights, outputs, gradients, statistics, and what users do with a model."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import outputs, pair, worst
from torch import nn

import wrn_fast
from benchmarks.memory import saved_bytes
from wrn_fast import reference
from wrn_fast.block import FastBlock, hooked, run_block
from wrn_fast.errors import WrnFastError
from wrn_fast.parity import FLOAT64, Pool, error

HEADS = reference.HEADS


@pytest.mark.parametrize("head", HEADS)
def test_same_seed_same_weights_same_keys(head, seed):
    torch.manual_seed(seed)
    ref = reference.WideResNet(16, 7, 2, 0.1, head=head)
    torch.manual_seed(seed)
    fast = wrn_fast.WideResNet(16, 7, 2, 0.1, head=head)
    assert list(ref.state_dict()) == list(fast.state_dict())
    for name, value in ref.state_dict().items():
        assert torch.equal(value, fast.state_dict()[name]), name
    assert [p.requires_grad for p in ref.parameters()] == [p.requires_grad for p in fast.parameters()]
    assert [n for n, _ in ref.named_modules()] == [n for n, _ in fast.named_modules()]


@pytest.mark.parametrize("head", HEADS)
def test_state_dict_loads_strictly_in_both_directions(head):
    ref, fast = pair(head=head)
    again = reference.WideResNet(10, 4, head=head)
    again.load_state_dict(fast.state_dict(), strict=True)
    for name, value in ref.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_wrong_keys_and_shapes_are_named():
    fast = wrn_fast.classic(10, 4)
    state = fast.state_dict()
    state["block1.layer.0.conv3.weight"] = state.pop("block1.layer.0.conv2.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*block1.layer.0.conv2.*Unexpected.*block1.layer.0.conv3"):
        fast.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc.weight"):
        fast.load_state_dict(wrn_fast.classic(10, 5).state_dict())


@pytest.mark.parametrize("act", ["relu", "silu", "leaky_relu"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_float64_outputs_gradients_and_statistics(head, training, act):
    ref, fast = pair(10, 4, 2, dtype=torch.float64, head=head, act=act)
    ref.train(training), fast.train(training)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    x_ref, x_fast = (x.clone().requires_grad_() for _ in range(2))
    want, got = outputs(ref(x_ref)), outputs(fast(x_fast))
    assert worst(got, want) <= FLOAT64
    weights = [torch.randn_like(v) for v in want]
    sum((v * w).sum() for v, w in zip(want, weights)).backward()
    sum((v * w).sum() for v, w in zip(got, weights)).backward()
    assert error(x_fast.grad, x_ref.grad) <= FLOAT64
    for (name, p), q in zip(ref.named_parameters(), fast.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or error(q.grad, p.grad) <= FLOAT64, name
    for name, value in ref.state_dict().items():
        assert error(fast.state_dict()[name], value) <= FLOAT64, name


@pytest.mark.parametrize("mode", ["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("training", [True, False])
def test_pooled_outputs_and_statistics(training, mode):
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    pools = {name: Pool(name, dtype) for name in ("out", "feature", "running_mean", "running_var")}
    for _ in range(8):
        oracle, fast = pair(10, 10, 2, head="cosine")
        eager = copy.deepcopy(oracle).to(memory_format=torch.channels_last)
        oracle = oracle.double()
        x = torch.randn(4, 3, 32, 32)
        for model in (oracle, fast, eager):
            model.train(training)
        with torch.no_grad():
            want = oracle(x.double())
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                got, plain = fast(x), eager(x.to(memory_format=torch.channels_last))
        pools["out"].add(got[0], plain[0], want[0])
        pools["feature"].add(got[1], plain[1], want[1])
        for name in ("running_mean", "running_var"):
            values = (
                torch.cat([getattr(m, name) for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
                for model in (fast, eager, oracle)
            )
            pools[name].add(*values)
    for pool in pools.values():
        cell = pool.judge()
        assert cell.ok, cell


def test_layouts_and_views_of_the_input_agree():
    fast = pair()[1].eval()
    x = torch.randn(2, 3, 32, 32)
    want = fast(x)[1]
    wide = torch.randn(2, 5, 40, 40)
    wide[:, 1:4, 3:35, 5:37] = x
    for view in (x.to(memory_format=torch.channels_last), wide[:, 1:4, 3:35, 5:37], x.mT.contiguous().mT):
        assert torch.equal(fast(view)[1], want)


def test_empty_batch():
    for training in (True, False):
        ref, fast = pair()
        ref.train(training)(torch.empty(0, 3, 32, 32))
        out, feature = fast.train(training)(torch.empty(0, 3, 32, 32))
        assert out.shape == (0, 4) and feature.shape == (0, 64)
        for name, value in ref.state_dict().items():
            assert torch.equal(fast.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 4, 32, 32), r"`x`: expected shape \[N, 3, H, W\], got \[2, 4, 32, 32\]"),
        (torch.randn(3, 32, 32), r"`x`: expected shape \[N, 3, H, W\]"),
        (torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), r"`x`: expected torch.float32 .* got torch.uint8"),
        (torch.randint(0, 255, (2, 3, 32, 32)), r"`x`: expected torch.float32 .* got torch.int64"),
        (torch.randn(2, 3, 32, 32, dtype=torch.float64), r"`x`: expected torch.float32 .* got torch.float64"),
        (torch.randn(2, 3, 32, 32, dtype=torch.float16), r"`x`: expected torch.float32 .* got torch.float16"),
        (torch.randn(2, 3, 64, 64), r"`x`: expected 32x32 images, got 64x64"),
        (torch.randn(2, 3, 32, 33), r"`x`: expected 32x32 images, got 32x33"),
        (torch.empty(2, 3, 32, 32, device="meta"), r"`x`: expected device cpu .* got meta"),
        ([1, 2], r"`x`: expected a tensor, got list"),
    ],
    ids=lambda v: None if isinstance(v, str) else "x",
)
def test_bad_input_names_x(x, message):
    with pytest.raises(WrnFastError, match=message):
        wrn_fast.WideResNet(10, 4)(x)


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (31, 17), (5, 9), (1, 1)])
def test_global_pooling_takes_any_image(size):
    ref, fast = pair(dtype=torch.float64, pool="global")
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert worst(fast.eval()(x), ref.eval()(x)) <= FLOAT64


def test_one_value_a_channel_in_training_raises_as_batch_norm_does():
    fast = wrn_fast.WideResNet(10, 4, pool="global")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fast(torch.randn(1, 3, 4, 4))


def test_dropout_modes():
    x = torch.randn(2, 3, 32, 32)
    fast = wrn_fast.WideResNet(10, 4, dropRate=0.5).eval()
    assert not torch.equal(fast(x)[1], fast(x)[1])
    fast = wrn_fast.classic(10, 4, dropRate=0.5)
    assert not torch.equal(fast.train()(x), fast(x))
    assert torch.equal(fast.eval()(x), fast(x))


def test_dropout_replays_from_the_default_generator():
    fast = wrn_fast.WideResNet(10, 4, dropRate=0.3).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(5)
    first = fast(x)[1]
    torch.manual_seed(5)
    assert torch.equal(fast(x)[1], first)
    with torch.random.fork_rng():
        assert not torch.equal(fast(x)[1], first)


def test_two_runs_are_bit_equal():
    _, fast = pair(16, 10, 2)
    x = torch.randn(4, 3, 32, 32)
    runs = []
    for _ in range(2):
        model = copy.deepcopy(fast).train()
        model(x)[1].square().sum().backward()
        runs.append([p.grad for p in model.parameters() if p.grad is not None] + list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_hooks_on_blocks_and_inner_modules_see_the_reference_tensors():
    ref, fast = pair(16, 4, 1, dtype=torch.float64)
    ref.eval(), fast.eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    names = ["conv1", "block1", "block2.layer.0", "block2.layer.1.bn2", "block3.layer.0.convShortcut", "block3.layer"]
    seen = {}
    for key, model in (("ref", ref), ("fast", fast)):
        for name in names:
            hook = lambda m, args, y, at=(key, name): seen.__setitem__(at, y.detach().clone())
            model.get_submodule(name).register_forward_hook(hook)
    assert worst(fast(x), ref(x)) <= FLOAT64
    for name in names:
        assert error(seen["fast", name], seen["ref", name]) <= FLOAT64, name


def test_a_hook_that_changes_a_block_output_changes_the_statistics_behind_it():
    ref, fast = pair(16, 4, 1, dtype=torch.float64)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in (ref.train(), fast.train()):
        model.block1.layer[0].register_forward_hook(lambda m, args, y: 3 * y + 1)
    assert worst(fast(x), ref(x)) <= FLOAT64
    for name, value in ref.state_dict().items():
        assert error(fast.state_dict()[name], value) <= FLOAT64, name


def test_global_hooks_are_called():
    _, fast = pair()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: called.append(type(m)))
    try:
        fast.eval()(torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    assert sum(issubclass(kind, FastBlock) for kind in called) == 3 and nn.Conv2d in called


def test_groups_and_blocks_called_by_hand():
    ref, fast = pair(16, 4, 1, dtype=torch.float64)
    y = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for name in ("conv1", "block1", "block2", "block3"):
        want, got = ref.get_submodule(name)(y), fast.get_submodule(name)(y)
        assert error(got, want) <= FLOAT64, name
        y = want.detach()
    y = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    assert error(fast.block1.layer[0](y), ref.block1.layer[0](y)) <= FLOAT64


@pytest.mark.parametrize(
    "flag",
    ["frozen", "untracked", "momentum None", "no count", "count alone", "momentum 0", "no affine", "replaced act"],
)
def test_batch_norm_flags_are_read_per_call(flag):
    ref, fast = pair(16, 4, 1, dtype=torch.float64)
    for model in (ref.train(), fast.train()):
        for name, m in model.named_modules():
            if not isinstance(m, nn.BatchNorm2d):
                continue
            if flag == "frozen" and "block2" in name:
                m.eval()
            elif flag == "untracked":
                m.track_running_stats = False
            elif flag == "momentum None":
                m.momentum = None
            elif flag == "count alone":
                m.running_mean = m.running_var = None
            elif flag == "no count":
                m.momentum = m.num_batches_tracked = None
            elif flag == "momentum 0":
                m.momentum = 0.0
            elif flag == "no affine" and "bn2" in name:
                m.weight = m.bias = None
        if flag == "replaced act":
            model.block1.layer[1].relu2 = nn.GELU()
            model.block2.layer[0].relu1 = nn.LeakyReLU(0.2)
    for step in range(3):
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        if step == 2:
            ref.eval(), fast.eval()
        assert worst(fast(x), ref(x)) <= FLOAT64
    for name, value in ref.state_dict().items():
        assert error(fast.state_dict()[name], value) <= FLOAT64, name


@pytest.mark.parametrize("leaky", [1, 2])
def test_one_leaky_activation_in_a_block_with_a_shortcut(leaky):
    ref, fast = pair(10, 4, 1, dtype=torch.float64)
    setattr(ref.block2.layer[0], f"relu{leaky}", nn.LeakyReLU(0.3))
    parts = fast.block2.layer[0].parts()
    stages = [s._replace(act=("leaky_relu", 0.3)) if i == leaky else s for i, s in enumerate(parts.stages, 1)]
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    assert error(run_block(parts._replace(stages=tuple(stages)), x, None)[0], ref.block2.layer[0](x)) <= FLOAT64


def test_deepcopy_and_pickle_keep_the_fast_class():
    _, fast = pair()
    x = torch.randn(2, 3, 32, 32)
    want = fast.eval()(x)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
        assert type(other) is wrn_fast.WideResNet and not hooked(other)
        assert all(torch.equal(a, b) for a, b in zip(other(x), want))


def test_training_from_the_same_seed_follows_the_reference():
    ref, fast = pair(10, 4, 1, dtype=torch.float64, head="classic")
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, 0.9, nesterov=True) for m in (ref, fast)]
    for _ in range(5):
        x, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(4, (4,))
        for model, optimizer in zip((ref, fast), optimizers):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    for name, value in ref.state_dict().items():
        assert error(fast.state_dict()[name], value) <= 1e3 * FLOAT64, name


def test_inference_mode_then_training():
    ref, fast = pair(dtype=torch.float64)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        assert worst(fast.eval()(x), ref.eval()(x)) <= FLOAT64
    fast.train()(x)[1].sum().backward()
    assert fast.conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("backend", "training"),
    [
        ("aot_eager", True),
        ("aot_eager", False),
        ("inductor", True),
        pytest.param("inductor", False, marks=pytest.mark.long),
    ],
)
def test_compile_without_a_graph_break(backend, training):
    _, fast = pair(10, 4, 1)
    fast.train(training)
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend=backend)
    pools = {"out": Pool("out", torch.float32), "input gradient": Pool("input gradient", torch.float32, rule="median")}
    for _ in range(8):
        x = torch.randn(3, 3, 32, 32)
        results = []
        for model in (compiled, fast, copy.deepcopy(fast).double()):
            leaf = x.to(next(model.parameters()).dtype).requires_grad_()
            y = model(leaf)[1]
            results.append((y, torch.autograd.grad(y.square().sum(), leaf)[0]))
        for pool, values in zip(pools.values(), zip(*results)):
            pool.add(*values)
    for pool in pools.values():
        cell = pool.judge()
        assert cell.ok, cell


@pytest.mark.parametrize("dropRate", [0.0, 0.1])
def test_saved_bytes_are_at_most_055_of_the_reference(dropRate):
    """WRN-28-10 at batch 16, unique storages, parameters excluded; on meta tensors, since only sizes count."""
    sizes = {}
    for kind in (reference.WideResNet, wrn_fast.WideResNet):
        with torch.device("meta"):
            model = kind(28, 10, 10, dropRate)
            x = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        sizes[kind] = saved_bytes(partial(model, x), model)
    ratio = sizes[wrn_fast.WideResNet] / sizes[reference.WideResNet]
    print(f"saved bytes, dropRate {dropRate}: {ratio:.3f} of the reference's")
    assert 0.2 < ratio <= 0.55

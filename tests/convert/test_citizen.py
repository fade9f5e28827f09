"""What people do with a model, done with an accelerated one: averaging, attacks, autocast, threads, processes."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from convert.networks import assert_equal, calls, observe, twins
from families import family_m, family_ssl, family_x
from models import shake
from torch import nn
from torch.utils.checkpoint import checkpoint

from wrn_fast import WideResNet, parity
from wrn_fast.convert import accelerate, report

DOUBLE = torch.float64


def net(rate=0.0, depth=10):
    return shake(family_x.WideResNet(depth, 10, 1, rate)).double()


def image(n=2):
    return torch.randn(n, 3, 32, 32, dtype=DOUBLE)


def test_second_derivatives():
    results = []
    plain, fast = twins(shake(family_ssl.WideResNet()).double())
    x = image().requires_grad_()
    for model in (fast, plain):
        (g,) = torch.autograd.grad(model(x).square().sum(), [x], create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), [x, model.block2.layer[0].conv1.weight]))
    for got, want in zip(*results):
        assert parity.error(got, want) <= parity.FLOAT64


@pytest.mark.parametrize("frozen", [False, True])
def test_many_gradients_at_once(frozen):
    """torch.autograd.functional.jacobian(vectorize=True) and grad(is_grads_batched=True) batch the backward pass."""
    results = []
    x = image()
    for model in twins(net(depth=16).requires_grad_(not frozen)):
        v = x.clone().requires_grad_()
        y = model.train(not frozen)(v).sum(0)
        wanted = [v, *(p for p in model.parameters() if p.requires_grad)]
        results.append(torch.autograd.grad(y, wanted, torch.eye(10, dtype=DOUBLE), is_grads_batched=True))
    for got, want in zip(*results):
        assert parity.error(got, want) <= parity.FLOAT64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_statistics_as_plain_batchnorm_does(reentrant):
    results = []
    x = image()
    for model in twins(net()):
        v = x.clone().requires_grad_()
        y = model.conv1(v)
        for group in (model.block1, model.block2, model.block3):
            y = checkpoint(group, y, use_reentrant=reentrant)
        y.square().sum().backward()
        grads = {f"gradient {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append({"x": v.grad, **grads, **dict(model.named_buffers())})
    assert_equal(results[1], results[0])
    assert results[0]["block1.layer.0.bn1.num_batches_tracked"] == 2


def test_averaging_and_update_bn():
    results = []
    batches = [image() for _ in range(3)]
    for model in twins(net()):
        average = torch.optim.swa_utils.AveragedModel(model)
        for x in batches:
            model(x).square().mean().backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
            average.update_parameters(model)
        torch.optim.swa_utils.update_bn(batches, average)
        results.append({"output": average.eval()(batches[0]).detach(), **average.state_dict()})
    assert_equal(results[1], results[0])
    assert calls(lambda: average(batches[0]))["fprop"] == 6


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_step_is_seen(make):
    """Fused optimizers do not move a tensor's version: nothing that is kept of a weight may rely on it."""
    model = accelerate(shake(family_x.WideResNet(10, 10, 1)))
    x = torch.randn(2, 3, 32, 32)
    model.eval()(x)
    model.train()(x).square().sum().backward()
    make(model.parameters(), lr=0.1, fused=True).step()
    model.eval()
    fresh = accelerate(family_x.WideResNet(10, 10, 1))
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model(x), fresh.eval()(x))


@pytest.mark.parametrize("size", [33, 40, 64])
def test_other_image_sizes_give_what_the_users_model_gives(size):
    plain, fast = (m.eval() for m in twins(net()))
    x = torch.randn(2, 3, size, size, dtype=DOUBLE)
    assert plain(x).shape[0] == (8 if size == 64 else 2)
    assert parity.error(fast(x), plain(x)) <= parity.FLOAT64


def test_parts_called_one_by_one():
    plain, fast = (m.eval() for m in twins(net(depth=16)))
    x, results = image(), []
    for m in (fast, plain):
        y = m.conv1(x)
        seen = [y := group(y) for group in (m.block1, m.block2, m.block3)]
        results.append([*seen, m.fc(F.avg_pool2d(m.relu(m.bn1(y)), 8).flatten(1))])
    for got, want in zip(*results):
        assert parity.error(got, want) <= parity.FLOAT64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_users_dtypes_within_the_bound(dtype):
    pool = parity.Pool("output", dtype)
    for _ in range(parity.SEEDS):
        plain, fast = twins(shake(family_x.WideResNet(16, 10, 1)))
        x, block_input = torch.randn(2, 3, 32, 32), torch.randn(2, 16, 8, 8)
        with torch.autocast("cpu", dtype):
            want, got = plain(x), fast(x)
            assert plain.block1.layer[0](block_input).dtype == fast.block1.layer[0](block_input).dtype
        assert got.dtype == want.dtype
        pool.add(got, want, copy.deepcopy(plain).double()(x.double()))
    cell = pool.judge()
    assert cell.ok, cell
    got.float().square().sum().backward()
    assert fast.conv1.weight.grad.dtype == torch.float32


def test_channels_last_in_gives_the_same():
    plain, fast = twins(net())
    x = image().to(memory_format=torch.channels_last)
    assert_equal(observe(fast, x, True), observe(plain, x, True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_out_is_layout_in(layout):
    """Callers view what they get: view(n, -1) of a channels_last map raises."""
    plain, fast = twins(net(depth=16).to(memory_format=layout))
    x = image().to(memory_format=layout)
    for part in ("block1.layer", "block2.layer.0", "block3"):
        seen = []
        for model in (plain, fast):
            handle = model.get_submodule(part).register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.stride()))
            model(x)
            handle.remove()
        assert seen[0] == seen[1]


class NormalisedHead(family_x.WideResNet):
    """Writes its head's weight anew in each forward, as heads of OOD detection do."""

    def forward(self, x):
        self.fc.weight.data = F.normalize(self.fc.weight.data, dim=1)
        return super().forward(x)


def test_a_head_that_rewrites_its_weight():
    plain, fast = twins(shake(NormalisedHead(10, 10, 1)).double())
    for _ in range(2):
        x = image()
        assert_equal(observe(fast, x, True), observe(plain, x, True))
        assert torch.equal(fast.fc.weight, plain.fc.weight)


def test_frozen_layers_get_no_gradient():
    plain, fast = twins(net())
    for model in (plain, fast):
        for p in [*model.block1.parameters(), *model.block2.parameters()]:
            p.requires_grad_(False)
    x = image()
    assert_equal(observe(fast, x, True), observe(plain, x, True))
    counts = calls(lambda: fast(x).sum().backward())
    assert counts["wgrad"] == 3  # block3: two convolutions and the shortcut


def test_several_models_from_several_threads():
    models = [accelerate(net()).eval() for _ in range(3)]
    x = image()
    want, got = [m(x) for m in models], {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: models[i](x)})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(3))


def test_training_resumed_from_a_checkpoint_gives_the_same_curve(tmp_path):
    def step(model, optimizer):
        torch.manual_seed(len(losses))
        x = image()
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    def fresh():
        model = accelerate(family_m.WideResNet(10, 1, 0.3).double())
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)

    losses = []
    model, optimizer = fresh()
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    step(model, optimizer)
    step(model, optimizer)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again, optimizer = fresh()
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first, losses = losses, losses[:1]
    step(again, optimizer)
    step(again, optimizer)
    assert losses == first


def test_sync_batchnorm_is_left_to_its_owner():
    results, x = [], image()
    for model in twins(net()):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        results.append(observe(model, x, True))
        assert calls(lambda model=model: model(x))["fprop"] == 0
    assert_equal(results[1], results[0])


def test_other_normalisations_are_not_recognised():
    block = family_x.BasicBlock(16, 16, 1)
    block.bn1 = nn.SyncBatchNorm(16)
    accelerate(block)
    assert type(block) is family_x.BasicBlock and "SyncBatchNorm" in report(block).why[""]


def test_hooks_of_the_backward_pass():
    """Full-backward hooks on a block and on a module inside see the plain gradients; the weights' are equal."""
    results, x = [], image()
    for model in twins(net(depth=16)):
        seen = {}
        for name in ("block2", "block2.layer.1", "block3.layer.0.conv2", "block1.layer.0.conv1"):
            note = lambda m, gx, gy, at=name, seen=seen: seen.update({f"{at} x": gx[0], f"{at} y": gy[0]})
            model.get_submodule(name).register_full_backward_hook(note)
        v = x.clone().requires_grad_()
        model.train()(v).square().sum().backward()
        results.append({**seen, "x": v.grad, **{f"gradient {k}": p.grad for k, p in model.named_parameters()}})
    assert len(results[0]) > 8
    assert_equal(results[1], results[0])


def test_hooks_of_the_state_dict():
    """EMA and quantisation libraries rename and check keys there."""
    results = []

    def add(module, state, prefix, metadata):
        state[f"{prefix}extra"] = state[f"{prefix}conv1.weight"] + 1

    def take(module, state, prefix, *rest):
        results[-1].append(state.pop(f"{prefix}extra"))

    for model in twins(net()):
        model.block2.layer[0].register_state_dict_post_hook(add)
        model.block2.layer[0].register_load_state_dict_pre_hook(take)
        model.register_load_state_dict_post_hook(lambda m, keys: results[-1].append(keys.missing_keys))
        results.append([model.state_dict()])
        model.load_state_dict(copy.deepcopy(results[-1][0]), strict=True)
        assert len(results[-1]) == 3 and results[-1][2] == []
    plain, fast = results
    assert list(plain[0]) == list(fast[0]) and torch.equal(plain[1], fast[1])
    assert all(torch.equal(v, fast[0][k]) for k, v in plain[0].items())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", [lambda: accelerate(net()), lambda: WideResNet(10, 10, 1)], ids=["accelerated", "own"])
def test_models_without_data(make, grad):
    """Sizes are planned on meta tensors."""
    model = make().eval().to("meta")
    with torch.set_grad_enabled(grad):
        y = model(torch.empty(2, 3, 32, 32, device="meta", dtype=model.fc.weight.dtype))
    assert (y[0] if isinstance(y, tuple) else y).shape == (2, 10)


def test_gradients_clipped_and_accumulated():
    results = []
    batches = [image() for _ in range(3)]
    for model in twins(net()):
        for x in batches:
            model(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        results.append({"norm": norm, **{f"gradient {k}": p.grad for k, p in model.named_parameters()}})
    assert_equal(results[1], results[0])


def test_inference_mode_and_a_gradient_scaler():
    plain, fast = (m.eval() for m in twins(net()))
    x = image()
    with torch.inference_mode():
        assert parity.error(fast(x), plain(x)) <= parity.FLOAT64
    model = accelerate(family_x.WideResNet(10, 10, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = model.block1.layer[0].conv1.weight.clone()
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.randn(2, 3, 32, 32)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.block1.layer[0].conv1.weight, before)

"""The paper's block types: B(3,1), B(1,3,1) and the others beside the reference, alone, in chains and from files."""

import copy

import pytest
import torch
from convert.networks import assert_equal, calls, masks_of, noted_draws, observe
from models import shake
from torch import nn

import wrn_fast
from wrn_fast import chain, cli, reference
from wrn_fast.errors import WrnFastError
from wrn_fast.parity import FLOAT64, Pool, error
from wrn_fast.reference import BLOCKS, kernel_sizes

DOUBLE = torch.float64


def smallest(block):
    return 3 * len(kernel_sizes(block)) + 4


def pair(block, k=1, rate=0.0, blocks=1, dtype=DOUBLE, **options):
    """A shake reference and a drop-in with its weights."""
    depth = blocks * (smallest(block) - 4) + 4
    ref = shake(reference.WideResNet(depth, 5, k, rate, block=block, head="classic", **options)).to(dtype)
    fast = wrn_fast.WideResNet(depth, 5, k, rate, block=block, head="classic", **options).to(dtype)
    fast.load_state_dict(ref.state_dict(), strict=True)
    return ref, fast


@pytest.mark.parametrize(
    ("block", "depth", "millions"),
    [
        # tables 2 and 3 of the paper, k = 2; table 2 counts (d - 4) / 6 blocks whatever l is
        ("B(1,3,1)", 58, 1.4), ("B(3,1)", 40, 1.2), ("B(1,3)", 40, 1.3), ("B(3,1,1)", 58, 1.3), ("B(3,3)", 28, 1.5),
        ("B(3,1,3)", 31, 1.1), ("B(3)", 40, 2.2), ("B(3,3)", 40, 2.2), ("B(3,3,3)", 40, 2.2), ("B(3,3,3,3)", 40, 2.2),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_paper(block, depth, millions):
    with torch.device("meta"):
        model = reference.WideResNet(depth, 10, 2, block=block, head="classic")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == pytest.approx(millions)


def test_names_follow_the_scheme_of_the_reference(seed):
    torch.manual_seed(seed)
    ref = reference.WideResNet(13, 4, block="B(1,3,1)")
    torch.manual_seed(seed)
    fast = wrn_fast.WideResNet(13, 4, block="B(1,3,1)")
    names = [name for name, _ in fast.block2.layer[0].named_parameters()]
    inner = [
        f"{part}.{p}" for i in "123" for part, p in ((f"bn{i}", "weight"), (f"bn{i}", "bias"), (f"conv{i}", "weight"))
    ]
    assert names == [*inner, "convShortcut.weight"]
    assert list(ref.state_dict()) == list(fast.state_dict())
    assert all(torch.equal(v, fast.state_dict()[k]) for k, v in ref.state_dict().items())
    assert [getattr(fast.block2.layer[0], f"conv{i}").stride[0] for i in (1, 2, 3)] == [1, 2, 1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_reference_in_float64(block, training):
    ref, fast = pair(block, blocks=2, act="silu")
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    assert calls(lambda: fast(x))["fprop"] == fast_convolutions(fast)
    fast.load_state_dict(ref.state_dict())
    assert_equal(observe(fast, x, training), observe(ref, x, training))


def fast_convolutions(model):
    """Every 3x3 and 1x1 convolution but the shortcuts', which are part of another."""
    return sum(isinstance(m, nn.Conv2d) for m in model.modules()) - sum(
        "convShortcut.w" in k for k in model.state_dict()
    )


@pytest.mark.parametrize("block", ["B(3)", "B(1,3)", "B(3,1,3)"])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_sits_before_the_last_convolution(block, training, monkeypatch):
    ref, fast = pair(block, rate=0.4)
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    with noted_draws(monkeypatch) as draws:
        got = observe(fast, x, training)
    assert len(draws) == 3
    with masks_of(draws, monkeypatch) as rest:
        want = observe(ref, x, training)
    assert not rest
    assert_equal(got, want)


@pytest.mark.parametrize("block", ["B(1,3,1)", "B(3,1)"])
def test_float32_and_bfloat16_within_the_bound(block):
    pools = {}
    for _ in range(8):
        oracle, fast = pair(block, k=2, dtype=torch.float32)
        eager = copy.deepcopy(oracle).to(memory_format=torch.channels_last)
        oracle = oracle.double()
        x = torch.randn(4, 3, 32, 32)
        for training in (True, False):
            with torch.no_grad():
                want = oracle.train(training)(x.double())
                for dtype in (torch.float32, torch.bfloat16):
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                        got = fast.train(training)(x)
                        plain = eager.train(training)(x.to(memory_format=torch.channels_last))
                    name = f"training {training}, {dtype}"
                    pools.setdefault(name, Pool(name, dtype)).add(got, plain, want)
    for pool in pools.values():
        cell = pool.judge()
        assert cell.ok, cell


@pytest.mark.native
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_chain_of_every_type_is_bit_equal_to_its_operators(block, rate, monkeypatch):
    _, fast = pair(block, k=2, rate=rate, blocks=2, dtype=torch.float32, dropout_in_eval=True)
    fast.eval()
    served, run = [], chain.run_blocks

    def counted(blocks, x):
        y = run(blocks, x)
        served.append(y is not None)
        return y

    monkeypatch.setattr("wrn_fast.block.run_blocks", counted)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(1)
        got = fast(x)
        assert served == [True]
        monkeypatch.setattr("wrn_fast.block.run_blocks", lambda blocks, x: None)
        torch.manual_seed(1)
        assert torch.equal(fast(x), got)


@pytest.mark.native
@pytest.mark.parametrize("leaky", [0, 1])
def test_a_chain_has_the_slope_of_the_one_leaky_activation(leaky):
    _, fast = pair("B(3,3)", k=2, dtype=torch.float32)
    parts = fast.eval().block2.layer[0].parts()
    stages = [s._replace(act=("leaky_relu", 0.3)) if i == leaky else s for i, s in enumerate(parts.stages)]
    parts = parts._replace(stages=tuple(stages))
    x = torch.randn(2, 32, 16, 16)
    with torch.no_grad():
        assert torch.equal(chain.run_blocks([parts], x), wrn_fast.block.run_block(parts, x, None)[0])


@pytest.mark.parametrize("block", ["B(3)", "B(1,3,1)"])
def test_hooks_inside_see_the_reference_tensors(block):
    ref, fast = pair(block)
    x, seen = torch.randn(2, 3, 32, 32, dtype=DOUBLE), []
    for model in (ref, fast):
        last = f"conv{len(kernel_sizes(block))}"
        model.eval().block2.layer[0].get_submodule(last).register_forward_hook(lambda m, i, y: seen.append(y))
    assert error(fast(x), ref(x)) <= FLOAT64
    assert error(seen[0], seen[1]) <= FLOAT64


@pytest.mark.parametrize("block", ["B(3)", "B(3,1)", "B(1,3,1)"])
def test_monte_carlo_dropout_shares_what_lies_before_it(block):
    _, fast = pair(block, rate=0.3)
    convolutions = len(kernel_sizes(block))
    counts = calls(lambda: wrn_fast.mc_predict(fast, torch.randn(2, 3, 32, 32, dtype=DOUBLE), 5, memory=1))
    assert counts["fprop"] == (convolutions - 1) + 5 * (2 * convolutions + 1)


@pytest.mark.parametrize("block", ["B(3,5)", "B(1,1)", "B(3, 3)", "B()", (3, 3), None])
def test_an_unknown_block_type_is_named(block):
    for library in (reference, wrn_fast):
        with pytest.raises(WrnFastError, match=r"`block`: expected one of B\(3,3\), .* got "):
            library.WideResNet(10, 10, block=block)


@pytest.mark.parametrize(
    ("block", "depth", "said"), [("B(3,1,3)", 28, r"9n \+ 4 .*\(13, 22, 31"), ("B(3)", 5, r"3n \+ 4")]
)
def test_a_depth_that_a_block_type_does_not_have(block, depth, said):
    with pytest.raises(WrnFastError, match=rf"`depth`: expected {said}"):
        wrn_fast.WideResNet(depth, 10, block=block)


@pytest.mark.parametrize("block", ["B(3)", "B(3,1,3)"])
def test_verify_accepts_block_types(block):
    model = wrn_fast.WideResNet(smallest(block), 5, 1, 0.2, block=block, act="silu")
    report = wrn_fast.verify(model, dtypes=(DOUBLE,), seeds=1, steps=1, batch=2)
    assert report.ok, report
    assert f"block='{block}'" in str(report.settings["candidate"])


@pytest.mark.parametrize("block", ["B(3)", "B(1,3)", "B(3,1,3)"])
def test_a_checkpoint_says_its_block_type(block):
    ref, _ = pair(block, k=2, dtype=torch.float32)
    net, report = wrn_fast.load_checkpoint(ref.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    assert type(net) is wrn_fast.WideResNet and not report.left and block in str(report)
    assert error(net.double()(x), ref.double().eval()(x)) <= FLOAT64


def test_a_checkpoint_of_blocks_that_nobody_has_is_refused():
    state = pair("B(3,1)", dtype=torch.float32)[0].state_dict()
    for name in [k for k in state if k.endswith(".conv2.weight")]:
        state[name] = torch.randn(*state[name].shape[:2], 5, 5)
    with pytest.raises(WrnFastError, match=r"a block type out of .* got B\(3,5\)"):
        wrn_fast.load_checkpoint(state)
    with pytest.raises(WrnFastError, match="the plain network round blocks other than"):
        wrn_fast.load_checkpoint(pair("B(3,1)", dtype=torch.float32)[0].state_dict(), {"eps": 1e-3})


def test_the_command_line_knows_block_types(capsys):
    words = "verify --block B(1,3) --depth 10 --width 1 --dtype float64 --seeds 1 --steps 1 --batch 2"
    assert cli.main(words.split()) == 0
    assert "block='B(1,3)'" in capsys.readouterr().out

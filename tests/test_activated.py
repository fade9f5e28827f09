"""Second outputs in place of prologues: which ones a plan takes, and that a planned run computes the same network."""

import weakref

import pytest
import torch
from models import pair, shake

from wrn_fast import activated, chain, dispatch, random, tuned
from wrn_fast.backends import aten
from wrn_fast.model import WideResNet
from wrn_fast.parity import RATIO, UNIT, error

ALWAYS = lambda writer, reader, raw: True
NEVER = lambda writer, reader, raw: False
INSIDE = lambda writer, reader, raw: not raw
NETWORKS = (
    *({"act": act} for act in ("relu", "silu", "leaky_relu")),
    *({"block": block, "depth": depth} for block, depth in (("B(3,3,3)", 22), ("B(3,1)", 16), ("B(3)", 16))),
)


@pytest.fixture(autouse=True)
def nothing_known():
    activated.forget()
    yield
    activated.forget()


@pytest.fixture
def any_dtype(monkeypatch):
    """Plain PyTorch as a backend that writes second outputs, in float64 too."""

    def scale_shift(stats, gamma, beta, eps, like):
        scale = torch.rsqrt(stats[1] + eps) if gamma is None else gamma * torch.rsqrt(stats[1] + eps)
        return scale, -stats[0] * scale if beta is None else beta - stats[0] * scale

    monkeypatch.setattr(aten, "scale_shift", scale_shift, raising=False)
    monkeypatch.setattr(activated, "_HALVES", (torch.float64, torch.bfloat16))


def units(model):
    return [unit for group in (model.block1, model.block2, model.block3) for unit in group.units()]


def steps_of(model, x):
    found = chain._steps([unit.parts() for unit in units(model)], x)
    assert found is not None
    return found


def network(dtype=torch.float64, **options):
    """Filters in `dtype`, BatchNorm in float32, and an input of the first block."""
    depth = options.pop("depth", 16)
    model = shake(WideResNet(depth, 10, 2, options.pop("dropRate", 0.0), **options).eval())
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.to(dtype)
    return model, torch.randn(2, 16, 12, 12, dtype=dtype).contiguous(memory_format=torch.channels_last)


def test_what_a_plan_changes():
    model, x = network(torch.bfloat16)
    steps = steps_of(model, x)
    planned = activated.plan(steps, ALWAYS)
    # The input's own prologues stay: the first convolution's and the first shortcut's.
    assert [s.problem.prologue for s in planned] == [True] + [False] * 11
    assert [s.problem.short_prologue for s in planned if s.short] == [True, False, False]
    # y is written where an identity shortcut reads it, and at the end; inside a block never.
    assert [s.problem.want_y for s in planned] == [False, True, False, False] * 2 + [False, True, False, True]
    assert [s.problem.act_out for s in planned] == ["relu"] * 11 + ["none"]
    assert planned[-1].second is None and all(s.second is not None for s in planned[:-1])
    for before, after in zip(steps, planned, strict=True):
        assert (before.x, before.y, before.w, before.residual) == (after.x, after.y, after.w, after.residual)
        after.problem.check()
    assert activated.plan(steps, NEVER) == steps
    inside = activated.plan(steps, INSIDE)
    assert [s.problem.act_out for s in inside] == (["relu", "none"] + ["relu"] * 2) * 2 + ["relu", "none"] * 2


@torch.no_grad()
@pytest.mark.parametrize("decision", (ALWAYS, INSIDE), ids=("always", "inside"))
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_a_planned_run_is_the_same_network(options, decision, any_dtype):
    model, x = network(**options)
    planned = activated.plan(steps_of(model, x), decision)
    assert any(step.second for step in planned)
    with dispatch.backend("aten"):
        want = x
        for unit in units(model):
            want = unit(want)
        assert error(activated.run(x, planned), want) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("name", ("running_mean", "running_var", "weight"))
def test_layers_that_share_a_vector(name, any_dtype):
    model, x = network()
    setattr(model.block1.layer[1].bn2, name, getattr(model.block1.layer[0].bn2, name))
    with dispatch.backend("aten"):
        want = x
        for unit in units(model):
            want = unit(want)
        assert error(activated.run(x, activated.plan(steps_of(model, x), ALWAYS)), want) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("block, moved", (("B(3,3)", 6), ("B(3,3,3)", 3)))
def test_masks_are_those_of_the_operators(block, moved, any_dtype, monkeypatch):
    """Dropout moves to the writer with its bits and its place in the order of draws, where no shortcut reads too."""
    monkeypatch.setattr(chain, "_DTYPES", (torch.float64,))
    monkeypatch.setattr(activated, "by_time", ALWAYS)
    model, x = network(dropRate=0.3, block=block, depth=13 if block == "B(3,3,3)" else 16)
    with dispatch.backend("aten"):
        torch.manual_seed(5)
        want = x
        for unit in units(model):
            want = unit(want)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        got = chain.run_blocks([unit.parts() for unit in units(model)], x)
    assert got is not None and error(got, want) < 1e-14
    assert torch.equal(state, torch.get_rng_state())
    drops = [s.problem.drop_at for s in activated.plan(steps_of(model, x), ALWAYS) if s.problem.p > 0]
    assert drops.count("output_act") == moved


@torch.no_grad()
def test_dropout_before_batch_norm(any_dtype):
    """The second output is made of the dropped first one, written or not."""
    model, x = network()
    steps = [
        step._replace(problem=step.problem._replace(p=0.3, drop_at="output"), rng=random.draw(x.device))
        if i % 2 == 0 else step
        for i, step in enumerate(steps_of(model, x))
    ]  # fmt: skip
    planned = activated.plan(steps, ALWAYS)
    assert all(step.second for step in planned[:-1])
    with dispatch.backend("aten"):
        assert error(activated.run(x, planned), activated.run(x, steps)) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("decision", (ALWAYS, INSIDE), ids=("always", "inside"))
def test_no_more_memory_than_later_layers_read(decision, any_dtype, monkeypatch):
    made, living, fprop = [], [], aten.fprop

    def watched(*args):
        living.append(sum(ref() is not None for ref in made))
        out = fprop(*args)
        made.extend(weakref.ref(v) for v in out if v.numel())
        return out

    model, x = network()
    with dispatch.backend("aten"):
        planned = activated.plan(steps_of(model, x), decision)
        monkeypatch.setattr(aten, "fprop", watched)
        activated.run(x, planned)
    # What the block reads, once for its shortcut, once for its convolution; then the latter's output in its place.
    assert max(living) == 2


@torch.no_grad()
def test_only_what_runs_is_asked_for(any_dtype, monkeypatch):
    """A backend proves a kernel when it is chosen, which costs seconds on a GPU: not for prologues that never run."""
    monkeypatch.setattr(activated, "by_time", ALWAYS)
    asked, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, problem: (asked.append(problem), choose(op, problem))[1])
    model, x = network(torch.bfloat16)
    with dispatch.backend("aten"):
        assert chain.run_blocks([unit.parts() for unit in units(model)], x) is not None
    assert sum(problem.prologue for problem in set(asked)) == 2  # the first one, without and with its second output


def test_what_stays_a_prologue():
    """float32, another mask or slope than the writer's own, a shortcut with another prologue."""
    model, x = network(torch.bfloat16, dropRate=0.3)
    steps = steps_of(model, x)
    single = [s._replace(problem=s.problem._replace(dtype=torch.float32)) for s in steps]
    assert activated.plan(single, ALWAYS) == single
    first, second = steps[:2]
    dropped = first._replace(problem=first.problem._replace(p=0.3, drop_at="output"))
    assert second.problem.p == 0.3 and activated.plan([dropped, second], ALWAYS) == [dropped, second]
    leaky = [s._replace(problem=s.problem._replace(act="leaky_relu", slope=slope, p=0.0, drop_at="none"))
             for s, slope in ((first, 0.1), (second, 0.2))]  # fmt: skip
    assert activated.plan(leaky, ALWAYS) == leaky
    both = [s._replace(problem=s.problem._replace(p=0.0, drop_at="none")) for s in steps[3:6]]
    both[1] = both[1]._replace(problem=both[1].problem._replace(p=0.3, drop_at="prologue"))
    assert both[2].short and activated.plan(both, ALWAYS)[0] == both[0]
    both[0] = both[0]._replace(problem=both[0].problem._replace(p=0.3, drop_at="prologue"))
    assert activated.plan([both[0], both[1]], ALWAYS)[0] == both[0]
    of_reader = [leaky[0]._replace(problem=first.problem), leaky[1]]
    assert activated.plan(of_reader, ALWAYS)[0].problem.slope == 0.2
    for change in ({"short_eps": 1e-3}, {"short_act": "silu"}, {"short_prologue": False}):
        other = [s._replace(problem=s.problem._replace(**change)) if s.short else s for s in steps]
        stays = [i for i, s in enumerate(activated.plan(other, ALWAYS)) if s.second is None]
        assert stays == [3, 7, 11]


def test_measured_times_decide(monkeypatch):
    """The prologue's cost against the second output's, and the width where a time is missing."""
    base = steps_of(*network(torch.bfloat16))[0].problem._replace(C=32, K=32)
    times = {}
    monkeypatch.setattr(activated, "_us", lambda p, _: times.get((p.prologue, p.act_out != "none" and p.want_y)))
    assert activated.by_time(base, base, False) and not activated.by_time(base, base, True)
    assert activated.by_time(base._replace(K=activated.WIDE), base, True)
    times |= {(True, False): 12.0, (False, False): 10.0, (False, True): 11.0}
    assert not activated.by_time(base, base, True)  # asked once, not at each call
    activated.forget()
    assert activated.by_time(base, base, True) and activated.by_time(base, base, False)
    times[False, True] = 13.0
    activated.forget()
    assert activated.by_time(base, base, False) and not activated.by_time(base, base, True)
    times[False, False] = 12.5
    activated.forget()
    assert not activated.by_time(base, base, False)


def test_classes_of_times_are_the_tables():
    """What `by_time` asks for is what `wrn-fast tune` measures."""
    from wrn_fast import tune

    measured = {tuned.key("triton", op, problem) for op, problem in tune.tasks(16, 10, 64, device="cpu")}
    model = shake(WideResNet(16, 10, 10).eval()).bfloat16()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.float()
    asked = []

    def ask(problem, names):
        asked.append(tuned.key("triton", "fprop", problem))

    patch = pytest.MonkeyPatch()
    with patch.context() as p:
        p.setattr(activated, "_us", ask)
        activated.plan(steps_of(model, torch.empty(64, 16, 32, 32, dtype=torch.bfloat16)), activated.by_time)
    assert asked and set(asked) <= measured


@torch.no_grad()
def test_outputs_of_a_planned_network_in_bfloat16(any_dtype, monkeypatch):
    """No further from the float64 oracle than the network by operators."""
    ratios = []
    for _ in range(8):
        ref, fast = pair(16, 10, 2)
        oracle, fast = ref.double().eval(), fast.bfloat16().eval()
        for m in fast.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.float()
        x = torch.randn(2, 3, 32, 32)
        want = oracle(x.double())[1]
        with dispatch.backend("aten"), monkeypatch.context() as p:
            p.setattr(activated, "by_time", ALWAYS)
            planned = error(fast(x.bfloat16())[1], want)
            p.setattr(activated, "by_time", NEVER)
            ratios.append((planned, error(fast(x.bfloat16())[1], want)))
    rms = torch.tensor(ratios).square().mean(0).sqrt()
    assert rms[0] <= RATIO * rms[1] + UNIT[torch.bfloat16] and rms[0] != rms[1]

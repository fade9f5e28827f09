"""The command line: exit statuses, JSON that scripts may rely on, checkpoints that are right, wrong and hostile."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wrn_fast
from wrn_fast import dispatch, packing, parity, reference, tune_cpu
from wrn_fast.backends import BACKENDS
from wrn_fast.cli import info, main
from wrn_fast.cli import verify as command
from wrn_fast.verify import markdown, verify

ROOT = Path(__file__).resolve().parents[1]
QUICK = "verify --size 12 --steps 1 --batch 2 --dtype float64 --seeds 1".split()
SMALL = [*QUICK, *"--depth 10 --width 1".split()]


@pytest.fixture(autouse=True)
def plain_backend():
    """What is tested here is the command, not a kernel."""
    with wrn_fast.backend("aten"):
        yield


def run(capsys, *words):
    """(status, standard output, standard error); argparse's own exits count as statuses."""
    try:
        status = main(words)
    except SystemExit as left:
        status = left.code
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *words):
    status, out, _ = run(capsys, *words, "--json")
    return status, json.loads(out)


def test_info_says_which_backend_and_why_not_the_others(capsys, monkeypatch):
    monkeypatch.setenv("WRN_FAST_PRECISION", "f2")
    with wrn_fast.backend(",".join(BACKENDS)):
        status, data = run_json(capsys, "info", "--batch", "3")
        _, out, _ = run(capsys, "info")
    assert status == 0
    assert set(data) == {
        "versions", "cpu", "gpus", "extensions", "openmp", "backends", "precision",
        "pinned algorithm", "packed filters", "memory of inference", "environment", "choices", "notes",
    }  # fmt: skip
    assert data["versions"]["torch"] == torch.__version__ and data["versions"]["wrn_fast"] == wrn_fast.__version__
    assert data["backends"] == list(BACKENDS) and data["precision"] == "f2"
    assert data["environment"]["WRN_FAST_PRECISION"] == "f2"
    assert any(name.startswith("libgomp") or "omp" in name for name in data["openmp"]) or sys.platform != "linux"
    on_cpu = [row for row in data["choices"] if row["device"] == "cpu"]
    assert len(on_cpu) == len(info.layers(10)) * len(info.DTYPES)
    for row in on_cpu:
        assert row["problem"].startswith("3x") and set(row["uses"]) == set(info.OPS)
        served = {use.split()[0] for use in row["uses"].values()}
        assert served <= set(BACKENDS) and all(row["why_not"].values())
        if row["dtype"] == "float64":
            assert served == {"aten"} and "float64" in row["why_not"]["cpu"]
    assert "group 3" in out and "not cpu: needs float32 or bfloat16" in out


def test_info_agrees_with_the_dispatcher():
    with wrn_fast.backend(",".join(BACKENDS)):
        rows = info.choices("cpu", 2, 1)
        for row, (layer, dtype) in zip(rows, [(a, b) for a in info.layers(1) for b in info.DTYPES]):
            for op, use in row["uses"].items():
                asked = info.problem(layer, op, dtype, "cpu", 2)
                asked.check()
                assert dispatch.choose(op, asked).NAME == use.split()[0]


@pytest.mark.native
@pytest.mark.parametrize("depth, width", ((10, 1), (16, 2)))
def test_info_says_which_algorithm_and_how_much_memory(capsys, monkeypatch, depth, width):
    """The algorithm is that of the plan; the packed filters are those that inference then keeps."""
    monkeypatch.delenv("WRN_FAST_PACK_CACHE", raising=False)
    packing.refresh()
    with wrn_fast.backend("cpu"):
        _, data = run_json(capsys, "info", "--depth", str(depth), "--width", str(width), "--batch", "1")
        model = wrn_fast.WideResNet(depth, 10, width, 0.0).eval()
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn(1, 3, 32, 32))
    uses = {row["layer"]: row["uses"]["fprop"] for row in data["choices"] if row["dtype"] == "float32"}
    assert uses["stem"] == "cpu direct" and uses["group 3"] == "cpu f4"
    assert uses["group 1"] == ("cpu f2" if width == 1 else "cpu f3")
    assert uses["stride 2"] == ("cpu direct" if width == 1 else "cpu f2s2")
    kept = sum(row.bytes for row in packing.report() if row.shape[2:] == (3, 3))
    assert data["memory of inference"][f"packed filters of WRN-{depth}-{width}"] == kept > 0
    monkeypatch.setenv("WRN_FAST_PACK_CACHE", "0")
    with wrn_fast.backend("cpu"):
        _, data = run_json(capsys, "info", "--depth", str(depth), "--width", str(width))
    assert data["memory of inference"][f"packed filters of WRN-{depth}-{width}"] == 0


def test_info_refuses_a_network_that_is_none(capsys):
    status, out, err = run(capsys, "info", "--depth", "11")
    assert status != 0 and "`--depth`" in out + err


def test_info_obeys_a_narrowed_choice(capsys):
    _, data = run_json(capsys, "info")
    assert data["backends"] == ["aten"]
    assert {use for row in data["choices"] for use in row["uses"].values()} == {"aten"}


def test_a_table_and_json_both_succeed(capsys):
    assert run(capsys, "info")[0] == 0
    assert isinstance(run_json(capsys, "info")[1], dict)


def test_tune_says_why_there_is_nothing_to_tune(capsys, monkeypatch):
    monkeypatch.setattr(tune_cpu, "unsupported", lambda: "no compiler")
    status, data = run_json(capsys, "tune")
    assert status == 0 and data["tuned"] == [] and data["reason"] in run(capsys, "tune")[1]


def test_verify_passes_the_drop_in(capsys, seed):
    status, out, _ = run(capsys, *SMALL, "--first-seed", str(seed))
    assert status == 0 and "every quantity is within its bound" in out and "steps: updates" in out
    status, out, _ = run(capsys, *SMALL, "--first-seed", str(seed), "--all")
    assert "eval/gradients/block3.layer.0.convShortcut.weight float64: ok" in out


def test_verify_json_is_the_report(capsys, seed):
    status, data = run_json(
        capsys, *SMALL, "--head", "classic", "--act", "silu", "--dropout", "0.2", "--first-seed", str(seed)
    )
    assert status == 0 and data["ok"] is True
    assert data["settings"]["first seed"] == seed and data["settings"]["gradients"] == "pooled"
    assert data["settings"]["candidate"] == "wrn_fast.WideResNet(10, 10, 1, 0.2, head='classic', act='silu')"
    assert set(data["rows"][0]) == {
        "quantity", "dtype", "tensors", "bad", "worst", "err_fast", "err_eager", "ratio", "ratio_nchw", "bound", "rule",
        "verdict",
    }  # fmt: skip
    assert {cell["verdict"] for cell in data["cells"]} == {parity.OK}
    assert set(data["machine"]) == {"device", "threads", "torch", "python", "date"}


MODELS = """
import wrn_fast, torch
def plain():
    from wrn_fast import reference
    return reference.WideResNet(10, 4, pool="global")
def fast():
    return wrn_fast.WideResNet(10, 4, pool="global")
def faulty():
    model = fast()
    model.block2.layer[0].bn2.eps = 1e-4
    return model
def other():
    return torch.nn.Linear(3, 3)
def number():
    return 3
made = fast()
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize("factory, status", [("fast", 0), ("made", 0), ("faulty", 1)])
def test_verify_a_model_against_another(capsys, models, factory, status):
    found, out, _ = run(capsys, *QUICK, "--model", f"my_models:{factory}", "--against", "my_models:plain")
    assert found == status
    assert ("out of bounds" in out) == bool(status)


def test_verify_a_model_of_the_user_is_accelerated(capsys, models, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": reference.WideResNet(10, 4, pool="global").state_dict()}, file)
    for more in ((), ("--checkpoint", str(file))):
        status, data = run_json(capsys, *QUICK, "--model", "my_models:plain", *more)
        assert status == 0 and data["settings"]["candidate"].startswith("accelerate(the reference(10, 4, 1")
    torch.save({"fc.weight": torch.ones(4, 64)}, file)
    status, _, err = run(capsys, *QUICK, "--model", "my_models:plain", "--checkpoint", str(file))
    assert status == 2 and "expected a state_dict of WideResNet, but it lacks block1.layer.0.bn1.bias" in err
    torch.save(reference.WideResNet(10, 5).state_dict(), file)
    status, _, err = run(capsys, *QUICK, "--model", "my_models:plain", "--checkpoint", str(file))
    assert status == 2 and "fc.weight is [5, 64] for [4, 64]" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--depth", "11"), "`depth`: expected 6n + 4"),
        (("--seeds", "7", "--dtype", "float32"), "`seeds`: expected at least 8"),
        (("--steps", "0"), "`steps`"),
        (("--device", "nonsense"), "`--device`: 'nonsense' cannot be used here"),
        (("--model", "my_models:other"), "expected at least one residual block that is recognised"),
        (("--depth", "16", "--checkpoint", "absent.pt"), "`--depth`: expected without --checkpoint"),
        (("--against", "my_models:fast"), "`--against`: expected beside --model"),
        (("--model", "my_models", "--against", "my_models:plain"), "`--model`: expected package.module:factory"),
        (("--model", "my_models:nothing", "--against", "my_models:plain"), "'my_models:nothing' cannot be found"),
        (("--model", "no_such_module:f", "--against", "my_models:plain"), "'no_such_module:f' cannot be found"),
        (("--model", "my_models:number", "--against", "my_models:plain"), "to make a torch.nn.Module, got int"),
        (("--checkpoint", "absent.pt"), "`--checkpoint` absent.pt: `src`: expected a file"),
        (("--write", "absent"), "`--write`: no folder absent"),
        (("--dtype", "int8"), "invalid choice"),
        (("--no-such-option",), "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_bad_use_is_status_2_and_says_what_was_wrong(capsys, models, words, message):
    status, out, err = run(capsys, *QUICK, *words)
    assert status == 2 and message in err and not out


# Checkpoints.


class Payload:
    """Pickles to a call: unpickling it without care writes the file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def weights(**options):
    state = reference.WideResNet(10, 10, **options).state_dict()
    state["block2.layer.0.bn1.running_var"].fill_(7.0)
    state["conv1.weight"].mul_(1.5)
    return state


def ddp(state):
    return {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}


@pytest.mark.parametrize("wrap", [dict, ddp], ids=["plain", "ddp"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_is_verified_as_it_is(capsys, tmp_path, zipped, wrap, monkeypatch):
    state, file = weights(), tmp_path / "weights.pt"
    torch.save(wrap(state), file, _use_new_zipfile_serialization=zipped)
    seen = []
    monkeypatch.setattr(
        command, "verify", lambda model, plain, **o: seen.append((model, o)) or verify(model, plain, **o)
    )
    status, _, err = run(capsys, *QUICK, "--checkpoint", str(file), "--head", "cosine")
    assert status == 0, err
    ((model, options),) = seen
    assert isinstance(model, wrn_fast.WideResNet) and options["randomize"] is False
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block2.layer.0.bn2.bias": None}, "block2.layer.0.bn2.bias"),
        ({"block2.layer.0.bn2.bias": torch.zeros(9)}, "block2.layer.0.bn2.bias"),
        ({"fc.weight": torch.full((10, 64), float("nan"))}, "fc.weight"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_a_checkpoint_that_does_not_fit_is_named(capsys, tmp_path, change, message):
    state = {k: v for k, v in (weights() | change).items() if v is not None}
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    status, _, err = run(capsys, *QUICK, "--checkpoint", str(file))
    assert status == 2 and err.startswith("wrn-fast verify: error: `--checkpoint`") and message in err
    assert len(err) < 500


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_refused_and_not_run(capsys, tmp_path, zipped, models):
    marker, file = tmp_path / "was run", tmp_path / "weights.pt"
    torch.save(weights() | {"conv1.weight": Payload(marker)}, file, _use_new_zipfile_serialization=zipped)
    for words in ((), ("--model", "my_models:plain")):
        status, _, err = run(capsys, *QUICK, *words, "--checkpoint", str(file))
        assert status == 2 and "`--checkpoint`" in err and not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload would not have run anyway"


def test_the_module_runs_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "wrn_fast.cli", "info", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["choices"]


# docs/parity.md


def test_the_page_is_written_from_its_data(capsys, tmp_path, monkeypatch):
    page = (({"depth": 10, "width": 1, "act": "silu"}, 1, 1, (torch.float64,), True),)
    monkeypatch.setattr(command, "PAGE", page)
    status, _, _ = run(capsys, "verify", "--seeds", "1", "--write", str(tmp_path))
    data = json.loads((tmp_path / "parity.json").read_text())
    page = (tmp_path / "parity.md").read_text()
    assert status == 0 and page == markdown(data)
    assert "cells" not in data["reports"][0] and "| eval: outputs | float64 |" in page


def test_the_committed_page_is_that_of_its_data_and_all_is_within_bounds():
    data = json.loads((ROOT / "docs" / "parity.json").read_text())
    assert (ROOT / "docs" / "parity.md").read_text() == markdown(data)
    for report in data["reports"]:
        assert report["ok"] and {row["verdict"] for row in report["rows"]} == {parity.OK}

"""Tuned tiles: the closed schema, where tables are looked up, damaged files, and the tuner that writes them."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from wrn_fast import activated, cache, tune, tuned
from wrn_fast.errors import WrnFastError
from wrn_fast.kernels import configs
from wrn_fast.kernels.configs import ARCHS
from wrn_fast.problem import ConvProblem

PROBLEM = ConvProblem("cuda", torch.bfloat16, torch.bfloat16, 128, 32, 32, 160, 160, 3, 3, 1, (1, 1, 1, 1))
TILE = {"rows": 64, "red": 32, "cols": [128, 32], "warps": 4, "stages": 3, "apply": False, "splits": 1, "box": False}
HEAD = dict.fromkeys(tuned.HEAD, "x") | {"gpu": "GPU", "arch": "sm_90", "sms": 132}


def row(problem=PROBLEM, **tile):
    return {**tuned.key("triton", "fprop", problem)._asdict(), "tile": TILE | tile, "us": 10.0, "runner_up_us": 11.5}


def document(*rows, **head):
    return {"format": tuned.FORMAT, "head": HEAD | head, "rows": list(rows)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache; nothing that was read before counts."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("WRN_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("WRN_FAST_TUNED_DIR", raising=False)
    tuned.table.cache_clear()
    yield cache.folder("tuned", create=True)
    tuned.table.cache_clear()


def lookup(problem=PROBLEM, gpu="GPU", arch="sm_90"):
    tuned.table.cache_clear()
    return tuned.lookup("triton", "fprop", problem, gpu, arch)


def test_a_row_serves_its_class_and_no_other(folder):
    cache.write(folder / "a.json", document(row()))
    assert lookup() == TILE
    assert lookup(PROBLEM._replace(N=150)) == TILE
    for change in ({"N": 8}, {"K": 320}, {"stride": 2}, {"act": "relu"}, {"dtype": torch.float16}, {"H": 16, "W": 16}):
        assert lookup(PROBLEM._replace(**change)) is None, change
    assert lookup(gpu="other", arch="sm_80") is None


@pytest.mark.parametrize("pixels, want", [(1, 0), (2, 1), (3, 2), (5, 2), (6, 3), (1448, 10), (1449, 11), (131072, 17)])
def test_pixels_count_by_the_nearest_power_of_two(pixels, want):
    assert (
        tuned.key("triton", "fprop", PROBLEM._replace(N=pixels, H=1, W=1, R=1, S=1, pad=(0,) * 4)).pixels_log2 == want
    )


def test_the_very_gpu_goes_before_its_architecture_and_the_chosen_folder_before_the_cache(
    folder, tmp_path, monkeypatch
):
    cache.write(folder / "a.json", document(row(rows=16), gpu="another of its kind"))
    assert lookup()["rows"] == 16
    cache.write(folder / "b.json", document(row(rows=32)))
    assert lookup()["rows"] == 32
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    monkeypatch.setenv("WRN_FAST_TUNED_DIR", str(chosen))
    assert lookup() is None
    cache.write(chosen / "c.json", document(row(rows=128)))
    assert lookup()["rows"] == 128


BREAKS = {
    "no object": lambda d: [],
    "another format": lambda d: d | {"format": 99},
    "a field too many": lambda d: d | {"extra": 1},
    "no head": lambda d: {"format": 1, "rows": []},
    "a head without gpu": lambda d: d | {"head": {k: v for k, v in d["head"].items() if k != "gpu"}},
    "rows that are no list": lambda d: d | {"rows": {}},
    "an unknown operator": lambda d: d["rows"][0].update(op="conv") or d,
    "an unknown backend": lambda d: d["rows"][0].update(backend="aten") or d,
    "a tile field too many": lambda d: d["rows"][0]["tile"].update(more=1) or d,
    "a width for two": lambda d: d["rows"][0]["tile"].update(cols=[160]) or d,
    "a bool for a number": lambda d: d["rows"][0]["tile"].update(rows=True) or d,
    "text for a number": lambda d: d["rows"][0].update(C="160") or d,
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_document_of_another_form_is_refused_and_left_out_with_a_warning(name, folder):
    broken = BREAKS[name](copy.deepcopy(document(row())))
    with pytest.raises(WrnFastError, match="expected"):
        tuned.validate(broken)
    cache.write(folder / "a.json", broken)
    with pytest.warns(UserWarning, match="a.json is left out"):
        assert lookup() is None


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_left_out(folder, share):
    whole = json.dumps(document(row())).encode()
    (folder / "a.json").write_bytes(whole[: int(share * len(whole))])
    with pytest.warns(UserWarning, match="a.json is left out"):
        assert lookup() is None


def test_every_packaged_row_is_legal():
    for path in sorted(Path(tuned.__file__).parent.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        arch = ARCHS[found["head"]["arch"]]
        for key, row in tuned.validate(found).items():
            stride, image = key.stride, (key.P * key.stride, key.Q * key.stride)
            problem = PROBLEM._replace(
                N=max(1, 2**key.pixels_log2 // (key.P * key.Q)), H=image[0], W=image[1], C=key.C, K=key.K, R=key.R,
                S=key.S, stride=stride, dtype=getattr(torch, key.dtype),
            )  # fmt: skip
            assert configs.illegal(configs.from_row(row["tile"]), key.op, problem, arch) is None, (path.name, key)


# The cache folder.


def test_a_folder_of_others_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("WRN_FAST_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    assert cache.folder("tuned", create=True) is None
    tmp_path.chmod(0o700)
    assert cache.folder("tuned", create=True) == tmp_path / "tuned"
    assert (tmp_path / "tuned").stat().st_mode & 0o777 == 0o700
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert cache.folder("link") is None
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert cache.folder("tuned") is None


def test_no_home_is_no_error(monkeypatch):
    for name in ("WRN_FAST_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache.folder("tuned") is None and cache.folder("tuned", create=True) is None


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    assert cache.write(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    assert not cache.write(tmp_path / "a.json", {"new": 1})
    assert cache.read(tmp_path / "a.json") == {"old": 1} and len(list(tmp_path.iterdir())) == 1
    assert not cache.write(tmp_path / "absent" / "a.json", {})


# The tuner, on a clock of its own.


def clock_for(best):
    """Seconds that grow with the distance from `best`."""

    def seconds(config):
        return 1.0 + sum(getattr(config, name) != value for name, value in best.items())

    return seconds


def test_the_search_finds_the_best_of_each_knob():
    arch = ARCHS["sm_90"]
    best = {"rows": 64, "red": 64, "stages": 2}
    ranking = tune.search("fprop", PROBLEM, arch, clock_for(best))
    assert {name: getattr(ranking[0][1], name) for name in best} == best
    assert [s for s, _ in ranking] == sorted(s for s, _ in ranking)
    assert all(configs.legal(config, "fprop", PROBLEM, arch) for _, config in ranking)


def test_a_tile_that_is_refused_is_never_the_best():
    refuse = lambda config: None if config.stages > 2 else 1.0 / config.stages
    ranking = tune.search("fprop", PROBLEM, ARCHS["sm_80"], refuse)
    assert not ranking or ranking[0][1].stages <= 2
    assert tune.search("fprop", PROBLEM, ARCHS["sm_80"], lambda config: None) == []


@pytest.fixture
def bench(folder, monkeypatch):
    """`tune.run` on a machine that has the GPU "GPU"; counts what is measured."""
    measured = []

    def measure(op, problem, index, clock):
        measured.append((op, problem))
        return tune.search(op, problem, ARCHS["sm_90"], clock_for({"rows": 64}))

    monkeypatch.setattr(tune, "unsupported", lambda device="cuda": None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "head", lambda index: dict(HEAD))
    monkeypatch.setattr(tune, "_measure", measure)
    return measured


def test_tuning_goes_on_where_it_stopped(bench, folder):
    tasks = tune.tasks(batch=8)
    activated._by_time(PROBLEM, PROBLEM, False, ("aten",))
    done = tune.run(tasks[:3])
    assert activated._by_time.cache_info().currsize == 0  # what was decided without these times is decided again
    assert (done["measured"], done["kept"]) == (3, 0) and len(bench) == 3
    again = tune.run(tasks)
    assert (again["measured"], again["kept"]) == (len(tasks) - 3, 3) and len(bench) == len(tasks)
    rows = tuned.validate(cache.read(Path(again["path"])))
    assert len(rows) == len(tasks) and all(row["tile"]["rows"] == 64 for row in rows.values())
    op, problem = tasks[0]
    assert tuned.lookup("triton", op, problem, "GPU", "sm_90")["rows"] == 64


def test_a_table_of_other_versions_or_a_damaged_one_is_made_anew(bench, folder, monkeypatch):
    tasks = tune.tasks(batch=8)[:2]
    path = Path(tune.run(tasks)["path"])
    path.write_text(path.read_text()[:50])
    assert tune.run(tasks)["measured"] == 2
    monkeypatch.setattr(tune, "head", lambda index: dict(HEAD) | {"triton": "another"})
    assert tune.run(tasks)["measured"] == 2


def test_the_time_limit_leaves_the_rest_for_another_run(bench):
    done = tune.run(tune.tasks(batch=8), limit_s=-1.0)
    assert done["measured"] == 0 and done["left"] > 10


def test_a_folder_that_cannot_be_written_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(cache, "write", lambda path, value: False)
    with pytest.raises(WrnFastError, match="WRN_FAST_TUNED_DIR"):
        tune.run(tune.tasks(batch=8))


def test_a_cpu_is_refused_with_the_backends_reason():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(WrnFastError, match="TRITON_INTERPRET"):
        tune.run([("fprop", PROBLEM._replace(device="cpu"))])


@pytest.mark.parametrize("word, arguments", [("depth", {"depth": 27}), ("width", {"width": 0}), ("batch", {"batch": 0}),
                                             ("dtype", {"dtype": "int8"})])  # fmt: skip
def test_bad_arguments_are_named(word, arguments):
    with pytest.raises(WrnFastError, match=f"`{word}`"):
        tune.tasks(**arguments)


def test_the_tasks_are_the_networks_layers_once_each():
    tasks = tune.tasks(28, 10, 128)
    keys = [tuned.key("triton", op, problem) for op, problem in tasks]
    assert len(set(keys)) == len(keys)
    shapes = {(op, p.C, p.K, p.stride) for op, p in tasks}
    for op in ("fprop", "wgrad"):
        assert {(op, 3, 16, 1), (op, 16, 160, 1), (op, 160, 320, 2), (op, 320, 320, 1), (op, 640, 640, 1)} <= shapes
    assert ("dgrad", 640, 640, 1) in shapes and ("dgrad", 3, 16, 1) not in shapes
    for _, problem in tasks:
        problem.check()

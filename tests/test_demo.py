"""The demo: what its readers accept and refuse, what it records, how it stops, and that it notices a wrong model."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import wrn_fast
from wrn_fast import parity, reference
from wrn_fast.demo import __main__ as command
from wrn_fast.demo import compare, data, files
from wrn_fast.demo.train import Trainer, train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--quick", "--epochs", "2", "--limit", "64", "--batch", "16", "--width", "1"]


@pytest.fixture
def images(seed):
    """uint8 images [12, 3, 32, 32] and their labels 0 to 9."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), np.arange(12) % 10


@pytest.fixture
def small_race(monkeypatch):
    monkeypatch.setitem(command.QUICK, "race", (10, 1))
    monkeypatch.setitem(command.QUICK, "runs", 2)


def binary(x, y, before=()):
    rows = [bytes([*before, label]) + image.tobytes() for image, label in zip(x, y)]
    return b"".join(rows)


def write_cifar10(folder, x, y, suffix, content):
    """Two images in each of the six files."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / f"{name}{suffix}").write_bytes(content(x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]))


def pickled(x, y, key=b"labels", **changes):
    """As NumPy 1 under Python 2 wrote it: protocol 2, numpy.core."""
    batch = {b"batch_label": b"training", key: y.tolist(), b"data": x.reshape(len(x), -1), b"filenames": [b"a.png"]}
    batch |= {name.encode(): value for name, value in changes.items()}
    return pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core")


def same(got, x, y, split):
    assert np.array_equal(np.concatenate([got.train_x, got.test_x]), x)
    assert np.array_equal(np.concatenate([got.train_y, got.test_y]), y)
    assert len(got.train_x) == split and got.train_y.dtype == np.int64


def test_cifar10_binary_in_a_folder_below(tmp_path, images):
    x, y = images
    write_cifar10(tmp_path / "cifar-10-batches-bin", x, y, ".bin", binary)
    got = files.read(tmp_path)
    assert (got.name, got.classes) == ("CIFAR-10", 10)
    same(got, x, y, 10)


def test_cifar10_python(tmp_path, images):
    x, y = images
    write_cifar10(tmp_path, x, y, "", pickled)
    same(files.read(tmp_path), x, y, 10)


def test_cifar100_takes_the_fine_label(tmp_path, images):
    x, y = images[0], images[1] * 11
    for name, part in (("train.bin", slice(0, 8)), ("test.bin", slice(8, 12))):
        (tmp_path / name).write_bytes(binary(x[part], y[part], before=(3,)))
    got = files.read(tmp_path)
    assert got.classes == 100
    same(got, x, y, 8)
    for path in tmp_path.iterdir():
        path.unlink()
    for name, part in (("train", slice(0, 8)), ("test", slice(8, 12))):
        (tmp_path / name).write_bytes(pickled(x[part], y[part], b"fine_labels", coarse_labels=[3] * 12))
    same(files.read(tmp_path), x, y, 8)


def test_svhn_calls_ten_the_digit_zero(tmp_path, images):
    from scipy.io import savemat

    x, y = images
    for name, part in (("train", slice(0, 8)), ("test", slice(8, 12))):
        labels = np.where(y[part] == 0, 10, y[part]).astype(np.uint8)[:, None]
        savemat(tmp_path / f"{name}_32x32.mat", {"X": x[part].transpose(2, 3, 1, 0), "y": labels})
    got = files.read(tmp_path)
    assert got.name == "SVHN"
    same(got, x, y, 8)


class Call:
    """A pickle that calls `function(*arguments)` where it is loaded without care."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    "attack",
    [
        lambda mark: Call(os.system, f"touch '{mark}'"),
        lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"),
        lambda mark: Call(np.ndarray.tofile, np.zeros(1), str(mark)),
        lambda mark: np.array([Call(os.system, f"touch '{mark}'")], dtype=object),
    ],
    ids=["system", "exec", "tofile", "object array"],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_calls_is_refused(tmp_path, images, attack, protocol):
    file, mark = tmp_path / "train", tmp_path / "mark"
    content = {b"fine_labels": [0], b"data": attack(mark)}
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    (tmp_path / "test").write_bytes(pickled(*images, b"fine_labels"))
    with pytest.raises(wrn_fast.WrnFastError, match=f"{file}: expected a pickled CIFAR batch"):
        files.read(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda x, y: pickled(x, y)[:-100], "expected a pickled CIFAR batch"),
        (lambda x, y: b"", "EOFError"),
        (lambda x, y: pickled(x.astype(np.float32), y), "'f4'"),
        (lambda x, y: pickled(x[:, :, :31], y), "expected `data` \\[N, 3072\\]"),
        (lambda x, y: pickled(x, y[:1]), "N labels"),
        (lambda x, y: pickled(x, y, b"fine_labels"), "KeyError: 'labels'"),
        (lambda x, y: pickled(x, y + 9), "expected labels 0 to 9"),
        (lambda x, y: pickle.dumps([1, 2], protocol=2), "AttributeError"),
    ],
)
def test_a_damaged_python_file_is_named(tmp_path, images, spoil, told):
    x, y = images
    write_cifar10(tmp_path, x, y, "", pickled)
    (tmp_path / "data_batch_3").write_bytes(spoil(x[:2], y[:2]))
    with pytest.raises(wrn_fast.WrnFastError, match=told) as error:
        files.read(tmp_path)
    assert str(tmp_path / "data_batch_3") in str(error.value)


def test_damaged_other_files_are_named(tmp_path, images):
    x, y = images
    write_cifar10(tmp_path, x, y, ".bin", binary)
    file = tmp_path / "test_batch.bin"
    for content, told in (
        (file.read_bytes()[:-1], "multiple of 3073 bytes"),
        (b"", "no image"),
        (b"\xff" * 3073, "0 to 9"),
    ):
        file.write_bytes(content)
        with pytest.raises(wrn_fast.WrnFastError, match=told) as error:
            files.read(tmp_path)
        assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(wrn_fast.WrnFastError, match=r"belongs to CIFAR-10, but test_batch\.bin is missing"):
        files.read(tmp_path)


def test_damaged_svhn_is_named(tmp_path):
    from scipy.io import savemat

    train, test = tmp_path / "train_32x32.mat", tmp_path / "test_32x32.mat"
    test.write_bytes(b"")
    train.write_bytes(b"MATLAB?" * 40)
    with pytest.raises(wrn_fast.WrnFastError, match=rf"{train}: expected a MATLAB 5 file"):
        files.read(tmp_path)
    savemat(train, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1), np.uint8)})
    with pytest.raises(wrn_fast.WrnFastError, match=rf"{train}: expected X uint8 \[32, 32, 3, N\] and y \[N, 1\], got"):
        files.read(tmp_path)


@pytest.mark.parametrize("package, what", [("scipy", "svhn"), ("sklearn", "digits")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, what):
    find = files.importlib.util.find_spec
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(wrn_fast.WrnFastError, match="pip install"):
        if what == "svhn":
            files.read_svhn(tmp_path / "train_32x32.mat")
        else:
            data.load(None, limit=0, seed=0)


def test_the_digits_are_split_and_normalised(seed):
    split = data.load(None, limit=0, seed=seed)
    assert len(split.train_x) == 1438 and len(split.test_x) == 359 and split.train_x.shape[1:] == (3, 32, 32)
    assert split.train_x.is_contiguous(memory_format=torch.channels_last)
    again, other = data.load(None, limit=0, seed=seed), data.load(None, limit=0, seed=seed + 1)
    assert torch.equal(split.train_x, again.train_x) and not torch.equal(split.train_y, other.train_y)
    assert split.train_y.bincount().add(split.test_y.bincount()).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    x = split.train_x.double()
    centred = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    # x carries four roundings: /255, the mean, the difference, the quotient.
    assert parity.error(split.train_x, centred) <= 4 * parity.UNIT[torch.float32]


def test_a_limit_draws_some_images(tmp_path, images, seed):
    x, y = images
    write_cifar10(tmp_path, x, y, ".bin", binary)
    split = data.load(str(tmp_path), limit=6, seed=seed)
    assert len(split.train_x) == 6 and len(split.test_x) == 1
    assert len(set(split.train_y.tolist())) == 6 and set(split.train_y.tolist()) <= set(y[:10].tolist())


def test_both_models_see_the_same_batches(seed):
    """Two equal models must end equal, bit for bit, and must have learnt."""
    split = data.load(None, limit=96, seed=seed)
    models = {}
    for name in ("one", "two"):
        torch.manual_seed(seed)
        models[name] = reference.classic(10, 10, 1)
    curves = {name: [] for name in models}
    ticks = []
    for name, epoch in train(models, split, epochs=3, batch=20, lr=0.1, seed=seed, tick=lambda: ticks.append(1)):
        curves[name].append((epoch.loss, epoch.accuracy))
    assert curves["one"] == curves["two"] and len(curves["one"]) == 3 and len(ticks) == 2 * 3 * 4
    assert curves["one"][-1][0] < curves["one"][0][0]
    assert all(torch.equal(p, q) for p, q in zip(models["one"].parameters(), models["two"].parameters()))


def test_the_race_is_run_in_turn():
    calls = []
    speed = compare.Speed("task", "model", 1)
    compare.race(
        speed,
        lambda: calls.append("eager"),
        lambda: calls.append("fast"),
        runs=4,
        device=torch.device("cpu"),
        tick=lambda: None,
    )
    assert len(speed.eager) == len(speed.fast) == 4, "the first call of each is not measured"
    assert [calls[i : i + 2] for i in range(0, 10, 2)] == [["fast", "eager"], ["eager", "fast"]] * 2 + [
        ["fast", "eager"]
    ]
    assert min(speed.eager) > 0 and speed.ratio > 0


def test_weights_that_do_not_fit_do_not_move():
    with pytest.raises(RuntimeError, match="size mismatch"):
        compare.move(reference.classic(10, 10, 1), wrn_fast.classic(10, 10, 2))
    with pytest.raises(RuntimeError, match="Missing key"):
        compare.move(reference.classic(10, 10, 1), wrn_fast.classic(16, 10, 1))


def test_the_demo_records_what_it_did(tmp_path, small_race, capsys, seed):
    assert command.main([*TINY, "--out", str(tmp_path), "--seed", str(seed % 1000)]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["complete"] and record["machine"]["torch"] == torch.__version__
    assert record["data"]["train"] == 64 and record["data"]["test"] == 16
    assert {name: len(curve) for name, curve in record["curves"].items()} == {"reference": 2, "drop-in": 2}
    assert [a["images"] for a in record["agreements"]] == [16, 16, 8]
    for a in record["agreements"]:
        assert a["verdict"] == parity.OK and 0 <= a["err_fast"] <= a["bound"] and a["tensors"] > 30
        assert a["same_predictions"] == a["images"]
    assert [s["task"] for s in record["speeds"]] == ["inference", "training step"]
    assert all(len(s["eager"]) == len(s["fast"]) == 2 and s["ratio"] > 0 for s in record["speeds"])
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for word in ("group 1: fprop ", "reference", "drop-in", "float64", "ratio", "demo.json", "demo.png"):
        assert word in said


def test_the_demo_notices_a_wrong_model(tmp_path, small_race, monkeypatch, capsys):
    class Wrong(wrn_fast.WideResNet):
        def features(self, x):
            y = super().features(x)
            return y if self.training else y * (1 + 2.0**-18)

    monkeypatch.setattr(wrn_fast, "classic", lambda *a: Wrong(*a, head="classic", dropout_in_eval=False))
    assert command.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "The models disagree" in capsys.readouterr().out
    assert {a["verdict"] for a in json.loads((tmp_path / "demo.json").read_text())["agreements"]} == {
        parity.OUT_OF_BOUNDS
    }


def test_an_interrupted_demo_keeps_what_it_has(tmp_path, small_race, monkeypatch, capsys):
    """Stopped in the second epoch of the second model."""
    step, count = Trainer.step, []

    def stop(self, x, y):
        count.append(1)
        if len(count) == 15:
            raise KeyboardInterrupt
        return step(self, x, y)

    monkeypatch.setattr(Trainer, "step", stop)
    assert command.main([*TINY, "--out", str(tmp_path)]) == 130
    record = json.loads((tmp_path / "demo.json").read_text())
    assert not record["complete"]
    assert {name: len(curve) for name, curve in record["curves"].items()} == {"reference": 1, "drop-in": 2}
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 epochs of both models" in said and "0 of 3 comparisons" in said and (tmp_path / "demo.png").exists()


def test_ctrl_c_stops_the_real_thing(tmp_path):
    demo = subprocess.Popen(
        [sys.executable, "-m", "wrn_fast.demo", *TINY, "--epochs", "1000", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background job ignores the signal, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in demo.stdout:
            if "images to train on" in line:
                break
        os.kill(demo.pid, signal.SIGINT)
        said, _ = demo.communicate(timeout=120)
    finally:
        demo.kill()
    assert demo.returncode == 130, said
    assert "stopped" in said and "partial" in said and "Traceback" not in said
    assert json.loads((tmp_path / "demo.json").read_text())["complete"] is False


@pytest.mark.parametrize(
    "words, told",
    [
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--batch", "65", "--limit", "64"], "--batch: expected at most the number of training images, 64, got 65"),
        (["--limit", "20", "--batch", "4"], "--limit: expected at least 32"),
        (["--depth", "12"], "`depth`: expected 6n + 4"),
        (["--width", "0"], "`widen_factor`"),
        (["--data", "/no/such/folder"], "/no/such/folder, which does not exist"),
        (["--data", str(ROOT / "tests")], "found none of them"),
        (["--data", __file__], "unpack archives first"),
        (["--out", __file__], "--out: expected a folder"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, words, told):
    assert command.main(["--quick", "--out", str(tmp_path), *words]) == 2
    assert told in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "demo.json").exists()


def test_cuda_without_a_gpu_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device: expected cpu" in capsys.readouterr().out

"""Files that someone made to harm: each is refused by a WrnFastError before it runs code or eats memory."""

import collections
import contextlib
import gc
import io
import pickle
import struct
import time
import zipfile

import pytest
import torch
from families import family_x

from wrn_fast import WrnFastError
from wrn_fast.convert import load_checkpoint
from wrn_fast.convert.archive import MAX_ENTRIES

STATE = family_x.WideResNet(10, 10, 1).state_dict()
RAN = []


def saved(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def rezipped(data, compression=zipfile.ZIP_STORED, extra=(), change=lambda name, content: (name, content)):
    """The archive written again, entries changed or added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
        for name, content in extra:
            new.writestr(name, content)
    return out.getvalue()


def with_pickle(payload):
    return rezipped(saved(STATE), change=lambda n, c: (n, payload if n.endswith("data.pkl") else c))


class Reduce:
    def __reduce__(self):
        return RAN.append, ("ran",)


def changed(**tensors):
    """The state with some tensors replaced."""
    names = {"fc": "fc.weight", "var": "bn1.running_var", "bias": "fc.bias"}
    return {**STATE, **{names[k]: v for k, v in tensors.items()}}


def without(start):
    return {k: v for k, v in STATE.items() if not k.startswith(start)}


def nan_in(value):
    t = STATE["fc.weight"].clone()
    t[3, 5] = value
    return t


def overlapping():
    memory = torch.zeros(640)
    return changed(fc=memory.view(10, 64), bias=memory[630:])


def cyclic():
    loop = {}
    loop["state_dict"] = loop
    return loop


def bomb():
    zeros = bytes(64 << 20)
    return rezipped(saved(STATE), zipfile.ZIP_DEFLATED, [("archive/data/999", zeros)])


def lying_size():
    """A stored entry whose size in the central directory is 64 GiB."""
    data = bytearray(saved(STATE))
    at = data.rfind(b"PK\x01\x02")
    struct.pack_into("<II", data, at + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(data)


def flipped_bit():
    data = bytearray(saved(STATE))
    at = data.find(STATE["fc.weight"].numpy().tobytes()[:64])
    data[at + 5] ^= 1
    return bytes(data)


def legacy(claim=None):
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    numel = STATE["fc.weight"].numel()
    old = pickle.BININT2 + struct.pack("<H", numel)
    return data if claim is None else data.replace(old, pickle.BININT + struct.pack("<i", claim), 1)


class Crafted:
    """A tensor that claims an offset and a shape of a storage of four numbers."""

    def __init__(self, offset, shape):
        self.offset, self.shape = offset, shape

    def __reduce__(self):
        storage = torch.arange(4.0)._typed_storage()
        stride = (self.shape[1], 1)
        arguments = (storage, self.offset, self.shape, stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def crafted(offset, shape):
    return saved({**STATE, "fc.weight": Crafted(offset, shape)})


WHOLE = saved(STATE)
MANY = [(f"archive/data/x{i}", b"") for i in range(MAX_ENTRIES)]
FILES = {
    "a payload in the pickle": (lambda: with_pickle(pickle.dumps(Reduce())), r"not one that holds tensors only"),
    "a global call": (lambda: with_pickle(b"cos\nsystem\n(S'true'\ntR."), r"not one that holds tensors only"),
    "a nested pickle": (
        lambda: with_pickle(pickle.dumps([pickle.dumps(Reduce()), Reduce()])),
        r"not one that holds tensors only",
    ),
    "a bare pickle": (lambda: pickle.dumps(Reduce()), r"a bare pickle"),
    "an empty file": (lambda: b"", r"an empty file"),
    "a text file": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", r"starts with b'version"),
    "half a file": (lambda: WHOLE[: len(WHOLE) // 2], r"damaged"),
    "the last byte missing": (lambda: WHOLE[:-1], r"damaged"),
    "a deflate bomb": (bomb, r"a compressed one"),
    "too many entries": (
        lambda: rezipped(WHOLE, extra=MANY),
        r"at most 10000 entries",
    ),
    "an entry outside": (lambda: rezipped(WHOLE, extra=[("archive/../../x", b"")]), r"outside itself"),
    "an absolute entry": (lambda: rezipped(WHOLE, extra=[("/etc/x", b"")]), r"outside itself"),
    "sizes beyond the file": (lying_size, r"claims \d+ bytes in a file of"),
    "a flipped bit": (flipped_bit, r"the checksum of .* is wrong"),
    "a tensor before its storage": (lambda: crafted(-1, (1, 2)), r"cannot be read: .*offset"),
    "a tensor beyond its storage": (lambda: crafted(0, (10, 64)), r"cannot be read: .*(out of bounds|resize)"),
    "an old file that claims more than it has": (lambda: legacy(2**31 - 1), r"claims \d+ elements"),
}
STATES = {
    "2^40 elements on 4 bytes": (lambda: changed(fc=torch.zeros(1).expand(2**20, 2**20)), r"in a storage of 4 bytes"),
    "two keys on one storage": (
        lambda: changed(var=STATE["bn1.running_mean"]),
        r"'bn1.running_mean' and 'bn1.running_var' are the same memory",
    ),
    "overlapping views": (overlapping, r"'fc.weight' and 'fc.bias' are the same memory"),
    "int8": (lambda: changed(fc=torch.zeros(10, 64, dtype=torch.int8)), r"real floating dtype, got torch.int8"),
    "complex": (lambda: changed(fc=torch.zeros(10, 64, dtype=torch.complex64)), r"got torch.complex64"),
    "sparse": (lambda: changed(fc=torch.zeros(10, 64).to_sparse()), r"dense tensor"),
    "meta": (lambda: changed(fc=torch.zeros(10, 64, device="meta")), r"on meta"),
    "NaN": (lambda: changed(fc=nan_in(float("nan"))), r"finite values"),
    "infinity": (lambda: changed(fc=nan_in(float("inf"))), r"finite values"),
    "a negative variance": (lambda: changed(var=torch.full((64,), -1e-3)), r"variances of at least 0"),
    "a wrong shape": (lambda: changed(fc=torch.zeros(10, 65)), r"expected shape .*10, 64.* got .*10, 65"),
    "a missing key": (
        lambda: without("block2.layer.0.bn2.running_var"),
        r"missing .*block2.layer.0.bn2.running_var",
    ),
    "a missing block": (
        lambda: without("block1."),
        r"names of a known family",
    ),
    "a key that is no text": (lambda: {**STATE, 7: torch.zeros(1)}, r"names as keys, got 7"),
    "a dict in itself": (cyclic, r"contains itself"),
    "no dict": (lambda: [STATE], r"got list"),
    "no tensors": (lambda: {"state_dict": {"a": 1}}, r"found none"),
}


# For any file: twice its size and as much again as the reader itself needs, and seconds.
SPARE_BYTES, SECONDS = 64 << 20, 5.0


def resident(field):
    """Bytes of this process now (VmRSS) or at most since `forget_peak` (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def forget_peak():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system does not let a process forget its peak")


@contextlib.contextmanager
def within_limits(size):
    """No more memory and time than a file of `size` bytes may cost."""
    gc.collect()
    forget_peak()
    before, begin = resident("VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - begin <= SECONDS
    assert resident("VmHWM") - before <= 2 * size + SPARE_BYTES


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused(name, tmp_path):
    make, message = FILES[name]
    data = make()
    (tmp_path / "weights.pt").write_bytes(data)
    RAN.clear()
    with within_limits(len(data)), pytest.raises(WrnFastError, match=f"`src`: .*{message}"):
        load_checkpoint(tmp_path / "weights.pt")
    assert not RAN


def test_the_limit_of_memory_is_alive():
    with pytest.raises(AssertionError), within_limits(0):
        torch.ones(SPARE_BYTES // 2)


@pytest.mark.parametrize("name", STATES)
def test_a_hostile_dict_is_refused(name):
    make, message = STATES[name]
    with pytest.raises(WrnFastError, match=f"`src`: .*{message}"):
        load_checkpoint(make())


@pytest.mark.parametrize("name", ["2^40 elements on 4 bytes", "two keys on one storage", "complex", "NaN"])
def test_a_hostile_dict_in_a_file_is_refused(name):
    make, message = STATES[name]
    data = saved(make())
    with within_limits(len(data)), pytest.raises(WrnFastError, match=f"`src`: .*{message}"):
        load_checkpoint(data)


def test_the_same_files_without_the_harm_load():
    for data in (WHOLE, rezipped(WHOLE), legacy()):
        net, _ = load_checkpoint(data)
        assert torch.equal(net.fc.weight, STATE["fc.weight"])


def test_keys_too_many_are_left_and_named():
    net, report = load_checkpoint({**STATE, "evil": torch.zeros(3), "block2.layer.0.bn2.extra": torch.zeros(3)})
    assert set(report.left) == {"evil", "block2.layer.0.bn2.extra"}
    assert torch.equal(net.fc.weight, STATE["fc.weight"])

"""Where a process finds itself: no home, no room, no permission, odd threads, strict interpreters."""

from __future__ import annotations

import os
import stat

import pytest
from injection.process import CALL, finish, run, start

from wrn_fast import cache

STORE = """
from wrn_fast import cache
folder = cache.folder("tuned", create=True)
print(folder is not None and cache.write(folder / "a.json", {"rows": list(range(2000))}))
"""
# Caches of a Triton kernel and of tuned rows are these files; nothing else is kept.
DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "nearly whole": lambda data: data[: len(data) * 99 // 100],
    "garbage": lambda data: bytes(range(256)) * 4,
    "nested beyond measure": lambda data: b"[" * 100_000,
    "another type": lambda data: b"[1, 2]",
    "a pickle": lambda data: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
}

as_root = pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() == 0, reason="root may write anywhere")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_no_cache(damage, tmp_path, monkeypatch):
    """Read as absent, then written anew."""
    from wrn_fast import tuned

    monkeypatch.setenv("WRN_FAST_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    folder = cache.folder("tuned", create=True)
    file = folder / "a.json"
    assert cache.write(file, {"rows": list(range(100))})
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    found = cache.read(file)
    assert found is None or found == [1, 2]
    with pytest.raises(ValueError):
        tuned.validate(found)
    assert cache.write(file, {"rows": [1]}) and cache.read(file) == {"rows": [1]}


def test_what_is_kept_is_private_and_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("WRN_FAST_CACHE_DIR", str(tmp_path / "new"))
    folder = cache.folder("tuned", create=True)
    assert cache.write(folder / "a.json", {})
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a.json").stat().st_mode) == 0o600


@as_root
def test_a_read_only_home(tmp_path):
    tmp_path.chmod(0o500)
    drop = ("WRN_FAST_CACHE_DIR", "XDG_CACHE_HOME")
    assert run(STORE, HOME=str(tmp_path), drop=drop).strip() == "False"
    assert run(CALL, HOME=str(tmp_path), drop=drop).strip() == "right"


def test_a_home_that_is_a_file(tmp_path):
    """What a container without a user has: a home that no folder can be made in, for root too."""
    home = tmp_path / "home"
    home.write_text("")
    drop = ("WRN_FAST_CACHE_DIR", "XDG_CACHE_HOME")
    assert run(STORE, HOME=str(home), drop=drop).strip() == "False"
    assert run(CALL, HOME=str(home), drop=drop).strip() == "right"


def test_no_home_and_no_user_name(tmp_path):
    """`~` cannot be expanded: the password database has no such user either."""
    drop = ("HOME", "USER", "LOGNAME", "WRN_FAST_CACHE_DIR", "XDG_CACHE_HOME")
    nobody = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    assert run(nobody + STORE, drop=drop).strip() == "False"
    assert run(nobody + CALL, drop=drop, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).strip() == "right"


def test_a_full_disk(tmp_path):
    """No file may grow beyond 1 kB: what was there stays, and nothing half is left."""
    small = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
    )
    where = {"WRN_FAST_CACHE_DIR": str(tmp_path)}
    tmp_path.chmod(0o700)
    assert run(STORE, **where).strip() == "True"
    before = (tmp_path / "tuned" / "a.json").read_bytes()
    assert run(small + STORE, **where).strip() == "False"
    assert (tmp_path / "tuned" / "a.json").read_bytes() == before
    assert [file.name for file in (tmp_path / "tuned").iterdir()] == ["a.json"]
    assert run(small + CALL, **where).strip() == "right"
    assert run(STORE, **where).strip() == "True"


def test_nowhere_to_write_temporary_files(tmp_path):
    """Every folder for temporary files is absent."""
    missing = str(tmp_path / "absent")
    code = "import tempfile\ntempfile._candidate_tempdir_list = lambda: []\n" + CALL
    assert run(code, TMPDIR=missing, TMP=missing, TEMP=missing).strip() == "right"


def test_two_cold_processes_at_once(tmp_path):
    """Both write the same files; whoever comes second, what is there is whole."""
    tmp_path.chmod(0o700)
    code = (
        "import json\nfrom wrn_fast import cache\n"
        "folder = cache.folder('tuned', create=True)\n"
        "for i in range(50):\n"
        "    value = {'rows': list(range(i, 3000))}\n"
        "    assert cache.write(folder / f'{i}.json', value)\n"
        "    assert cache.read(folder / f'{i}.json') == value\n"
    )
    both = [start(code, WRN_FAST_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for process in both:
        finish(process)
    assert len(list((tmp_path / "tuned").iterdir())) == 50


@pytest.mark.parametrize("threads", ["0", "1", "999", "-3", "many"])
def test_any_number_of_threads(threads):
    assert run(CALL, OMP_NUM_THREADS=threads).strip().splitlines()[-1] == "right"


def test_more_threads_than_the_machine_has():
    code = CALL.replace("y = wrn", "torch.set_num_threads(999)\nx = x.repeat(16, 1, 2, 2)\ny = wrn")
    assert run(code).strip() == "right"


@pytest.mark.parametrize("option", ["-O", "-OO", "-Werror", "-I", "-Xdev"])
def test_strict_interpreters(option):
    """-I ignores PYTHONPATH, as an installed script does."""
    ours = ("wrn_fast", "injection")
    code = "import sys; sys.path.insert(0, '.')\n"
    if option == "-Werror":
        # torch's own import warns in some versions; ours may not.
        code += (
            "import warnings\nwith warnings.catch_warnings():\n    warnings.simplefilter('ignore')\n    import torch\n"
        )
    if option == "-Xdev":
        code += "import warnings, torch\nwarnings.resetwarnings()\n"
        code += "".join(f"warnings.filterwarnings('error', module={name!r})\n" for name in ours)
    judged = 'wrn_fast.parity.error(y, want) <= wrn_fast.parity.WINOGRAD["f4"]'
    # -O drops assertions.
    call = CALL.replace(f'assert {judged}, "wrong"', f'{judged} or sys.exit("wrong")')
    assert call != CALL
    assert run(code + call, options=(option,)).strip() == "right"


def test_no_pickle_no_shell_no_eval_in_the_package():
    """What could run a planted file's code. The archive reader names pickle to refuse what it finds in one."""
    from injection.process import ROOT

    allowed = {("convert/archive.py", "pickle")}
    words = ("pickle.load", "shell=True", "os.system", "eval(", "exec(", "marshal", "shelve", "urllib", "http.client")
    for file in sorted((ROOT / "wrn_fast").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for word in words:
            name = str(file.relative_to(ROOT / "wrn_fast"))
            found = word in text and f".{word}" not in text and f"model.{word}" not in text
            assert not found or (name, word.split(".")[0]) in allowed, f"{name}: {word}"

"""Which kernels passed their self-check on this machine: small files that a change of GPU, version or source leaves.

Only what passed is kept; a failure is looked at again in each process.
"""

from __future__ import annotations

from collections.abc import Callable

from wrn_fast import cache

_OK = "ok"


def once(seen: dict[str, str | None], key: str, file: str, name: str, check: Callable[[], str | None]) -> str | None:
    """What `check` says against the kernel `name`, or None: asked once a process, and never again once it passed.

    Args:
        seen: the answers of this process, by `key`.
        key: the kernel and the device.
        file: in the cache, of everything that must be as it was.
        name: the kernel.
        check: runs it.
    """
    if key not in seen:
        known = _read(file)
        seen[key] = None if name in known else check()
        if seen[key] is None and name not in known:
            _add(file, name)
    return seen[key]


def _read(file: str) -> dict[str, str]:
    """What passed before; a file of another form counts as none."""
    folder = cache.folder("selfcheck")
    found = cache.read(folder / file) if folder else None
    if not isinstance(found, dict) or not all(v == _OK for v in found.values()):
        return {}
    return found


def _add(file: str, name: str) -> None:
    folder = cache.folder("selfcheck", create=True)
    if folder is not None:
        cache.write(folder / file, {**_read(file), name: _OK})

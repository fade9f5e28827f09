"""Runs pytest in forks of a process that has imported torch: importing it again would be most of a fault's time.

Run as a script in the copy of the checkout. Requests are lines of JSON on standard input: `arguments` of pytest,
`environment`, the `log` file of what it says, `seconds` at most. Each is answered by its exit status on a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

TIMED_OUT = 124


def child(request: dict[str, Any]) -> None:
    """The fork: never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    status = 3  # pytest's own for an internal error
    try:
        import pytest

        status = int(pytest.main(request["arguments"]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int, seconds: float) -> int:
    """Its exit status, negative for a signal; what takes too long is killed with all that it started."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return TIMED_OUT


def main() -> None:
    """Until standard input ends."""
    # The folder of this script would come before the copy's own modules.
    sys.path[0] = os.getcwd()
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            child(request)
        print(wait(process, request["seconds"]), flush=True)


if __name__ == "__main__":
    main()

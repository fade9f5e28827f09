import fcntl
import os

import pytest
from cuda import host_run


@pytest.fixture(scope="session")
def tool(tmp_path_factory):
    """The host-run tool with every compiled kernel; the processes of xdist share one build."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "host_run"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "host_run.so"
        return host_run.Tool(str(library)) if library.exists() else host_run.build(folder)

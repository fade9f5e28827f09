import fcntl
import os

import pytest
from cuda import host_run


def shared_build(tmp_path_factory, name, flags=()):
    """The host-run tool in a folder of that name, which the processes of xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "host_run.so"
        return host_run.Tool(str(library)) if library.exists() else host_run.build(folder, flags=flags)


@pytest.fixture(scope="session")
def tool(tmp_path_factory):
    """The host-run tool with every compiled kernel."""
    return shared_build(tmp_path_factory, "host_run")


@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """The host-run tool with the three kernels that compile fastest."""
    return shared_build(tmp_path_factory, "host_run_narrow", host_run.NARROW)

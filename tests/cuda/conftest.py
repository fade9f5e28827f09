import pytest
from cuda import host_run


@pytest.fixture(scope="session")
def tool(tmp_path_factory):
    """The host-run tool with every compiled kernel."""
    return host_run.build(tmp_path_factory.mktemp("host_run"))

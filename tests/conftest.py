"""Seeds, rotation of long lists, threads. `--seed N` replays a run; `--all-cases` runs every case of a rotated list."""

import importlib.util
import os
import random

# Before torch is imported: no compiled code from an earlier run, one OpenMP thread in each of several processes.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("wrn_fast")
    group.addoption("--seed", type=int, default=None, help="replay the seed that an earlier run printed")
    group.addoption("--all-cases", action="store_true", help="every case of the tests marked rotate(count)")
    group.addoption("--fuzz-scale", type=float, default=1.0, help="so many times the fuzzed cases of a usual run")
    group.addoption("--soak", type=float, default=60.0, help="seconds of test_soak.py")


def pytest_configure(config):
    # The processes of xdist take the first one's, so that all collect the same cases.
    if hasattr(config, "workerinput"):
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"wrn_fast: --seed {config.option.seed}"


def pytest_terminal_summary(terminalreporter, config):
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"replay with --seed {config.option.seed}")


def pytest_collection_modifyitems(config, items):
    skip_gpu, skip_native = no_gpu_reason(items), no_extension_reason()
    usual = float(config.getini("timeout") or 0) if config.pluginmanager.hasplugin("timeout") else 0
    longer = usual * config.getoption("--fuzz-scale") + config.getoption("--soak")
    for item in items:
        # A run that was asked to be longer has the time for it.
        if usual and longer > 2 * usual and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(longer))
        if skip_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=skip_gpu))
        if skip_native and item.get_closest_marker("native"):
            item.add_marker(pytest.mark.skip(reason=skip_native))
    rotate(config, items)


def rotate(config, items):
    """Keeps `count` cases of each test marked rotate(count), the ones that this run's seed draws."""
    if config.option.all_cases:
        return
    groups = {}
    for item in items:
        marker = item.get_closest_marker("rotate")
        if marker:
            groups.setdefault((item.parent.nodeid, item.originalname), (marker.args[0], []))[1].append(item)
    dropped = set()
    for name, (count, cases) in groups.items():
        if len(cases) > count:
            drawn = random.Random(f"{config.option.seed} {name}").sample(cases, count)
            dropped.update(item for item in cases if item not in drawn)
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def no_gpu_reason(items):
    if not any(item.get_closest_marker("gpu") for item in items):
        return None
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU"


def no_extension_reason():
    if importlib.util.find_spec("wrn_fast._cpu"):
        return None
    from wrn_fast._build import missing_extension_reason

    return missing_extension_reason("_cpu")


@pytest.fixture
def seed(request):
    """A seed that differs from run to run and from test to test; the header prints what replays it."""
    return random.Random(f"{request.config.option.seed} {request.node.nodeid}").randrange(2**31)


@pytest.fixture(autouse=True)
def seeded(seed):
    """Every test draws from generators seeded by `seed`, whatever ran before it."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)

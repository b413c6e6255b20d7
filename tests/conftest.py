"""Settings of the whole test run."""

import collections
import gc
import importlib.metadata
import os
import shutil
import tempfile

# Eight CPU devices for every test, before JAX starts; single-device tests use the first.
# The programs are small and run a few times: compiling them well, or in parts for many threads,
# takes longer than that saves. The last flag more than halves it; versions that do not know it
# abort.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10."))
        else "",
    ]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A program that several tests compile is compiled once; in the processes that they start, and in
# the workers of pytest-xdist, too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="jax_programs_")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# Little of what programs are traced to is garbage: looking for it as often as Python does takes a
# twentieth of the time.
gc.set_threshold(100_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="how often tests/faults kill training")
    parser.addoption(
        "--whole-contract",
        action="store_true",
        help="run also what takes long and shows little that other tests do not",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a file's tests to one worker: what a fixture made for a file is made once."""
    if config.option.dist != "load":  # not what `-n` alone is
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "lives" if file.endswith(("test_disk.py", "test_kill.py")) else file

    config.option.loadscopereorder = False  # or some that take longest come last, to one worker
    return ByFile(config, log)


def pytest_configure(config):
    config.addinivalue_line("markers", "one_in(n): of its cases, unless --whole-contract is given")


def pytest_collection_modifyitems(config, items):
    """Leave out most cases of the tests that say so: similar ones, a few of which show enough."""
    if config.option.whole_contract:
        return
    seen, left_out = collections.Counter(), []
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            test = item.path, item.originalname
            if seen[test] % marker.args[0]:
                left_out.append(item)
            seen[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_unconfigure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")  # so that it comes before what is made once for a module
def whole_contract(request):
    """Skip the test unless it is asked for."""
    if not request.config.getoption("--whole-contract"):
        pytest.skip("left out unless --whole-contract is given")


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


@pytest.fixture(autouse=True)
def strict_jax(request):
    """Make silent rank promotion an error, in the library and in its tests."""
    strict = not {"examples", "in_t5x"} & set(request.path.parts)  # Flax and T5X promote
    with jax.numpy_rank_promotion("raise" if strict else "allow"):
        yield

"""Settings of the whole test run."""

import os

# Eight CPU devices for every test, before JAX starts; single-device tests use the first.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_jax(request):
    """Make silent rank promotion an error, in the library and in its tests."""
    strict = not {"examples", "in_t5x"} & set(request.path.parts)  # Flax and T5X promote
    with jax.numpy_rank_promotion("raise" if strict else "allow"):
        yield

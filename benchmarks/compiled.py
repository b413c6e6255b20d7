"""Exact costs of a compiled step: FLOPs, bytes, memory. No timing."""

import contextlib
import threading
import time
from typing import Any, NamedTuple
from unittest import mock

import jax

# Unrolling changes `jax.lax`, so only one thread traces at a time; compiling may go on in others.
_TRACING = threading.Lock()


class Cost(NamedTuple):
    """What the compiler says about one step on one device.

    Attributes:
      flops: floating point operations, loops counted as often as they run.
      bytes_accessed: bytes read and written, likewise.
      temporary_bytes: memory beside arguments and results at the peak.
      compile_seconds: wall-clock of lowering and compiling.
    """

    flops: float
    bytes_accessed: float
    temporary_bytes: int
    compile_seconds: float


def cost(step: Any, *args: Any, **jit_options: Any) -> tuple[Cost, Any]:
    """Compile `step` for `args` and return its cost and the compiled step."""
    compiled, seconds = timed_compilation(step, *args, **jit_options)
    counted = compiled
    # Cost analysis counts a loop's body once. Count on a program without loops; its memory and its
    # compile time are not the step's, so those come from the real one. What is left is the norm's
    # loop on CPU, which runs once but for an extreme gradient.
    without, loops = _without_loops(step, args, jit_options)
    if loops:
        counted = without.compile()
    analysis = counted.cost_analysis()
    flops = analysis["flops"]
    if jax.default_backend() == "gpu":
        # Its compiler calls libraries for products, and does not count what they do.
        flops = lowered_flops(step, *args, **jit_options)
    memory = compiled.memory_analysis()
    return (
        Cost(flops, analysis["bytes accessed"], memory.temp_size_in_bytes, seconds),
        compiled,
    )


def lowered_flops(step: Any, *args: Any, **jit_options: Any) -> float:
    """Count the FLOPs of `step` before any compiler has optimized it, on any backend.

    They are counted on a CPU: JAX counts what it has lowered for no plugin, and CUDA's is one.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        return _without_loops(step, args, jit_options)[0].cost_analysis()["flops"]


def _without_loops(step: Any, args: tuple, jit_options: dict) -> tuple[Any, int]:
    """Return the step, lowered with its loops unrolled, and how many of them there were."""
    with _TRACING, unrolled_loops() as unrolled:
        # A new function, so that JAX traces it anew.
        lowered = jax.jit(lambda *args: step(*args), **jit_options).lower(*args)
    return lowered, len(unrolled)


def timed_compilation(step: Any, *args: Any, **jit_options: Any) -> tuple[Any, float]:
    """Trace and compile `step`, anew if need be; return it compiled, and the seconds it took."""
    with _TRACING:
        start = time.perf_counter()
        lowered = jax.jit(lambda *args: step(*args), **jit_options).lower(*args)
    return lowered.compile(), time.perf_counter() - start


@contextlib.contextmanager
def unrolled_loops():
    """Trace every `jax.lax.scan` unrolled, also those that say by how much, as Flax does.

    Yields a list that grows by one for each.
    """
    scan, found = jax.lax.scan, []

    def unrolled(function, *args, **options):
        found.append(function)
        return scan(function, *args, **options | {"unroll": True})

    with mock.patch("jax.lax.scan", unrolled):
        yield found

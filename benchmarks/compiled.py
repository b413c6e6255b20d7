"""Exact costs of a compiled step: FLOPs, bytes, memory. No timing."""

import contextlib
import functools
import time
from typing import Any, NamedTuple
from unittest import mock

import jax


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
    if "while" in compiled.as_text():
        # Cost analysis counts a loop's body once. Count on a program without loops; its memory
        # and its compile time are not the step's, so those come from the real one.
        with unrolled_loops():
            # A new function, so that JAX traces it anew.
            counted = jax.jit(lambda *args: step(*args), **jit_options).lower(*args).compile()
    analysis = counted.cost_analysis()
    memory = compiled.memory_analysis()
    return (
        Cost(
            analysis["flops"],
            analysis["bytes accessed"],
            memory.temp_size_in_bytes,
            seconds,
        ),
        compiled,
    )


def timed_compilation(step: Any, *args: Any, **jit_options: Any) -> tuple[Any, float]:
    """Trace and compile `step`, anew if need be; return it compiled, and the seconds it took."""
    start = time.perf_counter()
    compiled = jax.jit(lambda *args: step(*args), **jit_options).lower(*args).compile()
    return compiled, time.perf_counter() - start


@contextlib.contextmanager
def unrolled_loops():
    """Trace every `jax.lax.scan` unrolled."""
    with mock.patch("jax.lax.scan", functools.partial(jax.lax.scan, unroll=True)):
        yield

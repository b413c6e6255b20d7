"""The dtypes that are computed in: never narrower than float32."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

_P = ParamSpec("_P")
_T = TypeVar("_T")


def promoting(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return `function` in which JAX promotes dtypes, also where the user has it refuse to.

    What is of another dtype in this library is meant: a sum of squares, a complex leaf's scale.
    """

    @functools.wraps(function)
    def in_standard_promotion(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return in_standard_promotion


@promoting
def at_least_float32(*dtypes: Any) -> Any:
    """Return the dtype that holds numbers of all these dtypes, float32 or wider."""
    # Of floats of 8 bits and less JAX refuses to promote any; float32 holds them all.
    return jnp.result_type(jnp.float32, *(x for x in dtypes if not _is_float_of_a_byte(x)))


def widened(x: Any, *dtypes: Any) -> jax.Array:
    """Return `x` in a dtype that holds it and numbers of these dtypes, float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(at_least_float32(x.dtype, *dtypes))


def _is_float_of_a_byte(x: Any) -> bool:
    dtype = jnp.result_type(x)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits <= 8

"""The dtypes that are computed in: never narrower than float32."""

from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(*dtypes: Any) -> Any:
    """Return the dtype that holds numbers of all these dtypes, float32 or wider.

    Also where the user has JAX refuse to promote dtypes by itself: this is no accident.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def widened(x: Any, *dtypes: Any) -> jax.Array:
    """Return `x` in a dtype that holds it and numbers of these dtypes, float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(at_least_float32(x.dtype, *dtypes))

"""What XLA must not see through, or do in an order of its own: `optimization_barrier`, and why."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._layout import manual_axes
from ._types import PyTree


def unknown(x: PyTree) -> PyTree:
    """Return `x`, of which XLA then does not know that it is a constant.

    Of the square of `x * scale`, only one of them a constant, XLA makes a product of two squares.
    That of a scale is no number. It knows the scale where a device has one element of x, and x
    where that is the zeros of an unused parameter in `jax.jit`.
    """
    return jax.tree.map(jax.lax.optimization_barrier, x)


def map_with_scalars(function: Callable[..., Any], scalars: tuple[Any, ...], *trees: PyTree) -> Any:
    """Return `function(*leaves, *scalars)` for the leaves of `trees`, as `jax.tree.map` does.

    Inside `jax.shard_map`, where the other axes of the mesh stay with the compiler, each leaf gets
    scalars of its own. XLA would broadcast a shared one once for all leaves of one shape and, where
    those are not sharded alike (T5X's query and output kernels), reshard that array for each: an
    all-to-all of the leaf's size, to move copies of one number. It does so with constants too.
    """
    number = itertools.count()

    def of_leaf(*leaves: Any) -> Any:
        return function(*leaves, *(_own(scalars, next(number)) if manual_axes() else scalars))

    return jax.tree.map(of_leaf, *trees)


def _own(scalars: tuple[Any, ...], number: int) -> tuple[Any, ...]:
    # The number is what keeps XLA from seeing that one barrier is like the next.
    *own, _ = jax.lax.optimization_barrier((*map(jnp.asarray, scalars), jnp.int32(number)))
    return tuple(own)


def together(*trees: PyTree) -> Any:
    """Return `trees` such that nothing reads one of them before all of them are computed.

    For where XLA's own order takes more memory. What is no JAX array, such as a number of Python's,
    stays as it is; so does what is the same on all shards inside `jax.shard_map`, where others are
    not.
    """
    leaves, structure = jax.tree.flatten(trees)
    ordered = iter(jax.lax.optimization_barrier([x for x in leaves if isinstance(x, jax.Array)]))
    return structure.unflatten(
        _of_its_type(x, next(ordered)) if isinstance(x, jax.Array) else x for x in leaves
    )


def _of_its_type(x: jax.Array, ordered: jax.Array) -> jax.Array:
    # The barrier marks all as different on each shard if one of them is.
    return ordered if jax.typeof(x) == jax.typeof(ordered) else x

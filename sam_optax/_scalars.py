"""Scalars that meet every leaf of a tree, such as a gradient's scale, inside `jax.shard_map`."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._layout import manual_axes
from ._types import PyTree


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

"""The batch axis as several axes, or parts of it one after another; sharded as it was."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._examples import refuse_sparse
from ._layout import names_in
from ._types import PyTree


def split_within_shards(batch: PyTree, m: int, axis: int, shards: int) -> PyTree:
    """Return `batch` as m parts, each with an equal share of every data shard."""

    def split(x: Any, axis: int) -> Any:
        x = split_axis(x, axis, (shards, m, x.shape[axis] // (shards * m)))
        return merge_axes(jnp.moveaxis(x, axis + 1, 0), axis + 1)

    return map_arrays(split, batch, axis, scalar=lambda x: jnp.broadcast_to(x, (m,)))


def map_arrays(fn: Any, batch: PyTree, axis: int, scalar: Any = lambda x: x) -> PyTree:
    """Return the batch with `fn(x, axis)` of arrays, axis at least 0, and `scalar(x)` of others."""
    refuse_sparse(batch)

    def leaf(x: Any) -> Any:
        return fn(x, axis % x.ndim) if getattr(x, "ndim", 0) else scalar(x)

    return jax.tree.map(leaf, batch)


def split_axis(x: Any, axis: int, sizes: tuple[int, ...]) -> Any:
    """Return `x` with `axis` as axes of these sizes, the first of them sharded like `axis`."""
    shape = x.shape[:axis] + sizes + x.shape[axis + 1 :]
    sharding = _sharded_in_the_first(x, axis, len(sizes))
    return x.reshape(shape) if sharding is None else x.reshape(shape, out_sharding=sharding)


def merge_axes(x: Any, axis: int) -> Any:
    """Return `x` with `axis` and the next as one."""
    # Not with -1, which JAX cannot work out where another axis has the size 0.
    merged = x.shape[axis] * x.shape[axis + 1]
    return x.reshape((*x.shape[:axis], merged, *x.shape[axis + 2 :]))


def _sharded_in_the_first(x: Any, axis: int, parts: int) -> NamedSharding | None:
    """Return what keeps explicit mesh axes on the first part of `axis`, where JAX would not.

    It puts those of size 1 on another part; but a part that a loop goes over can have none, and
    the batch axis is to keep its own.
    """
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    if all(sharding.mesh.shape[name] > 1 for name in names_in(spec[axis])):
        return None
    spec[axis + 1 : axis + 1] = [None] * (parts - 1)
    return sharding.update(spec=PartitionSpec(*spec))

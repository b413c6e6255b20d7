"""What is computed before what, where XLA's own order takes more memory."""

from typing import Any

import jax

from ._types import PyTree


def together(*trees: PyTree) -> Any:
    """Return `trees` such that nothing reads one of them before all of them are computed.

    What is no JAX array, such as a number of Python's, stays as it is; so does what is the same on
    all shards inside `jax.shard_map`, where others are not.
    """
    leaves, structure = jax.tree.flatten(trees)
    ordered = iter(jax.lax.optimization_barrier([x for x in leaves if isinstance(x, jax.Array)]))
    return structure.unflatten(
        _of_its_type(x, next(ordered)) if isinstance(x, jax.Array) else x for x in leaves
    )


def _of_its_type(x: jax.Array, ordered: jax.Array) -> jax.Array:
    # The barrier marks all as different on each shard if one of them is.
    return ordered if jax.typeof(x) == jax.typeof(ordered) else x

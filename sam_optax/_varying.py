"""Values that differ from shard to shard inside `jax.shard_map`, as their types have it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ._types import PyTree


def varying(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """Mark `x` as different on each shard of `axes`, where it is not marked so already."""
    marked = _marked(jax.typeof(x))
    missing = tuple(axis for axis in axes if axis not in marked)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def axes_of(leaves: list[Any]) -> tuple[str, ...]:
    """Return the axes that any of the leaves is marked as different along."""
    return tuple(sorted(frozenset().union(*(_marked(jax.typeof(x)) for x in leaves))))


def refuse_a_part(loss: Any, grads: PyTree, ours: tuple[str, ...]) -> None:
    """Raise if types say that a shard has a part of the gradient only: its norm is another.

    Not for the axes `ours`, along which the parameters are copied for each shard.
    """
    if loss is None:
        return
    split = {*axes_of(jax.tree.leaves(grads))} - {*axes_of([loss])} - {*ours}
    if split:
        raise ValueError(
            f"The loss is the same on all shards of {sorted(split)}, and a parameter is not: each "
            "shard has a part of the parameters, and the norm in the perturbation would be of that "
            "part. Leave these axes to the compiler (axis_names of jax.shard_map), or give a "
            "perturbation of your own that adds the squares up with jax.lax.psum. If each shard is "
            "to ascend by itself, its loss must be its own, without psum or pmean."
        )


def types_of(function: Callable[..., Any], *args: Any) -> Any:
    """Return the types of the arrays that the function returns, their shardings included.

    `jax.eval_shape` leaves those out on a mesh of which only some axes are explicit.
    """
    types = []

    def keep_types(*args: Any) -> None:
        types.append(jax.tree.map(jax.typeof, function(*args)))

    jax.eval_shape(keep_types, *args)
    return types[0]


def zeros_like_type(kind: Any) -> jax.Array:
    """Return zeros of a type that `types_of` found, its sharding and marks included."""
    # Marked afterwards: where the mesh is given to `shard_map` alone, as T5X's is, the type has
    # marks without a sharding, which JAX's own `zeros_like` does not accept. On an explicit mesh
    # the sharding is said also where it is none: `jax.vmap` may be about to shard the loop's carry.
    explicit = AxisType.Explicit in kind.sharding.mesh.axis_types
    zeros = jnp.zeros(kind.shape, kind.dtype, out_sharding=kind.sharding if explicit else None)
    return varying(zeros, tuple(sorted(_marked(kind))))


def _marked(kind: Any) -> frozenset[str]:
    """Return the axes that a value of this type varies over."""
    of_axes = getattr(kind, "manual_axis_type", None)
    if of_axes is not None:
        return frozenset(of_axes.varying)
    return frozenset(getattr(kind, "vma", None) or ())  # before JAX 0.10

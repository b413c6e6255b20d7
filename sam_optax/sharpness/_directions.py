"""Directions in the space of the parameters: trees like them, in at least float32."""

from typing import Any

import jax
import jax.numpy as jnp

from .._checks import check_seed, is_none
from .._dtypes import widened
from .._mask import keep, perturbed_mask
from .._norm import unit_and_norm
from .._types import PyTree

compiled_unit_and_norm = jax.jit(unit_and_norm)


def random_direction(params: PyTree, seed: int = 0) -> PyTree:
    """Return a direction that is uniform on the unit sphere, the same for the same seed and shapes.

    Args:
      params: the parameters, real arrays.
      seed: an integer.

    Returns:
      A tree like the parameters, of length 1 over all leaves, in at least float32, sharded as they
      are, and `None` for leaves without a gradient, such as integers.

    Raises:
      ValueError: if no parameter has a gradient, or the seed is not in [0, 2**32).
      TypeError: if a parameter is complex, or the seed no integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> direction = sharpness.random_direction({"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)})
      >>> jax.tree.map(jnp.shape, direction)
      {'b': (3,), 'w': (3, 2)}
    """
    check_seed(seed)
    return random_unit(movable_leaves(params), jax.random.key(seed))


def movable_leaves(params: PyTree) -> PyTree:
    """Return the leaves that have a gradient, in at least float32, and `None` for the others."""

    def movable_leaf(w: Any) -> jax.Array:
        if jnp.iscomplexobj(w):
            raise TypeError(
                "Directions and the Hessian of complex parameters are not defined here: give real "
                "ones."
            )
        return widened(w)

    kept = keep(perturbed_mask(None, params), params)
    movable = [None if w is None else movable_leaf(w) for w in kept]
    if not any(w.size for w in movable if w is not None):
        raise ValueError(
            "The parameters have no array with a gradient: give some of a floating dtype, not "
            f"{jax.tree.map(_type_of, params)}."
        )
    return jax.tree.structure(params).unflatten(movable)


def random_unit(like: PyTree, key: jax.Array) -> PyTree:
    """Return a random unit vector, a tree like `like` and sharded as it is."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    normal = [_normal(k, w) for k, w in zip(keys, leaves, strict=True)]
    return compiled_unit_and_norm(jax.tree.unflatten(structure, normal))[0]


def _normal(key: jax.Array, like: jax.Array) -> jax.Array:
    normal = jax.random.normal(key, like.shape, like.dtype)
    return jax.device_put(normal, like.sharding) if like.committed else normal


def scaled(t: float, direction: PyTree) -> PyTree:
    """Return `t * direction`."""
    return jax.tree.map(lambda x: float(t) * widened(x), direction)


def added(x: Any, y: Any) -> Any:
    """Return `x + y` in a dtype that holds both, or the one of them that is not `None`."""
    if x is None or y is None:
        return y if x is None else x
    x, y = jnp.asarray(x), jnp.asarray(y)
    return widened(x, y.dtype) + widened(y, x.dtype)


def check_direction(name: str, tree: PyTree, movable: PyTree) -> None:
    """Raise unless `tree` is a direction of `movable_leaves`; leaves of it may be `None`."""
    if not _are_alike(tree, movable):
        raise TypeError(
            f"{name} must be a tree like the parameters, with real arrays of their shapes, such as "
            f"random_direction(params), but it is {jax.tree.map(_type_of, tree)}."
        )


def _are_alike(tree: PyTree, movable: PyTree) -> bool:
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    others, expected = jax.tree.flatten(movable, is_leaf=is_none)
    if structure != expected or all(x is None for x in leaves):
        return False
    pairs = zip(leaves, others, strict=True)
    return all(
        x is None or (w is not None and jnp.shape(x) == w.shape and not jnp.iscomplexobj(x))
        for x, w in pairs
    )


def _type_of(x: Any) -> str:
    return f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}"

"""The global l2 norm of a gradient, and the unit vector along it, at any scale."""

from typing import Any

import jax
import jax.numpy as jnp

from ._types import PyTree


def unit_and_norm(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """Return `tree / ||tree||_2` and `||tree||_2`, one l2 norm over every leaf.

    Squares are summed in float32 (or the widest dtype among the leaves, if wider). They are summed
    at three scales at once, powers of two apart, and the one that neither underflows nor overflows
    is used. So the norm is exact from the smallest normal number to the largest, in one pass over
    the gradient and one all-reduce, and in the usual range it is bit for bit the plain sum's.

    The unit vector is all zeros where there is no direction: every leaf zero, or one not finite.

    Args:
      tree: pytree of real or complex arrays of any floating dtype; `None` leaves are left out.

    Returns:
      The unit vector (leaves of at least float32, same shapes) and the norm (a real scalar; not
      finite if any element is not finite).
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return tree, jnp.zeros((), jnp.float32)
    dtype = jnp.result_type(jnp.float32, *(_real_dtype(x) for x in leaves))
    exponent = jnp.finfo(dtype).maxexp  # 128 in float32
    scales = jnp.array([2.0 ** (exponent // 2), 1.0, 2.0 ** (-5 * exponent // 8)], dtype)
    squares = sum((_squares_at(scales, x) for x in leaves), start=jnp.zeros(3, dtype))

    tiny = squares[1] < 2.0 ** (-exponent // 2)
    huge = ~jnp.isfinite(squares[1])
    best = jnp.where(tiny, 0, jnp.where(huge, 2, 1))
    scale, square = scales[best], squares[best]

    has_direction = (square > 0) & jnp.isfinite(square)
    inverse = 1 / jnp.sqrt(jnp.where(has_direction, square, 1))

    def unit_leaf(x: Any) -> jax.Array:
        # `where`, not a product: 0 * NaN is NaN.
        return jnp.where(has_direction, _widen(x, dtype) * scale * inverse, 0)

    # A finite gradient has a finite norm, even where sqrt(n) * max|g| is above the largest number.
    norm = jnp.sqrt(square) / scale
    norm = jnp.where(jnp.isfinite(square), jnp.minimum(norm, jnp.finfo(dtype).max), norm)
    return jax.tree.map(unit_leaf, tree), norm


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Return the real inner product of two trees of the same structure, in at least float32."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(jnp.real(_widen(x, jnp.float32) * jnp.conj(_widen(y, jnp.float32)))),
        a,
        b,
    )
    return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))


def _squares_at(scales: jax.Array, x: Any) -> jax.Array:
    x = _widen(x, scales.dtype)
    return jnp.stack([jnp.sum(_abs_square(x * scale)) for scale in scales])


def _abs_square(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)


def _real_dtype(x: Any) -> Any:
    return jnp.finfo(jnp.result_type(x)).dtype


def _widen(x: Any, dtype: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, dtype))

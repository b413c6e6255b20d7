"""The global l2 norm of a gradient, and the unit vector along it, at any scale."""

from typing import Any

import jax
import jax.numpy as jnp

from ._scalars import map_with_scalars
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
    dtype = _wide_dtype(leaves)
    scales = _scales(dtype)
    scale, norm = _at_best(scales, _squares_at(scales, leaves))

    def unit_leaf(x: Any, scale: Any, inverse: Any) -> jax.Array:
        # `where`, not a product: 0 * NaN is NaN.
        return jnp.where(inverse == 0, inverse, _widen(x, dtype) * scale * inverse)

    unit = map_with_scalars(unit_leaf, (scale, _inverse(norm)), tree)
    return unit, _unscaled(norm, scale)


def norm_and_projection(
    tree: PyTree, direction: PyTree, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return `||tree||_2` and the inner product of `direction` with the unit vector along `tree`.

    In one pass over `tree`, so that each leaf is free to go as soon as it has been read.

    Args:
      tree: as for `unit_and_norm`, which gives the same norm.
      direction: a tree like `tree`, no longer than about 1.
      like: a norm of about the size of that of `tree`: up to a factor of 2^60, the products are
        taken at a scale at which they neither underflow nor overflow.

    Returns:
      The norm and the projection, which is 0 where `tree` has no direction.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    dtype = _wide_dtype(leaves)
    scales = _scales(dtype)
    # A product with a direction is no larger than its norm, so only small ones need a scale.
    near = jnp.where(_is_tiny(like), scales[0], 1).astype(dtype)

    def product_of(x: Any, along: Any, near: Any) -> jax.Array:
        x, along = _widen(x, dtype), _widen(along, dtype)
        return jnp.sum(jnp.real(x * near * jnp.conj(along)))

    of_leaves = map_with_scalars(product_of, (near,), leaves, jax.tree.leaves(direction))
    product = sum(of_leaves, start=jnp.zeros((), dtype))
    scale, norm = _at_best(scales, _squares_at(scales, leaves))
    inverse = _inverse(norm)
    projection = jnp.where(inverse == 0, 0, product * (scale / near) * inverse)
    return _unscaled(norm, scale), projection


def norm_of_ordinary(tree: PyTree) -> jax.Array:
    """Return `||tree||_2` of numbers of ordinary size, of at least float32.

    A third of the cost of `unit_and_norm`, because it takes no care of the scale.
    """
    squares = [jnp.sum(_abs_square(x)) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def _wide_dtype(leaves: list[Any]) -> Any:
    return jnp.result_type(jnp.float32, *(_real_dtype(x) for x in leaves))


def _scales(dtype: Any) -> jax.Array:
    exponent = jnp.finfo(dtype).maxexp  # 128 in float32
    return jnp.array([2.0 ** (exponent // 2), 1.0, 2.0 ** (-5 * exponent // 8)], dtype)


def _at_best(scales: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the scale at which the sum neither underflows nor overflows, and its root."""
    huge = ~jnp.isfinite(squares[1])
    best = jnp.where(_is_tiny(jnp.sqrt(squares[1])), 0, jnp.where(huge, 2, 1))
    # XLA computes cheap scalar operations anew in the fusion of every leaf that uses their result,
    # but no quotient and no root. So what the leaves use is a quotient, here of powers of two, and
    # a root. Otherwise this is half of the compile time on CPU.
    return 1 / (1 / scales)[best], _root(squares[best])


def _root(square: jax.Array) -> jax.Array:
    # Its derivative is infinite at zero, and infinity times the zero that it meets there is NaN.
    positive = square != 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _is_tiny(norm: jax.Array) -> jax.Array:
    return norm < 2.0 ** (-jnp.finfo(norm.dtype).maxexp // 4)


def _inverse(norm: jax.Array) -> jax.Array:
    """Return `1 / norm`, or 0 where there is no direction."""
    has_direction = (norm > 0) & jnp.isfinite(norm)
    return 1 / jnp.where(has_direction, norm, jnp.inf)


def _unscaled(norm: jax.Array, scale: jax.Array) -> jax.Array:
    # A finite gradient has a finite norm, even where sqrt(n) * max|g| is above the largest number.
    unscaled = norm / scale
    largest = jnp.finfo(norm.dtype).max
    return jnp.where(jnp.isfinite(norm), jnp.minimum(unscaled, largest), unscaled)


def _squares_at(scales: jax.Array, leaves: list[Any]) -> jax.Array:
    """Return the sum of squares over all leaves, at each of the scales."""
    # The TPU's and the GPU's compiler make one loop over a leaf of its three sums. The CPU's makes
    # three, in twice the time and with most of what SAM adds to compiling, unless they are one; but
    # one that is broadcast to three makes the TPU's read the leaf three times.
    return jax.lax.platform_dependent(
        scales, leaves, cpu=_in_one_sum_a_leaf, default=_in_a_sum_for_each_scale
    )


def _in_one_sum_a_leaf(scales: jax.Array, leaves: list[Any]) -> jax.Array:
    def squares(x: Any) -> jax.Array:
        scaled = _widen(x, scales.dtype)[None] * scales.reshape(3, *(1 for _ in x.shape))
        return jnp.sum(_abs_square(scaled), axis=tuple(range(1, scaled.ndim)))

    return sum(map(squares, leaves), start=jnp.zeros(3, scales.dtype))


def _in_a_sum_for_each_scale(scales: jax.Array, leaves: list[Any]) -> jax.Array:
    def squares(x: Any) -> jax.Array:
        x = _widen(x, scales.dtype)
        return jnp.stack([jnp.sum(_abs_square(x * scale)) for scale in scales])

    return sum(map(squares, leaves), start=jnp.zeros(3, scales.dtype))


def _abs_square(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)


def _real_dtype(x: Any) -> Any:
    return jnp.finfo(jnp.result_type(x)).dtype


def _widen(x: Any, dtype: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, dtype))

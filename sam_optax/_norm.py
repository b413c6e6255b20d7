"""The global l2 norm of a gradient, and the unit vector along it, at any scale."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._barriers import map_with_scalars, unknown
from ._dtypes import at_least_float32, promoting, widened
from ._types import PyTree
from ._varying import axes_of, varying


@promoting
def unit_and_norm(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """Return `tree / ||tree||_2` and `||tree||_2`, one l2 norm over every leaf.

    Squares are summed in float32 (or the widest dtype among the leaves, if wider). They are summed
    at three scales at once, powers of two apart, and the one that neither underflows nor overflows
    is used. So the norm is exact from the smallest normal number to the largest, in one pass over
    the gradient and one all-reduce (on CPU, but for `jax.vmap`, a pass at scale 1, and another
    where that is not the one), and in the usual range it is that of the plain sum; on CPU, of
    float32 leaves, bit for bit.

    The unit vector is all zeros where there is no direction: every leaf zero, or one not finite.

    Args:
      tree: pytree of real or complex arrays of any floating dtype; `None` leaves are left out.

    Returns:
      The unit vector (leaves of at least float32, same shapes) and the norm (a real scalar; not
      finite if any element is not finite).
    """
    scale, norm = _scale_and_norm(jax.tree.leaves(tree))
    return _scaled(tree, scale, _over_norm(1, norm)), _unscaled(norm, scale)


@promoting
def along(tree: PyTree, length: Any) -> PyTree:
    """Return `length * tree / ||tree||_2`, the vector of that length along `tree`.

    As `length` times the unit vector of `unit_and_norm`, in one multiplication less.

    Args:
      tree: as for `unit_and_norm`.
      length: a scalar.

    Returns:
      The vector, leaves of at least float32. Where there is no direction, or the length is zero,
      every element is -0.0, because w + -0.0 is w, bit for bit, and -0.0 + 0.0 is not -0.0.
    """
    scale, norm = _scale_and_norm(jax.tree.leaves(tree))
    return _scaled(tree, scale, _over_norm(length, norm))


def of_ordinary_size(tree: PyTree) -> PyTree:
    """Return `tree` times a power of two, 1 if possible, at which its norm is no extreme number."""
    scale, _ = _scale_and_norm(jax.tree.leaves(tree))

    def scaled_leaf(x: Any, scale: Any) -> jax.Array:
        return widened(unknown(x), scale.dtype) * scale

    return map_with_scalars(scaled_leaf, (scale,), tree)


@promoting
def norms_and_product(
    tree: PyTree, direction: PyTree, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `||scale * tree||_2`, `||direction||_2` and the inner product of the two.

    In one pass over `tree`, so that each leaf is free to go as soon as it has been read, and with
    no care for the scale but that: it is for a norm between 2^-50 and 2^60.

    Args:
      tree: as for `unit_and_norm`.
      direction: a tree like `tree`, of length about 1.
      scale: a real scalar.
    """
    leaves = jax.tree.leaves(tree)
    dtype = _wide_dtype(leaves)

    def sums_of(x: Any, along: Any, scale: Any) -> tuple[jax.Array, ...]:
        x, along = widened(unknown(x), dtype) * scale, widened(unknown(along), dtype)
        product = jnp.real(x * jnp.conj(along))
        return jnp.sum(_abs_square(x)), jnp.sum(_abs_square(along)), jnp.sum(product)

    of_leaves = map_with_scalars(sums_of, (scale,), leaves, jax.tree.leaves(direction))
    zero = jnp.zeros((), dtype)
    square, square_along, product = (
        sum((sums[i] for sums in of_leaves), start=zero) for i in range(3)
    )
    return _root(square), _root(square_along), product


def scale_to_about_one(norm: jax.Array) -> jax.Array:
    """Return what a vector of that norm is multiplied by for a length of about 1."""
    norm = jax.lax.stop_gradient(norm)  # any scale would do, so nothing depends on it
    smallest = jnp.finfo(norm.dtype).smallest_normal
    # Where there is no direction there is nothing to scale. And 1 / 2^127 is not a normal number,
    # nor, where a device rounds its quotients down, is 1 / 2^126: so some powers of two less.
    return 1 / jnp.where(has_direction(norm), jnp.clip(norm, smallest, 1 / (64 * smallest)), 1)


def has_direction(norm: jax.Array) -> jax.Array:
    """Whether a vector of that norm is neither zero nor has elements that are not finite."""
    return (norm > 0) & jnp.isfinite(norm)


def norm_of_ordinary(tree: PyTree) -> jax.Array:
    """Return `||tree||_2` of numbers of ordinary size, of at least float32.

    A third of the cost of `unit_and_norm`, because it takes no care of the scale.
    """
    squares = [jnp.sum(_abs_square(x)) for x in jax.tree.leaves(tree)]
    return _root(sum(squares, start=jnp.zeros((), jnp.float32)))


def _scaled(tree: PyTree, scale: jax.Array, factor: jax.Array) -> PyTree:
    """Return `tree * scale * factor`, and -0.0 everywhere, also for NaN, where `factor` is zero."""

    def scaled_leaf(x: Any, scale: Any, factor: Any) -> jax.Array:
        return _times(widened(x, scale.dtype) * scale, factor)

    return map_with_scalars(scaled_leaf, (scale, factor), tree)


@jax.custom_jvp
def _times(x: Any, factor: Any) -> jax.Array:
    zero = -jnp.abs(factor)
    if jnp.iscomplexobj(x):
        zero = jax.lax.complex(zero, zero)
    # `where`, not a product: 0 * NaN is NaN.
    return jnp.where(factor == 0, zero, x * factor)


@_times.defjvp
@promoting
def _derivative_of_times(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # That of the product, at zero too. Where x is not finite the factor is a constant zero.
    (x, factor), (dx, dfactor) = primals, tangents
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    finite_dx = jnp.where(jnp.isfinite(x), dx, jnp.zeros_like(dx))
    return _times(x, factor), finite_dx * factor + finite * dfactor


def _wide_dtype(leaves: list[Any]) -> Any:
    return at_least_float32(*(jnp.finfo(jnp.result_type(x)).dtype for x in leaves))  # no complex


def _scales(dtype: Any) -> tuple[Any, Any, Any]:
    """Return the three scales: for tiny numbers, 1, for huge ones."""
    exponent = jnp.finfo(dtype).maxexp  # 128 in float32
    # Of NumPy: JAX has these as part of a loop's body, and an array as an operand of the loop.
    scales = 2.0 ** (exponent // 2), 1.0, 2.0 ** (-5 * exponent // 8)
    return tuple(np.dtype(dtype).type(scale) for scale in scales)


def _scale_and_norm(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
    """Return a power of two at which the sum is no extreme number, and the norm times it."""
    scales, squares = _scales(_wide_dtype(leaves)), _squares(leaves)
    plain = squares[1]
    tiny, huge = _is_tiny(jnp.sqrt(plain)), ~jnp.isfinite(plain)

    def best(of_each: Any) -> jax.Array:
        # No gather: of what `jax.vmap` has on an explicit mesh axis, that asks for a sharding.
        return jnp.where(tiny, of_each[0], jnp.where(huge, of_each[2], of_each[1]))

    # XLA computes cheap scalar operations anew in the fusion of every leaf that uses their result,
    # but no quotient and no root. So what the leaves use is a quotient, here of powers of two, and
    # a root. Otherwise this is half of the compile time on CPU.
    return 1 / best([1 / scale for scale in scales]), _root(best(squares))


def _root(square: jax.Array) -> jax.Array:
    # Its derivative is infinite at zero, and NaN at NaN: times the zero that it meets, also NaN.
    differentiable = (square > 0) & jnp.isfinite(square)
    root = jnp.sqrt(jnp.where(differentiable, square, 1))
    return jnp.where(differentiable, root, jax.lax.stop_gradient(square))


def _is_tiny(norm: jax.Array) -> jax.Array:
    return norm < 2.0 ** (-jnp.finfo(norm.dtype).maxexp // 4)


def _over_norm(length: Any, norm: jax.Array) -> jax.Array:
    """Return `length / norm`, or 0 where there is no direction."""
    length = jnp.asarray(length, norm.dtype)  # a float64 rho would make a float64 tree
    return length / jnp.where(has_direction(norm), norm, jnp.inf)


def _unscaled(norm: jax.Array, scale: jax.Array) -> jax.Array:
    # A finite gradient has a finite norm, even where sqrt(n) * max|g| is above the largest number.
    unscaled = norm / scale
    largest = jnp.finfo(norm.dtype).max
    return jnp.where(jnp.isfinite(norm), jnp.minimum(unscaled, largest), unscaled)


@jax.custom_jvp
def _squares(leaves: list[Any]) -> jax.Array:
    """Return the sum of squares over all leaves, at each of the scales."""
    return _on_this_platform(leaves)


@_squares.defjvp
@promoting
def _derivative_of_squares(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # That of the sum, but where an element is not finite at a scale: then the sum is not used, and
    # must not make its zero cotangent NaN.
    (leaves,), (changes,) = primals, tangents
    dtype = _wide_dtype(leaves)

    def changed(x: Any, dx: Any, scale: Any) -> jax.Array:
        x, dx = widened(x, dtype) * scale, widened(dx, dtype) * scale
        return 2 * jnp.sum(jnp.real(jnp.conj(jnp.where(jnp.isfinite(x), x, 0)) * dx))

    def change(scale: Any) -> jax.Array:
        of_leaves = (changed(x, dx, scale) for x, dx in zip(leaves, changes, strict=True))
        return sum(of_leaves, start=jnp.zeros((), dtype))

    return _squares(leaves), jnp.stack([change(scale) for scale in _scales(dtype)])


# Compiled once for the leaves' types where the step itself is not: the branches below are new
# functions each time, and JAX would compile them anew for each step of an eager loop.
@functools.partial(jax.jit, inline=True)
def _on_this_platform(leaves: list[Any]) -> jax.Array:
    """Return the sum of squares over all leaves, at each of the scales."""
    # The TPU's compiler makes one loop over a leaf of its three sums. The CPU's makes three. There,
    # a second pass where one was not enough takes half the time; elsewhere it would be a loop with
    # all-reduces in it, for which a GPU waits for the host. The GPU's makes one kernel of them, and
    # then two or three more for every leaf, to add up their parts and put them side by side: most
    # of the time. One sum over an array with all scales has none of these.
    return jax.lax.platform_dependent(
        leaves,
        cpu=_in_a_second_pass_where_needed,
        tpu=_in_a_sum_for_each_scale,
        default=_in_a_sum_for_all_scales,
    )


@jax.custom_batching.custom_vmap
def _in_a_second_pass_where_needed(leaves: list[Any]) -> jax.Array:
    dtype = _wide_dtype(leaves)
    for_tiny, _, for_huge = _scales(dtype)

    def squares(scale: jax.Array) -> jax.Array:
        def of_leaf(x: Any) -> jax.Array:
            # The scale with it: one for all leaves of a shape XLA would broadcast once for them,
            # in memory, and read that array with each. And it must not know a constant leaf.
            x, own = jax.lax.optimization_barrier((x, scale))
            return jnp.sum(_abs_square(widened(x, dtype) * own))

        return sum(map(of_leaf, leaves), start=jnp.zeros((), dtype))

    # In a loop, and not once here and once in a branch, the sum is compiled and counted once. Not a
    # `while_loop`: XLA would take a whole tree's widening out of it, and checkify no batched one.
    def add_up(turn: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scale, is_needed, plain, square = carry
        square = jax.lax.cond(is_needed, squares, lambda _: square, scale)
        plain = jnp.where(turn == 0, square, plain)
        enough = jnp.isfinite(plain) & ~_is_tiny(jnp.sqrt(plain))
        next_scale = jnp.where(jnp.isfinite(plain), for_tiny, for_huge)
        return next_scale, ~enough, plain, square

    zero = varying(jnp.zeros((), dtype), axes_of(leaves))
    start = zero + 1, zero == 0, zero, zero
    *_, plain, last = jax.lax.fori_loop(0, 2, add_up, start)
    # Where there was no second pass, the last is the plain one, and that is the one to take.
    return jnp.stack([last, plain, last])


@_in_a_second_pass_where_needed.def_vmap
def _in_one_pass_where_batched(
    axis_size: int, in_batched: list[Any], leaves: list[Any]
) -> tuple[jax.Array, bool]:
    # Of a branch that is batched JAX computes both sides, and selects among what they read, which
    # it cannot where that is sharded over an explicit mesh axis.
    (batched,) = in_batched
    axes = [0 if x else None for x in batched]
    at_each = jax.vmap(_in_a_sum_for_each_scale, in_axes=(axes,), axis_size=axis_size)
    return at_each(leaves), True


def _in_a_sum_for_each_scale(leaves: list[Any]) -> jax.Array:
    def squares(x: Any, for_tiny: Any, for_huge: Any) -> jax.Array:
        at_each = x * for_tiny, x, x * for_huge
        return jnp.stack([jnp.sum(_abs_square(y)) for y in at_each])

    return _over_leaves(squares, leaves)


def _in_a_sum_for_all_scales(leaves: list[Any]) -> jax.Array:
    def squares(x: Any, for_tiny: Any, for_huge: Any) -> jax.Array:
        axes = tuple(range(1, jnp.ndim(x) + 1))
        scales = jnp.stack([for_tiny, jnp.ones_like(for_tiny), for_huge])
        at_each = jnp.expand_dims(x, 0) * jnp.expand_dims(scales, axes)
        return jnp.sum(_abs_square(at_each), axis=axes)

    return _over_leaves(squares, leaves)


_MOST_DEVICES = 2**16


def _over_leaves(squares: Any, leaves: list[Any]) -> jax.Array:
    """Return the sum of `squares(x, scale for tiny numbers, for huge ones)` over the leaves."""
    dtype = _wide_dtype(leaves)
    for_tiny, _, for_huge = _scales(dtype)

    def of_leaf(x: Any, *hidden: Any) -> jax.Array:
        # Of a large leaf no device has only one element, and XLA multiplies what is constant. And
        # it makes one loop of the sums and what the leaf follows from, which it does not if that
        # is hidden: 3 to 5% more of a step's memory traffic on TPUs.
        if isinstance(x.size, int) and x.size > _MOST_DEVICES:
            return squares(widened(x, dtype), for_tiny, for_huge)
        return squares(widened(unknown(x), dtype), *hidden)

    of_leaves = map_with_scalars(of_leaf, unknown((for_tiny, for_huge)), leaves)
    return sum(of_leaves, start=jnp.zeros(3, dtype))


def _abs_square(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)

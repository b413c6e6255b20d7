"""What XLA must not know to be a constant."""

import jax

from ._types import PyTree


def unknown(x: PyTree) -> PyTree:
    """Return `x`, of which XLA then does not know that it is a constant.

    Of the square of `x * scale`, only one of them a constant, XLA makes a product of two squares.
    That of a scale is no number. It knows the scale where a device has one element of x, and x
    where that is the zeros of an unused parameter in `jax.jit`.
    """
    return jax.tree.map(jax.lax.optimization_barrier, x)

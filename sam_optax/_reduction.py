"""How the loss of a batch follows from the losses of its parts: `loss_reduction`."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ._checks import check_choice, is_real_scalar
from ._dtypes import at_least_float32, promoting
from ._types import PyTree

LossReduction = Literal["mean", "sum"] | Callable[..., Any]


def check_reduction(reduction: Any) -> None:
    """Raise unless `reduction` is one of the words, or a function."""
    if not callable(reduction):
        weight = ", or a function from a part of the batch to its weight"
        check_choice("loss_reduction", reduction, ("mean", "sum"), otherwise=weight)


def weight_of(reduction: LossReduction, part: tuple[PyTree, ...]) -> jax.Array:
    """Return how much a part of the batch weighs in the loss of the batch, a scalar.

    In JAX's default floating dtype: in float32 the shares of float64 gradients would be rounded.
    """
    if not callable(reduction):
        return jnp.ones((), float)
    weight = reduction(*part)
    if not is_real_scalar(weight):
        raise ValueError(
            "loss_reduction(batch) must return a real scalar, the weight of the batch's mean loss "
            f"such as its count of tokens, but it returned {weight!r}."
        )
    return jnp.asarray(weight, float)


def counts(weight: jax.Array) -> jax.Array:
    """Return 1 for a part with weight, and 0 for one without, as one of padding alone."""
    return (weight != 0).astype(jnp.float32)


def divisor_of(reduction: LossReduction, total_weight: Any) -> jax.Array:
    """Return what the weighted sum of the parts' losses is divided by."""
    # If no part has any weight, nothing was added and the sum is 0; it must not become 0 / 0.
    if reduction == "sum":
        return jnp.ones((), float)
    return jnp.where(total_weight == 0, 1, total_weight)


@promoting
def share_of(x: Any, share: jax.Array, *, may_be_zero: bool = True) -> jax.Array:
    """Return `share * x` in at least float32, and exactly zero where there is no share.

    A part without weight adds nothing, even where its own mean is 0 / 0. XLA finds out by itself
    that a constant share is not zero, but not of one that it must not know (`map_with_scalars`).
    """
    # The zero is the share itself. A constant would be one array for all leaves of one shape,
    # however they are sharded: see `map_with_scalars`.
    wide = at_least_float32(x.dtype)
    share = share.astype(jnp.finfo(wide).dtype)
    product = x.astype(wide) * share
    return jnp.where(share == 0, share, product) if may_be_zero else product

"""What a SAM step can tell about itself, computed only when asked for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._norm import (
    has_direction,
    norm_and_product,
    norm_of_ordinary,
    scale_to_about_one,
    unit_and_norm,
)
from ._scalars import map_with_scalars
from ._types import PyTree


class SharpnessInfo(NamedTuple):
    """Diagnostics of one step. It is returned on request and never kept in a state.

    The numbers are scalar arrays. With `m` groups the ascent's fields are means over the groups,
    and `skipped_ascents` is their sum.

    Attributes:
      ascent_loss: loss at w on the ascent micro-batch; `None` where the gradient function does not
        tell it, or the ascent gradient was given.
      descent_loss: loss at w_adv on the batch; `None` where the gradient function does not tell it.
      ascent_grad_norm: l2 norm of the ascent gradient at w, over the perturbed leaves.
      descent_grad_norm: l2 norm of the gradient that the step returns, over every leaf.
      cosine: of the angle between ascent and descent gradient, over the perturbed leaves; 0 where
        one of them is zero or not finite, or 1e18 times the other.
      realised_perturbation: `||w_adv - w||_2 / rho`, as stored. With SAM's own perturbation and one
        ascent step, 1 but for rounding: away from 1 where the dtype of w_adv is too narrow for
        it. 0 where rho is, or the ascent was skipped.
      skipped_ascents: int32, how many ascents had no direction (gradient zero or not finite) and
        so left w_adv at w.
      aux: for `sharpness_aware`, the auxiliary output of `grad_fn`; else `None`.
    """

    ascent_loss: Any
    descent_loss: Any
    ascent_grad_norm: jax.Array
    descent_grad_norm: jax.Array
    cosine: jax.Array
    realised_perturbation: jax.Array
    skipped_ascents: jax.Array
    aux: Any = None


class PointInfo(NamedTuple):
    """What one adversarial point tells; the fields are those of `SharpnessInfo`."""

    ascent_loss: Any
    ascent_grad_norm: jax.Array
    cosine: jax.Array
    realised_perturbation: jax.Array
    skipped_ascents: jax.Array

    def of_the_step(self, descent_loss: Any, grads: PyTree) -> SharpnessInfo:
        """Return the diagnostics of the step that returns this loss and these gradients."""
        # Not at the scale of the points' gradients, cheap as that would be: one of them, or its
        # ascent, may have been zero or not finite.
        _, norm = unit_and_norm(grads)
        return SharpnessInfo(**self._asdict(), descent_loss=descent_loss, descent_grad_norm=norm)


def describe(
    *,
    ascent_loss: Any,
    ascent_grads: PyTree,
    descent_grads: PyTree,
    params: PyTree,
    w_adv: PyTree,
    rho: Any,
) -> PointInfo:
    """Return the diagnostics of one ascent and descent; the trees hold the perturbed leaves."""
    _, ascent_norm = unit_and_norm(ascent_grads)
    return PointInfo(
        ascent_loss=ascent_loss,
        ascent_grad_norm=ascent_norm,
        cosine=_cosine(ascent_grads, ascent_norm, descent_grads),
        realised_perturbation=_realised(w_adv, params, rho),
        skipped_ascents=(~has_direction(ascent_norm)).astype(jnp.int32),
    )


def _cosine(ascent_grads: PyTree, ascent_norm: jax.Array, descent_grads: PyTree) -> jax.Array:
    """Return the cosine of the angle between the two, or 0 where one of them has no direction."""
    # Both at the scale that is known before the descent pass.
    scale = scale_to_about_one(ascent_norm)
    direction = map_with_scalars(lambda g, scale: scale * g, (scale,), ascent_grads)
    norm, product = norm_and_product(descent_grads, _kept(direction), scale)
    defined = has_direction(ascent_norm) & has_direction(norm)
    # The scaled norm is about 1; the norm itself may be too large to be multiplied.
    norms = norm * (ascent_norm * scale)
    return jnp.where(defined, product / jnp.where(defined, norms, 1), 0)


def _realised(w_adv: PyTree, params: PyTree, rho: Any) -> jax.Array:
    """Return `||w_adv - w|| / rho`, or 0 where rho is."""
    moves = jnp.asarray(rho) > 0

    def in_units_of_rho(v: Any, w: Any, rho: Any) -> jax.Array:
        # No narrower than float32: rounded like w_adv, w would hide what the rounding did to it.
        wide = jnp.promote_types(jnp.result_type(v, w), jnp.float32)
        difference = v.astype(wide) - jnp.asarray(w).astype(wide)
        return difference / rho.astype(jnp.finfo(wide).dtype)

    unit = jnp.where(moves, rho, 1)
    distance = norm_of_ordinary(map_with_scalars(in_units_of_rho, (unit,), w_adv, params))
    return jnp.where(moves, distance, 0)


def _kept(direction: PyTree) -> PyTree:
    """Return `direction` as it is kept through the descent pass: in half the memory if large.

    Rounding to bfloat16 is by 1/500 and random, so in the inner product of vectors of a million
    elements and more it averages out to 1e-6.
    """
    leaves = jax.tree.leaves(direction)
    if sum(x.size for x in leaves) < 1_000_000:
        return direction
    return jax.tree.map(lambda x: x if jnp.iscomplexobj(x) else x.astype(jnp.bfloat16), direction)

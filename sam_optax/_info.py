"""What a SAM step can tell about itself, computed only when asked for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._norm import norm_and_projection, unit_and_norm
from ._types import PyTree


class SharpnessInfo(NamedTuple):
    """Diagnostics of one step. It is returned on request and never kept in a state.

    Each field is a scalar array. With `m` groups the ascent's fields are means over the groups,
    and `skipped_ascents` is their sum.

    Attributes:
      ascent_loss: loss at w on the ascent micro-batch; `None` where the gradient function does not
        tell it, or the ascent gradient was given.
      descent_loss: loss at w_adv on the batch; `None` where the gradient function does not tell it.
      ascent_grad_norm: l2 norm of the ascent gradient at w, over the perturbed leaves.
      descent_grad_norm: l2 norm of the gradient that the step returns, over every leaf.
      cosine: of the angle between ascent and descent gradient, over the perturbed leaves; 0 where
        one of them is zero or not finite.
      realised_perturbation: `||w_adv - w||_2 / rho`, as stored. With SAM's own perturbation and one
        ascent step, 1 but for rounding: below 1 where the dtype of w_adv rounds it away. 0 where
        rho is.
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


def describe(
    *,
    ascent_loss: Any,
    descent_loss: Any,
    ascent_grads: PyTree,
    descent_grads: PyTree,
    params: PyTree,
    w_adv: PyTree,
    rho: Any,
    along_gradient: bool,
) -> SharpnessInfo:
    """Return the diagnostics of one ascent and descent; the trees hold the perturbed leaves.

    Where w_adv - w is along the ascent gradient, it stands for it in the cosine: the gradient
    itself, a copy of the parameters in size, need not be kept through the descent pass.
    """
    ascent_unit, ascent_norm = unit_and_norm(ascent_grads)
    moved = jax.tree.map(lambda v, w: v - jnp.asarray(w).astype(v.dtype), w_adv, params)
    _, distance = unit_and_norm(moved)
    direction, length = (moved, distance) if along_gradient else (ascent_unit, 1)
    descent_norm, projection = norm_and_projection(descent_grads, direction)
    rho = jnp.asarray(rho, distance.dtype)
    return SharpnessInfo(
        ascent_loss=ascent_loss,
        descent_loss=descent_loss,
        ascent_grad_norm=ascent_norm,
        descent_grad_norm=descent_norm,
        cosine=jnp.where(projection == 0, 0, projection / length),
        realised_perturbation=jnp.where(rho > 0, distance / jnp.where(rho > 0, rho, 1), 0),
        skipped_ascents=(~((ascent_norm > 0) & jnp.isfinite(ascent_norm))).astype(jnp.int32),
    )

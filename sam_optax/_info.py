"""What a SAM step can tell about itself, computed only when asked for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._barriers import map_with_scalars, together
from ._dtypes import at_least_float32, promoting, widened
from ._norm import (
    has_direction,
    norm_of_ordinary,
    norms_and_product,
    scale_to_about_one,
    unit_and_norm,
)
from ._types import PyTree


class SharpnessInfo(NamedTuple):
    """Diagnostics of one step. It is returned on request and never kept in a state.

    The numbers are scalar arrays in float32, whatever the parameters' dtype, or wider where the
    gradients are; `skipped_ascents` is int32. Gradient norms are in units of the loss per unit of
    the parameters. With `m` groups the ascent's fields are means over the groups that have any
    weight in the loss, and `skipped_ascents` is the sum over all. Where rho is the number 0, known
    before compilation, there is one ascent whatever `m`.

    Attributes:
      ascent_loss: loss at w on the ascent micro-batch; `None` where the gradient function does not
        tell it, or the ascent gradient was given.
      descent_loss: loss at w_adv on the batch; `None` where the gradient function does not tell it.
      ascent_grad_norm: l2 norm of the ascent gradient at w, over the perturbed leaves.
      descent_grad_norm: l2 norm of the gradient that the step returns, over every leaf.
      cosine: of the angle between ascent and descent gradient, over the perturbed leaves; 0 where
        one of them is zero or not finite, or some 1e19 times the other.
      realised_perturbation: `||w_adv - w||_2 / rho`, as stored. With SAM's own perturbation and one
        ascent step, 1 but for rounding: away from 1 where the dtype of w_adv is too narrow for
        it. It does not see how layers cast w_adv. 0 where rho is, or the ascent was skipped.
      skipped_ascents: int32, how many ascents had no direction (gradient zero or not finite) and
        so left w_adv at w; with several ascent steps, in the first of them. With another
        perturbation than SAM's, how many left it there.
      aux: for `sharpness_aware`, the auxiliary output of `grad_fn`; else `None`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> gradient = sam_optax.value_and_grad(
      ...     lambda w, x: jnp.mean((x @ w - 1) ** 2), rho=0.05, return_info=True)
      >>> loss, grads, info = gradient(jnp.zeros(2), jnp.eye(2).repeat(4, axis=0))
      >>> print(f"{info.cosine:.2f} {info.realised_perturbation:.2f} {info.skipped_ascents}")
      0.72 1.00 0
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

    def where(self, counted: jax.Array) -> "PointInfo":
        """Return zeros, the skipped ascents apart, where `counted` is zero: a part of padding."""
        kept = jax.tree.map(lambda x: jnp.where(counted == 0, 0, x), self)
        return kept._replace(skipped_ascents=self.skipped_ascents)

    def mean_of(self, number: jax.Array) -> "PointInfo":
        """Return the means from sums over `number` points, and the sum of skipped ascents."""
        number = jnp.maximum(number, 1)
        means = jax.tree.map(lambda x: x / number.astype(x.dtype), self)
        return means._replace(skipped_ascents=self.skipped_ascents)

    def of_the_step(self, descent_loss: Any, grads: PyTree) -> SharpnessInfo:
        """Return the diagnostics of the step that returns this loss and these gradients."""
        # Not at the scale of the points' gradients, cheap as that would be: one of them, or its
        # ascent, may have been zero or not finite, or be of a few leaves with a tiny gradient.
        _, norm = unit_and_norm(grads)
        loss = None if descent_loss is None else widened(descent_loss)
        return SharpnessInfo(**self._asdict(), descent_loss=loss, descent_grad_norm=norm)


class AscentInfo(NamedTuple):
    """What is known of a point before its descent pass, and all of the ascent that is kept for it.

    Attributes:
      loss: at w, or `None`.
      grad_norm: of the ascent gradient.
      direction: the ascent gradient, scaled to a length of about 1.
      realised_perturbation: as in `SharpnessInfo`.
      skipped: whether w_adv is w.
    """

    loss: Any
    grad_norm: jax.Array
    direction: PyTree
    realised_perturbation: jax.Array
    skipped: jax.Array

    def before(self, batch: PyTree) -> tuple[PyTree, "AscentInfo"]:
        """Return both, the batch such that its pass begins when the direction is at hand.

        XLA would put it off to the end of the step, and till then keep what it follows from, which
        may be in float32 and in several parts.
        """
        batch, direction = together(batch, self.direction)
        return batch, self._replace(direction=direction)

    def of_the_point(self, descent_grads: PyTree) -> PointInfo:
        """Return the diagnostics of the point with this gradient, of the perturbed leaves."""
        return PointInfo(
            ascent_loss=self.loss,
            ascent_grad_norm=self.grad_norm,
            cosine=self._cosine(descent_grads),
            realised_perturbation=self.realised_perturbation,
            skipped_ascents=self.skipped.astype(jnp.int32),
        )

    def _cosine(self, descent_grads: PyTree) -> jax.Array:
        """Return that of the angle between the two, or 0 where one of them has no direction."""
        # Both at the scale that is known before the descent pass.
        scale = scale_to_about_one(self.grad_norm)
        norm, norm_of_direction, product = norms_and_product(descent_grads, self.direction, scale)
        defined = has_direction(self.grad_norm) & has_direction(norm)
        norms = norm * norm_of_direction
        return jnp.where(defined, product / jnp.where(defined, norms, 1), 0)


@promoting
def describe_ascent(
    *,
    loss: Any,
    grads: PyTree,
    params: PyTree,
    w_adv: PyTree,
    rho: Any,
    moves_wherever_there_is_a_gradient: bool,
) -> AscentInfo:
    """Return the diagnostics of one ascent; the trees hold the perturbed leaves."""
    rho = jnp.asarray(rho, float)  # of Python's integers not all are JAX's
    _, norm = unit_and_norm(grads)
    realised = _realised(w_adv, params, rho)
    skipped = ~has_direction(norm)
    if not moves_wherever_there_is_a_gradient:
        skipped |= (rho > 0) & (realised == 0)
    scale = scale_to_about_one(norm)
    direction = map_with_scalars(lambda g, scale: scale * widened(g), (scale,), grads)
    # A sum of losses over many groups would be off by percents in bfloat16.
    loss = None if loss is None else widened(loss)
    return AscentInfo(loss, norm, _kept(direction), realised, skipped)


def _realised(w_adv: PyTree, params: PyTree, rho: jax.Array) -> jax.Array:
    """Return `||w_adv - w|| / rho`, or 0 where rho is."""
    moves = rho > 0

    def in_units_of_rho(v: Any, w: Any, rho: Any) -> jax.Array:
        # No narrower than float32: rounded like w_adv, w would hide what the rounding did to it.
        wide = at_least_float32(v, w)
        difference = jnp.asarray(v).astype(wide) - jnp.asarray(w).astype(wide)
        return difference / rho.astype(jnp.finfo(wide).dtype)

    unit = jnp.where(moves, rho, 1)
    distance = norm_of_ordinary(map_with_scalars(in_units_of_rho, (unit,), w_adv, params))
    return jnp.where(moves, distance, 0)


def _kept(direction: PyTree) -> PyTree:
    """Return `direction` as it is kept through the descent pass: in half the memory if large.

    Rounding to bfloat16 turns it by an angle of at most 1/500, so the cosine is off by 4e-6 near 1
    and by 1/500 at the very most. Mostly rounding is random, and among a million elements averages
    out to 1e-6; but not in a gradient of a few different numbers.
    """
    size: Any = sum(x.size for x in jax.tree.leaves(direction))
    if not isinstance(size, int) or size < 1_000_000:  # no int: of a size unknown before export
        return direction
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, direction
    )

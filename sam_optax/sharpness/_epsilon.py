"""Epsilon-sharpness: how far the loss rises within a distance."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._checks import LARGEST, SMALLEST, check_integer, check_number, check_seed
from .._norm import has_direction
from .._reduction import LossReduction
from .._types import PyTree
from ._directions import compiled_unit_and_norm, random_unit
from ._mean_loss import LossFn, MeanLoss


class EpsilonSharpness(NamedTuple):
    """How far the loss rises within a distance of the parameters.

    Attributes:
      loss: at the parameters.
      rise: the largest rise found, 0 where every point on the way is lower; a lower bound of the
        largest there is. Infinite if the loss is infinite at one of them. NaN if the loss is not
        finite at the parameters, or NaN at a point on the way: the search stops there.
      rise_of_one_step: that of the first step: SAM's own perturbation, `rho * g / ||g||`, or a
        random one where g has no direction.
      perturbation: the one with the largest rise, a tree like the parameters, in at least float32;
        zeros where the rise is 0; `None` for leaves without a gradient.
    """

    loss: float
    rise: float
    rise_of_one_step: float
    perturbation: PyTree


def epsilon_sharpness(
    loss_fn: LossFn,
    params: PyTree,
    batches: Sequence[Any],
    rho: float,
    *,
    steps: int = 10,
    loss_reduction: LossReduction = "mean",
    seed: int = 0,
) -> EpsilonSharpness:
    """Return how far the loss rises at most within a distance rho of the parameters.

    From SAM's perturbation on, each step moves to `rho * g / ||g||` with the gradient g at the
    point before, which for a loss that is quadratic there is the power method. The largest rise on
    the way is returned. Where a gradient has no direction, being zero or not finite, the step is
    in a random one, each time another.

    Args:
      loss_fn: as for `hessian_eigenpairs`, and so are `params`, `batches` and `loss_reduction`.
      params: the parameters.
      batches: the data.
      rho: the distance, above 0, such as the `rho` of training.
      steps: the number of steps, each a gradient and a loss over all batches.
      loss_reduction: `"mean"`, `"sum"`, or a function from a batch to its weight.
      seed: of the random directions.

    Returns:
      The loss, its rise and where. A loss that is infinite or NaN does not raise; see `rise`.

    Raises:
      ValueError: if there are no batches, or batches of several sizes with `"mean"`, the loss is no
        real scalar, no parameter has a gradient, a batch's weight is not finite, or a setting is
        out of its range.
      TypeError: if an argument is of the wrong type (`rho` is a number of Python or NumPy), or a
        parameter is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.mean(batch @ params**2)
      >>> at_minimum = sharpness.epsilon_sharpness(
      ...     loss_fn, jnp.zeros(2), [jnp.array([[3.0, 1.0]])], rho=0.1, steps=20)
      >>> round(at_minimum.rise, 4)
      0.03

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, eq. 1: the
      maximum that SAM's perturbation is an estimate of.
    """
    check_number("rho", rho, example=0.05)
    if not SMALLEST <= rho <= LARGEST:
        raise ValueError(f"rho={rho!r} must be finite and above 0, in float32 too, such as 0.05.")
    rho = float(rho)  # a NumPy float64 would widen the perturbation
    check_integer("steps", steps, at_least=1)
    check_seed(seed)
    mean = MeanLoss(loss_fn, params, batches, loss_reduction)
    nowhere = jax.tree.map(jnp.zeros_like, mean.movable)
    loss, rises = mean.loss(nowhere), []
    point, best = nowhere, nowhere
    for key in jax.random.split(jax.random.key(seed), steps):
        direction, norm = compiled_unit_and_norm(mean.gradient(point))
        if not has_direction(norm):
            direction = random_unit(mean.movable, key)
        point = jax.tree.map(lambda x: rho * x, direction)
        rises.append(mean.loss(point) - loss if math.isfinite(loss) else math.nan)
        if math.isnan(rises[-1]):
            return EpsilonSharpness(loss, math.nan, rises[0], point)
        if rises[-1] == max(0.0, *rises):
            best = point
    return EpsilonSharpness(loss, max(0.0, *rises), rises[0], best)

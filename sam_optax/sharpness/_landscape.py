"""The loss along directions from the parameters."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .._checks import is_none
from .._reduction import LossReduction
from .._types import PyTree
from ._directions import added, check_direction, scaled
from ._mean_loss import LossFn, MeanLoss


def loss_along(
    loss_fn: LossFn,
    params: PyTree,
    batches: Sequence[Any],
    direction: PyTree,
    distances: Sequence[float],
    *,
    across: PyTree | None = None,
    loss_reduction: LossReduction = "mean",
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the loss along a direction from the parameters, or over a plane of two.

    Args:
      loss_fn: as for `hessian_eigenpairs`, and so are `params`, `batches` and `loss_reduction`.
      params: the parameters.
      batches: the data.
      direction: a tree like the parameters, such as `random_direction(params)`, an eigenvector or
        a perturbation. Leaves that are `None` stay.
      distances: n multiples of it, so in units of its length.
      across: a second direction.
      loss_reduction: `"mean"`, `"sum"`, or a function from a batch to its weight.

    Returns:
      `[n]` losses in float64, which may be infinite or NaN; with `across`, `[n, n]`, where `[i, j]`
      is `distances[i]` along and `distances[j]` across.

    Raises:
      ValueError: if there are no batches, or batches of several sizes with `"mean"`, the loss is no
        real scalar, no parameter has a gradient, a batch's weight is not finite, or
        `loss_reduction` is none of these.
      TypeError: if an argument is of the wrong type, a parameter is complex, a direction is not
        like the parameters, or the distances are no list or array of numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.mean(batch * params**2)
      >>> sharpness.loss_along(loss_fn, jnp.float32(1), [jnp.ones(4)], jnp.float32(2), [-1, 0, 1])
      array([1., 1., 9.])

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_,
      section 3, without its scaling of filters.
    """
    mean = MeanLoss(loss_fn, params, batches, loss_reduction)
    check_direction("direction", direction, mean.movable)
    distances = _numbers(distances)
    if across is None:
        return np.asarray([mean.loss(scaled(t, direction)) for t in distances])
    check_direction("across", across, mean.movable)

    def at(s: float, t: float) -> float:
        along = scaled(s, direction), scaled(t, across)
        return mean.loss(jax.tree.map(added, *along, is_leaf=is_none))

    return np.asarray([[at(s, t) for t in distances] for s in distances])


def _numbers(distances: Any) -> list[float]:
    if isinstance(distances, list | tuple | range | np.ndarray | jax.Array):
        with contextlib.suppress(TypeError, ValueError):
            numbers = np.asarray(distances).astype(np.float64, casting="same_kind")
            if numbers.ndim == 1:
                return numbers.tolist()
    raise TypeError(
        f"distances={distances!r} must be a list, or an array of one axis, of numbers, such as "
        "[-1.0, 0.0, 1.0]."
    )

"""The algorithm: the gradient of the loss at an adversarial point near the parameters.

This is the only place where it is written. `value_and_grad` and `sharpness_aware` prepare its
arguments and hand on its result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._groups import Point, mean_over_points, over_parts_of_the_batch
from ._info import SharpnessInfo, describe
from ._mask import keep, perturbed_mask
from ._microbatch import ascent_batch, ascent_groups
from ._norm import unit_and_norm
from ._options import Options, is_static_zero
from ._perturbation import gradient_perturbation, move
from ._types import Evaluate, Evaluation, PyTree


def sharpness_aware_gradient(
    evaluate: Evaluate,
    params: PyTree,
    batch: tuple[PyTree, ...],
    rho: Any,
    options: Options,
    *,
    evaluate_ascent: Evaluate | None = None,
    ascent_grads: PyTree | None = None,
    with_info: bool = False,
) -> tuple[Evaluation, SharpnessInfo | None]:
    """Algorithm 1, lines 5 to 7: sample M, ascend on it, take the gradient of B at w_adv.

    Args:
      evaluate: one forward and backward pass, `evaluate(params, *batch)`.
      params: the parameters w.
      batch: the batch B; empty where `evaluate` holds its own.
      rho: the neighbourhood size, a scalar.
      options: the other settings.
      evaluate_ascent: the pass that the ascent gradient comes from, if another.
      ascent_grads: the ascent gradient at w, if it is known already.
      with_info: whether to compute the diagnostics.

    Returns:
      Loss, aux and gradient at w_adv, and the diagnostics or `None`.
    """
    if is_static_zero(rho) and not with_info:
        return evaluate(params, *batch), None  # the plain step, bit for bit and at its cost
    mask = perturbed_mask(options.perturb, params)

    def at_adversarial_point(micro_batch: tuple[PyTree, ...], batch: tuple[PyTree, ...]) -> Point:
        ascent, w_adv = _ascend(
            evaluate_ascent or evaluate, params, micro_batch, rho, options, mask, ascent_grads
        )
        descent = evaluate(w_adv, *batch)
        descent = descent._replace(grads=_in_dtypes_of(params, w_adv, descent.grads))
        if not with_info:
            return Point(descent, None)
        info = describe(
            ascent_loss=ascent.loss,
            descent_loss=descent.loss,
            ascent_grads=keep(mask, ascent.grads),
            descent_grads=keep(mask, descent.grads),
            params=keep(mask, params),
            w_adv=keep(mask, w_adv),
            rho=rho,
        )
        return Point(descent, info)

    if options.m == 1:
        point = at_adversarial_point(_micro_batch(batch, options, ascent_grads), batch)
    else:
        point = _over_groups(at_adversarial_point, evaluate, params, batch, options)
    if point.info is not None:
        point = point._replace(info=_of_the_step(point, params))
    return point.descent, point.info


def _micro_batch(batch: tuple[PyTree, ...], options: Options, ascent_grads: PyTree | None) -> Any:
    if not batch or ascent_grads is not None:
        return batch
    return ascent_batch(
        batch,
        options.ascent_fraction,
        batch_axis=options.batch_axis,
        data_shards=options.data_shards,
    )


def _over_groups(
    run: Callable[[Any, Any], Point],
    evaluate: Evaluate,
    params: PyTree,
    batch: tuple[PyTree, ...],
    options: Options,
) -> Point:
    micro_batches, parts = ascent_groups(
        batch,
        options.ascent_fraction,
        m=options.m,
        m_sharpness=options.m_sharpness,
        batch_axis=options.batch_axis,
        data_shards=options.data_shards,
    )
    if parts is None:
        return mean_over_points(lambda micro_batch: run(micro_batch, batch), micro_batches)
    return over_parts_of_the_batch(
        run,
        micro_batches,
        parts,
        options,
        whole_aux=lambda: jax.eval_shape(lambda: evaluate(params, *batch).aux),
    )


def _of_the_step(point: Point, params: PyTree) -> SharpnessInfo | None:
    """Return the diagnostics with the loss and gradient that the step returns, over every leaf."""
    grads = keep(perturbed_mask(None, params), point.descent.grads)
    return point.info and point.info._replace(
        descent_loss=point.descent.loss, descent_grad_norm=unit_and_norm(grads)[1]
    )


def _ascend(
    evaluate: Evaluate,
    params: PyTree,
    micro_batch: tuple[PyTree, ...],
    rho: Any,
    options: Options,
    mask: PyTree,
    grads: PyTree | None,
) -> tuple[Evaluation, PyTree]:
    """Line 6: w_adv = w + rho * g_M / ||g_M||_2, or as `options.perturbation` has it."""
    first = evaluate(params, *micro_batch) if grads is None else Evaluation(None, None, grads)
    if is_static_zero(rho):
        return first, params
    ascent, w_adv, epsilon = first, params, None
    for step in range(options.ascent_steps):
        if step:
            ascent = evaluate(w_adv, *micro_batch)
        # Each step has the length rho / ascent_steps, so w_adv stays in the ball of radius rho.
        move_by = (options.perturbation or gradient_perturbation)(
            keep(mask, ascent.grads), keep(mask, params), rho / options.ascent_steps
        )
        epsilon = move_by if epsilon is None else jax.tree.map(jnp.add, epsilon, move_by)
        # Always from w: adding up epsilon loses nothing, adding to a rounded w_adv would.
        w_adv = move(params, epsilon, options.adversarial_dtype)
    return first, w_adv


def _in_dtypes_of(params: PyTree, w_adv: PyTree, grads: PyTree) -> PyTree:
    """Return `grads` in the dtype it would have at w, where w_adv has another than w."""

    def cast(w: Any, v: Any, g: Any) -> Any:
        same = jnp.result_type(v) == jnp.result_type(w)
        return g if same else g.astype(jnp.result_type(w))

    return jax.tree.map(cast, params, w_adv, grads)

"""Parts of a batch, or of its ascent micro-batch, one after another.

For m-sharpness each has an adversarial point of its own; for gradient accumulation all share one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._aux import checked, grown_axes, put_together
from ._barriers import unknown
from ._dtypes import promoting
from ._examples import examples
from ._info import PointInfo
from ._options import Options
from ._reduction import counts, divisor_of, share_of, weight_of
from ._splitting import split_within_shards
from ._types import Evaluate, Evaluation, PyTree
from ._varying import types_of, zeros_like_type


class Point(NamedTuple):
    """What one adversarial point gives: the descent pass there, and diagnostics if asked for."""

    descent: Evaluation
    info: PointInfo | None


def mean_over_points(
    run: Callable[[PyTree], Point],
    micro_batches: PyTree,
    mean_aux: Callable[[PyTree], PyTree] | None,
) -> Point:
    """The paper's m-sharpness: the mean of the whole batch's gradients at m points.

    Loss and gradient are means. `aux` is that of the last point: each is the whole batch's, and
    mutable collections of different points have no mean. Or it is what `mean_aux` makes of all of
    them, stacked.
    """
    stack_aux = mean_aux is not None
    total = _fold(lambda group: (run(group), jnp.ones(())), micro_batches, stack_aux=stack_aux)
    point = total.divided_by(total.weight)
    if mean_aux is None:
        return point
    return point._replace(descent=point.descent._replace(aux=mean_aux(total.aux)))


def over_parts_of_the_batch(
    run: Callable[[PyTree, PyTree], Point],
    micro_batches: PyTree,
    parts: PyTree,
    options: Options,
    whole_aux: Callable[[], PyTree],
    shards: int,
) -> Point:
    """Foret's m-sharpness: each of m points with its own part of the batch.

    The parts are put together so that, at one and the same point, loss and gradient would be the
    whole batch's: `options.loss_reduction` says how the loss of a batch follows from its parts'.
    """
    reduction = options.loss_reduction

    def run_part(group: tuple[PyTree, PyTree]) -> tuple[Point, jax.Array]:
        micro_batch, part = group
        return run(micro_batch, part), weight_of(reduction, part)

    total = _fold(run_part, (micro_batches, parts), stack_aux=True)
    divisor = divisor_of(reduction, total.weight)
    point = total.divided_by(divisor)
    if not jax.tree.leaves(total.aux):
        aux = total.aux
    elif options.combine_aux is not None:
        aux = options.combine_aux(total.aux)
    else:
        axes = grown_axes(total.like.aux, whole_aux(), parts=total.weights.shape[0])
        aux = put_together(total.aux, axes, total.weights / divisor, shards)
    return point._replace(descent=point.descent._replace(aux=aux))


def accumulated(evaluate: Evaluate, limit: int, options: Options, shards: int) -> Evaluate:
    """Return `evaluate` in passes over at most `limit` examples each: gradient accumulation."""

    def evaluate_in_parts(params: PyTree, *batch: PyTree) -> Evaluation:
        n = examples(batch, options.batch_axis)
        passes = -(-n // limit)
        while n % (passes * shards) and passes * shards < n:
            passes += 1
        # T5X's limit may be less than an example a shard: then all are in one pass.
        if passes == 1 or n % (passes * shards):
            return evaluate(params, *batch)
        point = over_parts_of_the_batch(
            lambda _, part: Point(evaluate(params, *part), None),
            (),
            split_within_shards(batch, passes, options.batch_axis, shards),
            options,
            whole_aux=lambda: jax.eval_shape(lambda: evaluate(params, *batch).aux),
            shards=shards,
        )
        return point.descent

    return evaluate_in_parts


def is_float0(x: Any) -> bool:
    """Whether `x` is the gradient of an integer leaf, which has no numbers."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


class _Total(NamedTuple):
    """Weighted sums over the groups, and what is needed to turn them into a mean."""

    loss: Any
    grads: PyTree
    weight: jax.Array
    info: PointInfo | None  # means over the groups
    aux: PyTree  # stacked, or the last group's
    weights: Any  # of each group, where aux is stacked
    like: Evaluation  # one group's result: its dtypes are the ones to return

    @promoting
    def divided_by(self, divisor: Any) -> Point:
        def divide(like: Any, total: Any) -> Any:
            if is_float0(like):
                return np.zeros(like.shape, like.dtype)
            return (total / divisor.astype(jnp.finfo(total.dtype).dtype)).astype(like.dtype)

        loss, grads = jax.tree.map(
            divide, (self.like.loss, self.like.grads), (self.loss, self.grads)
        )
        return Point(Evaluation(loss, self.aux, grads), self.info)


def _fold(
    run: Callable[[PyTree], tuple[Point, jax.Array]], groups: PyTree, *, stack_aux: bool
) -> _Total:
    """Run the groups one after another, so that one adversarial point is held at a time.

    All of them in one loop: a first group ahead of it would be compiled a second time.
    """

    @functools.partial(jax.jit, inline=True)  # so that types and loop share one trace
    def results(group: PyTree) -> tuple[Evaluation, Any, jax.Array]:
        point, weight = run(group)
        checked(point.descent.aux)
        return point.descent, _weighted(point, weight), weight

    # Traced, not run, for the types of the sums: dtypes, shardings, and under `shard_map` the axes
    # that they vary over.
    like, sums_like, _ = types_of(results, jax.tree.map(lambda x: x[0], groups))
    types = (sums_like, None if stack_aux else like.aux)

    def body(carry: Any, group: PyTree) -> Any:
        sums, _ = carry
        descent, weighted, weight = results(group)
        sums = jax.tree.map(jnp.add, sums, weighted)
        return ((sums, None), (descent.aux, weight)) if stack_aux else ((sums, descent.aux), None)

    (sums, aux), stacked = jax.lax.scan(body, jax.tree.map(zeros_like_type, types), groups)
    aux, weights = stacked if stack_aux else (aux, None)
    loss, grads, weight, info, number = sums
    mean_info = None if info is None else info.mean_of(number)
    # That the sum of an unused parameter's zeros is zero XLA finds out too late to multiply it.
    grads = unknown(grads)
    return _Total(loss, grads, weight, mean_info, aux, weights, like)


def _weighted(point: Point, weight: jax.Array) -> tuple[Any, PyTree, jax.Array, Any, jax.Array]:
    """Return what is summed: loss and gradient times `weight`, in at least float32."""

    def times_weight(x: Any) -> Any:
        return jnp.zeros(()) if is_float0(x) else share_of(x, weight)

    loss, grads = jax.tree.map(times_weight, (point.descent.loss, point.descent.grads))
    counted = counts(weight)
    info = None if point.info is None else point.info.where(counted)
    return loss, grads, weight, info, counted

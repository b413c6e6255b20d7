"""m-sharpness: one adversarial point per group of examples, one group at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._info import SharpnessInfo
from ._options import LossReduction, Options
from ._types import Evaluation, PyTree


class Point(NamedTuple):
    """What one adversarial point gives: the descent pass there, and diagnostics if asked for."""

    descent: Evaluation
    info: SharpnessInfo | None


def mean_over_points(run: Callable[[PyTree], Point], micro_batches: PyTree) -> Point:
    """The paper's m-sharpness: the mean of the whole batch's gradients at m points.

    Loss and gradient are means. `aux` is that of the last point: each is the whole batch's, and
    mutable collections of different points have no mean.
    """
    total = _fold(lambda group: (run(group), jnp.float32(1)), micro_batches, stack_aux=False)
    return total.divided_by(total.weight)


def over_parts_of_the_batch(
    run: Callable[[PyTree, PyTree], Point],
    micro_batches: PyTree,
    parts: PyTree,
    options: Options,
    whole_aux: Callable[[], PyTree],
) -> Point:
    """Foret's m-sharpness: each of m points with its own part of the batch.

    The parts are put together so that, at one and the same point, loss and gradient would be the
    whole batch's: `options.loss_reduction` says how the loss of a batch follows from its parts'.
    """
    reduction = options.loss_reduction

    def run_part(group: tuple[PyTree, PyTree]) -> tuple[Point, jax.Array]:
        micro_batch, part = group
        return run(micro_batch, part), _weight(reduction, part)

    total = _fold(run_part, (micro_batches, parts), stack_aux=True)
    # If no part has any weight, nothing was added and the sum is 0; it must not become 0 / 0.
    divisor = (
        jnp.float32(1) if reduction == "sum" else jnp.where(total.weight == 0, 1, total.weight)
    )
    point = total.divided_by(divisor)
    if options.combine_aux is not None:
        aux = options.combine_aux(total.aux)
    else:
        aux = _combine_aux(total.aux, whole_aux(), total.weights / divisor)
    return point._replace(descent=point.descent._replace(aux=aux))


class _Total(NamedTuple):
    """Weighted sums over the groups, and what is needed to turn them into a mean."""

    loss: Any
    grads: PyTree
    weight: jax.Array
    info: SharpnessInfo | None  # means over the groups
    aux: PyTree  # stacked, or the last group's
    weights: Any  # of each group, where aux is stacked
    like: Evaluation  # one group's result: its dtypes are the ones to return

    def divided_by(self, divisor: Any) -> Point:
        def divide(like: Any, total: Any) -> Any:
            return like if _is_float0(like) else (total / divisor).astype(like.dtype)

        loss, grads = jax.tree.map(
            divide, (self.like.loss, self.like.grads), (self.loss, self.grads)
        )
        return Point(Evaluation(loss, self.aux, grads), self.info)


def _fold(
    run: Callable[[PyTree], tuple[Point, jax.Array]], groups: PyTree, *, stack_aux: bool
) -> _Total:
    """Run the groups one after another, so that one adversarial point is held at a time.

    The first runs ahead of the loop and gives the sums their types: dtypes, shardings, and under
    `shard_map` the axes that they vary over.
    """
    first, first_weight = run(jax.tree.map(lambda x: x[0], groups))

    def body(carry: Any, group: PyTree) -> Any:
        sums, _ = carry
        point, weight = run(group)
        sums = jax.tree.map(jnp.add, sums, _weighted(point, weight))
        aux = point.descent.aux
        return ((sums, None), (aux, weight)) if stack_aux else ((sums, aux), None)

    first_aux = first.descent.aux
    (sums, aux), stacked = jax.lax.scan(
        body,
        (_weighted(first, first_weight), None if stack_aux else first_aux),
        jax.tree.map(lambda x: x[1:], groups),
    )
    weights = None
    if stack_aux:
        aux, weights = jax.tree.map(_prepend, (first_aux, first_weight), stacked)
    loss, grads, weight, info = sums
    m = jax.tree.leaves(groups)[0].shape[0]
    return _Total(loss, grads, weight, _mean_info(info, m), aux, weights, first.descent)


def _weighted(point: Point, weight: jax.Array) -> tuple[Any, PyTree, jax.Array, Any]:
    """Return what is summed: loss and gradient times `weight` in at least float32.

    A group without weight adds exactly nothing, even where its own mean is 0 / 0.
    """

    def times_weight(x: Any) -> Any:
        wide = jnp.zeros(()) if _is_float0(x) else x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.where(weight == 0, 0, wide * weight)

    loss, grads = jax.tree.map(times_weight, (point.descent.loss, point.descent.grads))
    return loss, grads, weight, point.info


def _weight(reduction: LossReduction, part: tuple[PyTree, ...]) -> jax.Array:
    if not callable(reduction):
        return jnp.float32(1)
    weight = jnp.asarray(reduction(*part), jnp.float32)
    if weight.shape != ():
        raise ValueError(
            f"loss_reduction(batch) must return a scalar, the weight of the batch's mean loss, but "
            f"it returned an array of shape {weight.shape}."
        )
    return weight


def _mean_info(info: SharpnessInfo | None, m: int) -> SharpnessInfo | None:
    if info is None:
        return None
    mean = jax.tree.map(lambda x: x / m, info)
    return mean._replace(skipped_ascents=info.skipped_ascents)


def _combine_aux(aux: PyTree, whole: PyTree, share: jax.Array) -> PyTree:
    """Return the whole batch's aux from its parts', stacked in `aux`.

    `whole` has the shapes that the whole batch would give. An output that grows with the batch is
    put together along that axis; one that does not is taken to follow the loss.
    """
    m = share.shape[0]

    def combine(path: Any, parts: Any, whole: Any) -> Any:
        shape, name = parts.shape[1:], "aux" + jax.tree_util.keystr(path)
        if shape == whole.shape and jnp.issubdtype(parts.dtype, jnp.inexact):
            wide = parts.astype(jnp.promote_types(parts.dtype, jnp.float32))
            share_of = share.reshape((m,) + (1,) * len(shape))
            return jnp.sum(jnp.where(share_of == 0, 0, wide * share_of), 0).astype(parts.dtype)
        grown = [i for i, n in enumerate(shape) if whole.shape[i : i + 1] != (n,)]
        if (
            len(grown) == 1
            and whole.ndim == len(shape)
            and whole.shape[grown[0]] == m * shape[grown[0]]
        ):
            return jnp.concatenate(list(parts), axis=grown[0])
        raise TypeError(
            f"{name} is {parts.dtype}{list(shape)} for each of the m={m} parts of the batch and "
            f"{whole.dtype}{list(whole.shape)} for the whole batch, so it is not clear how the "
            "parts' make the whole batch's. Give combine_aux=, a function from the aux with leaves "
            "stacked along a first axis of size m to the aux of the batch."
        )

    return jax.tree_util.tree_map_with_path(combine, aux, whole)


def _prepend(first: jax.Array, rest: jax.Array) -> jax.Array:
    return jnp.concatenate([first[None], rest])


def _is_float0(x: Any) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0

"""Parts of a batch on different shards of a mesh, all at the same time.

Each shard works on its own part, and only the result is reduced over the mesh: one all-reduce of
the gradient, in a dtype of one's choice.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._aux import checked, grown_axes
from ._barriers import map_with_scalars, together
from ._dtypes import at_least_float32
from ._examples import refuse_sparse
from ._groups import Point, is_float0
from ._info import PointInfo
from ._layout import (
    Layout,
    as_given,
    as_names,
    explicit_among,
    manual_axes,
    names_in,
    names_in_type,
)
from ._notes import about_one_shard
from ._options import Options
from ._reduction import LossReduction, counts, divisor_of, share_of, weight_of
from ._types import Evaluate, Evaluation, PyTree
from ._varying import axes_of, varying


class _AlreadyReducedError(ValueError):
    """The loss is that of all shards, and would be added up a second time."""


def over_mesh_axes(
    run: Callable[[PyTree, PyTree, PyTree], Point],
    params: PyTree,
    batch: tuple[PyTree, ...],
    layout: Layout,
    options: Options,
    across: tuple[str, ...] = (),
    given: PyTree = (),
    evaluate: Evaluate | None = None,
) -> Point:
    """Run each of the batch's parts on the mesh shards that hold it, and reduce what comes out.

    The other axes of the mesh stay with the compiler, so `run` sees parameters and activations
    that are sharded over them as everywhere else.

    Args:
      run: `run(params, part, given)`, on one part. Its gradient must not be reduced over the axes.
      params: the parameters; every part has them whole, up to the other axes.
      batch: the batch, sharded over the layout's axes along the batch axis.
      layout: the mesh axes that number the parts.
      options: how the parts' loss, aux and gradient make the batch's.
      across: those of the axes along which parts have one adversarial point, and one `Point.info`.
      given: what else `run` reads, a tree: every part has its JAX arrays whole. `shard_map` may not
        close over those that lie on an explicit mesh.
      evaluate: one pass, as `Step` has it, for the shapes of aux; `None` where `run` gives none.

    Raises:
      ValueError: if a parameter is sharded over the axes.
    """
    _refuse_sharded(params, layout.axes, options)
    _refuse_unsharded(as_given(batch), layout, options.batch_axis)
    refuse_sparse(batch)
    combine_aux = options.combine_aux
    if layout.shards == 1:
        # Nothing to reduce, and no `shard_map`: over axes of size 1, with parameters sharded over
        # others, XLA's partitioner for CPUs fails in it.
        point = run(params, batch, given)
        aux = point.descent.aux
        if combine_aux is not None and jax.tree.leaves(aux):
            aux = combine_aux(jax.tree.map(lambda x: jnp.asarray(x)[None], checked(aux)))
        return point._replace(descent=point.descent._replace(aux=aux))
    over_shards = functools.partial(
        _over_shards, run, params, batch, layout, options, across, given, evaluate
    )
    with about_one_shard(layout.axes):
        try:
            return over_shards(check_vma=True)
        except _AlreadyReducedError:
            raise  # without the types below it could not be seen
        except (AssertionError, NotImplementedError, TypeError, ValueError):
            # JAX follows which values differ over the shards, and refuses loops and branches that
            # start from one that does not, such as a state of zeros, and some functions of its own.
            # Without that it computes the same here, where each sum over the shards is written
            # out; but not in a `shard_map` around that follows them. What fails then, too, is not
            # about that, and its error is the one to see.
            if manual_axes():
                raise
            return over_shards(check_vma=False)


def _over_shards(
    run: Callable[[PyTree, PyTree, PyTree], Point],
    params: PyTree,
    batch: tuple[PyTree, ...],
    layout: Layout,
    options: Options,
    across: tuple[str, ...],
    given: PyTree,
    evaluate: Evaluate | None,
    *,
    check_vma: bool,
) -> Point:
    axes, mesh, _ = layout
    arrays, filled = _arrays_of(given)
    # The batch and aux as lists: a class of the user's might refuse to be one of `PartitionSpec`s.
    examples, structure = jax.tree.flatten(batch)

    def on_shards(function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(
            lambda params, examples, arrays: function(
                params, structure.unflatten(examples), arrays
            ),
            mesh=mesh,
            in_specs=(PartitionSpec(), _specs(examples, axes, options.batch_axis), PartitionSpec()),
            out_specs=out_specs,
            axis_names=set(axes),
            check_vma=check_vma,
        )

    combine_aux = options.combine_aux
    aux_axes = None
    if evaluate is not None and combine_aux is None:
        with _in_context(mesh):
            aux_axes = _aux_axes(evaluate, params, batch, axes, on_shards)
    like: list[Any] = []

    def on_one_shard(
        params: PyTree, batch: tuple[PyTree, ...], arrays: tuple[jax.Array, ...]
    ) -> tuple[Any, PyTree, list[Any], Any]:
        # A copy of the parameters for each part: the gradient of a shared one would be reduced.
        point = run(jax.tree.map(lambda w: varying(w, axes), params), batch, filled(arrays))
        if check_vma:
            _refuse_reduced(point.descent.loss, axes)
        like[:] = (
            jax.tree.map(jax.typeof, point.descent.grads),
            jax.tree.structure(point.descent.aux),
        )
        weight = weight_of(options.loss_reduction, batch)
        total = _total_weight(weight, axes, options.loss_reduction)
        share = weight / divisor_of(options.loss_reduction, total)
        loss = jax.tree.map(lambda x: _reduce(x, share, axes), point.descent.loss)
        weigh = functools.partial(
            _weighted,
            dtype=options.reduction_dtype,
            may_be_zero=callable(options.loss_reduction),
        )
        weighted = map_with_scalars(weigh, (share,), point.descent.grads)
        info = point.info
        if info is not None and options.reduction_dtype is not None:
            # What it reads, the gradient of this part alone and the direction of its ascent, is
            # free to go before the reduction, which needs the most memory of all. XLA would put it
            # off to the end of the step. Reduced as it is, the gradient cannot go before.
            weighted, info = together(weighted, info)
        grads = jax.tree.map(lambda g, x: _sum(g, x, axes), point.descent.grads, weighted)
        aux = _aux_out(point.descent.aux, aux_axes, share, axes)
        if info is not None:
            info = _mean_info(info, weight, axes, across, options.loss_reduction)
        return loss, grads, aux, info

    on_all_shards = on_shards(
        on_one_shard,
        out_specs=(PartitionSpec(), PartitionSpec(), _aux_spec(aux_axes, axes), PartitionSpec()),
    )
    if not check_vma:
        # So JAX runs it outside `jax.jit`, too, where the mesh has other axes.
        on_all_shards = jax.jit(on_all_shards, inline=True)
    loss, grads, aux, info = on_all_shards(params, examples, arrays)
    grads = jax.tree.map(_float0_as_it_was, like[0], grads)
    aux = like[1].unflatten(aux)
    if combine_aux is not None and jax.tree.leaves(aux):
        aux = combine_aux(jax.tree.map(_whole_along_the_parts, aux))
    return Point(Evaluation(loss, aux, grads), info)


def reduced_over_shards(evaluate: Evaluate, layout: Layout, options: Options) -> Evaluate:
    """Return `evaluate` with each shard's gradient its own until it is reduced; without aux."""
    if not layout.axes:
        raise ValueError(
            f"reduction_dtype={options.reduction_dtype!r} is the dtype of a reduction over mesh "
            "axes, but it is not known which: name them in data_axes or group_axes. Inside "
            "jax.shard_map, where they are manual, leave it out: there the gradient is reduced by "
            "what you write."
        )

    def on_one_shard(params: PyTree, part: tuple[PyTree, ...], evaluate: Evaluate) -> Point:
        return Point(evaluate(params, *part)._replace(aux=None), None)

    def evaluate_on_shards(params: PyTree, *batch: PyTree) -> Evaluation:
        return over_mesh_axes(on_one_shard, params, batch, layout, options, given=evaluate).descent

    return evaluate_on_shards


def reduced_within_a_group(
    evaluation: Evaluation, part: tuple[PyTree, ...], across: tuple[str, ...], options: Options
) -> Evaluation:
    """Return loss and gradient of all parts along `across`, inside `shard_map`, without aux.

    They are marked as different on each shard, as the parameters are: what is differentiated there
    by one of them would else be summed over the shards.
    """
    reduction = options.loss_reduction
    share = weight_of(reduction, part)
    if reduction != "sum":
        # Of no weight at all the mean is 0 / 0, as it is to a loss that sees the whole group.
        share = share / _total_weight(share, across, reduction)

    def reduce(x: Any, dtype: Any) -> Any:
        total = _sum(x, _weighted(x, share, dtype), across)
        return _float0_as_it_was(x, varying(total, across))

    loss = jax.tree.map(lambda x: reduce(x, None), evaluation.loss)
    grads = jax.tree.map(lambda g: reduce(g, options.reduction_dtype), evaluation.grads)
    return Evaluation(loss, None, grads)


def _arrays_of(tree: PyTree) -> tuple[tuple[jax.Array, ...], Callable[..., Any]]:
    """Return the JAX arrays of a tree, and a function from such arrays to the tree with them."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def filled(arrays: tuple[jax.Array, ...]) -> Any:
        full = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            full[i] = x
        return structure.unflatten(full)

    return tuple(leaves[i] for i in places), filled


def _in_context(mesh: Any) -> Any:
    """Return the context of the mesh, which is that of `shard_map`'s function, too."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return contextlib.nullcontext()


def _reduce(x: Any, share: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return _sum(x, _weighted(x, share, None), axes)


def _weighted(x: Any, share: jax.Array, dtype: Any, *, may_be_zero: bool = True) -> jax.Array:
    """Return what of this part is summed, in the dtype of the reduction."""
    if is_float0(x):
        return jnp.zeros(())
    weighted = share_of(x, share, may_be_zero=may_be_zero)
    return weighted if dtype is None or jnp.iscomplexobj(x) else weighted.astype(dtype)


def _sum(like: Any, weighted: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return the sum of all parts, in the dtype of `like`."""
    if is_float0(like):
        return jnp.zeros(())
    wide = at_least_float32(like.dtype)
    if weighted.dtype == wide:
        return jax.lax.psum(weighted, axes).astype(like.dtype)

    def reduce(rounded: jax.Array) -> jax.Array:
        return jax.lax.psum(rounded, axes).astype(like.dtype)

    # XLA's CPU backend cannot reduce narrow types among some axes of a mesh (it aborts), and would
    # widen them to float32 in any case: so does this.
    return jax.lax.platform_dependent(
        weighted, cpu=lambda rounded: reduce(rounded.astype(wide)), default=reduce
    )


def _mean_info(
    info: PointInfo,
    weight: jax.Array,
    axes: tuple[str, ...],
    across: tuple[str, ...],
    reduction: LossReduction,
) -> PointInfo:
    """Return the mean over the groups with any weight, from the info of this shard's group."""
    of_groups = tuple(axis for axis in axes if axis not in across)
    if across:
        # The same on each of a group's shards, which its type does not say: that of the first.
        first = functools.reduce(jnp.logical_and, (jax.lax.axis_index(a) == 0 for a in across))
        info = jax.tree.map(lambda x: _total(jnp.where(first, x, 0), across), info)
        weight = _total_weight(weight, across, reduction)
    counted = counts(weight)
    totals = jax.tree.map(lambda x: _total(x, of_groups), info.where(counted))
    return totals.mean_of(_total_weight(counted, of_groups, reduction))


def _total_weight(weight: jax.Array, axes: tuple[str, ...], reduction: LossReduction) -> jax.Array:
    """Return the sum of the shards' weights: without a function for them, they are all alike."""
    if callable(reduction):
        return _total(weight, axes)
    return math.prod(jax.lax.axis_size(axis) for axis in axes) * weight  # no shard is asked


def _total(x: Any, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(varying(x, axes), axes)


def _float0_as_it_was(like: Any, g: Any) -> Any:
    return np.zeros(like.shape, like.dtype) if is_float0(like) else g


def _aux_axes(
    evaluate: Evaluate,
    params: PyTree,
    batch: tuple[PyTree, ...],
    axes: tuple[str, ...],
    on_shards: Callable[..., Any],
) -> list[int]:
    """Return how the aux of the parts make the batch's, from their shapes: nothing is computed."""
    arrays, filled = _arrays_of(evaluate)

    def of_one_part(
        params: PyTree, batch: tuple[PyTree, ...], arrays: tuple[jax.Array, ...]
    ) -> PyTree:
        # In `shard_map` and with a copy of the parameters, as it will be: elsewhere the loss sees
        # other axes, and its loops and branches other types.
        params = jax.tree.map(lambda w: varying(w, axes), params)
        aux = checked(filled(arrays)(params, *batch).aux)
        return jax.tree.map(lambda x: varying(jnp.asarray(x)[None], axes), aux)

    of_all_parts = on_shards(of_one_part, out_specs=PartitionSpec(axes))
    stacked = jax.eval_shape(of_all_parts, params, jax.tree.leaves(batch), arrays)
    if not jax.tree.leaves(stacked):
        return []
    parts = jax.tree.leaves(stacked)[0].shape[0]
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    whole = jax.eval_shape(lambda batch: evaluate(params, *batch).aux, batch)
    return grown_axes(part, whole, parts)


def _whole_along_the_parts(x: jax.Array) -> jax.Array:
    """Return `x` such that one part can be taken: along explicit axes no index goes into shards."""
    sharding = jax.typeof(x).sharding
    if sharding.spec[0] is None:
        return x
    spec = PartitionSpec(None, *sharding.spec[1:])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _aux_spec(aux_axes: list[int] | None, axes: tuple[str, ...]) -> Any:
    if aux_axes is None:  # stacked, for `combine_aux`
        return PartitionSpec(axes)
    return [_spec(axes, axis) for axis in aux_axes]


def _aux_out(
    aux: PyTree, aux_axes: list[int] | None, share: jax.Array, axes: tuple[str, ...]
) -> list[jax.Array]:
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(checked(aux))]
    if aux_axes is None:
        return [varying(x[None], axes) for x in leaves]

    def leaf(x: jax.Array, axis: int) -> jax.Array:
        return _reduce(x, share, axes) if axis == -1 else varying(x, axes)

    return [leaf(x, axis) for x, axis in zip(leaves, aux_axes, strict=True)]


def _specs(examples: list[Any], axes: tuple[str, ...], batch_axis: int) -> list[PartitionSpec]:
    def spec(x: Any) -> PartitionSpec:
        ndim = getattr(x, "ndim", 0)
        return _spec(axes, batch_axis % ndim if ndim else -1)

    return [spec(x) for x in examples]


def _spec(axes: tuple[str, ...], axis: int) -> PartitionSpec:
    return PartitionSpec() if axis == -1 else PartitionSpec(*(None,) * axis, axes)


def _refuse_unsharded(batch: PyTree, layout: Layout, batch_axis: int) -> None:
    """Raise if an array of the batch does not lie over those of the axes that are in types."""
    explicit = explicit_among(layout.axes, layout.mesh)
    if not explicit:
        return
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        ndim = getattr(x, "ndim", 0)
        if not -ndim <= batch_axis < ndim:
            continue  # of rank 0, or `examples` says what is wrong
        names = names_in(jax.typeof(x).sharding.spec[batch_axis])
        missing = [axis for axis in explicit if axis not in names]
        if missing:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} is not sharded over {missing} along "
                f"batch_axis={batch_axis}, as group_axes and reduction_dtype need it: its type is "
                f"{jax.typeof(x)}. Give the batch to jax.device_put, or inside jax.jit to "
                "jax.sharding.reshard, with the PartitionSpec "
                f"{_spec(layout.axes, batch_axis % ndim)}."
            )


def _refuse_reduced(loss: Any, axes: tuple[str, ...]) -> None:
    """Raise if the loss has been summed over the shards, as the gradient of it then would be."""
    missing = [] if loss is None else [axis for axis in axes if axis not in axes_of([loss])]
    if missing:
        raise _AlreadyReducedError(
            f"The loss is the same on all shards of {missing}, so it is reduced over them already. "
            "With group_axes or reduction_dtype it is that of one shard's examples: leave its "
            "jax.lax.psum or pmean out."
        )


def _refuse_sharded(params: PyTree, axes: tuple[str, ...], options: Options) -> None:
    groups = as_names(options.group_axes or ())
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        used = names_in_type(w) & set(axes)
        if not used:
            continue
        setting, why = "replicated_params", "each shard of these axes takes a gradient of it"
        if used & set(groups):
            setting = "group_axes"
            why = "each group along these axes has an adversarial point of its own"
        elif not groups:
            setting = "reduction_dtype"
            why = "each shard of these axes takes an ascent gradient of it"
        raise ValueError(
            f"The parameter params{jax.tree_util.keystr(path)} is sharded over {sorted(used)}, but "
            f"{why}, so it needs the parameter whole. Take axes that the parameters are replicated "
            f"over, or leave {setting} out."
        )

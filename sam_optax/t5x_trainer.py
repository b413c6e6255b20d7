"""T5X's train step with SAM's gradient in the place of the plain one.

The only module that imports T5X, which is not on PyPI. In gin:

  from sam_optax import t5x_trainer
  train_script.train.trainer_cls = @t5x_trainer.SharpnessAwareTrainer
"""
# T5X has no types, and may not be there.
# pyright: standard, reportMissingImports=false

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import FrozenDict, freeze
from gin import config as gin_config
from jax.sharding import NamedSharding, PartitionSpec
from t5x import losses, trainer
from t5x import metrics as metrics_lib

from ._checks import check_bool, check_integer, check_rho, is_static_zero
from ._examples import examples
from ._groups import accumulated
from ._info import SharpnessInfo
from ._layout import Axes, Layout, as_names, manual_axes
from ._mask import perturbed_mask
from ._microbatch import MSharpness
from ._options import Options
from ._reduction import LossReduction, divisor_of, share_of, weight_of
from ._step import Step
from ._types import Evaluation, Perturbation, PyTree

Batch = Mapping[str, jax.Array]

_LOSS = "sam/loss"  # where a model's metrics carry its loss
_A_LOSS = re.compile(r"loss(_per_\w+)?$")  # "z_loss_per_all_target_tokens", but no "loss_weights"


class SharpnessAwareTrainer(trainer.Trainer):
    """T5X's `Trainer` whose optimizer gets the gradient at the adversarial point.

    Model, optimizer, train state, data and checkpoints are the base trainer's, so a checkpoint of
    one is a checkpoint of the other. With `rho=0` the step is the base trainer's own.

    Each data shard gives its own first examples to the ascent: `ascent_fraction` of the batch, and
    at least one example a shard. With `num_microbatches` there is one ascent, in passes no larger
    than a micro-batch, and all micro-batches' gradients are taken at the point it leads to. Flax's
    mutables are those of the descent. Where the batch is divided (`group_axes`, `m_sharpness`
    `"foret"`) every part and micro-batch begins with the step's; their means are kept, and of what
    is not floating the last. A metric that keeps the last value has the last part's. There a loss
    that is an average over tokens or sequences is, over a part's micro-batches, the average over
    the part, times `num_microbatches`; elsewhere T5X adds up its micro-batches' averages, which is
    not the same where they have unequal numbers of tokens.

    T5X logs, next to its own metrics (whose `loss` is the one at w_adv, or the mean of those at m
    points), and with `diagnostics`:

      sam/ascent_loss: loss at w on the ascent examples. T5X's losses are sums over examples, so it
        is about `ascent_fraction` of `loss`, or more where one example of each data shard is more
        than that fraction. Where the model averages its loss it is about `loss` divided by
        `num_microbatches`, whose averages T5X adds up.
      sam/ascent_grad_norm, sam/descent_grad_norm: l2 norms of both gradients; with groups, the
        ascent's is the groups' mean.
      sam/cosine: of the angle between them, likewise.
      sam/realised_perturbation: `||w_adv - w|| / rho`; not 1 where the dtype of w_adv rounds it,
        or where a schedule's rho is 0 in some of the steps that are averaged, an ascent was
        skipped, or several `ascent_steps` go along a path that bends.
      sam/rho: the step's rho.
      sam/skipped_ascents: how many ascents since the last log had no direction.

    Args:
      model: as for `t5x.trainer.Trainer`, like all up to `weight_metrics_computer`. Gin does not
        hand on the bindings of `trainer.Trainer`: bind `learning_rate_fn` and `num_microbatches`.
      train_state: the train state.
      partitioner: any T5X partitioner with a mesh.
      eval_names: names of the evaluation datasets.
      summary_dir: folder of the TensorBoard logs.
      train_state_axes: how the train state is sharded.
      rng: key of the dropout masks, the same key in both passes. On several data shards an example
        has another place in the ascent's array than in the descent's, and so another mask; with
        `reduction_dtype` and no `group_axes`, each shard's part of the ascent has a key of its own.
      learning_rate_fn: learning rate by step.
      num_microbatches: number of micro-batches, or `None`.
      weight_metrics_computer: T5X's metrics of weights; its gradients are SAM's.
      rho: length of the perturbation; or a function of the train state's step, which for a
        fine-tuned checkpoint starts at the number of pre-training steps.
      ascent_fraction: share of the batch that the ascent gradient is taken on, in (0, 1].
      m: number of groups with an adversarial point each.
      m_sharpness: `"paper"` or `"foret"`, see `sam_optax.value_and_grad`.
      loss_reduction: how the loss of a batch follows from its parts', where it is divided: `"sum"`,
        `"mean"`, or a function from a part to its weight. By default as T5X's models have it: with
        a `loss_normalizing_factor` that counts tokens or sequences an average over them, otherwise
        a sum. Give it for a model that takes a mean on its own; metrics of losses, by their names,
        are taken likewise.
      ascent_steps: see `sam_optax.value_and_grad`, as all that follow.
      perturbation: from ascent gradient to perturbation.
      perturb: which parameters are perturbed, by default those too that the optimizer leaves
        alone: a predicate on paths such as `"decoder/logits_dense/kernel"`, or a tree of bools.
      adversarial_dtype: dtype of w_adv.
      data_shards: the number of contiguous blocks of the batch that give examples to the ascent, in
        place of the partitioner's data shards: a multiple of them makes runs on slices of
        different sizes take the same examples.
      group_axes: mesh axes along which each shard is a group with an adversarial point of its own:
        no all-reduce of the ascent gradient. Each shard then has dropout masks from a key of its
        own. Not for axes that parameters are sharded over. On several slices (T5X's
        `dcn_mesh_shape`, whose mesh is `("replica", "data", "model")`) all data shards are
        `("replica", "data")`, and `"replica"` makes a group of each slice.
      reduction_dtype: dtype of the all-reduce over `group_axes`, or else of the ascent gradient's.
      diagnostics: whether to compute and log the `sam/` metrics. They cost up to 0.4% of a step's
        FLOPs, and memory for the ascent's direction: half a copy of the parameters.

    Raises:
      ValueError: if a setting is out of its range, or parameters are sharded over mesh axes that
        `group_axes` or `reduction_dtype` need them whole on.
      TypeError: if a setting is of the wrong type.

    Example::

      # In a gin file, after T5X's finetune.gin; or use t5x_configs/sam.gin, which has this.
      from __gin__ import dynamic_registration
      import __main__ as train_script
      from sam_optax import t5x_trainer
      from t5x import utils

      train_script.train.trainer_cls = @t5x_trainer.SharpnessAwareTrainer
      t5x_trainer.SharpnessAwareTrainer:
        rho = 0.15
        num_microbatches = None
        learning_rate_fn = @utils.create_learning_rate_scheduler()

    References:
      Bahri et al., `Sharpness-Aware Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, Algorithm 1.
    """

    def __init__(
        self,
        model: Any,
        train_state: Any,
        partitioner: Any,
        eval_names: Any,
        summary_dir: str | None,
        train_state_axes: Any,
        rng: Any,
        learning_rate_fn: Callable[[Any], Any],
        num_microbatches: int | None,
        weight_metrics_computer: trainer.WeightMetricsComputer | None = None,
        *,
        rho: Any = 0.15,
        ascent_fraction: float = 0.25,
        m: int = 1,
        m_sharpness: MSharpness = "paper",
        loss_reduction: LossReduction | None = None,
        ascent_steps: int = 1,
        perturbation: Perturbation | None = None,
        perturb: Any = None,
        adversarial_dtype: Any = None,
        data_shards: int | None = None,
        group_axes: Axes | None = None,
        reduction_dtype: Any = None,
        diagnostics: bool = True,
    ):
        """Check the settings; see the class."""
        check_bool("diagnostics", diagnostics)
        if num_microbatches is not None:
            check_integer("num_microbatches", num_microbatches)
        _refuse_data_shards_with(data_shards, group_axes, reduction_dtype)
        self._diagnostics = diagnostics
        self._options = Options(
            rho=rho,
            ascent_fraction=ascent_fraction,
            m=m,
            m_sharpness=m_sharpness,
            loss_reduction=_loss_reduction(model) if loss_reduction is None else loss_reduction,
            combine_aux=functools.partial(_combine_parts, partitioner.mesh),
            mean_aux=_means_or_last,
            ascent_steps=ascent_steps,
            perturbation=perturbation,
            perturb=_like(train_state.params, perturb),
            adversarial_dtype=adversarial_dtype,
            batch_axis=0,
            data_axes=None if data_shards is not None else _data_axes(partitioner) or None,
            data_shards=data_shards,
            mesh=partitioner.mesh,
            group_axes=group_axes,
            reduction_dtype=reduction_dtype,
            replicated_params=_over_none_of(_data_axes(partitioner), train_state_axes.params),
            accumulation_steps=1,
        )
        _refuse_sharded_parameters(train_state_axes.params, self._options)
        if callable(rho) or not is_static_zero(rho):
            perturbed_mask(self._options.perturb, train_state.params)  # raises if it does not fit
        super().__init__(
            model=model,
            train_state=train_state,
            partitioner=partitioner,
            eval_names=eval_names,
            summary_dir=summary_dir,
            train_state_axes=train_state_axes,
            rng=rng,
            learning_rate_fn=learning_rate_fn,
            num_microbatches=num_microbatches,
            weight_metrics_computer=weight_metrics_computer,
        )

    @functools.cached_property
    def _partitioned_train_step(self) -> Any:
        rho = self._options.rho
        if not callable(rho) and is_static_zero(rho):
            return super()._partitioned_train_step

        def train_step(train_state: Any, batch: Batch) -> tuple[Any, Any]:
            # The only difference from T5X's own step is where the gradient comes from.
            grads, metrics, mutables = self._gradient(train_state, batch)
            return trainer.apply_grads(
                train_state,
                grads,
                metrics,
                self._learning_rate_fn(train_state.step),
                self._weight_metrics_computer,
                other_state_variables={"flax_mutables": mutables} if mutables else None,
            )

        return self._partitioner.partition(
            train_step,
            in_axis_resources=(self._train_state_axes, self._partitioner.data_partition_spec),
            out_axis_resources=(self._train_state_axes, None),
            donate_argnums=(0,),
        )

    def _gradient(self, train_state: Any, batch: Batch) -> tuple[PyTree, dict[str, Any], Any]:
        """Return gradient, metrics and flax mutables, as `accumulate_grads_microbatched` does."""
        rho = self._options.rho
        rho = rho(train_state.step) if callable(rho) else rho
        check_rho(rho)
        descent, info = self._step(train_state, batch, rho).gradient(train_state.params, (batch,))
        metrics, mutables = descent.aux
        reduction = self._options.loss_reduction
        if self._averages_parts():
            share = self._passes() / divisor_of(reduction, self._weight(batch))
            metrics = _with_losses_times(share, metrics)
        if info is None:
            return descent.grads, metrics, mutables
        if reduction == "sum":
            # T5X's metrics are sums over examples, and the diagnostics means over groups.
            info = info._replace(ascent_loss=info.ascent_loss * self._groups())
        return descent.grads, {**metrics, **_metrics_of(info, rho)}, mutables

    def _step(self, train_state: Any, batch: Batch, rho: Any) -> Step:
        """Return SAM's step, with a pass of T5X's as its pass."""
        options, k = self._options, self._passes()
        key = self._get_step_rng(train_state.step)
        b, shards = examples(batch, options.batch_axis), self._layout().shards
        parts = shards * options.m if self._groups_have_parts() else 1
        if k > 1 and b % (parts * k):
            each = f" of each of {parts} parts (m={options.m}, data shards={shards})"
            fitting = [n for n in range(1, b + 1) if b % (parts * n) == 0]
            raise ValueError(
                f"num_microbatches={k}{each if parts > 1 else ''} cannot share the batch of b={b} "
                f"examples evenly: b must be a multiple of {parts * k}"
                f"{f', or num_microbatches in {fitting}' if fitting else ''}."
            )

        def one_pass(params: PyTree, *batch: PyTree) -> Evaluation:
            return self._evaluate(train_state, params, *batch, key=key)

        def one_of_k(params: PyTree, *batch: PyTree) -> Evaluation:
            # The mean of the parts is taken here, and T5X adds up its micro-batches' averages.
            times = k if self._averages_parts() else 1
            one = one_pass(params, *batch)
            grads = jax.tree.map(lambda g: g * times, one.grads)
            return one._replace(loss=one.loss * times, grads=grads)

        def t5x_micro_batches(params: PyTree, *batch: PyTree) -> Evaluation:
            return self._evaluate(train_state, params, *batch, key=key, num_microbatches=k)

        # T5X's loop gives every micro-batch this key, which has to be the ascent's, too.
        key_in_loop = jax.random.split(key)[1] if k > 1 else key

        def ascent_pass(params: PyTree, *batch: PyTree) -> Evaluation:
            evaluation = self._evaluate(train_state, params, *batch, key=key_in_loop)
            return evaluation._replace(aux=({}, None))

        def ascent_passes(params: PyTree, *batch: PyTree) -> Evaluation:
            here = self._layout()
            limit = max(1, b // k * here.shards // shards)
            only_grads = accumulated(ascent_pass, limit, options, here.shards)
            return only_grads(params, *batch)

        if k > 1 and self._groups_have_parts():
            # T5X's loop takes micro-batches of the whole batch, and here each group has a part.
            options = dataclasses.replace(options, accumulation_steps=k)
            return Step(
                one_of_k, rho, options, evaluate_ascent=one_pass, with_info=self._diagnostics
            )
        return Step(
            t5x_micro_batches,
            rho,
            options,
            evaluate_ascent=ascent_passes,
            with_info=self._diagnostics,
        )

    def _layout(self) -> Layout:
        """Return how the batch is sharded here, where some axes may be a `shard_map`'s."""
        return Layout.over(_data_axes(self._partitioner), self._partitioner.mesh)

    def _groups_have_parts(self) -> bool:
        """Whether each group has a part of the batch."""
        options = self._options
        return options.group_axes is not None or (options.m > 1 and options.m_sharpness == "foret")

    def _averages_parts(self) -> bool:
        """Whether what the parts' losses are averages of are not all of the batch."""
        return self._options.loss_reduction != "sum" and self._groups_have_parts()

    def _weight(self, batch: Batch) -> jax.Array:
        """Return how much a batch, or a part of it, weighs in sums of losses that are averages."""
        reduction = self._options.loss_reduction
        if callable(reduction):
            return weight_of(reduction, (batch,))
        return jnp.asarray(examples(batch, self._options.batch_axis), float)  # parts of one size

    def _passes(self) -> int:
        """Return the number of T5X's micro-batches."""
        return max(1, self._num_microbatches or 1)

    def _groups(self) -> int:
        """Return the number of adversarial points."""
        options = self._options
        if options.group_axes is None:
            return options.m
        return Layout.over(as_names(options.group_axes), options.mesh).shards

    def _evaluate(
        self,
        train_state: Any,
        params: PyTree,
        batch: Batch,
        *,
        key: Any,
        num_microbatches: int | None = None,
    ) -> Evaluation:
        """Return T5X's gradient of `batch` at `params`, here: on the mesh, or in one group."""
        spec = _without(self._partitioner.data_partition_spec, manual_axes())
        for axis in manual_axes():
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        with _axis_rules_here():
            grads, metrics, mutables = trainer.accumulate_grads_microbatched(
                _TellingItsLoss(self._model),
                train_state.replace_params(params),
                batch,
                key,
                num_microbatches,
                spec,
            )
        metrics = dict(metrics)
        loss = metrics.pop(_LOSS).total
        if self._averages_parts():
            # Its losses weigh as much as the part does, so that T5X's sums of them are right.
            metrics = _with_losses_times(self._weight(batch), metrics)
        return Evaluation(loss, jax.tree.map(jnp.asarray, (metrics, mutables)), grads)


@gin_config.register_finalize_hook
def _check_bindings(bindings: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Raise on a setting that cannot be meant as soon as gin has parsed it.

    T5X makes the trainer once the data is there and the checkpoint is read.
    """
    trainer_class = SharpnessAwareTrainer
    bound = bindings.get(("", f"{trainer_class.__module__}.{trainer_class.__name__}"))
    if bound is None:
        return
    settings = {
        # A copy of what gin has bound is what it stands for.
        setting.name: copy.deepcopy(bound.get(setting.name, setting.default))
        for setting in inspect.signature(trainer_class).parameters.values()
        if setting.kind is setting.KEYWORD_ONLY
    }
    check_bool("diagnostics", settings.pop("diagnostics"))
    _refuse_data_shards_with(*map(settings.get, ("data_shards", "group_axes", "reduction_dtype")))
    if settings["loss_reduction"] is None:
        settings["loss_reduction"] = "sum"  # or as the model has it
    Options(
        **settings,
        combine_aux=None,
        batch_axis=0,
        data_axes=None,
        mesh=None,
        replicated_params=None,
        accumulation_steps=1,
    )


class _TellingItsLoss:
    """A model whose metrics have its loss, which T5X's accumulation would drop."""

    def __init__(self, model: Any):
        self._model = model

    def loss_fn(self, params: PyTree, batch: Batch, key: Any, *mutables: Any) -> Any:
        loss, aux = self._model.loss_fn(params, batch, key, *mutables)
        metrics, *mutables_out = aux if mutables else (aux,)
        metrics = {**metrics, _LOSS: metrics_lib.Sum.from_model_output(loss)}
        return loss, ((metrics, *mutables_out) if mutables else metrics)


def _with_losses_times(factor: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return T5X's metrics, losses by their names multiplied."""

    def times(name: str, metric: Any) -> Any:
        if not _A_LOSS.search(name) or getattr(metric, "total", None) is None:
            return metric
        return metric.replace(total=share_of(jnp.asarray(metric.total), factor))

    return {name: times(name, metric) for name, metric in metrics.items()}


def _metrics_of(info: SharpnessInfo, rho: Any) -> dict[str, Any]:
    values = {
        "ascent_loss": info.ascent_loss,
        "ascent_grad_norm": info.ascent_grad_norm,
        "descent_grad_norm": info.descent_grad_norm,
        "cosine": info.cosine,
        "realised_perturbation": info.realised_perturbation,
        "rho": rho,
    }
    metrics = {
        f"sam/{name}": metrics_lib.AveragePerStep.from_model_output(jnp.float32(value))
        for name, value in values.items()
    }
    skipped = metrics_lib.Sum.from_model_output(info.skipped_ascents)
    return {**metrics, "sam/skipped_ascents": skipped}


def _combine_parts(mesh: Any, aux: tuple[dict[str, Any], Any]) -> tuple[dict[str, Any], Any]:
    """Return the metrics and mutables of a batch from its parts', stacked along a first axis."""
    if not manual_axes():
        # Parts that are groups on the mesh: gather their few numbers once, not in every merge.
        aux = jax.lax.with_sharding_constraint(aux, NamedSharding(mesh, PartitionSpec()))
    metrics, mutables = aux
    # A metric without arrays, such as one of time, waits to be told what it measures.
    merged = {k: v.reduce() if jax.tree.leaves(v) else v for k, v in metrics.items()}
    return merged, _means_or_last(mutables)


def _means_or_last(stacked: PyTree) -> PyTree:
    """Return the means of what is floating, and the last of what is not, along a first axis."""

    def combine(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.mean(x, axis=0) if floating else x[-1]

    return jax.tree.map(combine, stacked)


def _loss_reduction(model: Any) -> LossReduction:
    """Return how the loss of a batch follows from its parts': T5X's are sums unless normalised.

    A number of tokens or sequences that T5X divides by is the weight of a part's loss.
    """
    factor = getattr(model, "_loss_normalizing_factor", None)
    if not isinstance(factor, str | losses.SpecialLossNormalizingFactor):
        return "sum"
    return lambda batch: losses.get_loss_normalizing_factor_and_weights(factor, batch)[0]


def _refuse_data_shards_with(data_shards: Any, group_axes: Any, reduction_dtype: Any) -> None:
    if data_shards is None:
        return
    blocks = f"data_shards={data_shards!r} says which blocks of the batch give ascent examples"
    if group_axes is not None:
        raise ValueError(
            f"{blocks}, but with group_axes={group_axes!r} each shard has its own: leave one out."
        )
    if reduction_dtype is not None:
        raise ValueError(
            f"{blocks}, but with reduction_dtype={reduction_dtype!r} each of the partitioner's "
            "data shards takes the gradient of its own: leave one out."
        )


def _data_axes(partitioner: Any) -> tuple[str, ...]:
    """Return the mesh axes that the batch is sharded over, major first; none if it is not."""
    axes = [axis for axis in partitioner.data_partition_spec if axis is not None]
    return as_names(axes[0]) if axes else ()


def _without(spec: Any, axes: tuple[str, ...]) -> PartitionSpec:
    """Return `spec` without `axes`."""

    def entry(names: Any) -> Any:
        if names is None or names is PartitionSpec.UNCONSTRAINED:
            return names
        return tuple(name for name in as_names(names) if name not in axes) or None

    return PartitionSpec(*map(entry, spec))


def _axis_rules_here() -> Any:
    """Return the context of the logical axis rules in force, without the axes of a `shard_map`.

    There a constraint may name only the axes that the compiler still has to itself.
    """
    rules = linen.get_logical_axis_rules()
    here = manual_axes()
    return linen.logical_axis_rules(
        [(name, _without((mesh_axes,), here)[0]) for name, mesh_axes in rules] if here else rules
    )


def _like(params: PyTree, perturb: Any) -> Any:
    """Return what gin and JSON write as a dict as what T5X's parameters are."""
    is_dict = isinstance(params, FrozenDict) and isinstance(perturb, Mapping)
    return freeze(perturb) if is_dict else perturb


def _refuse_sharded_parameters(param_axes: PyTree, options: Options) -> None:
    if options.group_axes is not None:
        needed, setting = as_names(options.group_axes), f"group_axes={options.group_axes!r}"
    elif options.reduction_dtype is not None:
        needed = as_names(options.data_axes or ())
        setting = f"reduction_dtype={options.reduction_dtype!r}"
    else:
        return
    for path, spec, used in _sharded(param_axes):
        if used & set(needed):
            raise ValueError(
                f"{setting} needs every parameter whole along {needed!r}, but "
                f"params{jax.tree_util.keystr(path)} is sharded as {spec}. Use "
                "standard_logical_axis_rules(parameter_partitioning_dims=1), or leave it out."
            )


def _over_none_of(axes: tuple[str, ...], param_axes: PyTree) -> bool:
    """Whether no parameter is sharded over any of `axes`."""
    return not any(used & set(axes) for _, _, used in _sharded(param_axes))


def _sharded(param_axes: PyTree) -> Iterator[tuple[Any, PartitionSpec, set[str]]]:
    """Yield where each parameter is, how it is sharded, and over which mesh axes."""
    specs = jax.tree_util.tree_leaves_with_path(
        param_axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    for path, spec in specs:
        yield path, spec, {axis for entry in spec if entry for axis in as_names(entry)}

"""SAM as an Optax gradient transformation around any inner optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ._checks import check_bool, check_gradient, check_rho
from ._grad_fn import as_optax_calls_it, evaluate_with
from ._layout import Axes
from ._microbatch import MSharpness
from ._options import Options
from ._outer import refuse_outer_wrapper
from ._reduction import LossReduction
from ._step import Step
from ._types import Perturbation, PyTree

_MISSING: Any = object()


class ScheduledSharpnessState(NamedTuple):
    """State of `sharpness_aware` where rho is a schedule.

    Attributes:
      count: int32 scalar, the number of steps taken, which rho is a function of.
      inner_state: state of the inner optimizer.

    Example:
      A run that had no schedule for its first 1,000 steps goes on with one:

      >>> import jax.numpy as jnp, optax, sam_optax
      >>> params = {"w": jnp.zeros(2)}
      >>> state = sam_optax.sharpness_aware(optax.adam(1e-3), rho=0.05).init(params)
      >>> state = sam_optax.ScheduledSharpnessState(jnp.int32(1000), state)
      >>> int(state.count)
      1000
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any


def sharpness_aware(
    inner: optax.GradientTransformation | None = None,
    rho: Any = 0.15,
    ascent_fraction: float = 0.25,
    m: int = 1,
    *,
    m_sharpness: MSharpness = "paper",
    loss_reduction: LossReduction = "mean",
    combine_aux: Callable[[PyTree], PyTree] | None = None,
    ascent_steps: int = 1,
    perturbation: Perturbation | None = None,
    perturb: Callable[[str], bool] | PyTree | None = None,
    adversarial_dtype: Any = None,
    batch_axis: int = 0,
    data_axes: Axes | None = None,
    mesh: Mesh | None = None,
    data_shards: int | None = None,
    group_axes: Axes | None = None,
    reduction_dtype: Any = None,
    replicated_params: bool | None = None,
    accumulation_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimization with the optimizer `inner`.

    One update takes the gradient on the ascent micro-batch, moves to the adversarial point w_adv,
    takes the whole batch's gradient there, and gives it to `inner` together with the parameters w:

      w_adv = w + rho * g_M / ||g_M||_2,   w <- inner(w, grad L_B(w_adv))

    `inner` counts one step per step. The state is the state of `inner` itself, so checkpoints with
    and without SAM are the same; a schedule for rho adds a step count.

    What acts on the gradient, such as clipping, belongs into `inner`: placed before this
    transformation in a chain it acts on the ascent gradient that `updates` gives, and on nothing
    where that is `None`. Wrappers that act on the gradient from outside (`optax.MultiSteps`,
    `optax.apply_if_finite`, `optax.masked`) go with `value_and_grad` instead.

    Args:
      inner: any Optax optimizer. `None`: Adafactor as T5 fine-tunes with it,
        `optax.adafactor(1e-3)`.
      rho: length of the perturbation, at least 0, or a schedule: a function of the step count.
      ascent_fraction: as for `value_and_grad`; so are the arguments that follow.
      m: number of groups, each with its own adversarial point.
      m_sharpness: `"paper"` or `"foret"`.
      loss_reduction: `"mean"`, `"sum"`, or a function from a part of the batch to its weight.
      combine_aux: from the parts' aux, stacked, to the batch's.
      ascent_steps: number of steps to the adversarial point.
      perturbation: from ascent gradient to perturbation.
      perturb: which parameters are perturbed.
      adversarial_dtype: floating dtype of w_adv.
      batch_axis: the axis of the examples in every array of the batch.
      data_axes: the mesh axes that the batch axis is sharded over.
      mesh: the mesh; by default the one of `jax.set_mesh`.
      data_shards: the number of data shards, in place of `data_axes`.
      group_axes: mesh axes whose shards are groups with an adversarial point each.
      reduction_dtype: dtype of the gradient's all-reduce over `group_axes`, or of the ascent
        gradient's over `data_axes`.
      replicated_params: whether no parameter is sharded over any of `data_axes`: `False` with FSDP.
      accumulation_steps: number of micro-batches of the descent pass.

    Returns:
      A transformation. Its `init` is that of `inner`. Its update function returns the updates and
      the state, of the shapes and dtypes that `inner` gives them:

      `update(updates, state, params, *, grad_fn, batch=None, return_info=False, **extra)`

      * `updates`: `None`, or a tree without leaves. Where it is given, it is the ascent gradient,
        and only the descent pass is left to do (and what follows the first of `ascent_steps`, on
        the whole batch).
      * `grad_fn`: `grad_fn(params, batch)`, such as `jax.grad(loss_fn)` or
        `jax.value_and_grad(loss_fn)`, the latter with aux only where `return_info`. The value, the
        loss at w_adv, is given to `inner`, as the extra argument `value` (and the gradient as
        `grad`), unless `extra` has one. Without `batch` it is called as `grad_fn(params)`, or,
        where `updates` is given and its second argument is `i` or begins with `_`, as
        `optax.contrib.sam` calls it, `grad_fn(params, i)`. For complex parameters it returns what
        Optax takes, the conjugate of JAX's gradient.
      * `batch`: pytree of the batch B. It may be left out where there is nothing to take a
        micro-batch from it for: if `updates` is given, or `ascent_fraction=1` (both with `m=1`, no
        `group_axes` and `accumulation_steps=1`).
      * `return_info`: whether to return `(updates, state, info)`, with the loss, aux and the
        diagnostics in a `SharpnessInfo`. Not inside `optax.chain`, which expects two results.
      * `extra`: passed on to `inner`; `batch` is not. A line search in it (`optax.lbfgs`) needs
        `value=loss_fn(params, batch)`, the loss at w, and a `value_fn` that holds the batch.

    Raises:
      ValueError: if a setting is out of its range; from `init` and `update`, if the wrapper around
        cannot work; from `update`, if an argument is missing, `updates` is another tree than
        `params`, `grad_fn` would take an ascent itself or returns an aux that nobody is given, the
        batch cannot be divided as the settings say, or the schedule gives a rho that is negative or
        not finite (seen only where it is not traced).
      TypeError: if a setting is of the wrong type; from `update`, if the arrays of `updates`, or
        what `grad_fn` returns, are no gradient of `params`, the schedule gives no number, or
        `state` has no step count for it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
      >>> params = {"w": jnp.zeros(2)}
      >>> batch = {"x": jnp.eye(2).repeat(4, axis=0), "y": jnp.ones(8)}
      >>> tx = sam_optax.sharpness_aware(optax.sgd(0.1), rho=0.05)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def train_step(params, state, batch):
      ...     updates, state, info = tx.update(
      ...         None, state, params,
      ...         grad_fn=jax.value_and_grad(loss_fn), batch=batch, return_info=True)
      ...     return optax.apply_updates(params, updates), state, info.descent_loss
      >>> params, state, loss = train_step(params, state, batch)
      >>> print(f"{loss:.3f}", params["w"])
      1.051 [0.105 0.1  ]

    References:
      Bahri et al., `Sharpness-Aware Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, Algorithm 1.
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, eq. 2 and 3.
    """
    optimizer = _inner_optimizer(inner)
    options = Options(
        rho=rho,
        ascent_fraction=ascent_fraction,
        m=m,
        m_sharpness=m_sharpness,
        loss_reduction=loss_reduction,
        combine_aux=combine_aux,
        ascent_steps=ascent_steps,
        perturbation=perturbation,
        perturb=perturb,
        adversarial_dtype=adversarial_dtype,
        batch_axis=batch_axis,
        data_axes=data_axes,
        mesh=mesh,
        data_shards=data_shards,
        group_axes=group_axes,
        reduction_dtype=reduction_dtype,
        replicated_params=replicated_params,
        accumulation_steps=accumulation_steps,
    )
    scheduled = callable(rho)

    def init_fn(params: PyTree) -> Any:
        refuse_outer_wrapper()
        inner_state = optimizer.init(params)
        if not scheduled:
            return inner_state
        return ScheduledSharpnessState(jnp.zeros((), jnp.int32), inner_state)

    def update_fn(
        updates: PyTree | None,
        state: Any,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[..., Any] = _MISSING,
        batch: PyTree | None = None,
        return_info: bool = False,
        **extra: Any,
    ) -> Any:
        if not jax.tree.leaves(updates):
            updates = None  # Flax's nnx.Optimizer makes an empty tree of None
        refuse_outer_wrapper(has_updates=updates is not None)
        _check_arguments(updates, params, grad_fn, batch, options)
        check_bool("return_info", return_info)
        _check_state(state, scheduled)
        inner_state, rho_now = (state.inner_state, rho(state.count)) if scheduled else (state, rho)
        check_rho(rho_now)
        if batch is None and updates is not None:
            grad_fn = as_optax_calls_it(grad_fn)
        step = Step(
            evaluate_with(grad_fn, keeps_aux=return_info),
            rho_now,
            options,
            ascent_grads=updates,
            with_info=return_info,
        )
        evaluation, info = step.gradient(params, () if batch is None else (batch,))
        if evaluation.loss is not None:
            extra = {"value": evaluation.loss, "grad": evaluation.grads} | extra
        updates, new_state = optimizer.update(evaluation.grads, inner_state, params, **extra)
        if scheduled:
            count = jnp.asarray(optax.safe_increment(state.count))
            new_state = ScheduledSharpnessState(count, new_state)
        if info is None:
            return updates, new_state
        return updates, new_state, info._replace(aux=evaluation.aux)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _inner_optimizer(inner: Any) -> optax.GradientTransformationExtraArgs:
    if inner is None:
        inner = optax.adafactor(1e-3)
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner={inner!r} must be an Optax optimizer such as optax.adam(1e-3); of an "
            "optax.MultiSteps give its .gradient_transformation()."
        )
    return optax.with_extra_args_support(inner)


def _check_state(state: Any, scheduled: bool) -> None:
    if not scheduled and isinstance(state, ScheduledSharpnessState):
        raise TypeError(
            "Where rho is a number, the state is the inner optimizer's, but it is a "
            "ScheduledSharpnessState. To go on from a run with a schedule, give state.inner_state."
        )
    if scheduled and not isinstance(state, ScheduledSharpnessState):
        raise TypeError(
            "Where rho is a schedule, the state is the ScheduledSharpnessState that init returns, "
            f"but it is a {type(state).__name__}. To go on from a run without a schedule, give "
            "sam_optax.ScheduledSharpnessState(jnp.int32(count), state)."
        )


def _needs_the_batch(updates: PyTree | None, options: Options) -> bool:
    divides = options.group_axes is not None or options.accumulation_steps > 1
    return divides or (updates is None and (options.ascent_fraction != 1 or options.m > 1))


def _check_arguments(
    updates: PyTree | None, params: PyTree | None, grad_fn: Any, batch: Any, options: Options
) -> None:
    if params is None:
        raise ValueError(
            "sharpness_aware needs the parameters: update(None, state, params, grad_fn=..., ...)."
        )
    if not callable(grad_fn):
        raise ValueError(
            f"sharpness_aware needs grad_fn, a function such as jax.grad(loss_fn), but it is "
            f"{'missing' if grad_fn is _MISSING else repr(grad_fn)}: "
            "update(None, state, params, grad_fn=grad_fn, batch=batch)."
        )
    if getattr(grad_fn, "takes_an_ascent", False):
        raise ValueError(
            "grad_fn comes from sam_optax.value_and_grad, which takes the ascent itself, and "
            "sharpness_aware would take another around it: give jax.value_and_grad(loss_fn) as "
            "grad_fn, or give the gradient to the inner optimizer alone."
        )
    if batch is None and _needs_the_batch(updates, options):
        raise ValueError(
            "sharpness_aware needs the batch, to divide it as its settings say "
            f"(ascent_fraction={options.ascent_fraction}, m={options.m}, "
            f"group_axes={options.group_axes!r}, "
            f"accumulation_steps={options.accumulation_steps}): update(None, state, params, "
            "grad_fn=grad_fn, batch=batch). A grad_fn that holds its own batch needs "
            "ascent_fraction=1, m=1, no group_axes and accumulation_steps=1; where the ascent "
            "gradient is given as updates, any ascent_fraction."
        )
    if updates is None:
        return
    if options.m > 1 or options.group_axes is not None:
        raise ValueError(
            f"updates is the ascent gradient of one group, but there are m={options.m}, "
            f"group_axes={options.group_axes!r}. Give updates=None, or m=1 and no group_axes."
        )
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise ValueError(
            "updates, where it is given, is the ascent gradient and must have the structure of "
            f"params, {jax.tree.structure(params)}, but it has {jax.tree.structure(updates)}."
        )
    check_gradient("updates, the ascent gradient,", updates, params)

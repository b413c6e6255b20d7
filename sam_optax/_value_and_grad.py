"""SAM as a gradient: the drop-in for `jax.value_and_grad`."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ._arguments import argument_numbers, check_given, refuse_other_examples
from ._checks import check_bool, check_callable, is_static_zero
from ._layout import Axes
from ._microbatch import MSharpness
from ._options import Options
from ._reduction import LossReduction
from ._step import Step
from ._types import Evaluate, Evaluation, Perturbation, PyTree


def value_and_grad(
    loss_fn: Callable[..., Any],
    rho: Any = 0.15,
    ascent_fraction: float = 0.25,
    m: int = 1,
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] | None = None,
    return_info: bool = False,
    m_sharpness: MSharpness = "paper",
    loss_reduction: LossReduction = "mean",
    combine_aux: Callable[[PyTree], PyTree] | None = None,
    ascent_steps: int = 1,
    perturbation: Perturbation | None = None,
    perturb: Callable[[str], bool] | PyTree | None = None,
    ascent_loss_fn: Callable[..., Any] | None = None,
    adversarial_dtype: Any = None,
    allow_int: bool = False,
    batch_axis: int = 0,
    data_axes: Axes | None = None,
    mesh: Mesh | None = None,
    data_shards: int | None = None,
    group_axes: Axes | None = None,
    reduction_dtype: Any = None,
    replicated_params: bool | None = None,
    accumulation_steps: int = 1,
) -> Callable[..., Any]:
    """Return a function that gives loss and gradient at the adversarial point near its parameters.

    With the default settings the function computes, for a batch B of b examples,

      w_adv = w + rho * grad L_M(w) / ||grad L_M(w)||_2,  M the first b/4 examples of B
      loss, grads = L_B(w_adv), grad L_B(w_adv)

    and is called where `jax.value_and_grad(loss_fn)` was. Any optimizer takes the gradient as it
    takes a plain one, and a step costs `1 + ascent_fraction` plain ones. A gradient on M that is
    zero or not finite gives no direction to ascend in: then `w_adv` is w and the step is the plain
    one, in the dtype of `w_adv`. `rho=0` is `jax.value_and_grad`, bit for bit: of the batch, or
    with `accumulation_steps` of every micro-batch.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)`, a scalar loss or `(loss, aux)`. The
        gradient is that by `params`, one tree (`(encoder, decoder)` is one too). Extra arguments
        (dropout keys, mutable collections) are passed on as they are, the same in both passes.
        `aux` comes from the descent pass, on the whole batch, and at w_adv, as do parameters that
        it contains. It is called for each pass, so it must be pure: an object that gives another
        random key in each call is called before it, not inside.
      rho: length of the perturbation, at least 0; or a traced scalar, of which that cannot be
        checked. For a schedule give its value, `rho=schedule(step)`, inside the train step. Give it
        by name: here `jax.value_and_grad` has `argnums`, and a 0 that means that turns SAM off.
      ascent_fraction: share of the batch that the ascent gradient is taken on, in (0, 1]. See
        `ascent_batch` for which examples these are.
      m: number of groups, each with its own adversarial point ("m-sharpness").
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      argnums: as for `jax.value_and_grad`, which positional argument of `loss_fn` is `params`, or
        which are, for a tuple of gradients. These are one point: their norm is of all, and the
        paths of `perturb` begin with the place in `argnums`, `"0/decoder/wo/kernel"`.
      batch_argnums: which positional arguments of `loss_fn` hold the examples, counted from its
        first, 0: one number, or several where inputs and labels are apart. By default 1; required
        if `argnums` is not 0. While it is left out and the batch is divided, another argument that
        looks like examples raises: one that `loss_fn` calls `batch`, or whose arrays have as many
        rows as the batch's (but by keyword not a tree of vectors, which may be a model's
        statistics). To give it turns that check off.
      return_info: whether to return also a `SharpnessInfo`.
      m_sharpness: for `m > 1`. `"paper"` takes the whole batch's gradient at each point, at a cost
        of `m + ascent_fraction` plain steps. `"foret"` pairs group i with its own part of the
        batch, at `1 + ascent_fraction`.
      loss_reduction: wherever the batch is divided (`m_sharpness="foret"`, `group_axes`,
        `accumulation_steps`), how the loss of a batch follows from its parts': `"mean"`, `"sum"`,
        or, for a mean over unequal numbers of tokens, a function from the part's batch arguments
        to its weight, such as `lambda batch: batch["decoder_loss_weights"].sum()`.
      combine_aux: likewise, from the parts' aux, stacked along a first axis, to the batch's. By
        default a leaf that grows with the batch is concatenated, and a floating one that does not
        is reduced as the loss is; others raise. So give it for counters and random keys, of which
        any part's will do; for a metric's total and count, which want adding up, unless the loss
        is a `"sum"`; and with a `"sum"` for batch statistics, whose mean is wanted.
      ascent_steps: number of steps to the adversarial point, each of length `rho / ascent_steps`.
        One whose gradient has no direction is left out.
      perturbation: from ascent gradient to perturbation: `gradient_perturbation` (SAM, what `None`
        means), `adaptive_perturbation(eta)` (ASAM), or a function of your own.
      perturb: which parameters are perturbed: a predicate on paths such as `"decoder/wo/kernel"`,
        or a tree of bools. The others stay at w in both passes and are not in the norm. Paths are
        those of `jax.tree_util.keystr`: an `nnx.Param`'s array is at `"out/kernel/value"` of what
        `nnx.split` gives, and at `"out/kernel"` inside `nnx.Optimizer`.
      ascent_loss_fn: the loss of the ascent pass, if it is another, as for a dropout key of its
        own: `lambda params, batch, key: loss_fn(params, batch, jax.random.fold_in(key, 1))`. With
        `has_aux` it returns an aux, too, or `(loss, None)`.
      adversarial_dtype: floating dtype of w_adv. By default each parameter's own, but at least
        float32: in bfloat16 most of the perturbation would be rounded away. Set it where the model
        cannot take float32 parameters, and watch `SharpnessInfo.realised_perturbation`.
      allow_int: as for `jax.value_and_grad`. Integer leaves are never perturbed.
      batch_axis: the axis of the examples in every array of the batch.
      data_axes: the mesh axes that the batch axis is sharded over, major first, such as `"data"`
        or `("replica", "data")`. Each shard then gives its own first examples to the ascent, so
        that none leaves its device. Not needed on a mesh with explicit axes, where the batch's
        type has them.
      mesh: the mesh of `data_axes` and `group_axes`; by default the one of `jax.set_mesh`.
      data_shards: the number of data shards, in place of `data_axes`: as many contiguous blocks
        of the batch.
      group_axes: mesh axes, the first of `data_axes`, or all of them if these are not given. Each
        shard along them is a group with an adversarial point of its own: Foret's m-sharpness, with
        all groups at the same time and no all-reduce of the ascent gradient. Not for axes that the
        parameters are sharded over. If they are not all of `data_axes`, see `replicated_params`.
      reduction_dtype: dtype, such as `jnp.bfloat16`, of the all-reduce of the gradient over
        `group_axes`, or else of the ascent gradient over `data_axes`. By default it is at least
        float32 over `group_axes`, and the compiler's affair over `data_axes`. In float16 a gradient
        beyond 65504 is infinite.
      replicated_params: whether no parameter is sharded over any of `data_axes`. By default that is
        not known, but for what types say on a mesh with explicit axes. With FSDP give `False`: all
        of w_adv is then computed before the descent, which takes less memory. Give `True` for
        groups of several shards, `group_axes="slice"` of `data_axes=("slice", "data")`: the
        gradient is then reduced once over both axes and not first within each group, after which
        each chip of a pod would send all of it to the other slices, in place of its part.
        `reduction_dtype` is then of the ascent's reduction, too. `loss_fn` runs on one shard of
        `data_axes` at a time, not on one group: these are the parts of `combine_aux`, and a dropout
        key that is an argument is the same in all. Otherwise nothing depends on it.
      accumulation_steps: number of micro-batches that the descent pass runs over, one after
        another and at one adversarial point. The ascent pass runs over as many as it takes for
        none to be larger. `loss_reduction` says how their losses make the batch's. A dropout key
        that is an argument is the same in all: for masks that differ, put a key per example in the
        batch, as for groups.

    Returns:
      A function of `loss_fn`'s arguments that returns `(loss, grads)`, or `((loss, aux), grads)`
      with `has_aux`; with `return_info` also the `SharpnessInfo`, as the last of three. Shapes and
      dtypes of the gradient are those of `jax.value_and_grad(loss_fn)`, and of loss and aux those
      that `loss_fn` gives at w_adv. Call it under `jax.jit`: outside, groups and accumulation are
      compiled in every call.

    Raises:
      ValueError: if a setting is out of its range; from the returned function, if the batch cannot
        be divided as the settings say, other arguments look like examples that are not divided
        with it, a mask selects nothing or is of another structure than `params`, `loss_reduction`
        gives no scalar, mesh axes are named and there is no mesh, or not these axes,
        `reduction_dtype` has no axes to reduce over, or parameters are sharded over axes that need
        them whole, or inside `jax.shard_map` split by hand.
      TypeError: if a setting is of the wrong type; from the returned function, if parameters or
        batch are not given by position, the batch holds a sparse array or a list of numbers,
        `perturb` or `perturbation` gives what it must not, or it is not clear how the parts' aux
        make the batch's.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
      >>> params = {"w": jnp.zeros(2)}
      >>> batch = {"x": jnp.eye(2).repeat(4, axis=0), "y": jnp.ones(8)}
      >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def train_step(params, state, batch):
      ...     loss, grads = sam_optax.value_and_grad(loss_fn, rho=0.05)(params, batch)
      ...     updates, state = optimizer.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> params, state, loss = train_step(params, state, batch)
      >>> print(f"{loss:.3f}")
      1.051

    References:
      Bahri et al., `Sharpness-Aware Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, Algorithm 1.
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, eq. 2 and 3.
    """
    check_callable("loss_fn", loss_fn, "lambda params, batch: ...")
    if ascent_loss_fn is not None:
        check_callable("ascent_loss_fn", ascent_loss_fn, "lambda params, batch: ...")
    if callable(rho):
        raise TypeError(
            f"rho={rho!r} is a function, and value_and_grad has no step count to call it with. "
            "Inside the train step, give its value: rho=schedule(step)."
        )
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
    check_bool("has_aux", has_aux)
    check_bool("return_info", return_info)
    check_bool("allow_int", allow_int)
    of_the_ascent = ascent_loss_fn
    if ascent_loss_fn is not None and has_aux:
        of_the_ascent = _with_aux(ascent_loss_fn)
    of_params, of_batch = argument_numbers(argnums, batch_argnums)
    one = isinstance(argnums, numbers.Integral)

    @functools.wraps(loss_fn)
    def sharpness_aware_value_and_grad(*args: Any, **kwargs: Any) -> Any:
        check_given("parameters", "argnums", of_params, args, kwargs)
        check_given("batch", "batch_argnums", of_batch, args, kwargs)
        if batch_argnums is None and options.divides_the_batch(return_info):
            refuse_other_examples(loss_fn, args, kwargs, batch_axis)

        params = args[of_params[0]] if one else tuple(args[i] for i in of_params)
        batch = tuple(args[i] for i in of_batch)
        apart = (*of_params, *of_batch)
        rest = [None if i in apart else arg for i, arg in enumerate(args)]

        def pass_of(loss_fn: Callable[..., Any]) -> Evaluate:
            by = of_params[0] if one else of_params
            plain = jax.value_and_grad(loss_fn, by, has_aux=has_aux, allow_int=allow_int)

            def evaluate(
                rest: list[Any], kwargs: dict[str, Any], params: PyTree, *batch: PyTree
            ) -> Evaluation:
                # Copies, so that a loss which pops something from its arguments finds it again.
                full, kwargs = jax.tree.map(lambda x: x, (rest, kwargs))
                given = (params,) if one else params
                for i, part in zip(apart, (*given, *batch), strict=True):
                    full[i] = part
                value, grads = plain(*full, **kwargs)
                loss, aux = value if has_aux else (value, None)
                return Evaluation(loss, aux, _conjugate(grads))

            return jax.tree_util.Partial(evaluate, rest, kwargs)

        step = Step(
            pass_of(loss_fn),
            rho,
            options,
            evaluate_ascent=None if of_the_ascent is None else pass_of(of_the_ascent),
            with_info=return_info,
        )
        descent, info = step.gradient(params, batch)
        value = (descent.loss, descent.aux) if has_aux else descent.loss
        grads = _conjugate(descent.grads)
        return (value, grads, info) if return_info else (value, grads)

    # `sharpness_aware` would take an ascent around each of these.
    vars(sharpness_aware_value_and_grad)["takes_an_ascent"] = not is_static_zero(rho)
    return sharpness_aware_value_and_grad


def _with_aux(ascent_loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `ascent_loss_fn`, which raises unless it returns an aux beside its loss."""

    @functools.wraps(ascent_loss_fn)
    def loss_and_aux(*args: Any, **kwargs: Any) -> Any:
        result = ascent_loss_fn(*args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                "With has_aux=True ascent_loss_fn must return (loss, aux), as loss_fn does, or "
                f"(loss, None), but it returned {jax.tree.map(jnp.shape, result)} (shapes)."
            )
        return result

    return loss_and_aux


def _conjugate(grads: PyTree) -> PyTree:
    """Turn JAX's gradient of complex leaves into the direction of steepest ascent, or back."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)

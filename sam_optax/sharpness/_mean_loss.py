"""The loss of several batches together, and its derivatives."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._checks import check_callable, is_none, is_real_scalar
from .._reduction import LossReduction, check_reduction, divisor_of, share_of, weight_of
from .._types import PyTree
from ._directions import added, movable_leaves

LossFn = Callable[[PyTree, Any], Any]


class MeanLoss:
    """The loss of all batches at `params + epsilon`, and its derivatives in epsilon."""

    def __init__(
        self, loss_fn: LossFn, params: PyTree, batches: Sequence[Any], reduction: LossReduction
    ):
        check_callable("loss_fn", loss_fn, "lambda params, batch: ...")
        self.movable = movable_leaves(params)
        check_reduction(reduction)
        _check_batches(batches, reduction)
        _check_not_traced(params, batches)
        weights = [weight_of(reduction, (batch,)) for batch in batches]
        _check_weights(weights)
        divisor = divisor_of(reduction, sum(weights))

        def over_batches(share: Callable[..., Any]) -> Callable[..., Any]:
            def mean(vector: PyTree) -> Any:
                total: Any = None
                for batch, weight in zip(batches, weights, strict=True):
                    part = share(weight, params, batch, vector)
                    total = part if total is None else jax.tree.map(jnp.add, total, part)
                return jax.tree.map(lambda x: x / divisor.astype(x.dtype), total)

            return mean

        self._loss_fn = loss_fn  # for as long as its programs are used
        programs = _programs_of(loss_fn)
        self._loss = over_batches(programs.loss)
        self.gradient = over_batches(programs.gradient)
        self.hessian_times = over_batches(programs.hessian_times)

    def loss(self, epsilon: PyTree) -> float:
        """Return the loss at `params + epsilon`."""
        return float(self._loss(epsilon))


class _Programs(NamedTuple):
    """A batch's share of the loss and of its derivatives: `(weight, params, batch, vector)`."""

    loss: Callable[..., Any]
    gradient: Callable[..., Any]
    hessian_times: Callable[..., Any]


_PROGRAMS: weakref.WeakKeyDictionary[LossFn, _Programs] = weakref.WeakKeyDictionary()


def _programs_of(loss_fn: LossFn) -> _Programs:
    """Return the loss's programs, the same ones for as long as there is this function."""
    try:
        if loss_fn not in _PROGRAMS:
            # They must not keep it alive: it may close over arrays as large as the parameters.
            _PROGRAMS[loss_fn] = _programs(weakref.ref(loss_fn))
        return _PROGRAMS[loss_fn]
    except TypeError:  # it cannot be a key
        return _programs(lambda: loss_fn)


def _programs(loss_fn: Callable[[], LossFn | None]) -> _Programs:
    def loss_at(epsilon: PyTree, params: PyTree, batch: Any) -> Any:
        moved = jax.tree.map(added, epsilon, params, is_leaf=is_none)
        function = loss_fn()
        assert function is not None, "`MeanLoss` holds it"
        loss = function(moved, batch)
        if not is_real_scalar(loss):
            raise ValueError(f"loss_fn(params, batch) must return a real scalar, not {loss!r}.")
        return loss

    def hessian_times(vector: PyTree, params: PyTree, batch: Any) -> Any:
        def gradient_at(epsilon: PyTree) -> Any:
            return jax.grad(loss_at)(epsilon, params, batch)

        zeros = jax.tree.map(jnp.zeros_like, vector)
        return jax.jvp(gradient_at, (zeros,), (vector,))[1]

    def share(of: Callable[..., Any]) -> Callable[..., Any]:
        @jax.jit
        def weighted(weight: Any, params: PyTree, batch: Any, vector: PyTree) -> Any:
            values = of(vector, params, batch)
            return jax.tree.map(lambda x: share_of(jnp.asarray(x), weight), values)

        return weighted

    return _Programs(share(loss_at), share(jax.grad(loss_at)), share(hessian_times))


def _check_not_traced(*trees: Any) -> None:
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(trees)):
        raise TypeError(
            "The sharpness functions read numbers back as they go, but the parameters or batches "
            "are traced: call them outside jax.jit, jax.vmap and jax.grad. They compile what is "
            "on the devices themselves."
        )


def _check_weights(weights: list[jax.Array]) -> None:
    for number, weight in enumerate(weights):
        if not jnp.isfinite(weight):
            raise ValueError(
                f"loss_reduction(batches[{number}]) is {weight}, but the weight of a batch's loss "
                "must be finite, such as its number of tokens."
            )


def _check_batches(batches: Any, reduction: LossReduction) -> None:
    if not isinstance(batches, list | tuple):
        raise TypeError(
            "batches must be a list of batches, which is gone through again and again, but it is "
            f"a {type(batches).__name__}. Give [batch] for a single one."
        )
    if not batches:
        raise ValueError("batches=[] has no batch: give one or more.")
    sizes = [
        {x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "ndim", 0)} for batch in batches
    ]
    if reduction == "mean" and any(size != sizes[0] for size in sizes):
        raise ValueError(
            'loss_reduction="mean" gives each batch the same weight, but their arrays have '
            f"{sorted(set().union(*sizes))} rows. Give a function from a batch to its weight, such "
            "as loss_reduction=lambda batch: batch['x'].shape[0], or lambda batch: 1.0 if these "
            "are no examples."
        )

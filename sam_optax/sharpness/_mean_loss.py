"""The loss of several batches together, and its derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._checks import is_none, is_real_scalar
from .._reduction import LossReduction, check_reduction, divisor_of, share_of, weight_of
from .._types import PyTree
from ._directions import added, movable_leaves

LossFn = Callable[[PyTree, Any], Any]


class MeanLoss:
    """The loss of all batches at `params + epsilon`, and its derivatives in epsilon."""

    def __init__(
        self, loss_fn: LossFn, params: PyTree, batches: Sequence[Any], reduction: LossReduction
    ):
        self.movable = movable_leaves(params)
        check_reduction(reduction)
        _check_batches(batches, reduction)
        _check_not_traced(params, batches)

        def loss_at(epsilon: PyTree, params: PyTree, batch: Any) -> Any:
            moved = jax.tree.map(added, epsilon, params, is_leaf=is_none)
            loss = loss_fn(moved, batch)
            if not is_real_scalar(loss):
                raise ValueError(f"loss_fn(params, batch) must return a real scalar, not {loss!r}.")
            return loss

        def over_batches(one: Callable[..., Any]) -> Callable[..., Any]:
            @jax.jit
            def weighted(params: PyTree, batch: Any, *vectors: PyTree) -> Any:
                weight = weight_of(reduction, (batch,))
                values = one(params, batch, *vectors)
                return jax.tree.map(lambda x: share_of(jnp.asarray(x), weight), values), weight

            def mean(*vectors: PyTree) -> Any:
                total: Any = None
                for batch in batches:
                    part = weighted(params, batch, *vectors)
                    total = part if total is None else jax.tree.map(jnp.add, total, part)
                values, weight = total
                divisor = divisor_of(reduction, weight)
                return jax.tree.map(lambda x: x / divisor.astype(x.dtype), values)

            return mean

        def gradient_at(epsilon: PyTree, params: PyTree, batch: Any) -> Any:
            return jax.grad(loss_at)(epsilon, params, batch)

        def hessian_times(params: PyTree, batch: Any, vector: PyTree) -> Any:
            zeros = jax.tree.map(jnp.zeros_like, vector)
            return jax.jvp(lambda e: gradient_at(e, params, batch), (zeros,), (vector,))[1]

        self._loss = over_batches(lambda params, batch, e: loss_at(e, params, batch))
        self.gradient = over_batches(lambda params, batch, e: gradient_at(e, params, batch))
        self.hessian_times = over_batches(hessian_times)

    def loss(self, epsilon: PyTree) -> float:
        """Return the loss at `params + epsilon`."""
        return float(self._loss(epsilon))


def _check_not_traced(*trees: Any) -> None:
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(trees)):
        raise TypeError(
            "The sharpness functions read numbers back as they go, but the parameters or batches "
            "are traced: call them outside jax.jit, jax.vmap and jax.grad. They compile what is "
            "on the devices themselves."
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

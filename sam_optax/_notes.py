"""What to add to an error of the loss function where SAM is the reason for it.

It is where the same pass does not fail as a plain step would have it: on the whole batch, or with
the parameters in their own dtypes. That is tried only once there is an error. Whether it is about
being on one shard of a mesh, JAX's own words tell.
"""

import contextlib
import re
from collections.abc import Generator

import jax
import jax.numpy as jnp

from ._examples import examples
from ._layout import as_given
from ._types import Evaluate, PyTree

_Batch = tuple[PyTree, ...]
# Of what is computed outside `jax.jit`, and not of shapes and dtypes: those are all that is tried.
_OF_VALUES = (ArithmeticError, MemoryError, jax.errors.JaxRuntimeError)
_ABOUT_MANUAL_AXES = re.compile(
    r"with_sharding_constraint|manual.axis.type|AxisType\.Manual|type `Manual`"
    r"|mesh passed to shard_map|in_specs passed to shard_map|not evenly divisible"
    r"|inputs to shard_map|partitioned manually"
)


@contextlib.contextmanager
def about_fewer_examples(
    evaluate: Evaluate, params: PyTree, micro_batch: _Batch, batch: _Batch, batch_axis: int
) -> Generator[None]:
    """Say that the pass was on a part of the batch, if it would not fail on all of it."""
    try:
        yield
    except _OF_VALUES:
        raise
    except Exception as error:
        if micro_batch is not batch and _works(evaluate, params, batch):
            a, b = (examples(as_given(x), batch_axis) for x in (micro_batch, batch))
            error.add_note(
                f"sam_optax: this was in the ascent, on {a} of {b} examples, and on all of them "
                "the loss does not fail. Give a larger ascent_fraction, or as data_axes all mesh "
                "axes that the loss divides the batch over; if only some arrays were divided, say "
                "in batch_argnums which arguments hold examples."
            )
        raise


@contextlib.contextmanager
def about_wider_parameters(
    evaluate: Evaluate, params: PyTree, w_adv: PyTree, batch: _Batch
) -> Generator[None]:
    """Say that w_adv has other dtypes than the parameters, if with theirs it would not fail."""
    try:
        yield
    except _OF_VALUES:
        raise
    except Exception as error:
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(w_adv), strict=True)
        dtypes = {(str(jnp.result_type(w)), str(jnp.result_type(v))) for w, v in leaves}
        widened = sorted((given, moved) for given, moved in dtypes if given != moved)
        if widened and _works(evaluate, params, batch):
            given, moved = widened[0]
            error.add_note(
                f"sam_optax: this was at the adversarial point, which is {moved} where the "
                f"parameters are {given}, and with {given} the loss does not fail. Cast in the "
                f"loss, or give adversarial_dtype=jnp.{given}, the dtype of every parameter that "
                "moves, and watch SharpnessInfo.realised_perturbation."
            )
        raise


@contextlib.contextmanager
def about_one_shard(axes: tuple[str, ...]) -> Generator[None]:
    """Say that the loss runs on one shard, if JAX refuses what cannot be in it there."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        if _ABOUT_MANUAL_AXES.search(str(error)):
            error.add_note(
                f"With group_axes or reduction_dtype the loss runs on one shard of {axes} at a "
                "time (with replicated_params, of all data_axes). So its sharding constraints and "
                "out_shardings must not name these axes (leave "
                "jax.sharding.get_abstract_mesh().manual_axes out of them), must not be a "
                "NamedSharding of the whole mesh (give the PartitionSpec), and a jax.shard_map in "
                "it must be over other axes (give it axis_names, no mesh, and jax.checkpoint(f) "
                "for f). An argument besides the batch must be whole along these axes "
                "(jax.sharding.reshard), and what lies on explicit axes must be an argument. A "
                "jax.vmap around the step must have no spmd_axis_name. If the step is inside a "
                "jax.shard_map, a loop or branch must start from what varies as its results do "
                "(jax.lax.pcast)."
            )
        raise


def _works(evaluate: Evaluate, params: PyTree, batch: _Batch) -> bool:
    with contextlib.suppress(Exception):
        jax.eval_shape(lambda params, batch: evaluate(params, *batch).grads, params, batch)
        return True
    return False

"""Which examples take part in the ascent: Algorithm 1, line 5."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ._types import PyTree

MSharpness = Literal["paper", "foret"]


def ascent_batch(
    batch: PyTree,
    ascent_fraction: float = 0.25,
    *,
    batch_axis: int = 0,
    data_shards: int = 1,
) -> PyTree:
    """Return the ascent micro-batch M: the examples that the ascent gradient is taken on.

    M has `a` examples, `ascent_fraction` of the batch's `b`, rounded to a multiple of
    `data_shards` and at least one from each. They are the first `a` of the batch, or, where the
    batch is laid out over D data shards, the first `a / D` of *each* shard, so that no example
    leaves its device.

    Args:
      batch: pytree of arrays that have `b` examples along `batch_axis`. Leaves of rank 0 belong to
        every example and are returned as they are.
      ascent_fraction: share of the batch in (0, 1]. At 1 the batch itself is returned.
      batch_axis: the axis of the examples, the same in every leaf.
      data_shards: D, the number of equal contiguous blocks that the batch is sharded into.

    Returns:
      A tree like `batch` with `a` examples along `batch_axis`.

    Raises:
      ValueError: if the leaves disagree on `b`, or `b` is not a multiple of `data_shards`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> sam_optax.ascent_batch({"x": jnp.arange(8)}, 0.5)
      {'x': Array([0, 1, 2, 3], dtype=int32)}
      >>> sam_optax.ascent_batch({"x": jnp.arange(8)}, 0.5, data_shards=2)
      {'x': Array([0, 1, 4, 5], dtype=int32)}

    References:
      Bahri et al., `Sharpness-Aware Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, Algorithm 1 and section 4.1.
    """
    sizes = batch_sizes(batch, ascent_fraction, batch_axis=batch_axis, data_shards=data_shards)
    return _take(batch, sizes, batch_axis, blocks=data_shards)


def ascent_groups(
    batch: PyTree,
    ascent_fraction: float = 0.25,
    *,
    m: int,
    m_sharpness: MSharpness = "paper",
    batch_axis: int = 0,
    data_shards: int = 1,
) -> tuple[PyTree, PyTree]:
    """Return the m ascent micro-batches, and what each is paired with.

    Args:
      batch: as for `ascent_batch`.
      ascent_fraction: as for `ascent_batch`; the share of all m micro-batches together.
      m: the number of groups.
      m_sharpness: `"paper"` splits the ascent micro-batch M into m groups and pairs each with the
        whole batch. `"foret"` splits the batch into m parts and takes group i from part i.
      batch_axis: as for `ascent_batch`.
      data_shards: as for `ascent_batch`.

    Returns:
      Two trees like `batch` whose leaves have a new first axis of size m: the ascent micro-batches
      of `a / m` examples, and the parts of the batch of `b / m` examples (`None` for `"paper"`).

    Raises:
      ValueError: as `ascent_batch`; if `a`, or for `"foret"` also `b`, cannot be shared out
        evenly over the groups and shards.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent, parts = sam_optax.ascent_groups(jnp.arange(8), 0.5, m=2, m_sharpness="foret")
      >>> ascent.tolist(), parts.tolist()
      ([[0, 1], [4, 5]], [[0, 1, 2, 3], [4, 5, 6, 7]])
    """
    sizes = batch_sizes(
        batch,
        ascent_fraction,
        m=m,
        m_sharpness=m_sharpness,
        batch_axis=batch_axis,
        data_shards=data_shards,
    )
    if m_sharpness == "paper":
        taken = _take(batch, sizes, batch_axis, blocks=data_shards)
        return _split_within_shards(taken, m, batch_axis, data_shards), None
    taken = _take(batch, sizes, batch_axis, blocks=math.lcm(data_shards, m))
    return _split(taken, m, batch_axis), _split(batch, m, batch_axis)


class BatchSizes(NamedTuple):
    """The number of examples in the batch, b, and in the ascent micro-batch, a."""

    b: int
    a: int


def batch_sizes(
    batch: PyTree,
    ascent_fraction: float,
    *,
    m: int = 1,
    m_sharpness: MSharpness = "paper",
    batch_axis: int = 0,
    data_shards: int = 1,
) -> BatchSizes:
    """Return `b` and `a = max(ascent_fraction * b, data_shards)`, rounded to whole shards."""
    b = _examples(batch, batch_axis)
    if b % data_shards:
        below, above = _around(b, data_shards)
        raise ValueError(
            f"The batch of b={b} examples cannot be shared evenly by {data_shards} data shards. "
            f"The nearest batch sizes that can: {_either(below, above)}."
        )
    a = data_shards * max(1, math.floor(ascent_fraction * b / data_shards + 0.5))
    if m > 1:
        _check_groups(b, a, m, m_sharpness, data_shards)
    return BatchSizes(b, a)


def _check_groups(b: int, a: int, m: int, m_sharpness: MSharpness, data_shards: int) -> None:
    # The paper's groups each take from every shard; Foret's are whole shards or lie in one shard.
    unit = m * data_shards if m_sharpness == "paper" else math.lcm(m, data_shards)
    if m_sharpness == "foret":
        if m % data_shards and data_shards % m:
            raise ValueError(
                f"m={m} groups cannot be laid over {data_shards} data shards: with "
                "m_sharpness='foret' one must be a multiple of the other."
            )
        if b % unit:
            raise ValueError(
                f"m={m} groups cannot share the batch of b={b} examples evenly. "
                f"The nearest batch sizes that can: {_either(*_around(b, unit))}."
            )
    if a % unit:
        below, above = (x if x <= b else 0 for x in _around(a, unit))
        sizes = " or ".join(f"a={x} (ascent_fraction={x / b:.6g})" for x in (below, above) if x)
        fitting = [k for k in range(1, a + 1) if a % (k * data_shards) == 0]
        shards = f" on {data_shards} data shards" if data_shards > 1 else ""
        raise ValueError(
            f"m={m} groups{shards} cannot share the ascent micro-batch of a={a} examples (of a "
            f"batch of b={b}) evenly. The nearest sizes that can: {sizes or 'none in this batch'}; "
            f"or, at a={a}, m in {fitting}."
        )


def _examples(batch: PyTree, axis: int) -> int:
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = "batch" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "ndim"):
            if isinstance(leaf, bool | int | float | complex):
                continue  # a scalar, of rank 0
            raise TypeError(f"{name} is {leaf!r}, not an array: leave it out of the batch.")
        if leaf.ndim == 0:
            continue
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"{name} has the shape {leaf.shape}, which has no axis batch_axis={axis}."
            )
        sizes[name] = leaf.shape[axis]
    if not sizes:
        raise ValueError(
            "The batch has no array with a batch axis, so there are no examples to take the ascent "
            "micro-batch from."
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            f"The batch's arrays have different numbers of examples along batch_axis={axis}: "
            f"{listed}. They must agree; pass what is not per example as another argument."
        )
    b = next(iter(sizes.values()))
    if b == 0:
        raise ValueError("The batch has no examples: b=0 along batch_axis. It needs at least one.")
    return b


def _take(batch: PyTree, sizes: BatchSizes, axis: int, *, blocks: int) -> PyTree:
    """Return the first `a / blocks` examples of each of `blocks` contiguous parts."""
    if sizes.a == sizes.b:
        return batch

    def take(x: Any, axis: int) -> Any:
        x = _reshape_axis(x, axis, (blocks, sizes.b // blocks))
        x = x[(slice(None),) * (axis + 1) + (slice(sizes.a // blocks),)]
        return _merge_axes(x, axis)

    def take_prefix(x: Any, axis: int) -> Any:
        return x[(slice(None),) * axis + (slice(sizes.a),)]

    return _map(take_prefix if blocks == 1 else take, batch, axis)


def _split(batch: PyTree, m: int, axis: int) -> PyTree:
    """Return `batch` as m contiguous parts, stacked along a new first axis."""

    def split(x: Any, axis: int) -> Any:
        return jnp.moveaxis(_reshape_axis(x, axis, (m, x.shape[axis] // m)), axis, 0)

    return _map(split, batch, axis, scalar=lambda x: _repeat(x, m))


def _split_within_shards(batch: PyTree, m: int, axis: int, shards: int) -> PyTree:
    """Return `batch` as m parts, each with an equal share of every data shard."""

    def split(x: Any, axis: int) -> Any:
        x = _reshape_axis(x, axis, (shards, m, x.shape[axis] // (shards * m)))
        return _merge_axes(jnp.moveaxis(x, axis + 1, 0), axis + 1)

    return _map(split, batch, axis, scalar=lambda x: _repeat(x, m))


def _map(fn: Any, batch: PyTree, axis: int, scalar: Any = lambda x: x) -> PyTree:
    def leaf(x: Any) -> Any:
        return fn(x, axis % x.ndim) if getattr(x, "ndim", 0) else scalar(x)

    return jax.tree.map(leaf, batch)


def _repeat(x: Any, m: int) -> jax.Array:
    return jnp.broadcast_to(x, (m,))


def _reshape_axis(x: Any, axis: int, sizes: tuple[int, ...]) -> Any:
    return x.reshape(x.shape[:axis] + sizes + x.shape[axis + 1 :])


def _merge_axes(x: Any, axis: int) -> Any:
    return x.reshape((*x.shape[:axis], -1, *x.shape[axis + 2 :]))


def _around(n: int, unit: int) -> tuple[int, int]:
    return n // unit * unit, -(-n // unit) * unit


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below else f"{above}"

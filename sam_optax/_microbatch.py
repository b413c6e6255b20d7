"""Which examples take part in the ascent: Algorithm 1, line 5."""

from typing import Any, Literal

import jax
from jax.sharding import Mesh

from ._checks import check_ascent_fraction, check_choice, check_integer
from ._division import Division
from ._examples import examples
from ._layout import Axes, batch_layout, check_layout
from ._splitting import map_arrays, merge_axes, split_axis, split_within_shards
from ._types import PyTree

MSharpness = Literal["paper", "foret"]


def ascent_batch(
    batch: PyTree,
    ascent_fraction: float = 0.25,
    *,
    batch_axis: int = 0,
    data_axes: Axes | None = None,
    mesh: Mesh | None = None,
    data_shards: int | None = None,
) -> PyTree:
    """Return the ascent micro-batch M: the examples that the ascent gradient is taken on.

    M has `a` examples, `ascent_fraction` of the batch's `b`, rounded to a multiple of the data
    shards (a half up, so 3 of 10 at 1/4) and at least one from each. They are the first `a` of the
    batch, or, where the batch is laid out over D data shards, the first `a / D` of *each* shard, so
    that no example leaves its device. On a mesh with explicit axes D is in the batch's type; on
    other meshes name the axes.

    Args:
      batch: pytree of arrays that have `b` examples along `batch_axis`. Leaves of rank 0 belong to
        every example and are returned as they are.
      ascent_fraction: share of the batch in (0, 1]. At 1 the batch itself is returned.
      batch_axis: the axis of the examples, the same in every leaf.
      data_axes: the mesh axes that the batch axis is sharded over, major first.
      mesh: the mesh of `data_axes`; by default the one of `jax.set_mesh`.
      data_shards: D itself, in place of `data_axes`: as many equal contiguous blocks.

    Returns:
      A tree like `batch` with `a` examples along `batch_axis`. NumPy arrays stay NumPy arrays.

    Raises:
      ValueError: if a setting is out of its range, no leaf has a batch axis, `b` is zero, the
        leaves disagree on it, it is not a multiple of the data shards, or axes are named and there
        is no mesh, or not these axes.
      TypeError: if a setting is of the wrong type, or a leaf is not an array.

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
    check_ascent_fraction(ascent_fraction)
    check_layout(batch_axis, data_axes, mesh, data_shards)
    shards = batch_layout(batch, batch_axis, data_axes, mesh, data_shards).shards
    return take_ascent_batch(batch, ascent_fraction, batch_axis, shards)


def ascent_groups(
    batch: PyTree,
    ascent_fraction: float = 0.25,
    *,
    m: int,
    m_sharpness: MSharpness = "paper",
    batch_axis: int = 0,
    data_axes: Axes | None = None,
    mesh: Mesh | None = None,
    data_shards: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Return the m ascent micro-batches, and what each is paired with.

    Every group takes an equal share of every data shard.

    Args:
      batch: as for `ascent_batch`.
      ascent_fraction: as for `ascent_batch`; the share of all m micro-batches together.
      m: the number of groups.
      m_sharpness: `"paper"` splits the ascent micro-batch M into m groups and pairs each with the
        whole batch. `"foret"` splits the batch into m parts and takes group i from part i.
      batch_axis: as for `ascent_batch`.
      data_axes: as for `ascent_batch`.
      mesh: as for `ascent_batch`.
      data_shards: as for `ascent_batch`.

    Returns:
      Two trees like `batch` whose leaves have a new first axis of size m: the ascent micro-batches
      of `a / m` examples, and the parts of the batch of `b / m` examples (`None` for `"paper"`).
      Leaves of rank 0 are repeated along it.

    Raises:
      ValueError: as `ascent_batch`; if `a`, or for `"foret"` also `b`, cannot be shared out
        evenly over the groups and shards.
      TypeError: as `ascent_batch`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent, parts = sam_optax.ascent_groups(jnp.arange(8), 0.5, m=2, m_sharpness="foret")
      >>> ascent.tolist(), parts.tolist()
      ([[0, 1], [4, 5]], [[0, 1, 2, 3], [4, 5, 6, 7]])

    References:
      Bahri et al., `Sharpness-Aware Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, section 4.1 for `"paper"`; Foret et al.,
      `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, section 4.1 for `"foret"`.
    """
    check_ascent_fraction(ascent_fraction)
    check_integer("m", m, at_least=1)
    check_choice("m_sharpness", m_sharpness, ("paper", "foret"))
    check_layout(batch_axis, data_axes, mesh, data_shards)
    shards = batch_layout(batch, batch_axis, data_axes, mesh, data_shards).shards
    return take_ascent_groups(batch, ascent_fraction, batch_axis, shards, int(m), m_sharpness)


def take_ascent_groups(
    batch: PyTree,
    ascent_fraction: float,
    axis: int,
    shards: int,
    m: int,
    m_sharpness: MSharpness,
) -> tuple[PyTree, PyTree]:
    """Return the groups of a batch that lies on `shards` contiguous blocks; see `ascent_groups`."""
    parts = m if m_sharpness == "foret" else 1
    taken = _take(batch, Division(shards, ascent_fraction, m, parts), axis)
    ascent = split_within_shards(taken, m, axis, shards)
    return ascent, split_within_shards(batch, m, axis, shards) if m_sharpness == "foret" else None


def take_ascent_batch(batch: PyTree, ascent_fraction: float, axis: int, shards: int) -> PyTree:
    """Return the first examples of each of `shards` contiguous blocks; see `ascent_batch`."""
    return _take(batch, Division(shards, ascent_fraction), axis)


def _take(batch: PyTree, division: Division, axis: int) -> PyTree:
    """Return the first `a` examples of the batch, as many of each part of each shard."""
    b = examples(batch, axis)
    division.check(b)
    a, blocks = division.ascent_size(b), division.shards * division.parts
    if a == b:
        return batch

    def take(x: Any, axis: int) -> Any:
        x = split_axis(x, axis, (blocks, b // blocks))
        x = x[(slice(None),) * (axis + 1) + (slice(a // blocks),)]
        return _apart(merge_axes(x, axis))

    def take_prefix(x: Any, axis: int) -> Any:
        return _apart(x[(slice(None),) * axis + (slice(a),)])

    return map_arrays(take_prefix if blocks == 1 else take, batch, axis)


def _apart(x: Any) -> Any:
    """Return a part of an array such that XLA does not lay out the whole as the part is wanted.

    On TPUs it would copy a batch of images to a layout with the three channels padded to 128, for
    the convolution over a quarter of them, and keep the copy until the descent's backward pass.
    """
    return jax.lax.optimization_barrier(x) if isinstance(x, jax.Array) and x.ndim > 2 else x

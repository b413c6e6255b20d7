"""How the batch is laid out over a mesh: how many data shards, and over which axes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from ._checks import check_axes, check_integer, check_mesh
from ._types import PyTree

Axes = str | Sequence[str]
# By leaf on a mesh with explicit axes: those that its batch axis is sharded over, and the mesh.
_Typed = dict[str, tuple[tuple[str, ...], Any]]


class Layout(NamedTuple):
    """The mesh axes that the batch axis is sharded over.

    Attributes:
      axes: names of the axes, major first; empty where they are not known by name.
      mesh: the mesh, or `None`.
      shards: number of data shards, the product of the axes' sizes.
    """

    axes: tuple[str, ...]
    mesh: Any
    shards: int

    @classmethod
    def over(cls, axes: tuple[str, ...], mesh: Any) -> "Layout":
        """Return the layout over `axes`, but for those that are manual here."""
        axes = tuple(axis for axis in axes if axis not in manual_axes())
        return cls(axes, mesh, math.prod(mesh.shape[axis] for axis in axes))

    def within(self, groups: tuple[str, ...]) -> "Layout":
        """Return the layout of one group's part, where each shard of `groups` is a group."""
        return Layout.over(tuple(axis for axis in self.axes if axis not in groups), self.mesh)


def check_layout(batch_axis: Any, data_axes: Any, mesh: Any, data_shards: Any) -> None:
    """Raise unless these say where the examples are, and how they are sharded."""
    check_integer("batch_axis", batch_axis)
    check_mesh(mesh)
    if data_shards is not None:
        check_integer("data_shards", data_shards, at_least=1)
    if data_axes is None:
        return
    check_axes("data_axes", data_axes)
    if data_shards is not None:
        raise ValueError(
            f"data_axes={data_axes!r} and data_shards={data_shards!r} both say how the batch is "
            "sharded: give one of them."
        )


def batch_layout(
    batch: PyTree,
    batch_axis: int,
    data_axes: Axes | None,
    mesh: Mesh | None,
    data_shards: int | None,
) -> Layout:
    """Return the layout that is named, or else the one in the types of an explicit mesh.

    Axes that are manual here, inside `jax.shard_map`, do not count: there the batch is the one of
    this shard alone.

    Raises:
      ValueError: if `data_axes` are not axes of the mesh, there is no mesh, or the types of the
        batch's leaves disagree, with one another, with `data_axes` or with `data_shards`.
    """
    typed = _axes_in_types(batch, batch_axis)
    mesh_of_types = next((mesh for _, mesh in typed.values()), None)
    if data_axes is None:
        axes = _common_axes(typed, batch_axis)
        if not axes:
            return Layout((), mesh_of_types, int(data_shards or 1))
        layout = Layout.over(axes, mesh_of_types)
        if data_shards is not None and data_shards != layout.shards:
            raise ValueError(
                f"data_shards={data_shards!r}, but the batch is sharded over {axes}, which have "
                f"{layout.shards} shards. On a mesh with explicit axes leave data_shards out."
            )
        return layout
    axes = as_names(data_axes)
    layout = Layout.over(axes, find_mesh(mesh, axes, "data_axes", mesh_of_types))
    _refuse_other_axes(typed, axes)
    return layout


def find_mesh(mesh: Mesh | None, axes: tuple[str, ...], name: str, mesh_of_types: Any) -> Any:
    """Return `mesh`, or that of `jax.set_mesh` or of the types, after checking that it has `axes`.

    Raises:
      ValueError: if there is none, it has not these axes, or `mesh` is another than that of
        `jax.set_mesh`.
    """
    here = jax.sharding.get_abstract_mesh()
    if mesh is not None and not here.empty and [*here.shape.items()] != [*mesh.shape.items()]:
        raise ValueError(
            f"mesh= has the axes {dict(mesh.shape)}, but the mesh of jax.set_mesh is another here, "
            f"with {dict(here.shape)}: leave mesh out, or give that one."
        )
    found: Any = here if mesh is None else mesh
    if found.empty and mesh_of_types is not None:
        found = mesh_of_types
    if found.empty:
        raise ValueError(
            f"{name}={axes!r} are axes of a mesh, but there is none here: inside jax.jit neither "
            "`with mesh:` nor the arrays' shardings tell of it. Give mesh=mesh, or call the step "
            "under jax.set_mesh(mesh)."
        )
    check_on_mesh(name, axes, found)
    return found


def check_on_mesh(name: str, axes: tuple[str, ...], mesh: Any) -> None:
    """Raise unless the mesh has these axes."""
    missing = [axis for axis in axes if axis not in mesh.shape]
    if missing:
        raise ValueError(f"{name}={axes!r}: the mesh has no {missing}, only {dict(mesh.shape)}.")


def as_names(axes: Axes) -> tuple[str, ...]:
    """Return one axis name or several as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes)


def names_in(entry: Any) -> tuple[str, ...]:
    """Return the axes that an entry of a `PartitionSpec` names: none, one or several."""
    return () if entry is None else as_names(entry)


def names_in_type(x: Any) -> set[str]:
    """Return the axes that an array is sharded over as its type has it: explicit ones."""
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else ()
    return {name for entry in spec for name in names_in(entry)}


def explicit_among(axes: tuple[str, ...], mesh: Any) -> list[str]:
    """Return those of `axes` that are explicit on the mesh, which types tell of."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return [axis for axis in axes if kinds.get(axis) == AxisType.Explicit]


def as_given(batch: tuple[PyTree, ...]) -> PyTree:
    """Return the one batch, or the tuple of several, so that errors say where a leaf is."""
    return batch[0] if len(batch) == 1 else batch


def manual_axes() -> tuple[str, ...]:
    """Return the axes of the `jax.shard_map` that this is called in, if any."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _axes_in_types(batch: PyTree, batch_axis: int) -> _Typed:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not isinstance(leaf, jax.Array):
            continue
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            continue
        if not -leaf.ndim <= batch_axis < leaf.ndim:
            continue  # of rank 0, or `examples` says what is wrong
        axes = names_in(sharding.spec[batch_axis])
        found["batch" + jax.tree_util.keystr(path)] = axes, sharding.mesh
    return found


def _common_axes(typed: _Typed, batch_axis: int) -> tuple[str, ...]:
    found = {path: axes for path, (axes, _) in typed.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{path}: {axes or 'no axis'}" for path, axes in found.items())
        raise ValueError(
            f"The batch's arrays are sharded over different mesh axes along batch_axis="
            f"{batch_axis}: {listed}. Shard them alike, so that each shard holds whole examples."
        )
    return next(iter(found.values()), ())


def _refuse_other_axes(typed: _Typed, data_axes: tuple[str, ...]) -> None:
    """Raise if a leaf's type says that it is sharded over others than `data_axes`."""
    for path, (axes, mesh) in typed.items():
        if axes and [*axes] != explicit_among(data_axes, mesh):
            raise ValueError(
                f"data_axes={data_axes!r}, but {path} is sharded over {axes}, as its type says. On "
                "a mesh with explicit axes leave data_axes out, or name these axes in this order "
                "(and the others that the batch is sharded over, which no type tells)."
            )

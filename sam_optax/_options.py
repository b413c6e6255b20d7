"""The settings of a SAM step, checked as soon as they are given."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from ._checks import (
    check_ascent_fraction,
    check_axes,
    check_bool,
    check_callable,
    check_choice,
    check_float_dtype,
    check_integer,
    check_rho,
    check_schedule,
    is_static_zero,
)
from ._layout import (
    Axes,
    Layout,
    as_given,
    as_names,
    batch_layout,
    check_layout,
    check_on_mesh,
    find_mesh,
    manual_axes,
)
from ._mask import check_perturb
from ._microbatch import MSharpness
from ._perturbation import adaptive_perturbation
from ._reduction import LossReduction, check_reduction
from ._types import Perturbation, PyTree


@dataclasses.dataclass(frozen=True)
class Options:
    """What `value_and_grad` and `sharpness_aware` have in common; they document each field."""

    rho: Any
    ascent_fraction: float
    m: int
    m_sharpness: MSharpness
    loss_reduction: LossReduction
    combine_aux: Callable[[PyTree], PyTree] | None
    ascent_steps: int
    perturbation: Perturbation | None
    perturb: Callable[[str], bool] | PyTree | None
    adversarial_dtype: Any
    batch_axis: int
    data_axes: Axes | None
    mesh: Mesh | None
    data_shards: int | None
    group_axes: Axes | None
    reduction_dtype: Any
    replicated_params: bool | None
    accumulation_steps: int
    mean_aux: Callable[[PyTree], PyTree] | None = None  # T5X's: of the paper's m points

    def __post_init__(self) -> None:
        """Raise on the first field that cannot be meant."""
        if callable(self.rho):
            check_schedule(self.rho)
        else:
            check_rho(self.rho)
        check_ascent_fraction(self.ascent_fraction)
        for name in ("m", "ascent_steps", "accumulation_steps"):
            check_integer(name, getattr(self, name), at_least=1)
            # A Python integer, because products of NumPy's overflow.
            object.__setattr__(self, name, int(getattr(self, name)))
        check_layout(self.batch_axis, self.data_axes, self.mesh, self.data_shards)
        check_choice("m_sharpness", self.m_sharpness, ("paper", "foret"))
        check_reduction(self.loss_reduction)
        check_perturb(self.perturb)
        if self.perturbation is not None:
            check_callable("perturbation", self.perturbation, "sam_optax.gradient_perturbation")
        # Gin wraps what it names.
        if getattr(self.perturbation, "__wrapped__", self.perturbation) is adaptive_perturbation:
            raise TypeError("perturbation=adaptive_perturbation must be adaptive_perturbation().")
        if self.combine_aux is not None:
            check_callable("combine_aux", self.combine_aux, "lambda aux: jax.tree.map(...)")
        for name in ("adversarial_dtype", "reduction_dtype"):
            if getattr(self, name) is not None:
                check_float_dtype(name, getattr(self, name))
        if self.replicated_params is not None:
            check_bool("replicated_params", self.replicated_params)
        self._check_groups()

    def divides_the_batch(self, with_info: bool) -> bool:
        """Whether a pass is over a part of the batch only."""
        if self.accumulation_steps > 1:
            return True
        if is_static_zero(self.rho):
            return with_info and self.ascent_fraction != 1
        on_shards = self.group_axes is not None or self.reduction_dtype is not None
        return on_shards or self.m > 1 or self.ascent_fraction != 1

    def layout(self, batch: tuple[PyTree, ...]) -> Layout:
        """Return the mesh axes that the batch lies over, after a check that groups are parts of it.

        Raises:
          ValueError: as `batch_layout`; if `group_axes` are manual here, or not the first of them.
        """
        if not batch:
            return Layout((), None, 1)
        layout = batch_layout(
            as_given(batch), self.batch_axis, self.data_axes, self.mesh, self.data_shards
        )
        if self.group_axes is None:
            return layout
        groups = as_names(self.group_axes)
        inside = [axis for axis in groups if axis in manual_axes()]
        if inside:
            raise ValueError(
                f"group_axes={groups!r}, of which {inside} are manual already, inside "
                "jax.shard_map: there each shard has its own part of the batch. Leave them out of "
                "group_axes."
            )
        mesh = find_mesh(self.mesh, groups, "group_axes", layout.mesh)
        axes = layout.axes or groups
        self._check_first(axes, f"the axes {axes!r} that the batch is sharded over")
        return Layout.over(axes, mesh)

    def _check_groups(self) -> None:
        if self.group_axes is None and self.reduction_dtype is not None and self.m > 1:
            raise ValueError(
                f"reduction_dtype={self.reduction_dtype!r} is of the reduction of one ascent "
                f"gradient, or over group_axes, and m={self.m} groups one after another have "
                "neither: leave it out, or make the groups with group_axes."
            )
        if self.group_axes is None:
            return
        check_axes("group_axes", self.group_axes)
        if self.data_shards is not None:
            raise ValueError(
                f"data_shards={self.data_shards!r} does not say over which mesh axes the batch is "
                f"sharded, and group_axes={self.group_axes!r} needs that: give data_axes."
            )
        if self.m > 1:
            raise ValueError(
                f"group_axes={self.group_axes!r} makes as many groups as the mesh has shards along "
                f"them, and m={self.m} is another number of groups: give one of them."
            )
        if self.mesh is not None:
            check_on_mesh("group_axes", as_names(self.group_axes), self.mesh)
        axes = as_names(self.data_axes or self.group_axes)
        self._check_first(axes, f"data_axes={self.data_axes!r}")

    def _check_first(self, axes: tuple[str, ...], what: str) -> None:
        groups = as_names(self.group_axes or ())
        if axes[: len(groups)] != groups:
            raise ValueError(
                f"group_axes={self.group_axes!r} must be the first of {what}, so that each group "
                "holds a contiguous part of the batch."
            )

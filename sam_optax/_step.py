"""The algorithm: the gradient of the loss at an adversarial point near the parameters.

Of Algorithm 1 (Bahri et al.), each line is a method of `Step`, and `gradient` is all of them:

  line 5, M, the ascent micro-batch of B:     `_micro_batch`
  line 6, w_adv = w + rho * g_M / ||g_M||_2:  `_ascend`
  line 7, the gradient of B at w_adv:         `_descend`

This is the only place where it is written. `value_and_grad` and `sharpness_aware` prepare its
arguments and hand on its result; `_groups` and `_mesh` run it on parts of the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._barriers import together
from ._checks import is_static_zero
from ._division import Division
from ._examples import examples
from ._groups import Point, accumulated, mean_over_points, over_parts_of_the_batch
from ._info import SharpnessInfo, describe_ascent
from ._layout import Layout, as_given, as_names, names_in_type
from ._mask import keep, perturbed_mask, refuse_overwritten
from ._mesh import over_mesh_axes, reduced_over_shards, reduced_within_a_group
from ._microbatch import take_ascent_batch, take_ascent_groups
from ._notes import about_fewer_examples, about_wider_parameters
from ._options import Options
from ._perturbation import gradient_perturbation, has_norm_of_what_is_given, move, of_leaves
from ._types import Evaluate, Evaluation, PyTree
from ._varying import refuse_a_part

_ALONG_THE_GRADIENT = (None, gradient_perturbation)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step's ingredients: everything but parameters and batch.

    Attributes:
      evaluate: one forward and backward pass, `evaluate(params, *batch)`. If it reads other arrays
        too, such as dropout keys, a `jax.tree_util.Partial` of them: `shard_map` wants to be given
        what it reads.
      rho: the neighbourhood size, a scalar.
      options: the other settings.
      with_info: whether to compute the diagnostics.
      evaluate_ascent: the pass that the ascent gradient comes from, if another.
      ascent_grads: the ascent gradient at w, if it is known already.
      across: manual mesh axes along which the shards of one group lie: the passes are over a
        shard's own examples, and the group's gradient is still to be made of its shards'.
    """

    evaluate: Evaluate
    rho: Any
    options: Options
    with_info: bool
    evaluate_ascent: Evaluate | None = None
    ascent_grads: PyTree | None = None
    across: tuple[str, ...] = ()

    def gradient(
        self, params: PyTree, batch: tuple[PyTree, ...]
    ) -> tuple[Evaluation, SharpnessInfo | None]:
        """Algorithm 1, lines 5 to 7: sample M, ascend on it, take the gradient of B at w_adv.

        Args:
          params: the parameters w.
          batch: the batch B; empty where `evaluate` holds its own.

        Returns:
          Loss, aux and gradient at w_adv, and the diagnostics or `None`.
        """
        options = self.options
        layout = options.layout(batch)
        if options.replicated_params is None and _are_sharded(params, layout):
            options = dataclasses.replace(options, replicated_params=False)
            return dataclasses.replace(self, options=options).gradient(params, batch)
        self._check(params, batch, layout)
        if is_static_zero(self.rho):
            # The plain step, bit for bit: every group's adversarial point would be w.
            if not self.with_info:
                return self._in_passes(batch, layout).evaluate(params, *batch), None
            point = self._one_group(params, batch, layout)
        elif options.group_axes is not None:
            point = self._on_the_mesh(params, batch, layout)
        elif options.m > 1:
            point = self._one_group_after_another(params, batch, layout)
        else:
            point = self._reducing_the_ascent(batch, layout)._one_group(params, batch, layout)
        if point.info is None:
            return point.descent, None
        grads = keep(perturbed_mask(None, params), point.descent.grads)
        return point.descent, point.info.of_the_step(point.descent.loss, grads)

    def _one_group(self, params: PyTree, batch: tuple[PyTree, ...], layout: Layout) -> Point:
        """Lines 5 to 7, with one adversarial point for all of `batch`."""
        step = self._in_passes(batch, layout)
        return step._at_adversarial_point(params, self._micro_batch(batch, layout), batch)

    def _at_adversarial_point(
        self, params: PyTree, micro_batch: tuple[PyTree, ...], batch: tuple[PyTree, ...]
    ) -> Point:
        """Lines 6 and 7: the gradient of `batch` at the point that `micro_batch` leads to."""
        mask = perturbed_mask(self.options.perturb, params)
        ascent, w_adv = self._ascend(params, micro_batch, batch, mask)
        if not self.with_info:
            return Point(self._descend(params, w_adv, batch, ascent), None)
        about_ascent = describe_ascent(
            loss=ascent.loss,
            grads=keep(mask, ascent.grads),
            params=keep(mask, params),
            w_adv=keep(mask, w_adv),
            rho=self.rho,
            moves_wherever_there_is_a_gradient=self.options.perturbation in _ALONG_THE_GRADIENT,
        )
        batch, about_ascent = about_ascent.before(batch)
        descent = self._descend(params, w_adv, batch, ascent)
        of_group = self._of_group(descent, batch)
        return Point(descent, about_ascent.of_the_point(keep(mask, of_group.grads)))

    def _micro_batch(self, batch: tuple[PyTree, ...], layout: Layout) -> tuple[PyTree, ...]:
        """Line 5: M, the part of `batch` that the ascent gradient is taken on."""
        options = self.options
        if not batch or self.ascent_grads is not None or _takes_all(options, layout):
            return batch
        return take_ascent_batch(batch, options.ascent_fraction, options.batch_axis, layout.shards)

    def _ascend(
        self,
        params: PyTree,
        micro_batch: tuple[PyTree, ...],
        batch: tuple[PyTree, ...],
        mask: list[bool],
    ) -> tuple[Evaluation, PyTree]:
        """Line 6: w_adv = w + rho * g_M / ||g_M||_2, or as `options.perturbation` has it."""
        options, evaluate = self.options, self.evaluate_ascent or self.evaluate
        perturbation = of_leaves(options.perturbation, params)
        if self.ascent_grads is None:
            with about_fewer_examples(evaluate, params, micro_batch, batch, options.batch_axis):
                first = evaluate(params, *micro_batch)
            first = self._of_group(first, micro_batch)
        else:
            first = Evaluation(None, None, self.ascent_grads)
        if is_static_zero(self.rho):
            return first, params
        if has_norm_of_what_is_given(options.perturbation):
            ours = (*as_names(options.group_axes or ()), *self.across)
            refuse_a_part(first.loss, keep(mask, first.grads), ours)
        # Each step has the length rho / ascent_steps, so w_adv stays in the ball of radius rho.
        rho = self.rho / options.ascent_steps
        leaves, structure = jax.tree.flatten(params)
        w = keep(mask, params)

        def to_w_adv(epsilon: list[Any]) -> PyTree:
            return structure.unflatten(move(leaves, epsilon, options.adversarial_dtype))

        epsilon = perturbation(keep(mask, first.grads), w, rho)
        w_adv = to_w_adv(epsilon)
        for _ in range(options.ascent_steps - 1):
            with about_wider_parameters(evaluate, params, w_adv, micro_batch):
                evaluation = evaluate(w_adv, *micro_batch)
            grads = self._of_group(evaluation, micro_batch).grads
            # Always from w: adding up epsilon loses nothing, adding to a rounded w_adv would.
            epsilon = jax.tree.map(jnp.add, epsilon, perturbation(keep(mask, grads), w, rho))
            w_adv = to_w_adv(epsilon)
        if options.replicated_params is False:
            # With FSDP XLA else mixes this with the descent's gathers, for up to three sharded
            # copies of the parameters more on TPUs. Of replicated ones it is better left free: all
            # of w_adv in float32, and not in the activations' dtype, is 4% of the bytes accessed.
            (w_adv,) = together(w_adv)
        return first, w_adv

    def _descend(
        self, params: PyTree, w_adv: PyTree, batch: tuple[PyTree, ...], ascent: Evaluation
    ) -> Evaluation:
        """Line 7: loss, aux and gradient of `batch` at w_adv, the gradient in the dtypes at w."""
        with about_wider_parameters(self.evaluate, params, w_adv, batch):
            descent = self.evaluate(w_adv, *batch)
        at_w = params if self.ascent_grads is not None else ascent.grads
        return descent._replace(grads=_in_dtypes_at_w(params, w_adv, at_w, descent.grads))

    def _of_group(self, evaluation: Evaluation, part: tuple[PyTree, ...]) -> Evaluation:
        """Return loss and gradient of the group, from those of this shard's part of the batch."""
        if not self.across:
            return evaluation
        return reduced_within_a_group(evaluation, part, self.across, self.options)

    def _in_passes(self, batch: tuple[PyTree, ...], layout: Layout) -> "Step":
        """Return the step with every pass no larger than one descent micro-batch."""
        k = self.options.accumulation_steps
        if k == 1:
            return self
        b = examples(batch, self.options.batch_axis)

        def split(evaluate: Evaluate) -> Evaluate:
            return accumulated(evaluate, b // k, self.options, layout.shards)

        ascent = self.evaluate_ascent or self.evaluate

        def without_aux(params: PyTree, *batch: PyTree) -> Evaluation:
            # The parts' aux would have to be put together, and the ascent's is nobody's.
            return ascent(params, *batch)._replace(aux=None)

        return dataclasses.replace(
            self, evaluate=split(self.evaluate), evaluate_ascent=split(without_aux)
        )

    def _one_group_after_another(
        self, params: PyTree, batch: tuple[PyTree, ...], layout: Layout
    ) -> Point:
        """Lines 5 to 7 for each of m groups: m-sharpness in either form."""
        options, step = self.options, self._in_passes(batch, layout)
        micro_batches, parts = take_ascent_groups(
            batch,
            options.ascent_fraction,
            options.batch_axis,
            layout.shards,
            options.m,
            options.m_sharpness,
        )
        if parts is None:
            return mean_over_points(
                lambda micro_batch: step._at_adversarial_point(params, micro_batch, batch),
                micro_batches,
                options.mean_aux,
            )
        return over_parts_of_the_batch(
            lambda micro_batch, part: step._at_adversarial_point(params, micro_batch, part),
            micro_batches,
            parts,
            options,
            whole_aux=lambda: jax.eval_shape(lambda: step.evaluate(params, *batch).aux),
            shards=layout.shards,
        )

    def _on_the_mesh(self, params: PyTree, batch: tuple[PyTree, ...], layout: Layout) -> Point:
        """m-sharpness in Foret's form, with all groups at the same time."""
        groups = Layout.over(as_names(self.options.group_axes or ()), layout.mesh)
        across, inside = (), layout.within(groups.axes)
        if self.options.replicated_params and layout.shards > 1:
            # Each shard takes its own gradient, so that one all-reduce adds them all up.
            across = inside.axes
            groups, inside = layout, layout.within(layout.axes)

        def on_one_group(params: PyTree, batch: tuple[PyTree, ...], given: Any) -> Point:
            step = dataclasses.replace(self, **given, across=across)
            return step._one_group(params, batch, inside)

        return over_mesh_axes(
            on_one_group,
            params,
            batch,
            groups,
            self.options,
            across=across,
            given={
                "evaluate": self.evaluate,
                "evaluate_ascent": self.evaluate_ascent,
                "rho": self.rho,
            },
            evaluate=self.evaluate,
        )

    def _reducing_the_ascent(self, batch: tuple[PyTree, ...], layout: Layout) -> "Step":
        """Return the step with the ascent gradient reduced over the mesh in a dtype of choice."""
        options = self.options
        if options.reduction_dtype is None or self.ascent_grads is not None:
            return self
        if not batch:
            raise ValueError(
                f"reduction_dtype={options.reduction_dtype!r} is the dtype in which the gradients "
                "of the shards' parts of the batch are reduced, so the batch must be given: a "
                "grad_fn that holds its own cannot be called on a part of it."
            )
        ascent = reduced_over_shards(self.evaluate_ascent or self.evaluate, layout, options)
        return dataclasses.replace(self, evaluate_ascent=ascent)

    def _check(self, params: PyTree, batch: tuple[PyTree, ...], layout: Layout) -> None:
        """Raise if the batch cannot be divided as the options say, or gradients not be averaged."""
        options, at_w = self.options, is_static_zero(self.rho)
        ascends = self.ascent_grads is None and (self.with_info or not at_w)
        ascends &= not _takes_all(options, layout)
        m = 1 if at_w else options.m
        if batch and (ascends or options.accumulation_steps > 1):
            division = Division(
                layout.shards,
                options.ascent_fraction,
                m,
                parts=m if options.m_sharpness == "foret" else 1,
                passes=options.accumulation_steps,
            )
            division.check(examples(as_given(batch), options.batch_axis))
        several_points = not at_w and (options.m > 1 or options.group_axes is not None)
        if several_points or options.accumulation_steps > 1:
            refuse_overwritten(params)


def _are_sharded(params: PyTree, layout: Layout) -> bool:
    """Whether types say that a parameter is sharded over axes of the batch, as with FSDP."""
    return any(names_in_type(w) & {*layout.axes} for w in jax.tree.leaves(params))


def _takes_all(options: Options, layout: Layout) -> bool:
    """Whether the ascent is on the batch as it is, whatever is in it."""
    undivided = options.m == 1 and options.group_axes is None and layout.shards == 1
    return undivided and options.ascent_fraction == 1


def _in_dtypes_at_w(params: PyTree, w_adv: PyTree, at_w: PyTree, grads: PyTree) -> PyTree:
    """Return `grads` in the dtypes of the gradient `at_w`, where w_adv has another than w."""

    def cast(w: Any, v: Any, like: Any, g: Any) -> Any:
        same = jnp.result_type(v) == jnp.result_type(w)
        return g if same else g.astype(jnp.result_type(like))

    return jax.tree.map(cast, params, w_adv, at_w, grads)

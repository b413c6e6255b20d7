"""What to add to an error of the loss function that SAM may be the reason for."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from ._layout import as_given
from ._microbatch import examples
from ._options import Options
from ._types import PyTree


@contextlib.contextmanager
def about_the_ascent(
    micro_batch: tuple[PyTree, ...], batch: tuple[PyTree, ...], options: Options
) -> Generator[None]:
    """Say that the pass was on fewer examples, if it was and the loss fails."""
    try:
        yield
    except (TypeError, ValueError) as error:
        sizes: Any = None
        with contextlib.suppress(TypeError, ValueError):
            axis = options.batch_axis
            sizes = [examples(as_given(x), axis) for x in (micro_batch, batch) if x]
        if sizes and sizes[0] < sizes[-1]:
            error.add_note(
                f"sam_optax: this was in the ascent, on {sizes[0]} of {sizes[1]} examples. If the "
                "loss cannot take so few, give a larger ascent_fraction, or all mesh axes that it "
                "divides the batch over as data_axes; if only some arrays were divided, say in "
                "batch_argnums which arguments hold examples."
            )
        raise


@contextlib.contextmanager
def about_wider_parameters(params: PyTree, w_adv: PyTree) -> Generator[None]:
    """Say that w_adv is of another dtype than the parameters, if it is and the loss fails."""
    try:
        yield
    except (TypeError, ValueError) as error:
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(w_adv), strict=True)
        pairs = {(str(jnp.result_type(w)), str(jnp.result_type(v))) for w, v in leaves}
        wider = sorted(pair for pair in pairs if pair[0] != pair[1])
        if wider:
            (given, moved), *_ = wider
            error.add_note(
                f"sam_optax: this was at the adversarial point, which is {moved} where the "
                f"parameters are {given}. If the loss needs {given}, give adversarial_dtype="
                f"jnp.{given}, and watch SharpnessInfo.realised_perturbation."
            )
        raise

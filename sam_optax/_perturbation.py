"""From the ascent gradient to the perturbation, and from the perturbation to the adversarial point.

A new variant of SAM that changes the perturbation is a new function here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ._checks import check_gradient, check_number, check_rho, is_inexact, is_none
from ._dtypes import promoting, widened
from ._norm import along, of_ordinary_size
from ._types import Perturbation, PyTree


def gradient_perturbation(grads: PyTree, params: PyTree, rho: Any) -> PyTree:
    """SAM's perturbation, `rho * g / ||g||_2` with one norm over every leaf.

    Args:
      grads: the ascent gradient g, of real or complex arrays of any floating dtype; leaves that are
        `None` are left out.
      params: the parameters; not used.
      rho: length of the perturbation, a scalar.

    Returns:
      The perturbation, a tree like `grads` in at least float32. Where `g` as a whole is zero or not
      finite, or `rho` is zero, it is -0.0 everywhere, which leaves every w as it is, bit for bit.

    Raises:
      ValueError: if `rho` is negative, not finite or no scalar.
      TypeError: if `rho` is no number, or a leaf of `grads` is no floating or complex array.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> sam_optax.gradient_perturbation({"w": jnp.array([3.0, 4.0])}, None, rho=0.5)["w"]
      Array([0.3, 0.4], dtype=float32)

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, eq. 2.
    """
    del params
    check_rho(rho)
    _check_inexact(grads)
    return along(grads, rho)


def adaptive_perturbation(eta: float = 0.01) -> Perturbation:
    """ASAM's scale-invariant perturbation, `rho * T^2 g / ||T g||_2` with `T = |w| + eta`.

    Rescaling a layer, and undoing it in the next, changes neither the network nor (at `eta=0`)
    what this perturbation does to it. The useful `rho` is larger than SAM's, often about ten times.

    Args:
      eta: added to `|w|`, so that small weights move too; at least 0.

    Returns:
      A perturbation, to be given as `perturbation=`: a function of the ascent gradient g, the
      parameters w and rho, whose result is like that of `gradient_perturbation`, and as -0.0
      everywhere where there is no direction (a complex leaf: zero).

    Raises:
      ValueError: if `eta` is negative or not finite; from the perturbation, if `rho` is negative,
        not finite or no scalar.
      TypeError: if `eta` is not a number; from the perturbation, if `rho` is no number, a leaf of
        the gradient is no floating or complex array, or its structure is not the parameters'.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> asam = sam_optax.adaptive_perturbation(eta=0.0)
      >>> g, w = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, -4.0])}
      >>> asam(g, w, rho=0.5)["w"]
      Array([0.3, 1.6], dtype=float32)

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, eq. 9.
    """
    check_number("eta", eta, example=0.01)
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta={eta!r} must be finite and at least 0, such as 0.01.")

    eta = float(eta)

    @promoting
    def perturbation(grads: PyTree, params: PyTree, rho: Any) -> PyTree:
        check_rho(rho)
        _check_inexact(grads)
        _check_structure("grads", grads, params)
        # |w| in at least float32: in bfloat16 an eta of 0.01 is lost beside a weight of 8.
        scale = jax.tree.map(lambda w: jnp.abs(widened(w)) + eta, params)
        # T * g itself may be too large or too small for a number.
        direction = of_ordinary_size(grads)
        scaled = along(jax.tree.map(lambda t, g: t * g, scale, direction), rho)
        return jax.tree.map(lambda t, x: t * x, scale, scaled)

    return perturbation


def has_norm_of_what_is_given(perturbation: Perturbation | None) -> bool:
    """Whether it is one of these, and so has the norm of the arrays on this device alone."""
    return perturbation is None or getattr(perturbation, "__module__", None) == __name__


def of_leaves(perturbation: Perturbation | None, tree: PyTree) -> Perturbation:
    """Return `perturbation` of lists of leaves, those of trees like `tree`, `None` for what stays.

    SAM's own, which `None` means, takes the lists as they are: a class of the user's might refuse
    to hold `None`.

    Raises:
      TypeError: from the perturbation, if it is not like `tree`.
    """
    if perturbation is None or perturbation is gradient_perturbation:
        return gradient_perturbation
    structure = jax.tree.structure(tree)

    def of_lists(grads: list[Any], params: list[Any], rho: Any) -> list[Any]:
        epsilon = perturbation(structure.unflatten(grads), structure.unflatten(params), rho)
        _check_structure("The perturbation", epsilon, tree)
        check_gradient("The perturbation", epsilon, tree)
        return structure.flatten_up_to(epsilon)

    return of_lists


@promoting
def move(params: PyTree, perturbation: PyTree, dtype: Any = None) -> PyTree:
    """Return the adversarial point `w + epsilon`.

    Args:
      params: the parameters w.
      perturbation: epsilon, a tree like `params` with `None` for leaves that stay as they are.
      dtype: the floating dtype of the moved leaves. By default each leaf's own, but at least
        float32: an epsilon of size 0.15 spread over millions of bfloat16 weights is mostly rounded
        away.
    """

    def move_leaf(epsilon: Any, w: Any) -> Any:
        if epsilon is None:
            return w
        w = widened(w)
        # The epsilon of a user's own perturbation may be wider, and w_adv is not.
        return _sum(w, epsilon).astype(w.dtype if dtype is None or jnp.iscomplexobj(w) else dtype)

    return jax.tree.map(move_leaf, perturbation, params, is_leaf=is_none)


@jax.custom_jvp
def _sum(w: Any, epsilon: Any) -> jax.Array:
    # Where epsilon is zero w stays, bit for bit: -0.0 + 0.0 would be +0.0. It also keeps XLA from
    # gathering sharded parameters (FSDP) ahead of the sum, in float32 and each for itself.
    return jnp.where(epsilon == 0, w, w + epsilon)


@_sum.defjvp
@promoting
def _derivative_of_the_sum(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Where epsilon is zero, too; that of `where` alone is zero there in epsilon, so in rho = 0.
    return _sum(*primals), tangents[0] + tangents[1]


def _check_inexact(grads: PyTree) -> None:
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if not is_inexact(g):
            raise TypeError(
                f"grads{jax.tree_util.keystr(path)} is {g!r}, which is no gradient: it must be a "
                "real or complex array. Give None in its place to leave it out."
            )


def _check_structure(what: str, tree: PyTree, params: PyTree) -> None:
    ours, theirs = (jax.tree.structure(x, is_leaf=is_none) for x in (tree, params))
    if ours != theirs:
        raise TypeError(
            f"{what} must have the structure of the parameters, {theirs}, with None for leaves "
            f"that stay as they are, but it has {ours}."
        )

"""The shapes of the functions and trees that the rest of the package passes around."""

from typing import Any, NamedTuple, Protocol

PyTree = Any
"""A pytree of arrays."""


class Evaluation(NamedTuple):
    """What one forward and backward pass gives.

    Attributes:
      loss: scalar, or `None` if the gradient function does not tell it.
      aux: the loss function's auxiliary output, or `None`.
      grads: gradient, a tree like the parameters.
    """

    loss: Any
    aux: Any
    grads: PyTree


class Evaluate(Protocol):
    """One forward and backward pass on (a part of) the batch."""

    def __call__(self, params: PyTree, *batch: PyTree) -> Evaluation:
        """Return loss, aux and gradient of `batch` at `params`."""
        ...


class Perturbation(Protocol):
    """A way from the ascent gradient to the perturbation, such as SAM's or ASAM's.

    What it returns is checked in the step: a `TypeError` if it is of another structure than its
    arguments, or an array of another shape or no floating dtype.

    Example:
      SAM's in the maximum norm, every weight by rho in the direction of its sign:

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> def by_sign(grads, params, rho):
      ...     return jax.tree.map(lambda g: rho * jnp.sign(g).astype(jnp.float32), grads)
      >>> gradient = sam_optax.value_and_grad(
      ...     lambda w, x: jnp.sum(x @ w**2), rho=0.5, perturbation=by_sign)
      >>> gradient(jnp.array([1.0, -2.0]), jnp.ones((4, 2)))[1]
      Array([ 12., -20.], dtype=float32)
    """

    def __call__(self, grads: PyTree, params: PyTree, rho: Any) -> PyTree:
        """Return the perturbation epsilon.

        Args:
          grads: the ascent gradient, in the direction of steepest ascent. Leaves that are not to
            be perturbed are `None`, here and in `params`.
          params: the parameters w.
          rho: the neighbourhood size, a scalar.

        Returns:
          A tree like `grads`, whose leaves should be of at least float32: all zeros where the
          gradient gives no direction, being zero or not finite.
        """
        ...

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
    """A way from the ascent gradient to the perturbation, such as SAM's or ASAM's."""

    def __call__(self, grads: PyTree, params: PyTree, rho: Any) -> PyTree:
        """Return the perturbation epsilon.

        Args:
          grads: the ascent gradient, in the direction of steepest ascent. Leaves that are not to
            be perturbed are `None`, here and in `params`.
          params: the parameters w.
          rho: the neighbourhood size, a scalar.

        Returns:
          A tree like `grads` with leaves of at least float32: all zeros where the gradient gives
          no direction, being zero or not finite.
        """
        ...

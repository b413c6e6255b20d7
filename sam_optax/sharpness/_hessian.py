"""The largest eigenvalues of the Hessian, by Lanczos."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import check_integer, check_number, check_seed
from .._dtypes import promoting
from .._reduction import LossReduction
from .._types import PyTree
from ._directions import compiled_unit_and_norm, random_unit
from ._mean_loss import LossFn, MeanLoss


class HessianEigenpairs(NamedTuple):
    """The largest eigenvalues of a Hessian.

    Attributes:
      values: `[k]`, in descending order. Algebraically: -9 is smaller than 1.
      vectors: k trees like the parameters, unit eigenvectors in at least float32; `None` for leaves
        without a gradient.
      residuals: `[k]`, `||H v - value v|| / |value|`: how far from converged each pair is, and at
        least what rounding leaves unknown, the dtype's epsilon times the largest value in size. At
        1 or more, the value is noise.
      steps: the number of Lanczos steps, each a Hessian-vector product over all batches.
    """

    values: np.ndarray[Any, np.dtype[np.float64]]
    vectors: list[PyTree]
    residuals: np.ndarray[Any, np.dtype[np.float64]]
    steps: int


def hessian_eigenpairs(
    loss_fn: LossFn,
    params: PyTree,
    batches: Sequence[Any],
    k: int = 1,
    *,
    max_steps: int = 30,
    tolerance: float = 1e-3,
    loss_reduction: LossReduction = "mean",
    seed: int = 0,
) -> HessianEigenpairs:
    """Return the k algebraically largest eigenvalues of the Hessian, and their eigenvectors.

    By Lanczos's method: the Hessian is never formed, and each step takes its product with one
    vector, the derivative of the gradient along it, at the cost of about two gradients. Every new
    vector is made orthogonal to all before it, twice, since in float32 they would otherwise repeat
    eigenvalues. So `max_steps` copies of the parameters in float32 are held. From one first vector,
    an eigenvalue that several eigenvectors share is found once.

    Args:
      loss_fn: `loss_fn(params, batch)`, a scalar that is twice differentiable, without dropout. It
        is compiled once for a function and its shapes, as by `jax.jit`, also over several calls and
        measures: define it outside the loop over checkpoints. (Each `model.loss` is a new function:
        keep one in a variable.) What it closes over is read once.
      params: the parameters, of any real dtype; the Hessian is taken in at least float32.
      batches: the data, in batches of one shape, so that each function compiles once. A last batch
        with fewer examples needs a function as `loss_reduction`.
      k: the number of eigenvalues.
      max_steps: the largest number of steps; the pairs of the last are returned.
      tolerance: stop when all k residuals, but for rounding, are at most this, and not before step
        `2k + 8`: where nearly all eigenvalues are one, any random vector is nearly an eigenvector.
      loss_reduction: how the loss of the data follows from the batches', as for `value_and_grad`:
        `"mean"`, `"sum"`, or a function from a batch to its weight.
      seed: of the first vector.

    Returns:
      The eigenpairs, and how far from converged they are. Values and residuals are NumPy arrays in
      float64.

    Raises:
      ValueError: if there are no batches, or batches of several sizes with `"mean"`, the loss is no
        real scalar, no parameter has a gradient, a batch's weight or a product with the Hessian is
        not finite, or a setting is out of its range.
      TypeError: if an argument is of the wrong type or traced (this is not for `jax.jit`), the
        batches are no list, or a parameter is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.mean(batch @ params**2)
      >>> pairs = sharpness.hessian_eigenpairs(loss_fn, jnp.ones(2), [jnp.array([[3.0, 1.0]])])
      >>> pairs.values.round(3).tolist()
      [6.0]

    References:
      Golub and Van Loan, Matrix Computations, section 10.1. Bahri et al., `Sharpness-Aware
      Minimization Improves Language Model Generalization <https://arxiv.org/abs/2110.08529>`_, on
      why it is this that SAM lowers.
    """
    check_integer("k", k, at_least=1)
    check_integer("max_steps", max_steps, at_least=k)
    check_number("tolerance", tolerance, example=1e-3)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} must be at least 0, such as 0.001.")
    check_seed(seed)
    mean = MeanLoss(loss_fn, params, batches, loss_reduction)
    size = sum(x.size for x in jax.tree.leaves(mean.movable))
    if k > size:
        raise ValueError(f"k={k} eigenvalues of a Hessian that has {size}: give k={size} or less.")
    most = min(max_steps, size)
    fewest = min(most, 2 * k + 8)
    epsilon = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(mean.movable))
    keys = jax.random.split(jax.random.key(seed), max_steps)
    basis: list[PyTree] = [random_unit(mean.movable, keys[0])]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        product = mean.hessian_times(basis[-1])
        diagonal.append(float(_inner(basis[-1], product)))
        product, beta = _orthogonal(product, basis)
        if not math.isfinite(beta):
            raise ValueError(
                "The Hessian times a vector is not finite: the loss, or a derivative of it, is NaN "
                "or overflows at these parameters on one of these batches. Give a finite loss."
            )
        values, vectors = _eigh(diagonal, off_diagonal)
        rounding = epsilon * np.abs(values).max()
        top = slice(-1, -k - 1, -1)  # the largest first
        values, vectors = values[top], vectors[:, top]
        errors = beta * np.abs(vectors[-1])
        scale = np.maximum(np.abs(values), np.finfo(np.float32).tiny)
        steps = len(diagonal)
        if steps == most or (steps >= fewest and bool((errors <= tolerance * scale).all())):
            break
        if beta <= rounding:
            # The vectors so far span an invariant subspace: go on outside of it.
            product, beta = _orthogonal(random_unit(mean.movable, keys[steps]), basis)[0], 0.0
        off_diagonal.append(beta)
        basis.append(product)
    residuals = (errors + rounding) / scale
    return HessianEigenpairs(values, [_combine(v, basis) for v in vectors.T], residuals, steps)


@jax.jit
@promoting
def _inner(a: PyTree, b: PyTree) -> jax.Array:
    # Not `optax.tree.vdot`: that makes a vector of each leaf, which moves one that is sharded.
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))


@jax.jit
@promoting
def _without(vector: PyTree, unit: PyTree) -> PyTree:
    """Return `vector` less its part along `unit`."""
    return optax.tree.add_scale(vector, -_inner(vector, unit), unit)


def _orthogonal(vector: PyTree, basis: list[PyTree]) -> tuple[PyTree, float]:
    """Return the unit vector along what of `vector` is orthogonal to `basis`, and its length."""
    for unit in (*basis, *basis):
        # One at a time: where each reduces over a mesh, many at once can deadlock CPU devices.
        vector = jax.block_until_ready(_without(vector, unit))
    unit, norm = compiled_unit_and_norm(vector)
    return unit, float(norm)


def _eigh(diagonal: list[float], off_diagonal: list[float]) -> Any:
    matrix = np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    return np.linalg.eigh(matrix)


def _combine(coefficients: Any, basis: list[PyTree]) -> PyTree:
    total = optax.tree.zeros_like(basis[0])
    for c, unit in zip(coefficients, basis, strict=True):
        total = optax.tree.add_scale(total, float(c), unit)
    return total

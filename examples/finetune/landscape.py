"""How sharp a minimum is: the top Hessian eigenvalue, and the loss along a direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Eigenpair(NamedTuple):
    """The top eigenvalue of a Hessian and its unit eigenvector."""

    value: float
    vector: Any
    """A tree like the parameters."""
    relative_residual: float
    """`||H v - value v|| / |value|`: how far from converged the pair is."""


def top_hessian_eigenpair(
    loss_fn, params, max_steps: int = 30, tolerance: float = 1e-3, seed: int = 0
) -> Eigenpair:
    """The algebraically largest eigenvalue of the Hessian of `loss_fn(params)`, by Lanczos.

    The Hessian is never formed: each step needs its product with one vector, the derivative of the
    gradient along it. Every new vector is orthogonalised against all earlier ones, twice, as
    single-precision Lanczos would otherwise lose orthogonality and repeat eigenvalues. Stops when
    the relative residual is at most `tolerance`, or after `max_steps`.
    """
    weights, unravel = ravel_pytree(params)

    @jax.jit
    def hessian_times(weights, vector):
        gradient = jax.grad(lambda w: loss_fn(unravel(w)))
        return jax.jvp(gradient, (weights,), (vector,))[1]

    vector = jax.random.normal(jax.random.key(seed), weights.shape, weights.dtype)
    vector /= jnp.linalg.norm(vector)
    basis, diagonal, off_diagonal = [], [], []
    for _ in range(min(max_steps, weights.size)):
        basis.append(vector)
        product = hessian_times(weights, vector)
        diagonal.append(float(jnp.vdot(vector, product)))
        product = _orthogonalise(product, jnp.stack(basis))
        off_diagonal.append(float(jnp.linalg.norm(product)))
        values, vectors = np.linalg.eigh(_tridiagonal(diagonal, off_diagonal[:-1]))
        value, coefficients = values[-1], vectors[:, -1]
        residual = abs(off_diagonal[-1] * coefficients[-1] / value)
        if residual <= tolerance:
            break
        vector = product / off_diagonal[-1]
    ritz_vector = jnp.asarray(coefficients, weights.dtype) @ jnp.stack(basis)
    ritz_vector /= jnp.linalg.norm(ritz_vector)
    return Eigenpair(float(value), unravel(ritz_vector), float(residual))


def _orthogonalise(vector, basis):
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _tridiagonal(diagonal, off_diagonal):
    return np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)


def random_unit_direction(params, seed: int = 0):
    """A direction uniform on the unit sphere, the same for the same seed and shapes."""
    flat, unravel = ravel_pytree(params)
    direction = jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype)
    return unravel(direction / jnp.linalg.norm(direction))


def unit_gradient(loss_fn, params):
    """The direction in which the loss rises fastest, which SAM's perturbation takes."""
    flat, unravel = ravel_pytree(jax.jit(jax.grad(loss_fn))(params))
    return unravel(flat / jnp.linalg.norm(flat))


def loss_along(loss_fn, params, direction, distances) -> list[float]:
    """`loss_fn(params + t * direction)` for each t of `distances`."""

    @jax.jit
    def loss_at(params, direction, distance):
        return loss_fn(jax.tree.map(lambda w, v: w + distance * v, params, direction))

    return [float(loss_at(params, direction, float(t))) for t in distances]

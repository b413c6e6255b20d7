"""How sharp a minimum is: Hessian eigenvalues, epsilon-sharpness, and the loss around it.

Each function takes a loss `loss_fn(params, batch)` and several batches, and takes the loss of all
of them together. One batch at a time is on the devices, sharded as it comes; directions are trees
like the parameters, and sharded as those are. Nothing here belongs in a train step.
"""

from ._directions import random_direction
from ._epsilon import EpsilonSharpness, epsilon_sharpness
from ._hessian import HessianEigenpairs, hessian_eigenpairs
from ._landscape import loss_along

__all__ = [
    "EpsilonSharpness",
    "HessianEigenpairs",
    "epsilon_sharpness",
    "hessian_eigenpairs",
    "loss_along",
    "random_direction",
]

"""The only difference between the two runs: what stands in for the gradient."""

import jax

import sam_optax
from finetune.experiment import Experiment


def plain_gradient(loss_fn):
    """Ordinary training."""
    return jax.value_and_grad(loss_fn, has_aux=True)


def sam_gradient(loss_fn, experiment: Experiment):
    """SAM: the gradient at the adversarial point, called in the same way."""
    return sam_optax.value_and_grad(
        loss_fn,
        rho=experiment.rho,
        ascent_fraction=experiment.ascent_fraction,
        m=experiment.m,
        has_aux=True,
    )

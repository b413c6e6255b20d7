"""The ways of taking a training step that are compared: plain, what others do, and ours."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import sam_optax

RHO = 0.15
GSAM_ALPHA = 0.1


class Way(NamedTuple):
    """How to take a step.

    Attributes:
      init: from the parameters to the optimizer's state.
      step: `step(params, state, batch) -> (params, state, loss)`.
      calls: how many calls of `step` move the parameters once.
      shares: how many equal shares the batch has to be cut into.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    calls: int = 1
    shares: int = 1


def ways(loss_fn: Callable[..., Any], base: Any = None) -> dict[str, Way]:
    """Every way by name. `loss_fn(params, batch)` is a mean over examples; `base` is Adafactor."""
    base = optax.adafactor(1e-3) if base is None else base

    def from_gradient(gradient, shares=1):
        def step(params, state, batch):
            loss, grads = gradient(params, batch)
            updates, state = base.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return Way(base.init, step, shares=shares)

    def ours(one_over: int, m: int = 1, **options):
        gradient = sam_optax.value_and_grad(loss_fn, RHO, 1 / one_over, m, **options)
        return from_gradient(gradient, one_over * m)

    return {
        "plain": from_gradient(jax.value_and_grad(loss_fn)),
        "optax.contrib.sam, opaque": _opaque(loss_fn, base),
        "optax.contrib.sam, transparent": _transparent(loss_fn, base),
        "by hand, as Foret et al.": from_gradient(_by_hand(loss_fn)),
        "GSAM": from_gradient(_gsam(loss_fn)),
        "two bare passes, a/b = 1/4": from_gradient(_two_bare_passes(loss_fn), 4),
        **{f"a/b = {_fraction(n)}": ours(n) for n in (1, 2, 4, 8)},
        **{f"m = {m}, paper": ours(4, m) for m in (2, 4, 8)},
        **{f"m = {m}, Foret": ours(4, m, m_sharpness="foret") for m in (2, 4, 8)},
    }


def _fraction(n: int) -> str:
    return "1" if n == 1 else f"1/{n}"


def _adversary() -> optax.GradientTransformation:
    return optax.chain(optax.contrib.normalize(), optax.sgd(RHO))


def _opaque(loss_fn, base) -> Way:
    sam = optax.contrib.sam(base, _adversary(), opaque_mode=True)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = sam.update(
            grads, state, params, grad_fn=lambda p, _: jax.grad(loss_fn)(p, batch)
        )
        return optax.apply_updates(params, updates), state, loss

    return Way(sam.init, step)


def _transparent(loss_fn, base) -> Way:
    sam = optax.contrib.sam(base, _adversary(), sync_period=2)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = sam.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return Way(sam.init, step, calls=2)


def _at_adversarial_point(loss_fn, params, batch):
    """Return the gradient at w, and loss and gradient at w + rho * g / ||g||."""
    first = jax.grad(loss_fn)(params, batch)
    scale = RHO / optax.tree.norm(first)
    adversarial = jax.tree.map(lambda w, g: w + scale * g, params, first)
    return first, *jax.value_and_grad(loss_fn)(adversarial, batch)


def _by_hand(loss_fn):
    """What people write who write SAM themselves (Foret et al. 2021, eq. 3)."""

    def gradient(params, batch):
        _, loss, grads = _at_adversarial_point(loss_fn, params, batch)
        return loss, grads

    return gradient


def _gsam(loss_fn):
    """Zhuang et al. 2022, alg. 1: less of the part of g that is orthogonal to SAM's gradient."""

    def gradient(params, batch):
        first, loss, grads = _at_adversarial_point(loss_fn, params, batch)
        along = optax.tree.vdot(first, grads) / optax.tree.norm(grads) ** 2
        return loss, jax.tree.map(lambda g, h: h - GSAM_ALPHA * (g - along * h), first, grads)

    return gradient


def _two_bare_passes(loss_fn):
    """No SAM, but what any SAM costs at least: both passes, and no care for the length."""

    def gradient(params, batch):
        quarter = jax.tree.map(lambda x: x[: x.shape[0] // 4], batch)
        first = jax.grad(loss_fn)(params, quarter)
        return jax.value_and_grad(loss_fn)(jax.tree.map(jnp.add, params, first), batch)

    return gradient


NAMES = tuple(ways(jnp.sum))

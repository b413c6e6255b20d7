"""The public surface as a user's type checker sees it: strictly checked, and never run."""
# pyright: reportUnknownArgumentType=true, reportUnknownMemberType=true
# pyright: reportUnknownVariableType=true, reportUnknownLambdaType=true

from typing import Any, assert_type

import jax
import optax

import sam_optax

Params = dict[str, jax.Array]


def loss_fn(params: Params, batch: Params) -> jax.Array:
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()


def loss_and_aux(params: Params, batch: Params) -> tuple[jax.Array, Params]:
    return loss_fn(params, batch), batch


def rho_at(step: jax.Array) -> jax.Array:
    return 0.05 + 0 * step


def as_an_optimizer(params: Params, batch: Params) -> Any:
    tx = sam_optax.sharpness_aware(
        optax.adamw(1e-3),
        rho=rho_at,
        ascent_fraction=0.25,
        m=2,
        m_sharpness="foret",
        perturbation=sam_optax.adaptive_perturbation(eta=0.01),
        perturb=lambda path: "norm" in path,
    )
    assert_type(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    updates, state = tx.update(None, state, params, grad_fn=loss_fn, batch=batch)  # pyright: ignore[reportArgumentType]
    return updates, state


def as_a_gradient(params: Params, batch: Params) -> Any:
    gradient = sam_optax.value_and_grad(loss_and_aux, rho=0.05, has_aux=True, return_info=True)
    result = gradient(params, batch)
    return result


def what_a_step_tells(info: sam_optax.SharpnessInfo) -> None:
    print(info.ascent_loss, info.cosine, info.realised_perturbation, info.skipped_ascents)


def the_examples(batch: Params) -> None:
    micro_batch = sam_optax.ascent_batch(batch, 0.25, data_axes=("replica", "data"))
    groups = sam_optax.ascent_groups(batch, 0.25, m=4)
    print(micro_batch, groups)


def of_my_own(grads: Params, params: Params, rho: jax.Array) -> Params:
    return {name: rho * g for name, g in grads.items()}


custom: sam_optax.Perturbation = of_my_own

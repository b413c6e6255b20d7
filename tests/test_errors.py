"""Bad input: a clear error at the earliest moment, with the value, the rule and the fix."""

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import mlp_batch, mlp_loss, mlp_params

import sam_optax

SETTINGS = [
    ({"rho": -0.1}, ValueError, "rho=-0.1 must be finite and at least 0"),
    ({"rho": float("nan")}, ValueError, "rho=nan"),
    ({"rho": float("inf")}, ValueError, "rho=inf"),
    ({"rho": jnp.float32(-1)}, ValueError, "rho=.*-1.*at least 0"),
    ({"rho": jnp.ones(3)}, ValueError, r"rho must be a real scalar.*\(3,\).*perturb="),
    ({"rho": jnp.complex64(1)}, ValueError, "rho must be a real scalar.*complex64"),
    ({"rho": "0.1"}, TypeError, "rho='0.1' must be a number"),
    ({"rho": None}, TypeError, "rho=None must be a number"),
    ({"rho": True}, TypeError, "rho=True must be a number"),
    ({"ascent_fraction": 0}, ValueError, r"ascent_fraction=0 must be in \(0, 1\].*rho=0"),
    ({"ascent_fraction": 1.5}, ValueError, r"ascent_fraction=1.5 must be in \(0, 1\]"),
    ({"ascent_fraction": float("nan")}, ValueError, "ascent_fraction=nan"),
    ({"ascent_fraction": "1/4"}, TypeError, "ascent_fraction='1/4' must be a number"),
    ({"ascent_fraction": None}, TypeError, "ascent_fraction=None"),
    ({"ascent_fraction": jnp.float32(0.5)}, TypeError, "ascent_fraction.*static_args"),
    ({"m": 0}, ValueError, "m=0 must be at least 1"),
    ({"m": -2}, ValueError, "m=-2"),
    ({"m": 2.0}, TypeError, "m=2.0 must be an integer"),
    ({"m": "2"}, TypeError, "m='2'"),
    ({"m": None}, TypeError, "m=None"),
    ({"m": jnp.int32(2)}, TypeError, "m must be a Python number.*static_args"),
    ({"ascent_steps": 0}, ValueError, "ascent_steps=0 must be at least 1"),
    ({"ascent_steps": True}, TypeError, "ascent_steps=True"),
    ({"data_shards": 0}, ValueError, "data_shards=0"),
    ({"batch_axis": None}, TypeError, "batch_axis=None"),
    ({"m_sharpness": "both"}, ValueError, "m_sharpness='both' must be one of.*paper.*foret"),
    ({"m_sharpness": None}, ValueError, "m_sharpness=None"),
    ({"loss_reduction": "max"}, ValueError, "loss_reduction='max' must be one of"),
    ({"loss_reduction": None}, ValueError, "loss_reduction=None"),
    ({"perturbation": "asam"}, TypeError, "perturbation='asam' must be a function"),
    ({"combine_aux": "sum"}, TypeError, "combine_aux='sum' must be a function"),
    ({"adversarial_dtype": "int32"}, TypeError, "adversarial_dtype='int32'.*floating"),
    ({"adversarial_dtype": "half a float"}, TypeError, "adversarial_dtype='half a float'"),
]


@pytest.mark.parametrize(("options", "error", "message"), SETTINGS)
def test_settings_are_checked_when_they_are_given(options, error, message):
    with pytest.raises(error, match=message):
        sam_optax.value_and_grad(mlp_loss, **options)
    with pytest.raises(error, match=message):
        sam_optax.sharpness_aware(optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": None}, TypeError, "loss_fn=None must be a function"),
        ({"ascent_loss_fn": 3}, TypeError, "ascent_loss_fn=3 must be a function"),
        ({"rho": lambda count: 0.1}, TypeError, r"no step count.*rho=schedule\(step\)"),
        ({"batch_argnums": 0}, ValueError, "batch_argnums=0 must be at least 1"),
        ({"batch_argnums": "batch"}, TypeError, "batch_argnums='b'"),
        ({"batch_argnums": ()}, ValueError, r"batch_argnums=\(\)"),
        ({"batch_argnums": (1, 1)}, ValueError, r"batch_argnums=\(1, 1\)"),
    ],
)
def test_settings_of_value_and_grad(options, error, message):
    with pytest.raises(error, match=message):
        sam_optax.value_and_grad(**({"loss_fn": mlp_loss} | options))


@pytest.mark.parametrize("inner", ["adam", optax.adam, 0.1])
def test_inner_must_be_an_optimizer(inner):
    with pytest.raises(TypeError, match="inner=.* must be an Optax optimizer"):
        sam_optax.sharpness_aware(inner)


def test_the_batch_must_be_positional():
    with pytest.raises(TypeError, match=r"positional argument 1.*keywords \['batch'\]"):
        sam_optax.value_and_grad(mlp_loss)(mlp_params(), batch=mlp_batch())


def test_traced_rho_must_be_a_scalar():
    def step(rho):
        return sam_optax.value_and_grad(mlp_loss, rho=rho)(mlp_params(), mlp_batch())[0]

    assert jnp.isfinite(jax.jit(step)(0.1))
    with pytest.raises(ValueError, match=r"rho must be a real scalar.*\(2,\)"):
        jax.jit(step)(jnp.ones(2))


GOOD = {"grad_fn": jax.grad(mlp_loss), "batch": mlp_batch()}


@pytest.mark.parametrize(
    ("settings", "call", "error", "message"),
    [
        ({}, {"params": None}, ValueError, "needs the parameters"),
        ({}, {"grad_fn": None}, ValueError, "needs grad_fn.*None"),
        ({}, {"grad_fn": "jax.grad"}, ValueError, "needs grad_fn.*'jax.grad'"),
        ({}, {"batch": None}, ValueError, "needs the batch.*ascent_fraction=0.25"),
        ({"m": 2, "ascent_fraction": 1}, {"batch": None}, ValueError, "needs the batch.*m=2"),
        ({"m": 2}, {"updates": mlp_params()}, ValueError, "one group, but there are m=2"),
        ({}, {"updates": {"hidden": 1.0}}, ValueError, "must have the structure of params"),
        ({}, {"grad_fn": lambda p, b: {"w": 1.0}}, TypeError, "grad_fn must return a gradient"),
        ({}, {"grad_fn": lambda p, b: None}, TypeError, "grad_fn must return a gradient"),
        ({}, {"grad_fn": mlp_loss}, TypeError, "grad_fn must return a gradient"),
        (
            {},
            {"grad_fn": jax.grad(lambda p, b: (mlp_loss(p, b), 0), has_aux=True)},
            TypeError,
            "grad_fn must return a gradient",
        ),
        ({"m": 3}, {}, ValueError, "m=3 groups cannot share"),
    ],
)
def test_arguments_of_update(settings, call, error, message):
    params = mlp_params()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1), **settings)
    arguments = {"updates": None, "state": tx.init(params), "params": params} | GOOD | call
    with pytest.raises(error, match=message):
        tx.update(**arguments)


def test_missing_grad_fn():
    params = mlp_params()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs grad_fn.*missing"):
        tx.update(None, tx.init(params), params, batch=mlp_batch())


def test_inject_hyperparams_says_what_must_be_static():
    params = mlp_params()
    with pytest.raises(TypeError, match="ascent_fraction must be a Python number.*static_args"):
        optax.inject_hyperparams(sam_optax.sharpness_aware)(rho=0.1).init(params)
    make = optax.inject_hyperparams(
        sam_optax.sharpness_aware,
        static_args=("ascent_fraction", "m", "ascent_steps", "accumulation_steps", "batch_axis"),
    )
    tx = make(inner=optax.sgd(0.1), rho=lambda count: 0.1)
    updates, state = jax.jit(lambda s: tx.update(None, s, params, **GOOD))(tx.init(params))
    reference = sam_optax.sharpness_aware(optax.sgd(0.1), rho=0.1)
    expected, _ = reference.update(None, reference.init(params), params, **GOOD)
    assert jnp.allclose(updates["out"]["kernel"], expected["out"]["kernel"], rtol=1e-5)
    assert state.hyperparams["rho"] == jnp.float32(0.1)

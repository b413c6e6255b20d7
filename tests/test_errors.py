"""Bad input: a clear error at the earliest moment, with the value, the rule and the fix."""

import collections
import fractions
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from problems import (
    assert_trees_close,
    assert_trees_equal,
    mlp_batch,
    mlp_loss,
    mlp_params,
    norm64,
)

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
    ({"rho": [0.1]}, TypeError, r"rho=\[0.1\] must be a number"),
    ({"rho": 1 + 0j}, TypeError, r"rho=\(1\+0j\) must be a number"),
    ({"rho": np.float32("nan")}, ValueError, "rho=.*nan.* must be finite"),
    ({"rho": np.float64(-1)}, ValueError, "rho=.*-1.0.* at least 0"),
    ({"rho": jnp.float32("inf")}, ValueError, "rho=.*inf.* must be finite"),
    ({"rho": 10**400}, ValueError, "rho=1000.* must be finite"),
    ({"rho": 1e39}, ValueError, "rho=1e.?39 must be finite.* in float32 too"),
    ({"rho": np.ones(2)}, ValueError, r"rho must be a real scalar.*\(2,\)"),
    ({"rho": np.array("0.1")}, ValueError, "rho must be a real scalar.*<U3"),
    ({"rho": np.array(None)}, ValueError, "rho must be a real scalar.*object"),
    ({"rho": jnp.array(True)}, ValueError, "rho must be a real scalar.*bool"),
    ({"rho": jax.random.key(0)}, ValueError, "rho must be a real scalar.*key"),
    ({"rho": jax.ShapeDtypeStruct((), "float32")}, TypeError, "rho=Shape.* must be a number"),
    ({"ascent_fraction": 0}, ValueError, r"ascent_fraction=0 must be in \(0, 1\].*rho=0"),
    ({"ascent_fraction": 1.5}, ValueError, r"ascent_fraction=1.5 must be in \(0, 1\]"),
    ({"ascent_fraction": float("nan")}, ValueError, "ascent_fraction=nan"),
    ({"ascent_fraction": "1/4"}, TypeError, "ascent_fraction='1/4' must be a number"),
    ({"ascent_fraction": None}, TypeError, "ascent_fraction=None"),
    ({"ascent_fraction": -0.25}, ValueError, r"ascent_fraction=-0.25 must be in \(0, 1\]"),
    ({"ascent_fraction": float("inf")}, ValueError, "ascent_fraction=inf"),
    ({"ascent_fraction": True}, TypeError, "ascent_fraction=True must be a number"),
    ({"ascent_fraction": np.True_}, TypeError, "ascent_fraction=.*True.* must be a number"),
    ({"ascent_fraction": np.float32(2)}, ValueError, "ascent_fraction=.*2.0.* must be in"),
    ({"ascent_fraction": np.float32("nan")}, ValueError, "ascent_fraction=.*nan.* must be in"),
    ({"ascent_fraction": np.array(0.25)}, TypeError, r"ascent_fraction=array\(0.25\) must be"),
    ({"ascent_fraction": [0.25]}, TypeError, "ascent_fraction=.*must be a number"),
    ({"ascent_fraction": jnp.float32(0.5)}, TypeError, "ascent_fraction.*static_args"),
    ({"m": 0}, ValueError, "m=0 must be at least 1"),
    ({"m": -2}, ValueError, "m=-2"),
    ({"m": 2.0}, TypeError, "m=2.0 must be an integer"),
    ({"m": "2"}, TypeError, "m='2'"),
    ({"m": None}, TypeError, "m=None"),
    ({"m": np.float32(2)}, TypeError, "m=.*2.0.* must be an integer"),
    ({"m": np.array([2])}, TypeError, r"m=array\(\[2\]\) must be an integer"),
    ({"m": np.int64(0)}, ValueError, "m=.*0.* must be at least 1"),
    ({"m": jnp.int32(2)}, TypeError, "m must be a Python number.*static_args"),
    ({"ascent_steps": 0}, ValueError, "ascent_steps=0 must be at least 1"),
    ({"ascent_steps": True}, TypeError, "ascent_steps=True"),
    ({"ascent_steps": 1.5}, TypeError, "ascent_steps=1.5 must be an integer"),
    ({"accumulation_steps": -1}, ValueError, "accumulation_steps=-1 must be at least 1"),
    ({"accumulation_steps": "4"}, TypeError, "accumulation_steps='4' must be an integer"),
    ({"accumulation_steps": None}, TypeError, "accumulation_steps=None must be an integer"),
    ({"data_shards": 0}, ValueError, "data_shards=0"),
    ({"data_shards": "8"}, TypeError, "data_shards='8' must be an integer"),
    ({"data_shards": jnp.int32(8)}, TypeError, "data_shards must be a Python number.*static_args"),
    ({"batch_axis": "0"}, TypeError, "batch_axis='0' must be an integer"),
    ({"batch_axis": True}, TypeError, "batch_axis=True must be an integer"),
    ({"batch_axis": None}, TypeError, "batch_axis=None"),
    ({"m_sharpness": "both"}, ValueError, "m_sharpness='both' must be one of.*paper.*foret"),
    ({"m_sharpness": None}, TypeError, "m_sharpness=None"),
    ({"loss_reduction": "max"}, ValueError, "loss_reduction='max' must be.*, or a function"),
    ({"loss_reduction": None}, TypeError, "loss_reduction=None"),
    ({"perturbation": "asam"}, TypeError, "perturbation='asam' must be a function"),
    ({"perturbation": {}}, TypeError, r"perturbation=\{\} must be a function"),
    (
        {"perturbation": sam_optax.adaptive_perturbation},
        TypeError,
        r"must be adaptive_perturbation\(\)",
    ),
    (
        # as Gin hands it over
        {"perturbation": functools.wraps(sam_optax.adaptive_perturbation)(lambda *args: None)},
        TypeError,
        r"must be adaptive_perturbation\(\)",
    ),
    ({"combine_aux": "sum"}, TypeError, "combine_aux='sum' must be a function"),
    ({"adversarial_dtype": "int32"}, TypeError, "adversarial_dtype='int32'.*floating"),
    ({"adversarial_dtype": "half a float"}, TypeError, "adversarial_dtype='half a float'"),
    ({"adversarial_dtype": jnp.float32(1)}, TypeError, "adversarial_dtype=Array.* must be a float"),
    ({"adversarial_dtype": ","}, TypeError, "adversarial_dtype=',' must be a floating"),
    ({"adversarial_dtype": "(-1,)f4"}, TypeError, r"adversarial_dtype='\(-1,\)f4' must be"),
    ({"adversarial_dtype": 16}, TypeError, "adversarial_dtype=16 must be a floating"),
    ({"reduction_dtype": "complex64"}, TypeError, "reduction_dtype='complex64' must be a float"),
    ({"reduction_dtype": []}, TypeError, r"reduction_dtype=\[\] must be a floating"),
    ({"reduction_dtype": "bfloat16", "m": 2}, ValueError, "m=2 groups one after another.*leave"),
    ({"data_axes": 3}, TypeError, "data_axes=3 must be the name of a mesh axis"),
    ({"data_axes": {"data"}}, TypeError, r"data_axes=\{'data'\} must be the name"),
    ({"data_axes": [["data"]]}, TypeError, r"data_axes=\[\['data'\]\] must be the name"),
    ({"data_axes": ("data", None)}, TypeError, "data_axes=.*None.* must be the name"),
    ({"data_axes": ()}, ValueError, r"data_axes=\(\) must name one"),
    ({"data_axes": ""}, ValueError, "data_axes='' must name one"),
    ({"data_axes": ["a", "a"]}, ValueError, "data_axes=.*each once"),
    ({"data_axes": "data", "data_shards": 2}, ValueError, "data_axes='data'.*data_shards=2.*one"),
    ({"group_axes": b"data"}, TypeError, "group_axes=b'data' must be the name"),
    ({"group_axes": {}}, TypeError, r"group_axes=\{\} must be the name"),
    ({"group_axes": "data", "m": 2}, ValueError, "group_axes='data'.*m=2 is another number"),
    ({"group_axes": "data", "data_shards": 2}, ValueError, "data_shards=2.*give data_axes"),
    ({"group_axes": "b", "data_axes": ("a", "b")}, ValueError, "group_axes='b' must be the first"),
    ({"replicated_params": "data"}, TypeError, "replicated_params='data' must be True or False"),
    ({"mesh": "v5e:4x4"}, TypeError, "mesh='v5e:4x4' must be a jax.sharding.Mesh"),
    ({"mesh": jax.devices()}, TypeError, r"mesh=\[.* must be a jax.sharding.Mesh"),
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
        ({"batch_argnums": 0}, ValueError, "argnums=0 and batch_argnums=0 both name"),
        ({"argnums": (0, 1)}, ValueError, r"argnums=\(0, 1\): .* Say in batch_argnums"),
        ({"argnums": 1}, ValueError, "argnums=1: .* not just the first .* Say in batch_argnums"),
        ({"argnums": -1}, ValueError, "argnums=-1 must be at least 0"),
        ({"argnums": None}, TypeError, "argnums=None must be an integer"),
        ({"argnums": False}, TypeError, "argnums=False must be an integer"),
        ({"argnums": ()}, ValueError, r"argnums=\(\) must name one"),
        ({"argnums": (2, 2)}, ValueError, r"argnums=\(2, 2\) must name one argument or more, once"),
        ({"batch_argnums": "batch"}, TypeError, "batch_argnums='batch' must be an integer"),
        ({"batch_argnums": ()}, ValueError, r"batch_argnums=\(\)"),
        ({"batch_argnums": (1, 1)}, ValueError, r"batch_argnums=\(1, 1\)"),
        ({"batch_argnums": 1.0}, TypeError, "batch_argnums=1.0 must be an integer"),
        ({"batch_argnums": (1, True)}, TypeError, "batch_argnums=True must be an integer"),
        ({"batch_argnums": -1}, ValueError, "batch_argnums=-1 must be at least 0"),
        ({"batch_argnums": {1}}, TypeError, r"batch_argnums=\{1\} must be an integer"),
        ({"batch_argnums": jnp.int32(1)}, TypeError, "batch_argnums must be a Python number"),
        ({"has_aux": "no"}, TypeError, "has_aux='no' must be True or False"),
        ({"has_aux": None}, TypeError, "has_aux=None must be True or False"),
        ({"return_info": 1}, TypeError, "return_info=1 must be True or False"),
        ({"allow_int": jnp.array(True)}, TypeError, "allow_int=Array.* must be True or False"),
    ],
)
def test_settings_of_value_and_grad(options, error, message):
    with pytest.raises(error, match=message):
        sam_optax.value_and_grad(**({"loss_fn": mlp_loss} | options))


@pytest.mark.parametrize(
    ("same", "numpy"),
    [
        ({"ascent_fraction": 0.5}, {"ascent_fraction": np.float32(0.5)}),
        ({"ascent_fraction": 0.5}, {"ascent_fraction": np.float16(0.5)}),
        ({"ascent_fraction": 1}, {"ascent_fraction": np.int64(1)}),
        ({"ascent_fraction": 0.5}, {"ascent_fraction": fractions.Fraction(1, 2)}),
        ({"m": 2, "ascent_steps": 2}, {"m": np.int32(2), "ascent_steps": np.int64(2)}),
        ({"accumulation_steps": 4}, {"accumulation_steps": np.uint8(4)}),
        (
            {"data_shards": 4, "batch_axis": 0},
            {"data_shards": np.int8(4), "batch_axis": np.int8(0)},
        ),
        ({"batch_argnums": 1}, {"batch_argnums": [np.int32(1)]}),
        ({"return_info": True}, {"return_info": np.True_}),
        ({"m_sharpness": "foret", "m": 2}, {"m_sharpness": np.str_("foret"), "m": 2}),
    ],
)
def test_numpy_scalars_mean_what_python_numbers_mean(same, numpy):
    traced = [
        jax.make_jaxpr(sam_optax.value_and_grad(mlp_loss, **options))(mlp_params(), mlp_batch())
        for options in (same, numpy)
    ]
    assert str(traced[0]) == str(traced[1])


@pytest.mark.parametrize("rho", [np.float32(0.25), np.float64(0.25), np.array(0.25)])
def test_rho_may_be_a_numpy_number(rho):
    g = mlp_params()
    expected = sam_optax.gradient_perturbation(g, None, 0.25)
    assert_trees_equal(sam_optax.gradient_perturbation(g, None, rho), expected)
    assert sam_optax.value_and_grad(mlp_loss, rho=rho)


def test_small_numpy_integers_do_not_overflow():
    batch = mlp_batch(b=800)
    options = {"m": np.int8(100), "data_shards": np.int8(4), "ascent_fraction": 1}
    assert sam_optax.ascent_groups(batch, **options)[0]["x"].shape == (100, 8, 5)
    accumulated = sam_optax.value_and_grad(mlp_loss, accumulation_steps=np.uint8(4))
    assert jax.eval_shape(accumulated, mlp_params(), batch)[0].shape == ()


def test_a_half_precision_fraction_of_a_large_batch():
    # 100,000 is more than float16 holds.
    batch = np.broadcast_to(np.float32(0), (100_000,))
    assert sam_optax.ascent_batch(batch, np.float16(0.25)).shape == (25_000,)


STATIC = ["ascent_fraction", "m", "ascent_steps", "accumulation_steps", "batch_axis", "data_shards"]
STATIC += ["m_sharpness", "loss_reduction", "data_axes", "group_axes", "mesh", "adversarial_dtype"]
STATIC += ["perturbation", "has_aux", "return_info", "allow_int", "batch_argnums"]
STATIC += ["replicated_params", "argnums"]


@pytest.mark.parametrize("name", STATIC)
def test_what_must_be_known_before_compilation_says_so_when_traced(name):
    def step(setting):
        return sam_optax.value_and_grad(mlp_loss, **{name: setting})(mlp_params(), mlp_batch())[0]

    with pytest.raises((TypeError, ValueError), match=f"^{name}.*Tracer") as error:
        jax.jit(step)(1)
    assert " must be " in str(error.value)


@pytest.mark.parametrize("inner", ["adam", optax.adam, 0.1, (), {}])
def test_inner_must_be_an_optimizer(inner):
    with pytest.raises(TypeError, match="inner=.* must be an Optax optimizer"):
        sam_optax.sharpness_aware(inner)


def test_the_batch_must_be_positional():
    message = r"positional argument 1.*there are 1 positional.*keywords \['batch'\]"
    with pytest.raises(TypeError, match=message):
        sam_optax.value_and_grad(mlp_loss)(mlp_params(), batch=mlp_batch())


def test_traced_rho_must_be_a_scalar():
    def step(rho):
        return sam_optax.value_and_grad(mlp_loss, rho=rho)(mlp_params(), mlp_batch())[0]

    assert jnp.isfinite(jax.jit(step)(0.1))
    for rho in (jnp.ones(2), jnp.ones((1,)), jnp.complex64(1), jnp.array(True)):
        with pytest.raises(ValueError, match=rf"rho must be a real scalar.*{rho.dtype}"):
            jax.jit(step)(rho)


NEXT_TO = mlp_params()  # in the place of a gradient
GOOD = {"grad_fn": jax.grad(mlp_loss), "batch": mlp_batch()}


@pytest.mark.parametrize(
    ("settings", "call", "error", "message"),
    [
        ({}, {"params": None}, ValueError, "needs the parameters"),
        ({}, {"grad_fn": None}, ValueError, "needs grad_fn.*None"),
        ({}, {"grad_fn": "jax.grad"}, ValueError, "needs grad_fn.*'jax.grad'"),
        ({}, {"batch": None}, ValueError, "needs the batch.*ascent_fraction=0.25"),
        ({"m": 2, "ascent_fraction": 1}, {"batch": None}, ValueError, "needs the batch.*m=2"),
        (
            {"accumulation_steps": 2, "ascent_fraction": 1},
            {"batch": None},
            ValueError,
            "needs the batch.*accumulation_steps=2.*accumulation_steps=1",
        ),
        (
            {"accumulation_steps": 2},
            {"updates": NEXT_TO, "batch": None},
            ValueError,
            "needs the batch.*accumulation_steps=2",
        ),
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
        ({}, {"grad_fn": lambda p, b: (None, NEXT_TO)}, TypeError, "the scalar is None"),
        ({}, {"grad_fn": lambda p, b: ("low", NEXT_TO)}, TypeError, "the scalar is 'low'"),
        ({}, {"grad_fn": lambda p, b: (jnp.ones(2), NEXT_TO)}, TypeError, "scalar is Array"),
        ({}, {"grad_fn": lambda p, b: ((1j, 3), NEXT_TO)}, TypeError, "the scalar is 1j"),
        ({}, {"grad_fn": lambda p, b: [1.0, NEXT_TO]}, TypeError, "must return a gradient"),
        ({}, {"grad_fn": lambda p, b: (NEXT_TO, 1.0)}, TypeError, "must return a gradient"),
        ({}, {"grad_fn": lambda p, b: (1.0, 2.0, NEXT_TO)}, TypeError, "must return a gradient"),
        ({}, {"return_info": "yes"}, TypeError, "return_info='yes' must be True or False"),
        ({}, {"return_info": None}, TypeError, "return_info=None must be True or False"),
        ({"rho": lambda c: 0.1}, {}, TypeError, "state is the Scheduled.*init.*tuple"),
        ({"rho": lambda c: 0.1}, {"state": None}, TypeError, "state is the Scheduled.*NoneType"),
        (
            {},
            {"state": sam_optax.ScheduledSharpnessState(jnp.int32(3), optax.EmptyState())},
            TypeError,
            "Where rho is a number, .*is a ScheduledSharpnessState.*state.inner_state",
        ),
        (
            {"reduction_dtype": "bfloat16", "data_axes": "data", "ascent_fraction": 1}
            | {"mesh": jax.make_mesh((8,), ("data",), (AxisType.Auto,))},
            {"batch": None, "grad_fn": lambda params: params},
            ValueError,
            "reduction_dtype='bfloat16' .*the batch must be given",
        ),
    ],
)
def test_arguments_of_update(settings, call, error, message):
    params = mlp_params()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1), **settings)
    state = optax.sgd(0.1).init(params)
    arguments = {"updates": None, "state": state, "params": params} | GOOD | call
    with pytest.raises(error, match=message):
        tx.update(**arguments)


def test_a_given_ascent_gradient_needs_no_reduction():
    params, batch = mlp_params(), mlp_batch()
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    call = {"grad_fn": jax.grad(mlp_loss), "batch": batch}
    updates = []
    for options in ({}, {"reduction_dtype": "bfloat16", "data_axes": "data", "mesh": mesh}):
        tx = sam_optax.sharpness_aware(optax.sgd(0.1), **options)
        grads = jax.grad(mlp_loss)(params, batch)
        updates.append(tx.update(grads, tx.init(params), params, **call)[0])
    assert_trees_equal(*updates)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_gradient_that_takes_an_ascent_itself_is_refused(wrap):
    params = mlp_params()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1))
    call = {"batch": mlp_batch()}
    with pytest.raises(ValueError, match="takes the ascent itself.*give jax.value_and_grad"):
        grad_fn = wrap(sam_optax.value_and_grad(mlp_loss))
        tx.update(None, tx.init(params), params, grad_fn=grad_fn, **call)
    plain = sam_optax.value_and_grad(mlp_loss, rho=0.0)
    tx.update(None, tx.init(params), params, grad_fn=plain, **call)


def test_missing_grad_fn():
    params = mlp_params()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs grad_fn.*missing"):
        tx.update(None, tx.init(params), params, batch=mlp_batch())


def test_a_predicate_that_inject_hyperparams_calls_as_a_schedule_is_refused():
    params = mlp_params()
    make = optax.inject_hyperparams(
        sam_optax.sharpness_aware,
        static_args=("ascent_fraction", "m", "ascent_steps", "accumulation_steps", "batch_axis"),
    )
    tx = make(inner=optax.sgd(0.1), rho=0.1, perturb=lambda path: path != "out/kernel")
    with pytest.raises(TypeError, match="perturb=True is one bool.*static_args"):
        tx.update(None, tx.init(params), params, **GOOD)
    alone = sam_optax.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), perturb=True)
    alone(jnp.ones(2), jnp.ones((4, 2)))  # a tree of one leaf


def test_inject_hyperparams_says_what_must_be_static():
    params = mlp_params()
    with pytest.raises(TypeError, match="ascent_fraction must be a Python number.*static_args"):
        optax.inject_hyperparams(sam_optax.sharpness_aware)(rho=0.1).init(params)
    settings = set(inspect.signature(sam_optax.sharpness_aware).parameters)
    make = optax.inject_hyperparams(
        sam_optax.sharpness_aware, static_args=settings - {"rho", "adversarial_dtype"}
    )
    with pytest.raises(TypeError, match=r"adversarial_dtype=Array.*parameters\) - {'rho'}"):
        make(rho=0.1, adversarial_dtype=jnp.bfloat16).init(params)
    make = optax.inject_hyperparams(sam_optax.sharpness_aware, static_args=settings - {"rho"})
    make(rho=0.1, adversarial_dtype=jnp.bfloat16, perturb=lambda path: True).init(params)
    tx = make(inner=optax.sgd(0.1), rho=lambda count: 0.1)
    updates, state = jax.jit(lambda s: tx.update(None, s, params, **GOOD))(tx.init(params))
    reference = sam_optax.sharpness_aware(optax.sgd(0.1), rho=0.1)
    expected, _ = reference.update(None, reference.init(params), params, **GOOD)
    assert jnp.allclose(updates["out"]["kernel"], expected["out"]["kernel"], rtol=1e-5)
    assert state.hyperparams["rho"] == jnp.float32(0.1)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, "rho=-0.1 must be finite and at least 0"),
        (float("nan"), ValueError, "rho=nan"),
        ("0.1", TypeError, "rho='0.1' must be a number"),
        (None, TypeError, "rho=None must be a number"),
        (True, TypeError, "rho=True must be a number"),
        (jnp.ones(2), ValueError, r"rho must be a real scalar.*\(2,\)"),
        (lambda count: 0.1, TypeError, "rho=<function.* must be a number"),
    ],
)
def test_values_of_a_schedule_and_of_a_perturbation(value, error, message):
    params = mlp_params()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1), rho=lambda count: value)
    with pytest.raises(error, match=message):
        tx.update(None, tx.init(params), params, **GOOD)
    for perturbation in (sam_optax.gradient_perturbation, sam_optax.adaptive_perturbation()):
        with pytest.raises(error, match=message):
            perturbation(params, params, value)


def test_a_schedule_that_cannot_be_called_with_a_step_count_is_refused_when_given():
    needs_more = "function linear_schedule.*cannot be called with that alone.*its arguments in"
    with pytest.raises(TypeError, match=needs_more):
        sam_optax.sharpness_aware(optax.sgd(0.1), rho=optax.linear_schedule)
    for schedule in (jnp.cos, max, functools.partial(optax.linear_schedule(0.0, 0.1, 4))):
        sam_optax.sharpness_aware(optax.sgd(0.1), rho=schedule)

    @functools.wraps(optax.linear_schedule)  # as gin does, which gives the arguments that it names
    def configured(*args):
        return 0.1 * args[0]

    sam_optax.sharpness_aware(optax.sgd(0.1), rho=configured)


@pytest.mark.parametrize("result", [jnp.float32(1), (jnp.float32(1), 2, 3)])
def test_an_ascent_loss_fn_without_the_aux_of_loss_fn_is_told(result):
    gradient = sam_optax.value_and_grad(
        lambda w, x: (jnp.mean(x @ w), 0), has_aux=True, ascent_loss_fn=lambda w, x: result
    )
    with pytest.raises(TypeError, match=r"ascent_loss_fn must return \(loss, aux\).*returned \("):
        gradient(jnp.ones(3), jnp.ones((4, 3)))


# A gradient has, for each parameter, an array of its shape and kind.

WRONG_LEAVES = [
    (jnp.ones((3, 7)), r"float32\[3, 7\]"),
    (jnp.ones((1, 3)), r"float32\[1, 3\]"),  # it would broadcast
    (jnp.float32(1), r"float32\[\]"),
    (1.0, "1.0"),
    ("x", "'x'"),
    (jnp.ones((7, 3), jnp.int32), r"int32\[7, 3\]"),
    (jnp.ones((7, 3), bool), r"bool\[7, 3\]"),
    (jnp.ones((7, 3), jnp.complex64), r"complex64\[7, 3\]"),
    (np.zeros((7, 3), jax.dtypes.float0), r"float0.*\[7, 3\]"),
    (jax.ShapeDtypeStruct((7, 3), jnp.float32), "ShapeDtypeStruct"),
]


@pytest.mark.parametrize(("leaf", "received"), WRONG_LEAVES)
def test_leaves_that_are_no_gradient(leaf, received):
    params = mlp_params()
    wrong = params | {"out": {"kernel": leaf}}
    message = (
        rf"of its shape and of floating dtype.*\['out'\]\['kernel'\], float32\[7, 3\].*{received}"
    )
    plain, foret = sam_optax.sharpness_aware(), sam_optax.sharpness_aware(m=2, m_sharpness="foret")
    for tx in (plain, foret):
        for grad_fn in (lambda p, b: wrong, lambda p, b: (1.0, wrong)):
            with pytest.raises(TypeError, match=f"^The gradient that grad_fn returns.*{message}"):
                tx.update(None, None, params, **GOOD | {"grad_fn": grad_fn})
    with pytest.raises(TypeError, match=f"^updates.*{message}"):
        plain.update(wrong, None, params, **GOOD)
    with pytest.raises(TypeError, match=f"^The perturbation must.*{message}"):
        sam_optax.value_and_grad(mlp_loss, perturbation=lambda g, p, r: wrong)(params, mlp_batch())


@pytest.mark.parametrize("options", [{}, {"m": 2, "m_sharpness": "foret"}, {"rho": 0}])
def test_narrow_and_numpy_gradients_and_python_losses_are_gradients(options):
    params = mlp_params()
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    numpy = jax.tree.map(np.asarray, params)
    for grads in (narrow, numpy):
        tx = sam_optax.sharpness_aware(optax.sgd(1.0), **options)
        arguments = GOOD | {"grad_fn": lambda p, b: (2.0, grads)}
        updates, _ = tx.update(None, tx.init(params), params, **arguments)
        assert_trees_close(jax.tree.map(jnp.negative, updates), grads)


def test_perturbations_of_another_structure():
    for epsilon in (None, {"w": jnp.ones(3)}, []):
        gradient = sam_optax.value_and_grad(mlp_loss, perturbation=lambda g, p, r: epsilon)
        with pytest.raises(TypeError, match="perturbation must have the structure of the param"):
            gradient(mlp_params(), mlp_batch())
    asam, grads = sam_optax.adaptive_perturbation(), mlp_params()
    with pytest.raises(TypeError, match="grads must have the structure of the parameters"):
        asam(grads, {"w": jnp.ones(3)}, 0.1)


@pytest.mark.parametrize("leaf", [jnp.arange(3), "x", 1, True])
def test_gradients_given_to_a_perturbation(leaf):
    for perturbation in (sam_optax.gradient_perturbation, sam_optax.adaptive_perturbation()):
        with pytest.raises(TypeError, match=r"grads\['w'\] is .* no gradient"):
            perturbation({"w": leaf}, {"w": leaf}, 0.1)


@pytest.mark.parametrize(
    ("eta", "error", "message"),
    [
        (float("inf"), ValueError, "eta=inf must be finite"),
        (np.float32("nan"), ValueError, "eta=.*nan.* must be finite"),
        (True, TypeError, "eta=True must be a number"),
        (jnp.float32(0.1), TypeError, "eta must be a Python number"),
        (np.array(0.1), TypeError, r"eta=array\(0.1\) must be a number"),
        ([0.1], TypeError, r"eta=\[0.1\] must be a number"),
    ],
)
def test_eta_of_adaptive_perturbation(eta, error, message):
    with pytest.raises(error, match=message):
        sam_optax.adaptive_perturbation(eta)


def test_eta_may_be_a_numpy_number():
    g, w = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, -4.0])}
    results = (sam_optax.adaptive_perturbation(eta)(g, w, 0.5) for eta in (0.5, np.float32(0.5)))
    assert_trees_equal(*results)


def test_a_wide_rho_does_not_widen_the_adversarial_point():
    seen = []

    def loss_fn(params, batch):
        seen.extend(x.dtype for x in jax.tree.leaves(params))
        return mlp_loss(params, batch)

    with jax.enable_x64(True):
        gradient = sam_optax.value_and_grad(loss_fn, rho=np.float64(0.1))
        jax.eval_shape(gradient, mlp_params(), mlp_batch())
    assert set(seen) == {np.dtype("float32")}


@pytest.mark.parametrize(
    "weight", ["x", None, 1j, [1.0, 2.0], jnp.ones(3), jnp.complex64(1), jnp.bool_(True)]
)
def test_weights_of_parts(weight):
    gradient = sam_optax.value_and_grad(
        mlp_loss, accumulation_steps=2, loss_reduction=lambda batch: weight
    )
    message = "must return a real scalar.*it returned " + re.escape(
        repr(weight).splitlines()[0][:5]
    )
    with pytest.raises(ValueError, match=message):
        gradient(mlp_params(), mlp_batch())


# Batches, wherever one is given.


class Table(collections.UserDict):
    """As pandas has it: neither a pytree nor an array, and long to print."""

    ndim, shape = 2, (8, 5)

    def __repr__(self):
        return "Table(" + 1000 * "1, " + ")"


X = jnp.ones((8, 5))
BATCHES = [
    (None, ValueError, "(no array with a batch axis|needs the batch)"),
    ({}, ValueError, "no array with a batch axis"),
    ((), ValueError, "no array with a batch axis"),
    ([], ValueError, "no array with a batch axis"),
    ((1.0, 2.0), ValueError, "no array with a batch axis"),
    ({"x": None}, ValueError, "no array with a batch axis"),
    (1.0, ValueError, "no array with a batch axis"),
    (1j, ValueError, "no array with a batch axis"),
    (jnp.float32(1), ValueError, "no array with a batch axis"),
    (jnp.ones((0, 5)), ValueError, "no examples: b=0.*at least one"),
    ({"x": X, "y": jnp.ones((4, 3))}, ValueError, r"different numbers.*\['x'\]: 8.*\['y'\]: 4"),
    ("text", TypeError, "batch is 'text', a str and not an array: give an array, or a dict"),
    (Table(), TypeError, "a Table and not an array"),
    ({"x": X, "t": ["a"] * 8}, TypeError, r"batch.*\['t'\]\[0\] is 'a', a str .*: leave it out"),
    ({"x": X, "f": norm64}, TypeError, r"batch.*\['f'\] is <function.*not an array"),
    (jax.ShapeDtypeStruct((8, 5), jnp.float32), TypeError, "ShapeDtypeStruct.*not an array"),
    ([[1.0, 2.0], [3.0, 4.0]], TypeError, r"batch.* is a list of 2 .*jnp.asarray"),
    ({"x": X, "y": [1.0] * 8}, TypeError, r"batch.*\['y'\] is a list of 8 .*jnp.asarray"),
    ({"x": X, "y": [[1, 2]] * 8}, TypeError, r"batch.*\['y'\] is a list of 8 .*jnp.asarray"),
    ({"x": X, "y": (1.0,) * 8}, TypeError, r"batch.*\['y'\] is a tuple of 8 .*jnp.asarray"),
    ({"x": [X] * 4, "y": [1.0] * 4}, TypeError, r"batch.*\['y'\] is a list of 4 .*jnp.asarray"),
]
BATCH_FUNCTIONS = {
    "value_and_grad": lambda batch, **options: sam_optax.value_and_grad(
        lambda params, batch, key: mlp_loss(params, mlp_batch()), **options
    )(mlp_params(), batch, None),
    "update": lambda batch, **options: sam_optax.sharpness_aware(**options).update(
        None,
        None,
        mlp_params(),
        grad_fn=jax.grad(lambda p, b: mlp_loss(p, mlp_batch())),
        batch=batch,
    ),
    "ascent_batch": lambda batch, **options: sam_optax.ascent_batch(batch, **options),
    "ascent_groups": lambda batch, **options: sam_optax.ascent_groups(batch, m=2, **options),
}


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
@pytest.mark.parametrize(("batch", "error", "message"), BATCHES)
def test_batches_without_examples(batch, error, message, function):
    with pytest.raises(error, match=message) as raised:
        BATCH_FUNCTIONS[function](batch)
    assert len(str(raised.value)) < 500


def test_a_list_of_traced_numbers_is_no_array_either():
    def step(batch):
        return sam_optax.value_and_grad(mlp_loss)(mlp_params(), batch)

    with pytest.raises(TypeError, match=r"\['weight'\] is a list of 16 .*jnp.asarray"):
        jax.jit(step)(mlp_batch(b=16) | {"weight": [1.0] * 16})


def test_lists_of_arrays_and_of_settings_are_trees():
    record = collections.namedtuple("Record", [*"abcdefgh"])  # as many as the examples
    settings = {"rates": [0.1, 0.2], "range": (0, 1), "record": record(*range(8))}
    taken = sam_optax.ascent_batch([X, jnp.ones(8), settings])
    assert taken[0].shape == (2, 5) and taken[1].shape == (2,) and taken[2] == settings


MESH = AbstractMesh((8,), ("data",), (AxisType.Auto,))


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ascent_fraction": True}, TypeError, "ascent_fraction=True"),
        ({"ascent_fraction": 2}, ValueError, r"ascent_fraction=2 must be in \(0, 1\]"),
        (
            {"batch_axis": 2},
            ValueError,
            r"has the shape \(\d+, 5\), which has no axis batch_axis=2",
        ),
        ({"batch_axis": 0.5}, TypeError, "batch_axis=0.5 must be an integer"),
        ({"data_shards": -1}, ValueError, "data_shards=-1 must be at least 1"),
        ({"data_axes": 3}, TypeError, "data_axes=3 must be the name of a mesh axis"),
        ({"data_axes": {}}, TypeError, r"data_axes=\{\} must be the name of a mesh axis"),
        ({"data_axes": "data"}, ValueError, r"there is none here.*mesh=mesh.*jax.set_mesh\(mesh\)"),
        ({"data_axes": "data", "data_shards": 2}, ValueError, "give one of them"),
        ({"data_axes": "rows", "mesh": MESH}, ValueError, r"no \['rows'\], only \{'data': 8\}"),
        ({"mesh": "v5e:4x4"}, TypeError, "mesh='v5e:4x4' must be a jax.sharding.Mesh"),
        ({"mesh": 8, "data_axes": "data"}, TypeError, "mesh=8 must be a jax.sharding.Mesh"),
    ],
)
def test_settings_of_the_batch(options, error, message, function):
    with pytest.raises(error, match=message):
        BATCH_FUNCTIONS[function](mlp_batch(b=64), **options)


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
def test_data_shards_that_do_not_share_the_batch(function):
    above = 98 if function == "ascent_groups" else 70  # of 70, 21 would ascend, for m=2 groups
    message = rf"b=64 .* 7 data shards.*: 63 or {above}\.$"
    with pytest.raises(ValueError, match=message):
        BATCH_FUNCTIONS[function](mlp_batch(b=64), data_shards=7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"m": 0}, ValueError, "m=0 must be at least 1"),
        ({"m": -1}, ValueError, "m=-1 must be at least 1"),
        ({"m": "2"}, TypeError, "m='2' must be an integer"),
        ({"m": None}, TypeError, "m=None must be an integer"),
        ({"m": True}, TypeError, "m=True must be an integer"),
        ({"m": 3}, ValueError, "m=3 groups cannot share .*a=16"),
        (
            {"m": 3, "m_sharpness": "foret"},
            ValueError,
            r"m=3: .*b=64 .*; m in \[1, 2, 4, 8, 16\] can.*60 or 72",
        ),
        ({"m_sharpness": "both"}, ValueError, "m_sharpness='both' must be one of"),
        ({"m_sharpness": None}, TypeError, "m_sharpness=None must be one of"),
    ],
)
def test_settings_of_ascent_groups(options, error, message):
    with pytest.raises(error, match=message):
        sam_optax.ascent_groups(mlp_batch(b=64), **{"m": 2} | options)


@pytest.mark.parametrize(
    ("perturb", "error", "message"),
    [
        ("kernel", TypeError, "predicate on paths or a tree of bools.*'kernel'"),
        (3, TypeError, "predicate on paths or a tree of bools.*holds 3"),
        ([], ValueError, "does not fit the parameters"),
        ({"hidden": True}, ValueError, "does not fit the parameters"),
        ({"hidden": None, "out": True}, ValueError, "does not fit the parameters"),
        (lambda path: "yes", TypeError, r"perturb\(path\) must return a bool.*'yes'"),
        (lambda path: False, ValueError, "selects none"),
    ],
)
def test_masks_of_both_entry_points(perturb, error, message):
    with pytest.raises(error, match=message):
        sam_optax.value_and_grad(mlp_loss, perturb=perturb)(mlp_params(), mlp_batch())
    with pytest.raises(error, match=message):
        sam_optax.sharpness_aware(perturb=perturb).update(None, None, mlp_params(), **GOOD)


def _of_all_rows(params, batch):
    return mlp_loss(params, {**batch, "x": batch["x"].reshape(16, -1)})


def _in_bfloat16(params, batch):
    def body(total, w):
        return total + w.sum(), None

    start = jnp.zeros((), jnp.bfloat16)
    return jax.lax.scan(body, start, params["out"]["kernel"])[0].astype(jnp.float32)


def _of_four_rows(params, batch):
    return mlp_loss(params, {**batch, "x": batch["x"].reshape(4, -1)})


def _of_no_rows(params, batch):
    return mlp_loss(params, {**batch, "x": batch["x"].reshape(15, -1)})


NARROW = r"is float32 where the parameters are bfloat16.*adversarial_dtype=jnp\.bfloat16"


@pytest.mark.parametrize(
    ("loss_fn", "options", "note"),
    [
        (_of_all_rows, {}, "in the ascent, on 4 of 16 examples.*ascent_fraction.*data_axes"),
        (_of_all_rows, {"m": 2}, "in the ascent, on 2 of 16 examples"),
        (_of_all_rows, {"ascent_fraction": 1}, None),
        (_in_bfloat16, {}, NARROW),
        (_in_bfloat16, {"ascent_steps": 2}, NARROW),
        (_in_bfloat16, {"adversarial_dtype": "bfloat16"}, None),
    ],
)
def test_notes_on_errors_of_the_loss_function(loss_fn, options, note):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mlp_params())
    jax.value_and_grad(loss_fn)(params, mlp_batch())
    gradient = sam_optax.value_and_grad(loss_fn, **options)
    if note is None:
        gradient(params, mlp_batch())
        return
    with pytest.raises(TypeError) as error:
        gradient(params, mlp_batch())
    ours = [note for note in error.value.__notes__ if note.startswith("sam_optax: ")]
    assert len(ours) == 1 and re.search(note, ours[0])  # JAX adds some of its own


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (_of_no_rows, {}),
        (_of_no_rows, {"ascent_fraction": 1}),
        (_of_four_rows, {}),
        (lambda params, batch: mlp_loss(params, batch) * jnp.ones(2), {}),
        (mlp_loss, {"perturbation": lambda grads, params, rho: {"x": rho}}),
    ],
)
def test_errors_that_are_not_of_fewer_examples_have_no_note(loss_fn, options):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mlp_params())
    with pytest.raises((TypeError, ValueError)) as error:
        sam_optax.value_and_grad(loss_fn, **options)(params, mlp_batch())
    notes = getattr(error.value, "__notes__", [])
    assert not any(note.startswith("sam_optax") for note in notes)


def test_an_error_of_the_numbers_has_no_note():
    def loss_fn(w, x):
        return jnp.mean(x) * w / jnp.sum(x[:2] - 1)

    with jax.debug_nans(True), pytest.raises(FloatingPointError) as error:
        sam_optax.value_and_grad(loss_fn)(jnp.float32(0), jnp.ones(8).at[1:].set(0.0).at[1].set(1))
    notes = getattr(error.value, "__notes__", [])
    assert not any(note.startswith("sam_optax") for note in notes)


@pytest.mark.parametrize("kind", [FloatingPointError, MemoryError, jax.errors.JaxRuntimeError])
@pytest.mark.parametrize("fails", [lambda w, x: len(x) == 2, lambda w, x: w.dtype == jnp.float32])
def test_errors_of_numbers_and_of_memory_have_no_note(fails, kind):
    def loss_fn(w, x):
        if fails(w, x):
            raise kind("of the device")
        return jnp.mean(x * w)

    with pytest.raises(kind) as error:
        sam_optax.value_and_grad(loss_fn)(jnp.bfloat16(1), jnp.ones(8))
    notes = getattr(error.value, "__notes__", [])
    assert not any(note.startswith("sam_optax") for note in notes)


def test_an_error_of_the_loss_function_is_left_alone():
    def loss_fn(params, batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="^'mine'"):
        sam_optax.value_and_grad(loss_fn)(mlp_params(), mlp_batch())
    with pytest.raises(TypeError, match="Gradient only defined for scalar-output"):
        sam_optax.value_and_grad(lambda p, b: jnp.ones(2))(mlp_params(), mlp_batch())


def test_every_error_comes_before_compilation():
    # `lower` traces, and compiles nothing: the latest that an error may come.
    wrong = mlp_params() | {"out": {"kernel": jnp.ones((3, 7))}}
    tx = sam_optax.sharpness_aware()
    calls = [
        lambda p: sam_optax.value_and_grad(mlp_loss, m=3)(p, mlp_batch()),
        lambda p: sam_optax.value_and_grad(mlp_loss)(p, mlp_batch() | {"t": ["a"]}),
        lambda p: tx.update(None, None, p, grad_fn=lambda p, b: wrong, batch=mlp_batch()),
        lambda p: tx.update(None, None, p, grad_fn=jax.grad(mlp_loss)),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)):
            jax.jit(call).lower(mlp_params())


def test_labels_left_out_along_another_axis():
    step = sam_optax.value_and_grad(lambda w, x, y: jnp.mean((w @ x - y) ** 2), batch_axis=1)
    with pytest.raises(ValueError, match=r"4 rows along batch_axis=1.*batch_argnums=\(1, 2\)"):
        step(jnp.ones(2), jnp.ones((2, 4)), jnp.ones((1, 4)))


def test_a_batch_on_shards_that_it_does_not_divide_into_at_ascent_fraction_1():
    step = sam_optax.value_and_grad(mlp_loss, ascent_fraction=1, data_shards=4)
    with pytest.raises(ValueError, match="b=10 .* 4 data shards"):
        step(mlp_params(), mlp_batch(b=10))


def test_groups_on_mesh_axes_need_the_batch_and_their_own_ascent_gradients():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params, call = mlp_params(), {"grad_fn": jax.grad(mlp_loss)}
    tx = sam_optax.sharpness_aware(optax.sgd(0.1), 0.1, 1, group_axes="data", mesh=mesh)
    with pytest.raises(ValueError, match="needs the batch.*group_axes='data'"):
        tx.update(None, tx.init(params), params, **call)
    with pytest.raises(ValueError, match="one group, but there are m=1, group_axes='data'"):
        tx.update(params, tx.init(params), params, **call, batch=mlp_batch())


def test_what_looks_like_a_batch_and_is_none():
    w, x = jnp.ones(2), jnp.ones((4, 2))

    def not_given(w, x, key=None, batch=None):
        return jnp.mean(x @ w)

    def takes_more(w, x, *more, batch=None):
        return jnp.mean(x @ w)

    class Unsigned:
        __signature__ = "none"

        def __call__(self, w, x):
            return jnp.mean(x @ w)

    expected = sam_optax.value_and_grad(lambda w, x: jnp.mean(x @ w))(w, x)
    assert_trees_equal(sam_optax.value_and_grad(not_given)(w, x), expected)
    assert_trees_equal(sam_optax.value_and_grad(takes_more)(w, x, None, None), expected)
    assert_trees_equal(sam_optax.value_and_grad(Unsigned())(w, x), expected)
    key = jax.random.PRNGKey(0, impl="rbg")  # as many words as there are examples
    with_key = sam_optax.value_and_grad(lambda w, x, key: jnp.mean(x @ w))
    assert_trees_equal(with_key(w, x, key), expected)

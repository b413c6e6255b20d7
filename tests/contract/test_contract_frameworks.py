"""The parameters of Flax, Equinox and Haiku, trained in their own loops, against Optax by hand."""

import functools

import equinox
import flax.linen
import flax.linen.fp8_ops
import flax.nnx
import flax.training.train_state
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layer import RHO, layer_batch, layer_params, sam_gradient_by_hand
from problems import assert_trees_close

import sam_optax

BATCHES = [layer_batch(seed) for seed in range(3)]
OPTIMIZER = optax.sgd(0.5, momentum=0.9)


@functools.cache
def expected():
    """Three steps of heavy-ball momentum on the SAM gradient, in float64."""
    params = {k: np.asarray(w, np.float64) for k, w in layer_params().items()}
    velocity = jax.tree.map(np.zeros_like, params)
    for batch in BATCHES:
        grads = sam_gradient_by_hand(params, batch, shards=1)
        velocity = {k: 0.9 * velocity[k] + grads[k] for k in grads}
        params = {k: params[k] - 0.5 * velocity[k] for k in grads}
    return params


def assert_trained(w, b):
    assert_trees_close({"w": w, "b": b}, expected(), rtol=1e-4, atol=1e-5)


def squared_error(outputs, batch):
    return jnp.mean(jnp.square(outputs - batch["y"]))


@pytest.fixture(autouse=True)
def flax_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


# Flax Linen.


class LinenLayer(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return jnp.tanh(flax.linen.Dense(8)(x))


def linen_loss(params, batch):
    return squared_error(LinenLayer().apply({"params": params}, batch["x"]), batch)


def train_state(tx):
    params = {"Dense_0": {"kernel": layer_params()["w"], "bias": layer_params()["b"]}}
    create = flax.training.train_state.TrainState.create
    return create(apply_fn=LinenLayer().apply, params=params, tx=tx)


def test_linen_train_state_with_the_gradient():
    @jax.jit
    def train_step(state, batch):
        _, grads = sam_optax.value_and_grad(linen_loss, rho=RHO)(state.params, batch)
        return state.apply_gradients(grads=grads)

    state = train_state(OPTIMIZER)
    for batch in BATCHES:
        state = train_step(state, batch)
    assert_trained(state.params["Dense_0"]["kernel"], state.params["Dense_0"]["bias"])
    assert state.step == 3


def test_linen_train_state_with_sharpness_aware():
    @jax.jit
    def train_step(state, batch):
        updates, opt_state = state.tx.update(
            None, state.opt_state, state.params, grad_fn=jax.grad(linen_loss), batch=batch
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    state = train_state(sam_optax.sharpness_aware(OPTIMIZER, rho=RHO))
    for batch in BATCHES:
        state = train_step(state, batch)
    assert_trained(state.params["Dense_0"]["kernel"], state.params["Dense_0"]["bias"])

    # apply_gradients gives the transformation no grad_fn, and the error says what is missing.
    with pytest.raises(ValueError, match="needs grad_fn"):
        state.apply_gradients(grads=state.params)


class Fp8Layer(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        of_fp8 = flax.linen.fp8_ops.Fp8DirectDotGeneralOp
        return jnp.tanh(flax.linen.Dense(8, dot_general_cls=of_fp8)(x))


def fp8_loss(variables, batch):
    return squared_error(Fp8Layer().apply(variables, batch["x"]), batch)


@pytest.mark.parametrize("settings", [{}, {"perturb": lambda path: "bias" not in path}])
def test_fp8_scales_are_no_part_of_the_ascent(settings):
    batch, scales = BATCHES[0], "_overwrite_with_gradient"
    variables = Fp8Layer().init(jax.random.key(0), batch["x"])
    for _ in range(3):  # their values are one step's result and the next's input
        gradient = sam_optax.value_and_grad(fp8_loss, rho=RHO, return_info=True, **settings)
        _, grads, info = jax.jit(gradient)(variables, batch)
        ascent = jax.grad(fp8_loss)(variables, jax.tree.map(lambda x: x[:4], batch))["params"]
        if settings:
            ascent["Dense_0"]["bias"] = jnp.zeros(8)
        length = optax.tree.norm(ascent)
        moved = jax.tree.map(lambda w, g: w + RHO * g / length, variables["params"], ascent)
        expected = jax.grad(fp8_loss)(variables | {"params": moved}, batch)
        assert_trees_close(grads, expected, rtol=1e-4, atol=1e-5)
        norm = optax.tree.norm(expected["params"])
        np.testing.assert_allclose(info.descent_grad_norm, norm, rtol=1e-4)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, variables["params"], grads["params"])
        variables = {"params": params, scales: grads[scales]}


@pytest.mark.parametrize(
    "several", [{"m": 2}, {"m": 2, "m_sharpness": "foret"}, {"accumulation_steps": 2}]
)
def test_fp8_scales_are_not_averaged(several):
    batch = BATCHES[0]
    variables = Fp8Layer().init(jax.random.key(0), batch["x"])
    with pytest.raises(ValueError, match="_overwrite_with_gradient.* is its new value"):
        sam_optax.value_and_grad(fp8_loss, **several)(variables, batch)
    if "m" in several:
        sam_optax.value_and_grad(fp8_loss, rho=0, **several)(variables, batch)


# Flax NNX.


def nnx_layer():
    layer = flax.nnx.Linear(4, 8, rngs=flax.nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = layer_params()["w"], layer_params()["b"]
    return layer


def nnx_loss(graph):
    """Return the loss as a function of the layer's state, as `flax.nnx.split` gives it."""

    def loss_fn(state, batch):
        return squared_error(jnp.tanh(flax.nnx.merge(graph, state)(batch["x"])), batch)

    return loss_fn


def test_nnx_optimizer_with_the_gradient():
    @flax.nnx.jit
    def train_step(layer, optimizer, batch):
        graph, state = flax.nnx.split(layer)
        _, grads = sam_optax.value_and_grad(nnx_loss(graph), rho=RHO)(state, batch)
        optimizer.update(layer, grads)

    layer = nnx_layer()
    optimizer = flax.nnx.Optimizer(layer, OPTIMIZER, wrt=flax.nnx.Param)
    for batch in BATCHES:
        train_step(layer, optimizer, batch)
    assert_trained(layer.kernel[...], layer.bias[...])
    assert optimizer.step[...] == 3


def test_nnx_optimizer_with_sharpness_aware():
    @flax.nnx.jit
    def train_step(layer, optimizer, batch):
        grad_fn = jax.grad(nnx_loss(flax.nnx.split(layer)[0]))
        optimizer.update(layer, None, grad_fn=grad_fn, batch=batch)

    layer = nnx_layer()
    tx = sam_optax.sharpness_aware(OPTIMIZER, rho=RHO)
    optimizer = flax.nnx.Optimizer(layer, tx, wrt=flax.nnx.Param)
    for batch in BATCHES:
        train_step(layer, optimizer, batch)
    assert_trained(layer.kernel[...], layer.bias[...])
    assert optimizer.step[...] == 3


def test_nnx_split_and_merge_with_sharpness_aware():
    tx = sam_optax.sharpness_aware(OPTIMIZER, rho=RHO)
    graph, params = flax.nnx.split(nnx_layer(), flax.nnx.Param)

    @jax.jit
    def train_step(params, state, batch):
        call = {"grad_fn": jax.grad(nnx_loss(graph)), "batch": batch}
        updates, state = tx.update(None, state, params, **call)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in BATCHES:
        params, state = train_step(params, state, batch)
    layer = flax.nnx.merge(graph, params)
    assert_trained(layer.kernel[...], layer.bias[...])
    assert train_step._cache_size() == 1


def trained(form, loss_fn, params):
    """Return what the batches make of `params`, by the gradient or by the optimizer."""
    sam = form == "sharpness_aware"
    tx = sam_optax.sharpness_aware(OPTIMIZER, rho=RHO) if sam else OPTIMIZER

    @jax.jit
    def train_step(params, state, batch):
        if sam:
            call = {"grad_fn": jax.grad(loss_fn), "batch": batch}
            updates, state = tx.update(None, state, params, **call)
        else:
            _, grads = sam_optax.value_and_grad(loss_fn, rho=RHO)(params, batch)
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in BATCHES:
        params, state = train_step(params, state, batch)
    assert train_step._cache_size() == 1
    return params


FORMS = pytest.mark.parametrize("form", ["value_and_grad", "sharpness_aware"])


# Equinox.


def equinox_layer():
    layer = equinox.nn.Linear(4, 8, key=jax.random.key(0))
    new = layer_params()["w"].T, layer_params()["b"]
    return equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, new)


def equinox_loss(layer, batch):
    return squared_error(jnp.tanh(jax.vmap(layer)(batch["x"])), batch)


def test_equinox_module_with_the_gradient():
    # A module of arrays alone is a tree of parameters as it is.
    @equinox.filter_jit
    def train_step(layer, state, batch):
        _, grads = sam_optax.value_and_grad(equinox_loss, rho=RHO)(layer, batch)
        updates, state = OPTIMIZER.update(grads, state, equinox.filter(layer, equinox.is_array))
        return equinox.apply_updates(layer, updates), state

    layer = equinox_layer()
    state = OPTIMIZER.init(equinox.filter(layer, equinox.is_array))
    for batch in BATCHES:
        layer, state = train_step(layer, state, batch)
    assert_trained(layer.weight.T, layer.bias)


@FORMS
def test_equinox_partition(form):
    # With an activation function among the leaves, the parameters are those that `is_array` picks.
    model = equinox.nn.Sequential([equinox_layer(), equinox.nn.Lambda(jnp.tanh)])
    params, rest = equinox.partition(model, equinox.is_inexact_array)

    def loss_fn(params, batch):
        return squared_error(jax.vmap(equinox.combine(params, rest))(batch["x"]), batch)

    layer = equinox.combine(trained(form, loss_fn, params), rest).layers[0]
    assert_trained(layer.weight.T, layer.bias)


# Haiku.


@FORMS
def test_haiku(form):
    network = haiku.without_apply_rng(haiku.transform(lambda x: jnp.tanh(haiku.Linear(8)(x))))
    params = network.init(jax.random.key(0), BATCHES[0]["x"])
    assert jax.tree.map(jnp.shape, params) == {"linear": {"w": (4, 8), "b": (8,)}}
    params = {"linear": layer_params()}

    def loss_fn(params, batch):
        return squared_error(network.apply(params, batch["x"]), batch)

    assert_trained(**trained(form, loss_fn, params)["linear"])

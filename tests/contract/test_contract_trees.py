"""Parameters in every kind of pytree, with every kind of leaf, against a closed form.

For L(w) = s/2 ||w||^2, where s is the mean of the batch, the gradient at the adversarial point is
s * (1 + rho / ||w||) * w, whatever the tree is.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from problems import assert_trees_equal

import sam_optax

RHO = 0.5
BATCH = jnp.arange(1.0, 9.0)  # mean 4.5


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    name: str = dataclasses.field(metadata={"static": True}, default="layer")


@flax.struct.dataclass
class FlaxLayer:
    kernel: Any
    width: int = flax.struct.field(pytree_node=False, default=2)


@flax.struct.dataclass
class OfArrays:
    """As a class that checks its shapes, or turns what it is given into arrays."""

    kernel: Any
    bias: Any

    def __post_init__(self):
        if self.kernel.ndim < self.bias.ndim:  # of a bool, None or PartitionSpec an AttributeError
            raise ValueError


A, B, C = jnp.array([3.0, -4.0]), jnp.array([[12.0], [0.5]]), jnp.float32(-2.0)

TREES = {
    "one array": A,
    "one scalar": C,
    "one Python number": 2.0,
    "Python numbers": {"a": 2.0, "b": [A, -1.5]},
    "a scalar beside an array": {"scale": C, "kernel": B},
    "empty subtrees": {"a": {}, "b": (), "c": [A], "d": {"e": {}}},
    "an empty array": {"a": jnp.zeros((0, 3)), "b": A},
    "None": {"a": A, "b": None, "c": {"d": None, "e": B}},
    "list": [A, [B, C]],
    "pair": (A, B),
    "pair of a scalar and a pair": (C, (A, B)),
    "named tuple": Pair(A, Pair(B, None)),
    "dataclass": Layer(Layer(A), name="outer"),
    "Flax dataclass": FlaxLayer({"inner": FlaxLayer(B)}),
    "a class that looks at its arrays": {"layer": OfArrays(B, A)},
    "FrozenDict": flax.core.freeze({"params": {"kernel": A, "bias": B}}),
    "complex": {"a": jnp.array([3.0 - 4.0j, 1.0j]), "b": A},
    "NumPy arrays": {"a": np.asarray(A, np.float32), "b": B},
}


def loss_fn(params, batch):
    squares = [jnp.sum(jnp.square(jnp.abs(x))) for x in inexact(params)]
    return jnp.mean(batch) / 2 * sum(squares, start=jnp.zeros(()))


def inexact(params):
    leaves = [x for x in jax.tree.leaves(params) if not hasattr(x, "dtype") or is_inexact(x)]
    return [jnp.asarray(x) for x in leaves]


def is_inexact(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def expected(params):
    """Loss and direction of steepest ascent at the adversarial point, in float64."""
    leaves = [np.asarray(x, np.complex128).ravel() for x in inexact(params)]
    length = np.linalg.norm(np.concatenate(leaves))
    loss = 4.5 / 2 * (length + RHO) ** 2
    return loss, jax.tree.map(lambda w: 4.5 * (1 + RHO / length) * np.asarray(w), params)


def assert_close(tree, like):
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def conjugate(tree):
    """Between JAX's gradient of complex leaves and the direction of steepest ascent."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, tree)


def ascending(params, batch):
    """The gradient that complex parameters descend on: Optax does not conjugate, nor do we."""
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    return loss, conjugate(grads)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", TREES)
def test_value_and_grad(name):
    params = TREES[name]
    loss, direction = expected(params)
    value, grads, info = sam_optax.value_and_grad(loss_fn, rho=RHO, return_info=True)(params, BATCH)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    assert_close(grads, conjugate(direction))
    plain = jax.grad(loss_fn)(params, BATCH)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda g: g.dtype, plain)
    np.testing.assert_allclose(info.realised_perturbation, 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", TREES)
def test_sharpness_aware(name):
    params = TREES[name]
    loss, direction = expected(params)
    tx = sam_optax.sharpness_aware(optax.sgd(0.1, momentum=0.9), rho=RHO)
    state = tx.init(params)
    updates, new_state, info = tx.update(
        None, state, params, grad_fn=ascending, batch=BATCH, return_info=True
    )
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, direction))
    assert_close(new_state[0].trace, direction)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    np.testing.assert_allclose(info.descent_loss, loss, rtol=1e-5)
    after = optax.apply_updates(params, updates)
    assert_close(after, jax.tree.map(lambda w, g: np.asarray(w) - 0.1 * g, params, direction))


@pytest.mark.parametrize("perturb", [lambda path: path == "layer/kernel", {"layer": True}])
def test_some_leaves_of_a_class_that_looks_at_its_arrays(perturb):
    def gradient(params):
        return jax.jit(sam_optax.value_and_grad(loss_fn, rho=RHO, perturb=perturb))(params, BATCH)

    expected = gradient({"layer": {"kernel": B, "bias": A}})
    loss, grads = gradient({"layer": OfArrays(B, A)})
    np.testing.assert_array_equal(loss, expected[0])
    np.testing.assert_array_equal(grads["layer"].kernel, expected[1]["layer"]["kernel"])


@pytest.mark.parametrize(
    "options",
    [
        {"m": 2, "m_sharpness": "foret"},
        {"accumulation_steps": 2},
        {"group_axes": "data"},
        {"data_axes": "data", "reduction_dtype": "float32"},
    ],
    ids=str,
)
def test_batch_and_aux_of_a_class_that_looks_at_its_arrays(options):
    def loss_of(params, x, y):
        errors = jnp.square(x @ params - y)
        return jnp.mean(errors), (errors, jnp.mean(y))

    def step(loss_fn, batch):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        gradient = sam_optax.value_and_grad(loss_fn, has_aux=True, mesh=mesh, **options)
        return jax.jit(gradient)(A, batch)

    def of_arrays(params, batch):
        loss, aux = loss_of(params, batch.kernel, batch.bias)
        return loss, OfArrays(*aux)

    x, y = jnp.arange(32.0).reshape(16, 2) / 32, jnp.arange(16.0)
    (loss, aux), grads = step(lambda params, batch: loss_of(params, *batch), (x, y))
    (same_loss, same_aux), same_grads = step(of_arrays, OfArrays(x, y))
    assert isinstance(same_aux, OfArrays)
    assert_trees_equal((same_loss, jax.tree.leaves(same_aux), same_grads), (loss, [*aux], grads))


@pytest.mark.parametrize("params", [{}, [], (), None, {"a": {}, "b": None}])
def test_no_parameters_at_all(params):
    value, grads, info = sam_optax.value_and_grad(loss_fn, return_info=True)(params, BATCH)
    assert value == 0 and jax.tree.structure(grads) == jax.tree.structure(params)
    assert info.skipped_ascents == 1 and info.descent_grad_norm == 0
    if params is None:
        return  # to Optax, None means that they were not given
    tx = sam_optax.sharpness_aware(optax.adam(0.1))
    state = tx.init(params)
    updates, state = tx.update(
        None, state, params, grad_fn=jax.value_and_grad(loss_fn), batch=BATCH
    )
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert state[0].count == 1


# Leaves without a gradient: integers, booleans and PRNG keys.

MIXED = {
    "kernel": A,
    "steps": jnp.int32(3),
    "table": jnp.arange(3, dtype=jnp.uint8),
    "flag": jnp.array(True),
    "key": jax.random.key(0),
    "bias": B,
}
TRAINED = {k: k in ("kernel", "bias") for k in MIXED}


def test_leaves_without_a_gradient_in_value_and_grad():
    seen = []

    def remember(params, batch):
        seen.append(params)
        return loss_fn(params, batch)

    gradient = sam_optax.value_and_grad(remember, rho=RHO, allow_int=True)
    value, grads = gradient(MIXED, BATCH)
    loss, direction = expected({"kernel": A, "bias": B})
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    assert_close({k: grads[k] for k in direction}, direction)
    plain = jax.grad(loss_fn, allow_int=True)(MIXED, BATCH)
    for k in ("steps", "table", "flag", "key"):
        assert grads[k].dtype == plain[k].dtype == jax.dtypes.float0
        assert grads[k].shape == MIXED[k].shape
        for point in seen:  # at w and at w_adv
            assert point[k] is MIXED[k] or (point[k] == MIXED[k]).all()

    with pytest.raises(TypeError, match="allow_int"):
        sam_optax.value_and_grad(loss_fn)(MIXED, BATCH)


def apply(params, updates):
    """`optax.apply_updates`, which cannot add float0."""
    return jax.tree.map(lambda w, u: w if u.dtype == jax.dtypes.float0 else w + u, params, updates)


def test_leaves_without_a_gradient_in_sharpness_aware():
    inner = optax.partition({True: optax.sgd(0.1), False: optax.set_to_zero()}, TRAINED)
    tx = sam_optax.sharpness_aware(inner, rho=RHO)

    @jax.jit
    def train_step(params, state):
        grad_fn = jax.value_and_grad(loss_fn, allow_int=True)
        updates, state = tx.update(None, state, params, grad_fn=grad_fn, batch=BATCH)
        return apply(params, updates), state

    after, state = train_step(MIXED, tx.init(MIXED))
    _, direction = expected({"kernel": A, "bias": B})
    assert_close(
        {k: after[k] for k in direction},
        jax.tree.map(lambda w, g: w - 0.1 * g, {"kernel": A, "bias": B}, direction),
    )
    for k in ("steps", "table", "flag"):
        assert_trees_equal(after[k], MIXED[k])
    assert (jax.random.key_data(after["key"]) == jax.random.key_data(MIXED["key"])).all()
    train_step(after, state)
    assert train_step._cache_size() == 1


# Complex parameters in an optimizer that takes only real ones.


def test_split_real_and_imaginary_inside():
    params = {"w": jnp.array([3.0 - 4.0j, 1.0j])}
    inner = optax.contrib.split_real_and_imaginary(optax.chain(optax.clip(5.0), optax.scale(-1.0)))
    _, direction = expected(params)
    clipped = direction["w"].real.clip(-5, 5) + 1j * direction["w"].imag.clip(-5, 5)

    tx = sam_optax.sharpness_aware(inner, rho=RHO)
    updates, _ = tx.update(None, tx.init(params), params, grad_fn=ascending, batch=BATCH)
    assert_close(updates, {"w": -clipped})

    grads = conjugate(sam_optax.value_and_grad(loss_fn, rho=RHO)(params, BATCH)[1])
    assert_close(inner.update(grads, inner.init(params), params)[0], {"w": -clipped})

"""Sharpness measures against whole Hessians, quadratics and known maxima."""

import dataclasses
import fractions
import functools
import gc
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import mlp_batch, mlp_loss, mlp_params

import sam_optax
from sam_optax import sharpness

NO_DATA = [jnp.zeros(1)]


def quadratic(eigenvalues):
    """A loss with these eigenvalues, and its Hessian."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues),) * 2))[0]
    matrix = jnp.asarray(rotation @ np.diag(eigenvalues) @ rotation.T, jnp.float32)

    def loss_fn(params, batch):
        w = ravel_pytree(params)[0]
        return 0.5 * w @ matrix @ w

    return loss_fn, matrix


def test_the_largest_eigenvalues_are_not_the_largest_in_size():
    loss_fn, matrix = quadratic(np.array([-9.0, -1.0, 0.0, 0.5, 2.0, 4.0]))
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    pairs = sharpness.hessian_eigenpairs(loss_fn, params, NO_DATA, k=3, tolerance=1e-5)
    np.testing.assert_allclose(pairs.values, [4, 2, 0.5], rtol=1e-4)
    vectors = jnp.stack([ravel_pytree(v)[0] for v in pairs.vectors])
    np.testing.assert_allclose(vectors @ matrix, pairs.values[:, None] * vectors, atol=1e-3)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-4)


def test_a_network_against_its_whole_hessian():
    params, batches = mlp_params(), [mlp_batch(b=8, seed=seed) for seed in (0, 1, 2)]
    flat, unravel = ravel_pytree(params)
    whole = np.mean([jax.hessian(lambda w, b=b: mlp_loss(unravel(w), b))(flat) for b in batches], 0)
    expected = np.linalg.eigvalsh(whole)[::-1][:2]
    pairs = sharpness.hessian_eigenpairs(mlp_loss, params, batches, k=2, max_steps=60)
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-3)
    assert (pairs.residuals <= 1e-3).all() and pairs.steps <= 60


def test_residuals_are_those_of_the_definition():
    loss_fn, matrix = quadratic(np.linspace(1, 2, 60))
    before = np.inf
    for steps in (3, 12):
        pairs = sharpness.hessian_eigenpairs(
            loss_fn, jnp.ones(60), NO_DATA, max_steps=steps, tolerance=0
        )
        vector, value = pairs.vectors[0], pairs.values[0]
        by_definition = np.linalg.norm(matrix @ vector - value * vector) / value
        assert pairs.residuals[0] == pytest.approx(by_definition, rel=0.02)
        assert pairs.steps == steps and pairs.residuals[0] < before / 2
        before = pairs.residuals[0]


def test_an_eigenvalue_that_is_there_twice():
    # From any vector of the space of 5s, H leads nowhere else: it has to start again outside.
    loss_fn, _ = quadratic(np.array([5.0, 5, 1, 1, 1, 1, 1, 1]))
    pairs = sharpness.hessian_eigenpairs(loss_fn, jnp.ones(8), NO_DATA, k=3, tolerance=1e-4)
    np.testing.assert_allclose(pairs.values, [5, 5, 1], rtol=1e-3)


def test_every_eigenvalue_of_a_small_one():
    loss_fn, _ = quadratic(np.array([3.0, -2.0]))
    pairs = sharpness.hessian_eigenpairs(loss_fn, jnp.ones(2), NO_DATA, k=2)
    np.testing.assert_allclose(pairs.values, [3, -2], rtol=1e-4)


def test_one_eigenvalue_beside_very_many_equal_ones():
    """As of weight decay: any random vector is nearly an eigenvector of all the others."""
    eigenvalues = jnp.ones(250_000).at[7].set(1.45)
    pairs = sharpness.hessian_eigenpairs(
        lambda w, batch: 0.5 * jnp.sum(eigenvalues * w**2), jnp.zeros(250_000), NO_DATA
    )
    np.testing.assert_allclose(pairs.values, [1.45], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_residuals_tell_what_rounding_leaves_unknown(dtype):
    eigenvalues = [1e4, 1e-3, 5e-4, 1e-4]
    with jax.enable_x64(True):
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
        matrix = jnp.asarray(rotation @ np.diag(eigenvalues) @ rotation.T, dtype)
        pairs = sharpness.hessian_eigenpairs(
            lambda w, batch: w @ matrix @ w / 2, jnp.zeros(4, dtype), NO_DATA, k=2
        )
    true = np.array(eigenvalues[:2])
    assert (np.abs(pairs.values - true) <= 8 * pairs.residuals * np.abs(pairs.values)).all()
    assert pairs.residuals[0] < 1e-6 and (pairs.residuals[1] < 1e-4) == (dtype == "float64")


def test_residuals_know_of_eigenvalues_that_are_larger_in_size():
    eigenvalues = jnp.array([-1e4, 1.0])
    pairs = sharpness.hessian_eigenpairs(
        lambda w, _: 0.5 * jnp.sum(eigenvalues * w**2), jnp.ones(2), NO_DATA
    )
    assert pairs.residuals[0] > 1e-3


def test_batches_weigh_as_the_loss_says():
    def loss_fn(w, batch):
        return jnp.mean(batch) * w**2

    alike, w = [jnp.full(3, 1.0), jnp.full(3, 5.0)], jnp.float32(1)
    uneven = [jnp.full(1, 1.0), jnp.full(3, 5.0)]
    for reduction, batches, value in (
        ("mean", alike, 6.0),
        ("sum", uneven, 12.0),
        (lambda batch: 1.0 * batch.size, uneven, 8.0),
        (lambda batch: 1.0, uneven, 6.0),
    ):
        pairs = sharpness.hessian_eigenpairs(loss_fn, w, batches, loss_reduction=reduction)
        assert pairs.values[0] == pytest.approx(value)


def test_epsilon_sharpness_of_a_quadratic_is_half_the_top_eigenvalue():
    loss_fn, _ = quadratic(np.array([0.1, 1.0, 8.0]))
    found = sharpness.epsilon_sharpness(loss_fn, jnp.zeros(3), NO_DATA, rho=0.5, steps=20)
    assert found.loss == 0
    assert found.rise == pytest.approx(0.5 * 8 * 0.25, rel=1e-3)
    assert found.rise_of_one_step <= found.rise
    assert float(optax.tree.norm(found.perturbation)) == pytest.approx(0.5, rel=1e-5)


def test_at_a_maximum_the_loss_does_not_rise():
    top = sharpness.epsilon_sharpness(lambda w, b: -jnp.sum(w**2), jnp.zeros(2), NO_DATA, 0.5)
    np.testing.assert_allclose(top.rise_of_one_step, -0.25, rtol=1e-6)
    assert top.rise == 0
    np.testing.assert_array_equal(top.perturbation, 0)


def test_one_step_is_sams_perturbation():
    params, batch = mlp_params(), mlp_batch(b=16)
    found = sharpness.epsilon_sharpness(mlp_loss, params, [batch], rho=0.1, steps=1)
    grads = jax.grad(mlp_loss)(params, batch)
    w_adv = jax.tree.map(lambda w, g: w + 0.1 * g / optax.tree.norm(grads), params, grads)
    assert found.loss == pytest.approx(float(mlp_loss(params, batch)), rel=1e-6)
    assert found.rise == found.rise_of_one_step
    assert found.rise == pytest.approx(float(mlp_loss(w_adv, batch)) - found.loss, rel=1e-3)


def test_more_steps_find_more():
    params, batch = mlp_params(), mlp_batch(b=16)
    found = sharpness.epsilon_sharpness(mlp_loss, params, [batch], rho=2.0, steps=10)
    one = sharpness.epsilon_sharpness(mlp_loss, params, [batch], rho=2.0, steps=1)
    assert found.rise > found.rise_of_one_step == one.rise > 0


def test_loss_along_and_across():
    params = {"a": jnp.float32(1), "b": jnp.float32(2), "step": jnp.int32(7)}

    def loss_fn(params, batch):
        return params["a"] ** 2 + 10 * params["b"] + 0 * params["step"]

    along = {"a": jnp.float32(2), "b": jnp.float32(0), "step": None}
    across = {"a": jnp.float32(0), "b": jnp.float32(1), "step": None}
    line = sharpness.loss_along(loss_fn, params, NO_DATA, along, [-1, 0, 0.5])
    np.testing.assert_allclose(line, [21, 21, 24])
    plane = sharpness.loss_along(loss_fn, params, NO_DATA, along, [0, 1], across=across)
    np.testing.assert_allclose(plane, [[21, 31], [29, 39]])


def test_random_direction_is_a_unit_vector_fixed_by_its_seed():
    params = {"a": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(4)}
    first, again, other = (
        ravel_pytree(sharpness.random_direction(params, seed))[0] for seed in (0, 0, 1)
    )
    assert first.dtype == jnp.float32
    assert float(jnp.linalg.norm(first)) == pytest.approx(1, rel=1e-6)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    # Parameters that no one put on a device may be used with batches on any.
    assert not sharpness.random_direction(jnp.zeros(4)).committed


def test_bfloat16_parameters_have_a_float32_hessian():
    loss_fn, _ = quadratic(np.array([1.0, 3.0]))
    wide = sharpness.hessian_eigenpairs(loss_fn, jnp.ones(2), NO_DATA)
    narrow = sharpness.hessian_eigenpairs(loss_fn, jnp.ones(2, jnp.bfloat16), NO_DATA)
    assert narrow.values == pytest.approx(wide.values, rel=1e-5)


def test_on_a_mesh_it_is_the_same_and_directions_are_sharded_as_the_parameters():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, batches = mlp_params(sizes=(8, 16, 4)), [mlp_batch(b=16, sizes=(8, 16, 4))]
    hidden = {"kernel": P(None, "model"), "bias": P("model")}
    specs = {"hidden": hidden, "out": {"kernel": P("model")}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    on_mesh = jax.device_put(params, shardings)
    sharded = [jax.device_put(b, NamedSharding(mesh, P("data"))) for b in batches]
    one = sharpness.hessian_eigenpairs(mlp_loss, params, batches, tolerance=1e-4)
    with jax.set_mesh(mesh):
        many = sharpness.hessian_eigenpairs(mlp_loss, on_mesh, sharded, tolerance=1e-4)
        rise = sharpness.epsilon_sharpness(mlp_loss, on_mesh, sharded, rho=0.1, steps=2)
    np.testing.assert_allclose(many.values, one.values, rtol=1e-4)
    assert rise.rise > 0
    for tree in (many.vectors[0], rise.perturbation, sharpness.random_direction(on_mesh)):
        kernel = tree["hidden"]["kernel"]
        assert kernel.sharding.is_equivalent_to(shardings["hidden"]["kernel"], kernel.ndim)


def test_parameters_sharded_over_the_data_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, batch = mlp_params(sizes=(8, 16, 4)), mlp_batch(b=16, sizes=(8, 16, 4))
    on_mesh = jax.device_put((params, batch), NamedSharding(mesh, P("data")))
    many_steps = {"max_steps": 30, "tolerance": 0}  # many programs with collectives at once: a hang
    one = sharpness.hessian_eigenpairs(mlp_loss, params, [batch], **many_steps)
    with jax.set_mesh(mesh):
        many = sharpness.hessian_eigenpairs(mlp_loss, on_mesh[0], [on_mesh[1]], **many_steps)
    np.testing.assert_allclose(many.values, one.values, rtol=1e-4)


def test_a_smaller_last_batch():
    params, whole = mlp_params(), mlp_batch(b=18)
    batches = [jax.tree.map(lambda x, i=i: x[i : i + 8], whole) for i in (0, 8, 16)]
    with pytest.raises(ValueError, match=r'"mean" gives each .*\[2, 8\] rows.*from a batch to its'):
        sharpness.hessian_eigenpairs(mlp_loss, params, batches)
    weighted = sharpness.hessian_eigenpairs(
        mlp_loss, params, batches, loss_reduction=lambda batch: batch["x"].shape[0]
    )
    expected = sharpness.hessian_eigenpairs(mlp_loss, params, [whole])
    np.testing.assert_allclose(weighted.values, expected.values, rtol=1e-3)


MEASURES = [
    functools.partial(sharpness.hessian_eigenpairs, max_steps=3),
    functools.partial(sharpness.epsilon_sharpness, rho=0.1, steps=2),
    lambda loss_fn, params, batches, **options: sharpness.loss_along(
        loss_fn, params, batches, sharpness.random_direction(params), [0.0, 1.0], **options
    ),
]


@pytest.mark.parametrize("measure", MEASURES, ids=["eigenpairs", "epsilon", "along"])
def test_a_second_call_compiles_nothing(measure):
    def loss_fn(params, batch):
        return mlp_loss(params, batch)

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    counts = []
    for seed in range(3):
        batches = [mlp_batch(seed), mlp_batch(seed + 1)]
        # A function for the weight is often written where it is given.
        weight = {"loss_reduction": lambda batch: batch["x"].shape[0]} if seed == 2 else {}
        functools.partial(measure, **weight)(loss_fn, mlp_params(seed), batches)
        counts.append(len(compilations))
    assert 0 < counts[0] == counts[1] == counts[2]


def test_a_loss_function_is_let_go():
    def loss_fn(params, batch):
        return mlp_loss(params, batch)

    sharpness.hessian_eigenpairs(loss_fn, mlp_params(), [mlp_batch()], max_steps=2)
    gone = weakref.ref(loss_fn)
    del loss_fn
    gc.collect()
    assert gone() is None


@dataclasses.dataclass  # which cannot be hashed
class ScaledLoss:
    factor: float

    def __call__(self, params, batch):
        return self.factor * mlp_loss(params, batch)

    def method(self, params, batch):
        return self(params, batch)


@pytest.mark.parametrize("way", [lambda loss: loss, lambda loss: loss.method])
def test_callable_objects_and_methods(way):
    loss, batch = ScaledLoss(2.0), [mlp_batch()]
    for factor in (2.0, 3.0):
        loss.factor = factor
        (found,) = sharpness.loss_along(way(loss), mlp_params(), batch, mlp_params(1), [0.0])
        np.testing.assert_allclose(found, factor * mlp_loss(mlp_params(), batch[0]), rtol=1e-6)


def test_directions_of_different_leaves():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    losses = sharpness.loss_along(
        lambda w, _: 10 * jnp.sum(w["a"]) + jnp.sum(w["b"]),
        params,
        NO_DATA,
        {"a": jnp.ones(2), "b": None},
        [0, 1],
        across={"a": None, "b": jnp.ones(3)},
    )
    np.testing.assert_allclose(losses, [[23, 26], [43, 46]])


def test_float64_parameters_are_not_narrowed():
    with jax.enable_x64(True):
        params = jnp.full(3, 1e40, jnp.float64)

        def loss_fn(w, batch):
            assert w.dtype == jnp.float64
            return jnp.sum(w / 1e40) + 1e-12

        for direction in (jnp.ones(3, jnp.float64), jnp.ones(3, jnp.float32)):
            losses = sharpness.loss_along(loss_fn, params, [np.zeros(1)], 1e30 * direction, [0, 1])
            assert losses[0] == 3 + 1e-12 and losses[1] > losses[0]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("promotion", ["standard", "strict"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtypes_where_float64_is_allowed(dtype, promotion):
    """Float64 parameters stay float64, and narrower ones are moved in float32."""
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        params = jnp.array([1.0, -2.0, 0.5], dtype)
        batch = jnp.arange(12.0, dtype=wide).reshape(4, 3)

        def loss_fn(w, batch):
            assert w.dtype == wide
            return jnp.mean((batch @ w) ** 2)

        pairs = sharpness.hessian_eigenpairs(loss_fn, params, [batch], k=2)
        uphill = sharpness.epsilon_sharpness(loss_fn, params, [batch], rho=0.1).perturbation
        assert {v.dtype for v in (*pairs.vectors, uphill)} == {jnp.dtype(wide)}
        expected = np.linalg.eigvalsh(2 * batch.T @ batch / 4)[:0:-1]
        np.testing.assert_allclose(pairs.values, expected, rtol=1e-5)
        assert sharpness.loss_along(loss_fn, params, [batch], uphill, [0, 1])[1] > 0


def test_sharpness_where_the_loss_or_its_gradient_is_not_finite():
    def infinite_slope(w, batch):
        return jnp.sum(jnp.sqrt(jnp.abs(w)))  # not finite at 0

    start = jnp.array([0.0, 0.5])
    assert sharpness.epsilon_sharpness(infinite_slope, start, NO_DATA, 0.1).rise > 0

    def outside(w, batch):  # NaN beyond 1, which the second step reaches
        return jnp.where(w[0] > 1, jnp.nan, w[0] - w[1] + jnp.where(w[1] < 0, 20 * w[0], 0))

    found = sharpness.epsilon_sharpness(outside, jnp.array([0.91, 0.05]), NO_DATA, 0.1, steps=5)
    assert np.isfinite(found.rise_of_one_step) and np.isnan(found.rise)

    assert 0.91 + found.perturbation[0] > 1


@pytest.mark.parametrize("sign", [-1, 1])
def test_above_an_infinite_loss_there_is_no_rise(sign):
    def loss_fn(w, batch):
        return sign * jnp.log(jnp.sum(w**2))

    found = sharpness.epsilon_sharpness(loss_fn, jnp.zeros(2), NO_DATA, rho=0.1)
    assert found.loss == -sign * np.inf
    assert np.isnan(found.rise) and np.isnan(found.rise_of_one_step)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": []}, ValueError, "has no batch"),
        ({"batches": jnp.ones(3)}, TypeError, r"a list of batches.*Give \[batch\]"),
        ({"batches": iter([])}, TypeError, "list of batches"),
        ({"k": 0}, ValueError, "k=0 must be at least 1"),
        ({"k": 3}, ValueError, "k=3 eigenvalues of a Hessian that has 2: give k=2 or less"),
        ({"k": 2, "max_steps": 1}, ValueError, "max_steps=1 must be at least 2"),
        ({"tolerance": None}, TypeError, "tolerance=None must be a number"),
        ({"tolerance": -1.0}, ValueError, "tolerance=-1.0 must be at least 0"),
        ({"loss_reduction": "total"}, ValueError, "loss_reduction='total' must be one of"),
        ({"loss_reduction": None}, TypeError, "loss_reduction=None must be one of"),
        ({"params": jnp.ones(2, jnp.complex64)}, TypeError, "complex"),
        ({"params": jnp.ones(2, jnp.int32)}, ValueError, r"no array with a .*not int32\[2\]"),
        ({"params": [jnp.ones((2, 0)), 1]}, ValueError, r"float32\[2, 0\].*int\[\]"),
        ({"seed": None}, TypeError, "seed=None must be an integer"),
        ({"seed": 1.5}, TypeError, "seed=1.5 must be an integer"),
        ({"seed": 2**32}, ValueError, r"seed=4294967296 must be in \[0, 2\*\*32\)"),
        ({"seed": -1}, ValueError, "seed=-1 must be in"),
        ({"loss_reduction": lambda _: jnp.nan}, ValueError, r"\(batches\[0\]\) is nan"),
        ({"loss_fn": None}, TypeError, "loss_fn=None must be a function"),
        ({"loss_fn": "loss"}, TypeError, "loss_fn='loss' must be a function"),
        ({"loss_fn": lambda w, batch: w}, ValueError, "must return a real scalar"),
        ({"loss_fn": lambda w, batch: w @ w * jnp.nan}, ValueError, "is not finite: the loss"),
        ({"loss_fn": lambda w, batch: jnp.exp(99 * w.sum())}, ValueError, "is not finite"),
    ],
)
def test_bad_input_of_eigenpairs(options, error, message):
    arguments = {"loss_fn": lambda w, b: jnp.sum(w**2), "params": jnp.ones(2), "batches": NO_DATA}
    with pytest.raises(error, match=message):
        sharpness.hessian_eigenpairs(**(arguments | options))


@pytest.mark.parametrize(
    "rho",
    [0, -1.0, 1e-46, float("nan"), float("inf"), pytest.param(10**400, id="10**400"), None, "0.1"],
)
def test_bad_rho(rho):
    with pytest.raises((ValueError, TypeError), match=f"rho={rho!r} must be"):
        sharpness.epsilon_sharpness(lambda w, b: jnp.sum(w**2), jnp.ones(2), NO_DATA, rho)


@pytest.mark.parametrize("seed", [None, 1.5, "x", True])
def test_bad_seeds_before_they_are_needed(seed):
    loss_fn, params = lambda w, b: jnp.sum(w**2), jnp.ones(2)
    with pytest.raises(TypeError, match=f"seed={seed!r} must be an integer"):
        sharpness.epsilon_sharpness(loss_fn, params, NO_DATA, 0.1, seed=seed)
    with pytest.raises(TypeError, match=f"seed={seed!r} must be an integer"):
        sharpness.random_direction(params, seed)


@pytest.mark.parametrize("rho", [np.float64(0.1), fractions.Fraction(1, 10)])
def test_a_wide_rho_does_not_widen_the_perturbation(rho):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params = jnp.ones(2, jnp.float32)
        found = sharpness.epsilon_sharpness(lambda w, b: jnp.sum(w * w), params, NO_DATA, rho)
    assert found.perturbation.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(found.perturbation), 0.1, rtol=1e-6)


@pytest.mark.parametrize("direction", [{"a": jnp.ones(2)}, jnp.ones(3), jnp.ones(2) * 1j, None])
def test_directions_must_be_like_the_parameters(direction):
    with pytest.raises(TypeError, match="direction must be a tree like the parameters"):
        sharpness.loss_along(lambda w, b: jnp.sum(w**2), jnp.ones(2), NO_DATA, direction, [0, 1])


@pytest.mark.parametrize("distances", [[0, 1], (0.0, 1.0), np.arange(2), jnp.arange(2.0), range(2)])
def test_distances_are_any_numbers(distances):
    losses = sharpness.loss_along(
        lambda w, b: jnp.sum(w), jnp.ones(2), NO_DATA, jnp.ones(2), distances, across=jnp.ones(2)
    )
    np.testing.assert_array_equal(losses, [[2, 4], [4, 6]])


@pytest.mark.parametrize(
    "distances", [iter([0, 1]), "12", {1: 2}, 0.5, [None], [1j], [[0, 1]], [[0], [1, 2]]]
)
def test_distances_that_are_no_list_of_numbers(distances):
    with pytest.raises(TypeError, match="distances=.* must be a list, or an array of one axis"):
        sharpness.loss_along(lambda w, b: w, jnp.float32(1), NO_DATA, jnp.float32(1), distances)


@pytest.mark.parametrize(
    "measure",
    [
        lambda f, w, data: sharpness.hessian_eigenpairs(f, w, data).values,
        lambda f, w, data: sharpness.epsilon_sharpness(f, w, data, 0.1).rise,
        lambda f, w, data: sharpness.loss_along(f, w, data, jnp.ones(2), [0.0]),
    ],
)
def test_under_jit_they_say_where_to_call_them(measure):
    with pytest.raises(TypeError, match="are traced: call them outside jax.jit"):
        jax.jit(lambda w: measure(lambda w, _: w @ w, w, NO_DATA))(jnp.ones(2))
    with pytest.raises(TypeError, match="are traced"):
        jax.jit(lambda data: measure(lambda w, _: w @ w, jnp.ones(2), [data]))(jnp.ones(3))


def test_found_as_an_attribute_too():
    alone = "import sam_optax; print(sam_optax.sharpness.random_direction.__name__)"
    found = subprocess.run(
        [sys.executable, "-c", alone], check=True, capture_output=True, text=True
    )
    assert found.stdout.split() == ["random_direction"]
    with pytest.raises(AttributeError, match="'sam_optax' has no attribute 'sharpnes'"):
        _ = sam_optax.sharpnes


@pytest.mark.parametrize(
    ("reduction", "value"), [("sum", 6.0), (lambda b: 1.0 * b.size, 4.0), (lambda b: 1.0, 3.0)]
)
def test_every_measure_weighs_the_batches(reduction, value):
    def loss_fn(w, batch):
        return jnp.mean(batch) * w**2

    batches, w = [jnp.full(1, 1.0), jnp.full(3, 5.0)], jnp.float32(1)
    found = sharpness.epsilon_sharpness(loss_fn, w, batches, 0.5, loss_reduction=reduction)
    assert found.loss == pytest.approx(value) and found.rise == pytest.approx(1.25 * value)
    losses = sharpness.loss_along(loss_fn, w, batches, w, [0, 1], loss_reduction=reduction)
    np.testing.assert_allclose(losses, [value, 4 * value])


def test_the_seed_is_that_of_the_first_vector_and_of_random_steps():
    def loss_fn(w, batch):
        return jnp.sum(jnp.arange(50.0) * w**2)

    def top(seed):
        w = jnp.ones(50)
        return sharpness.hessian_eigenpairs(loss_fn, w, NO_DATA, max_steps=2, seed=seed).values[0]

    assert top(0) == top(0) != top(1)

    def way(seed):
        w = jnp.zeros(50)
        found = sharpness.epsilon_sharpness(loss_fn, w, NO_DATA, 0.1, steps=1, seed=seed)
        return found.perturbation

    np.testing.assert_array_equal(way(0), way(0))
    assert not np.allclose(way(0), way(1))


def test_a_random_direction_is_uniform_on_the_sphere():
    one, other = sharpness.random_direction([jnp.zeros(10_000)] * 2)
    assert not np.allclose(one, other)
    normal = np.float64(one) * np.sqrt(20_000)
    assert abs(normal.mean()) < 0.05 and abs((normal**4).mean() - 3) < 0.3


def test_the_perturbation_is_that_of_the_largest_rise():
    def loss_fn(w, batch):  # the second step goes to the other side, where it is less high
        return jnp.sum(jnp.where(w >= 0, jnp.sin(4 * w), -0.5 * w))

    found = sharpness.epsilon_sharpness(loss_fn, jnp.zeros(1), NO_DATA, 0.5, steps=2)
    assert found.rise == found.rise_of_one_step == pytest.approx(np.sin(2))
    np.testing.assert_allclose(found.perturbation, [0.5], rtol=1e-6)


def test_the_rise_to_an_infinite_loss_is_infinite():
    def wall(w, batch):
        return jnp.where(w[0] > 0.95, jnp.inf, w[0])

    found = sharpness.epsilon_sharpness(wall, jnp.array([0.9]), NO_DATA, 0.1, steps=3)
    assert found.rise == found.rise_of_one_step == np.inf


def test_settings_of_sharpness_out_of_range():
    with pytest.raises(ValueError, match="steps=0 must be"):
        sharpness.epsilon_sharpness(lambda w, _: jnp.sum(w), jnp.ones(2), NO_DATA, 0.1, steps=0)
    with pytest.raises(ValueError, match="must be in"):
        sharpness.random_direction(jnp.ones(2), 2**32)  # JAX would take it for 0


def test_directions_are_checked_leaf_by_leaf():
    params = {"w": jnp.ones(2), "step": jnp.int32(0)}

    def along(direction, **across):
        loss_fn = lambda params, batch: jnp.sum(params["w"])  # noqa: E731
        return sharpness.loss_along(loss_fn, params, NO_DATA, direction, [0], **across)

    with pytest.raises(TypeError, match="direction must be a tree like"):
        along({"w": jnp.ones(2), "step": jnp.int32(1)})
    with pytest.raises(TypeError, match="across must be a tree like"):
        along({"w": jnp.ones(2), "step": None}, across={"w": jnp.ones(3), "step": None})


def test_a_narrow_direction_is_multiplied_in_float32():
    along = jnp.ones(1, jnp.bfloat16)
    losses = sharpness.loss_along(lambda w, _: w[0], jnp.zeros(1), NO_DATA, along, [1.001])
    np.testing.assert_allclose(losses, 1.001, rtol=1e-6)


def test_residuals_are_not_smaller_than_the_narrowest_parameters_allow():
    def loss_fn(params, batch):
        narrow = params["narrow"].astype("float64")
        return narrow @ narrow + 2 * params["wide"] @ params["wide"]

    with jax.enable_x64(True):
        params = {"narrow": jnp.zeros(2, "float32"), "wide": jnp.zeros(2, "float64")}
        pairs = sharpness.hessian_eigenpairs(loss_fn, params, NO_DATA)
    assert pairs.residuals[0] >= 1e-7


def test_the_tolerance_is_relative():
    def steps(scale):
        eigenvalues = scale * jnp.linspace(1, 2, 60)
        pairs = sharpness.hessian_eigenpairs(
            lambda w, _: 0.5 * jnp.sum(eigenvalues * w**2), jnp.ones(60), NO_DATA, tolerance=1e-3
        )
        return pairs.steps

    assert steps(1e-4) == steps(1e4)


def test_no_pair_is_taken_for_converged_before_step_2k_plus_8():
    eigenvalues = jnp.linspace(1, 2, 60)
    pairs = sharpness.hessian_eigenpairs(
        lambda w, _: 0.5 * jnp.sum(eigenvalues * w**2), jnp.ones(60), NO_DATA, k=2, tolerance=1e9
    )
    assert pairs.steps == 2 * 2 + 8


def test_of_a_linear_loss_the_hessian_is_zero_and_so_are_the_residuals():
    found = sharpness.hessian_eigenpairs(
        lambda w, batch: jnp.mean(batch @ w), jnp.ones(3), [jnp.ones((4, 3))], k=2
    )
    assert (found.values == 0).all() and (found.residuals == 0).all()


def test_without_a_gradient_each_step_is_in_another_random_direction():
    seen = []

    def loss_fn(w, batch):
        jax.debug.callback(lambda w: seen.append(tuple(w.tolist())), w)
        return jnp.sum(jnp.floor(w))

    sharpness.epsilon_sharpness(loss_fn, jnp.ones(3) / 2, NO_DATA, 0.1, steps=6)
    jax.effects_barrier()
    assert len(set(seen)) == 1 + 6

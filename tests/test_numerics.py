"""Every numerical trap of SAM, each with a test that fails without its fix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.experimental import checkify
from jax.flatten_util import ravel_pytree
from problems import (
    assert_trees_close,
    assert_trees_equal,
    first,
    mlp_batch,
    mlp_loss,
    mlp_params,
    norm64,
)

import sam_optax
from sam_optax import _norm
from sam_optax._dtypes import widened
from sam_optax._norm import unit_and_norm


def padded(batch, n):
    """Weight 0 for the first n examples."""
    b = batch["x"].shape[0]
    return batch | {"weight": (jnp.arange(b) >= n).astype(jnp.float32)}


def weighted_loss(params, batch):
    """Sum over examples of weighted squared errors: 0 where every weight is."""
    per_example = jax.vmap(lambda x, y: mlp_loss(params, {"x": x[None], "y": y[None]}))
    return jnp.sum(per_example(batch["x"], batch["y"]) * batch["weight"])


# Zero gradient: eps = 0, w_adv == w bit for bit, the step is the plain step.


def test_zero_ascent_gradient_is_the_plain_step():
    params, batch = mlp_params(), padded(mlp_batch(), 4)  # all of the ascent slice is padding
    params["out"]["kernel"] = params["out"]["kernel"].at[0, 0].set(-0.0)
    assert norm64(jax.grad(weighted_loss)(params, first(batch, 4))) == 0
    seen = []

    def loss_fn(params, batch):
        seen.append(params)
        return weighted_loss(params, batch)

    result = sam_optax.value_and_grad(loss_fn)(params, batch)
    assert_trees_equal(result, jax.value_and_grad(weighted_loss)(params, batch))
    w_adv = jax.jit(lambda p: capture_w_adv(weighted_loss, p, batch))(params)
    assert_trees_equal(w_adv, params)  # the sign of -0.0 too
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize(
    "perturbation",
    [None, sam_optax.adaptive_perturbation(), lambda g, w, rho: jax.tree.map(lambda x: rho * x, g)],
    ids=["SAM", "ASAM", "the user's"],
)
def test_a_rho_that_becomes_zero_leaves_minus_zero_as_it_is(perturbation, dtype):
    w = -jnp.zeros(3, dtype)

    def loss_fn(w, batch):
        return jnp.sum(jnp.abs(batch @ w - 1)), w

    def w_adv(rho):
        gradient = sam_optax.value_and_grad(
            loss_fn, rho, has_aux=True, perturbation=perturbation, adversarial_dtype=None
        )
        return gradient(w, jnp.ones((4, 3), dtype))[0][1]

    assert (jax.jit(w_adv)(0.1) != w).all()
    seen = jax.jit(w_adv)(0.0)
    assert np.signbit(np.asarray(seen.real)).all()
    assert not jnp.iscomplexobj(w) or np.signbit(np.asarray(seen.imag)).all()


def capture_w_adv(loss_fn, params, batch, **kwargs):
    """The adversarial point, handed out as aux."""

    def with_params(params, batch):
        return loss_fn(params, batch), params

    (_, w_adv), _ = sam_optax.value_and_grad(with_params, has_aux=True, **kwargs)(params, batch)
    return w_adv


def test_zero_gradient_everywhere_leaves_the_parameters_alone():
    params = mlp_params()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1))
    updates, _ = tx.update(
        None,
        tx.init(params),
        params,
        grad_fn=jax.grad(lambda p, b: 0.0 * jnp.sum(p["out"]["kernel"])),
        batch=mlp_batch(),
    )
    assert_trees_equal(optax.apply_updates(params, updates), params)


# NaN or inf in the ascent gradient: eps = 0 and counted; the descent pass decides.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_ascent_gradient_is_the_plain_step(bad):
    params, batch = mlp_params(), mlp_batch()

    def ascent_loss(params, batch):
        return mlp_loss(params, batch) + jnp.sum(params["hidden"]["bias"]) * bad

    gradient = sam_optax.value_and_grad(mlp_loss, ascent_loss_fn=ascent_loss, return_info=True)
    loss, grads, info = gradient(params, batch)
    assert_trees_equal((loss, grads), jax.value_and_grad(mlp_loss)(params, batch))
    assert info.skipped_ascents == 1 and info.realised_perturbation == 0


def test_not_finite_descent_gradient_is_returned_as_the_plain_step_would():
    params, batch = mlp_params(), mlp_batch()
    batch["x"] = batch["x"].at[-1].set(jnp.nan)  # outside the ascent slice
    loss, grads = sam_optax.value_and_grad(mlp_loss)(params, batch)
    assert jnp.isnan(loss) and jnp.isnan(grads["hidden"]["kernel"]).all()


# Selecting by a product crashes on PRNG keys and bools, and lets NaN through.


def test_keys_bools_and_integers_in_the_parameters_stay_as_they_are():
    params = {
        "w": jnp.ones(3),
        "key": jax.random.key(0),
        "flag": jnp.array(True),
        "steps": jnp.int32(7),
        "nothing": None,
    }

    def loss_fn(params, batch):
        assert params["steps"].dtype == jnp.int32 and params["flag"].dtype == jnp.bool_
        noise = jax.random.normal(params["key"], (3,))
        scale = jnp.where(params["flag"], params["steps"], 0).astype(jnp.float32)
        return jnp.mean(jnp.square(batch @ (params["w"] + noise))) * scale

    gradient = sam_optax.value_and_grad(loss_fn, allow_int=True)
    _, grads = jax.jit(gradient)(params, jnp.ones((8, 3)))
    expected = jax.value_and_grad(lambda w: loss_fn(params | {"w": w}, jnp.ones((8, 3))))
    direction = expected(params["w"])[1]
    w_adv = params["w"] + 0.15 * direction / jnp.linalg.norm(direction)
    np.testing.assert_allclose(grads["w"], expected(w_adv)[1], rtol=1e-5)
    assert grads["steps"].dtype == jax.dtypes.float0

    # A predicate that takes every leaf takes every one that can move.
    every = sam_optax.value_and_grad(loss_fn, allow_int=True, perturb=lambda path: True)
    np.testing.assert_allclose(every(params, jnp.ones((8, 3)))[1]["w"], grads["w"], rtol=1e-5)

    for m_sharpness in ("paper", "foret"):
        two = sam_optax.value_and_grad(
            loss_fn, 0.15, 1.0, m=2, m_sharpness=m_sharpness, allow_int=True
        )
        np.testing.assert_allclose(two(params, jnp.ones((8, 3)))[1]["w"], grads["w"], rtol=1e-5)


# The norm is accumulated in float32, whatever the leaves are.


@pytest.fixture(params=["CPU", "TPU", "GPU"])
def platform(request, monkeypatch):
    """The sums of squares as they are made on each platform, all run here."""
    # It is traced once for the same types, which is not to be before.
    _norm._on_this_platform.clear_cache()
    sums = {
        "CPU": _norm._in_a_second_pass_where_needed,
        "TPU": _norm._in_a_sum_for_each_scale,
        "GPU": _norm._in_a_sum_for_all_scales,
    }
    monkeypatch.setattr(_norm, "_in_a_second_pass_where_needed", sums[request.param])
    monkeypatch.setattr(_norm, "_MOST_DEVICES", 8)  # so that small arrays are large ones, too
    yield
    _norm._on_this_platform.clear_cache()


@pytest.mark.usefixtures("platform")
def test_norm_of_many_bfloat16_leaves():
    tree = [jnp.full((), 0.316, jnp.bfloat16)] * 200
    true = norm64(tree)
    np.testing.assert_allclose(jax.jit(unit_and_norm)(tree)[1], true, rtol=1e-6)
    naive = jnp.sqrt(sum((x * x for x in tree), start=jnp.bfloat16(0)))
    assert abs(float(naive) / true - 1) > 0.05, "the trap is gone: this test shows nothing"


@pytest.mark.usefixtures("platform")
def test_norm_where_most_of_the_squares_underflow_and_one_does_not():
    g = np.full(2**18 + 1, 2.0**-69, np.float32)
    g[0] = 2.0**-62
    np.testing.assert_allclose(unit_and_norm(g)[1], norm64(g), rtol=1e-5)


def test_norm_is_wider_than_float32_where_the_leaves_are():
    with jax.enable_x64(True):
        tree = [jnp.float64(1.0), jnp.float64(1e-9), jnp.float32(0)]
        unit, norm = unit_and_norm(tree)
        assert norm.dtype == jnp.float64 and unit[1].dtype == jnp.float64
        np.testing.assert_allclose(unit[1], 1e-9, rtol=1e-12)
        for scale in (1e-290, 1e290):
            unit, norm = unit_and_norm([jnp.float64(3 * scale), jnp.float64(4 * scale)])
            np.testing.assert_allclose(norm, 5 * scale, rtol=1e-12)
            np.testing.assert_allclose(unit, [0.6, 0.8], rtol=1e-12)


# Tiny and huge gradients neither underflow nor overflow when squared.


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *((jnp.float32, e) for e in range(-36, 38, 2)),
        *((jnp.bfloat16, e) for e in range(-36, 38, 6)),
        *((jnp.float16, e) for e in range(-4, 4)),
    ],
)
def test_unit_vector_at_every_scale(dtype, exponent):
    rng = np.random.default_rng(0)
    tree = [
        jnp.asarray(rng.uniform(0.5, 3, size=shape) * 10.0**exponent, dtype)
        for shape in [(), (3,), (4, 5)]
    ]
    true = norm64(tree)
    for function in (unit_and_norm, jax.jit(unit_and_norm)):
        unit, norm = function(tree)
        np.testing.assert_allclose(norm, true, rtol=1e-6)
        np.testing.assert_allclose(norm64(unit), 1.0, rtol=1e-6)
        for u, x in zip(unit, tree, strict=True):
            np.testing.assert_allclose(u, np.asarray(x, np.float64) / true, rtol=2e-6)


# XLA takes the square of a product apart where an array has one element.


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("value", [0.0, 1e-37, 1e-12, 1e25])
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_norm_of_one_element_in_jit(shape, value):
    x = jnp.full(shape, value, jnp.float32)
    np.testing.assert_allclose(jax.jit(unit_and_norm)([x])[1], value, rtol=1e-6)
    two = jax.jit(lambda x: unit_and_norm({"x": x, "unused": jnp.zeros(shape)}))
    np.testing.assert_allclose(two(x)[1], value, rtol=1e-6)


@pytest.mark.usefixtures("platform")
def test_gradient_near_the_largest_number_has_a_direction():
    unit, norm = unit_and_norm([jnp.full((100,), 3e38, jnp.float32)])
    np.testing.assert_allclose(unit[0], 0.1, rtol=1e-5)
    assert jnp.isfinite(norm)


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25, 1e37])
def test_the_derivative_of_the_norm_at_any_scale(scale):
    # Where one of the scales overflows, it has no part in the derivative: 0 * inf would be NaN.
    tree = [jnp.array([3.0, 0.0]) * scale, jnp.array(4.0) * scale]
    for derivative in (jax.grad, jax.jacfwd):
        found = derivative(lambda tree: unit_and_norm(tree)[1])(tree)
        assert_trees_close(found, [jnp.array([0.6, 0.0]), jnp.array(0.8)], rtol=1e-6)


@pytest.mark.usefixtures("platform")
def test_norm_is_the_plain_sum_bit_for_bit_in_the_usual_range():
    tree = mlp_params()
    plain = jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))
    assert unit_and_norm(tree)[1] == plain


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-10, 1.0, 1e10, 1e25])
def test_perturbation_has_the_length_rho_at_every_scale(scale):
    params, batch = mlp_params(), mlp_batch()
    w_adv = capture_w_adv(
        mlp_loss, params, batch, ascent_loss_fn=lambda p, b: (scale * mlp_loss(p, b), p)
    )
    moved = jax.tree.map(lambda v, w: np.asarray(v, np.float64) - np.asarray(w), w_adv, params)
    np.testing.assert_allclose(norm64(moved), 0.15, rtol=1e-5)


# The adversarial point is never formed below float32 unasked.


def test_bfloat16_weights_get_a_float32_adversarial_point():
    n = 1_000_000
    w = jnp.ones((n,), jnp.bfloat16)
    batch = jnp.ones((4, 1))
    dtypes = []

    def loss_fn(w, batch):
        dtypes.append(w.dtype)
        return jnp.sum(w.astype(jnp.float32) ** 2) * jnp.mean(batch)

    _, grads, info = sam_optax.value_and_grad(loss_fn, rho=0.15, return_info=True)(w, batch)
    assert dtypes == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(info.realised_perturbation, 1.0, rtol=1e-3)
    assert grads.dtype == jnp.bfloat16

    rounded = sam_optax.value_and_grad(
        loss_fn, rho=0.15, return_info=True, adversarial_dtype=jnp.bfloat16
    )
    assert rounded(w, batch)[2].realised_perturbation == 0  # all of it is rounded away
    assert dtypes[-1] == jnp.bfloat16


def test_bfloat16_state_and_updates_keep_their_dtypes():
    params = mlp_params(dtype=jnp.bfloat16)
    tx = sam_optax.sharpness_aware(optax.adam(0.01))
    state = tx.init(params)
    updates, new_state = tx.update(
        None, state, params, grad_fn=jax.grad(mlp_loss), batch=mlp_batch()
    )
    types = jax.tree.map(jax.typeof, (params, state))
    assert jax.tree.map(jax.typeof, (updates, new_state)) == types


FORET_ASAM = {"m_sharpness": "foret", "perturbation": sam_optax.adaptive_perturbation()}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.float8_e4m3fn, {}),
        (jnp.float8_e5m2, {"m": 2, **FORET_ASAM}),
        (jnp.float4_e2m1fn, {"accumulation_steps": 2}),
    ],
)
def test_floats_of_a_byte_and_less(dtype, options):
    stored = jax.tree.map(lambda w: w.astype(dtype), mlp_params())

    def loss_fn(params, batch):
        return 8 * mlp_loss(jax.tree.map(lambda w: w.astype(jnp.float32), params), batch)

    gradient = jax.jit(sam_optax.value_and_grad(loss_fn, return_info=True, **options))
    with jax.numpy_dtype_promotion("strict"):
        loss, grads, info = gradient(stored, mlp_batch())
    assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, stored)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), stored)
    expected_loss, expected, expected_info = gradient(wide, mlp_batch())
    # The ascent gradient at w has their dtype, so that its direction is rounded.
    np.testing.assert_allclose(loss, expected_loss, rtol=0.1)
    expected_length = expected_info.realised_perturbation
    np.testing.assert_allclose(info.realised_perturbation, expected_length, rtol=0.1)
    flat, expected = (ravel_pytree(jax.tree.map(widened, x))[0] for x in (grads, expected))
    assert flat @ expected > 0.7 * jnp.linalg.norm(flat) * jnp.linalg.norm(expected)


# w is kept, never restored by subtracting.


def test_the_inner_optimizer_sees_w():
    params, batch = mlp_params(), mlp_batch()
    seen = []

    def remember(updates, state, params=None):
        seen.append(params)
        return updates, state

    spy = optax.GradientTransformation(lambda params: (), remember)
    tx = sam_optax.sharpness_aware(spy, rho=1e4)  # w + eps - eps would have lost 4 digits
    tx.update(None, tx.init(params), params, grad_fn=jax.grad(mlp_loss), batch=batch)
    assert_trees_equal(seen, [params])


# Clipping belongs into the inner optimizer, where it acts on the SAM gradient.


def test_clipping_in_the_inner_optimizer_acts_on_the_sam_gradient():
    params, batch = mlp_params(), mlp_batch()
    inner = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    tx = sam_optax.sharpness_aware(inner)
    updates, _ = tx.update(None, tx.init(params), params, grad_fn=jax.grad(mlp_loss), batch=batch)
    np.testing.assert_allclose(norm64(updates), 1e-3, rtol=1e-5)
    _, grads = sam_optax.value_and_grad(mlp_loss)(params, batch)
    length = norm64(grads)
    assert_trees_close(updates, jax.tree.map(lambda g: -g * 1e-3 / length, grads), atol=1e-9)


# Masked leaves: no perturbation, and not in the norm.


def test_masked_leaves_are_not_perturbed_and_not_in_the_norm():
    params, batch = mlp_params(), mlp_batch()
    perturb = {"hidden": True, "out": False}
    w_adv = capture_w_adv(mlp_loss, params, batch, perturb=perturb)
    assert_trees_equal(w_adv["out"], params["out"])
    moved = jax.tree.map(lambda v, w: v - w, w_adv["hidden"], params["hidden"])
    np.testing.assert_allclose(norm64(moved), 0.15, rtol=1e-5)


# State types are the same before and after: no second compilation, scan works.


def test_state_types_do_not_drift_and_nothing_compiles_twice():
    params = mlp_params() | {"half": jnp.ones(3, jnp.bfloat16)}

    def loss_fn(params, batch):
        return mlp_loss(params, batch) + jnp.sum(params["half"].astype(jnp.float32) ** 2)

    tx = sam_optax.sharpness_aware(optax.adam(0.01), rho=optax.constant_schedule(0.1))

    @jax.jit
    def train_step(params, state, batch):
        updates, state = tx.update(None, state, params, grad_fn=jax.grad(loss_fn), batch=batch)
        return optax.apply_updates(params, updates), state

    carry = (params, tx.init(params))
    types = jax.tree.map(jax.typeof, carry)
    for seed in range(3):
        carry = train_step(*carry, mlp_batch(seed))
        assert jax.tree.map(jax.typeof, carry) == types
    assert train_step._cache_size() == 1


# Unknown extra arguments are accepted, and passed on.


def test_extra_arguments_reach_the_inner_optimizer():
    seen = {}

    def remember(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), remember)
    params = mlp_params()
    tx = sam_optax.sharpness_aware(spy)
    tx.update(
        None,
        (),
        params,
        grad_fn=jax.value_and_grad(mlp_loss),
        batch=mlp_batch(),
        temperature=3.0,
    )
    assert seen["temperature"] == 3.0
    loss, grads = sam_optax.value_and_grad(mlp_loss)(params, mlp_batch())
    np.testing.assert_allclose(seen["value"], loss, rtol=1e-6)
    assert_trees_close(seen["grad"], grads)

    without = sam_optax.sharpness_aware(optax.sgd(0.1))  # takes no extra arguments
    without.update(
        None,
        without.init(params),
        params,
        grad_fn=jax.grad(mlp_loss),
        batch=mlp_batch(),
        temperature=3.0,
    )


# One count per train step, for the inner optimizer's schedule and for rho's.


def test_schedules_count_train_steps():
    counts = []

    def rho(count):
        counts.append(int(count))
        return 0.1

    inner = optax.sgd(lambda count: jnp.where(count < 3, 1.0, 0.0))
    tx = sam_optax.sharpness_aware(inner, rho=rho, ascent_steps=2)
    params, batch = mlp_params(), mlp_batch()
    state = tx.init(params)
    sizes = []
    for _ in range(4):
        updates, state = tx.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
        sizes.append(norm64(updates))
    assert counts == [0, 1, 2, 3]
    assert all(size > 0 for size in sizes[:3]) and sizes[3] == 0


# Wrappers that act on the gradient from outside refuse, with the reason and the form that works.


@pytest.mark.parametrize("given", ["updates", "None"])
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda tx: optax.MultiSteps(tx, 2), "MultiSteps"),
        (lambda tx: optax.apply_if_finite(tx, 3), "apply_if_finite"),
        (lambda tx: optax.masked(tx, {"hidden": True, "out": False}), "masked"),
        (
            lambda tx: optax.partition({"a": tx, "b": optax.sgd(1.0)}, {"hidden": "a", "out": "b"}),
            "masked",
        ),
    ],
)
def test_wrappers_around_refuse_with_the_reason(wrap, name, given):
    params, batch = mlp_params(), mlp_batch()
    grads = jax.grad(mlp_loss)(params, batch) if given == "updates" else None
    plain, outer = (wrap(x) for x in (optax.sgd(0.1), sam_optax.sharpness_aware(optax.sgd(0.1))))
    with pytest.raises(ValueError, match=f"{name}.*value_and_grad"):
        outer.init(params)
    if given == "None" and name in ("MultiSteps", "masked"):
        return  # Optax itself cannot map over None, and would not say why
    with pytest.raises(ValueError, match=f"{name}.*value_and_grad"):
        # The state that the wrapper would have: SAM's is the inner optimizer's.
        outer.update(grads, plain.init(params), params, grad_fn=jax.grad(mlp_loss), batch=batch)


def test_multi_steps_on_the_functional_form_sees_every_micro_batch():
    params = mlp_params()
    batches = [mlp_batch(0), mlp_batch(1)]
    gradient = sam_optax.value_and_grad(mlp_loss)
    outer = optax.MultiSteps(optax.sgd(1.0), 2)
    state = outer.init(params)
    for batch in batches:
        updates, state = outer.update(gradient(params, batch)[1], state, params)
    both = jax.tree.map(lambda a, b: -(a + b) / 2, *(gradient(params, b)[1] for b in batches))
    assert_trees_close(updates, both)


def test_multi_steps_inside_works():
    params, batch = mlp_params(), mlp_batch()
    inside = sam_optax.sharpness_aware(
        optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    )
    state = inside.init(params)
    for _ in range(2):
        updates, state = inside.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
    gradient = sam_optax.value_and_grad(mlp_loss)(params, batch)[1]
    assert_trees_close(updates, jax.tree.map(jnp.negative, gradient))


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("shape", [(), (5, 4)])
@pytest.mark.parametrize("constant", [0.0, 1e-15, 1e25])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_leaf_whose_gradient_is_a_constant_in_jit(size, constant, shape):
    def perturbation(g):
        tree = {"w": g, "constant": jnp.full(shape, constant)}
        return sam_optax.gradient_perturbation(tree, None, 0.1)["w"], unit_and_norm(tree)[1]

    g = size * jnp.arange(1.0, 5)
    expected = norm64({"w": g, "constant": jnp.full(shape, constant)})
    in_a_loop = jax.lax.scan(lambda _, g: (None, perturbation(g)), None, g[None])[1]
    for w, norm in (jax.jit(perturbation)(g), jax.tree.map(lambda x: x[0], in_a_loop)):
        np.testing.assert_allclose(norm, expected, rtol=1e-6)
        np.testing.assert_allclose(w, 0.1 * np.asarray(g, np.float64) / expected, 1e-6, atol=1e-37)


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("shape", [(), (90, 90)])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_an_unused_parameter_whose_gradients_are_added_up(size, shape):
    # XLA finds out that the sum is zero, after it has gone through what is done with it.
    def loss_fn(params, batch):
        return size * jnp.mean(batch @ params["w"])

    params, batch = {"w": jnp.ones(3), "unused": jnp.ones(shape)}, jnp.ones((16, 3))
    options = {"rho": 0.3, "m": 2, "m_sharpness": "foret", "accumulation_steps": 2}
    gradient = jax.jit(sam_optax.value_and_grad(loss_fn, return_info=True, **options))
    _, grads, info = gradient(params, batch)
    np.testing.assert_allclose(grads["w"], size, rtol=1e-6)
    np.testing.assert_allclose(info.ascent_grad_norm, size * np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(info.descent_grad_norm, size * np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(info.cosine, 1, rtol=1e-6)


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("shape", [(), (5, 4)])
@pytest.mark.parametrize("constant", [0.0, 0.01])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_asam_of_a_leaf_whose_gradient_is_a_constant_in_jit(size, constant, shape):
    params = {"w": jnp.arange(1.0, 5), "constant": jnp.full(shape, 2.0)}

    def perturbation(g):
        tree = {"w": g, "constant": jnp.full(shape, size * constant)}
        return sam_optax.adaptive_perturbation(0.1)(tree, params, 0.1)

    found = jax.jit(lambda gs: jax.lax.scan(lambda _, g: (None, perturbation(g)), None, gs)[1])
    expected = {"w": np.arange(1.0, 5), "constant": np.full(shape, constant)}
    scale = {key: np.abs(np.asarray(w, np.float64)) + 0.1 for key, w in params.items()}
    length = norm64({key: scale[key] * g for key, g in expected.items()})
    g = jnp.asarray(size * np.arange(1.0, 5), jnp.float32)
    for key, epsilon in found(g[None]).items():
        np.testing.assert_allclose(
            epsilon[0], 0.1 * scale[key] ** 2 * expected[key] / length, rtol=1e-5
        )


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the XLA of JAX 0.9 does not fuse what a branch widens"
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_norm_reads_the_gradient_once_and_holds_no_array(dtype):
    leaves = [jax.ShapeDtypeStruct((256, 256), dtype)] * 16
    compiled = jax.jit(lambda tree: unit_and_norm(tree)[1]).lower(leaves).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256**2
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    # Neither a wider copy of it, nor a scale as large as a leaf, read with each.
    assert compiled.cost_analysis()["bytes accessed"] < 1.02 * size


@pytest.mark.parametrize("outer", ["checkify", "vmap"])
def test_checkify_and_vmap(outer):
    gradient = sam_optax.value_and_grad(lambda w, x: jnp.mean((x @ w - 1) ** 2), 0.1)
    params, batch = jnp.eye(2, 3), jnp.eye(8, 3)
    of_all = jax.vmap(gradient, in_axes=(0, None))
    if outer == "checkify":
        checked = checkify.checkify(of_all, errors=checkify.all_checks)
    else:
        checked = jax.vmap(checkify.checkify(gradient), in_axes=(0, None))
    errors, result = checked(params, batch)
    errors.throw()
    assert_trees_close(result, of_all(params, batch))


def test_the_step_of_complex_parameters_can_be_differentiated():
    def loss_fn(w, x):
        return jnp.mean(jnp.abs(x @ w - 1) ** 4)

    def by_hand(w):
        g = jnp.conj(jax.grad(loss_fn)(w, x))
        return loss_fn(w + 0.5 * g / jnp.sqrt(jnp.sum(jnp.abs(g) ** 2)), x)

    w = jnp.array([1 + 2j, 0.5 - 1j, -1j])
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 0j
    step = sam_optax.value_and_grad(loss_fn, 0.5, 1.0)
    found = jax.grad(lambda w: step(w, x)[0])(w)
    np.testing.assert_allclose(found, jax.grad(by_hand)(w), rtol=1e-4)

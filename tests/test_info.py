"""The diagnostics: right where they are asked for, absent where not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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


def expected_info(params, batch, rho=0.15):
    m_loss, g_m = jax.value_and_grad(mlp_loss)(params, first(batch, len(batch["x"]) // 4))
    length = norm64(g_m)
    w_adv = jax.tree.map(lambda w, g: w + rho * g / length, params, g_m)
    b_loss, g_b = jax.value_and_grad(mlp_loss)(w_adv, batch)
    inner = sum(
        np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(g_m), jax.tree.leaves(g_b), strict=True)
    )
    return {
        "ascent_loss": m_loss,
        "descent_loss": b_loss,
        "ascent_grad_norm": length,
        "descent_grad_norm": norm64(g_b),
        "cosine": inner / length / norm64(g_b),
        "realised_perturbation": 1.0,
        "skipped_ascents": 0,
        "aux": None,
    }


def assert_info(info, expected):
    for name, value in expected.items():
        actual = getattr(info, name)
        if value is None:
            assert actual is None, name
        else:
            assert jnp.shape(actual) == (), name
            np.testing.assert_allclose(actual, value, rtol=1e-5, err_msg=name)


def test_value_and_grad_tells_all():
    params, batch = mlp_params(), mlp_batch()
    gradient = sam_optax.value_and_grad(mlp_loss, return_info=True)
    loss, grads, info = jax.jit(gradient)(params, batch)
    assert_info(info, expected_info(params, batch))
    assert info.skipped_ascents.dtype == jnp.int32
    plain_loss, plain_grads = sam_optax.value_and_grad(mlp_loss)(params, batch)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)


@pytest.mark.parametrize("with_value", [False, True])
def test_sharpness_aware_tells_all(with_value):
    params, batch = mlp_params(), mlp_batch()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1))
    grad_fn = (jax.value_and_grad if with_value else jax.grad)(mlp_loss)
    call = (None, tx.init(params), params)
    updates, state, info = tx.update(*call, grad_fn=grad_fn, batch=batch, return_info=True)
    expected = expected_info(params, batch)
    if not with_value:
        expected |= {"ascent_loss": None, "descent_loss": None}
    assert_info(info, expected)
    assert_trees_equal((updates, state), tx.update(*call, grad_fn=grad_fn, batch=batch))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_cosine_and_norms_do_not_depend_on_the_scale_of_the_loss(scale):
    def scaled_loss(params, batch):
        return scale * mlp_loss(params, batch)

    params, batch = mlp_params(), mlp_batch()
    *_, info = sam_optax.value_and_grad(scaled_loss, return_info=True)(params, batch)
    expected = expected_info(params, batch)
    for name in ("cosine", "realised_perturbation"):
        np.testing.assert_allclose(getattr(info, name), expected[name], rtol=1e-4, err_msg=name)
    for name in ("ascent_grad_norm", "descent_grad_norm"):
        np.testing.assert_allclose(getattr(info, name), scale * expected[name], rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 3e37, 3e38])
def test_cosine_at_any_scale_and_its_derivative(scale):
    def cosine(w):
        def loss_fn(w, batch):
            return scale * jnp.sum(jnp.sin(w * batch.mean(0)))

        batch = jnp.array([[0.3, 1.0], [0.1, -0.5]])
        return sam_optax.value_and_grad(loss_fn, 0.5, 0.5, return_info=True)(w, batch)[2].cosine

    w = jnp.array([0.4, 1.0])
    value, slope = jax.jit(jax.value_and_grad(cosine))(w)

    def expected(w):  # the same by hand, at scale 1
        ascent = jnp.array([0.3, 1.0]) * jnp.cos(w * jnp.array([0.3, 1.0]))
        at = w + 0.5 * ascent / jnp.linalg.norm(ascent)
        descent = jnp.array([0.2, 0.25]) * jnp.cos(at * jnp.array([0.2, 0.25]))
        return ascent @ descent / jnp.linalg.norm(ascent) / jnp.linalg.norm(descent)

    np.testing.assert_allclose(value, expected(w), rtol=1e-5)
    if 1e-20 <= scale <= 1.0:  # the derivative of the gradient's norm has the range of a square
        np.testing.assert_allclose(slope, jax.grad(expected)(w), rtol=1e-4)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18])
@pytest.mark.parametrize("constant", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(), (300, 300)])
def test_a_gradient_that_is_a_constant_in_jit_leaves_the_cosine_alone(shape, constant, scale):
    # With constants XLA makes squares of scales: an unused parameter, a linear one.
    def loss_fn(params, batch):
        loss = jnp.sum(batch.mean(0) * params["w"] ** 2)
        return scale * (loss + (constant * jnp.sum(params["linear"]) if constant else 0))

    params, batch = {"w": jnp.ones(3), "linear": jnp.ones(shape)}, jnp.ones((8, 3))
    info = jax.jit(sam_optax.value_and_grad(loss_fn, 0.1, return_info=True))(params, batch)[2]
    ascent = norm64([np.full(3, 2.0), np.full(shape, constant)])
    w_adv = 1 + 0.1 * 2 / ascent
    descent = norm64([np.full(3, 2 * w_adv), np.full(shape, constant)])
    inner = 12 * w_adv + np.prod(shape) * constant**2
    np.testing.assert_allclose(info.cosine, inner / ascent / descent, rtol=1e-5)
    np.testing.assert_allclose(info.ascent_grad_norm, scale * ascent, rtol=1e-5)
    np.testing.assert_allclose(info.descent_grad_norm, scale * descent, rtol=1e-5)


def test_cosine_where_the_perturbation_is_not_along_the_gradient():
    params, batch = mlp_params(), mlp_batch()
    grads = jax.grad(mlp_loss)(params, first(batch, len(batch["x"]) // 4))
    for options in ({"perturbation": sam_optax.adaptive_perturbation()}, {"ascent_steps": 3}):
        gradient = sam_optax.value_and_grad(mlp_loss, return_info=True, **options)
        _, descent, info = gradient(params, batch)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(descent), strict=True)
        inner = sum(np.vdot(np.float64(x), np.float64(y)) for x, y in pairs)
        np.testing.assert_allclose(info.cosine, inner / norm64(grads) / norm64(descent), rtol=1e-4)


def test_aux_of_grad_fn_comes_out_or_raises():
    def loss_fn(params, batch):
        return mlp_loss(params, batch), {"n": jnp.int32(batch["x"].shape[0])}

    params, batch = mlp_params(), mlp_batch()
    tx = sam_optax.sharpness_aware(optax.sgd(0.1))
    call = {"grad_fn": jax.value_and_grad(loss_fn, has_aux=True), "batch": batch}
    info = tx.update(None, tx.init(params), params, return_info=True, **call)[2]
    assert info.aux["n"] == 16
    with pytest.raises(ValueError, match="aux.*return_info=True"):
        tx.update(None, tx.init(params), params, **call)


def test_rho_zero_still_tells():
    params, batch = mlp_params(), mlp_batch()
    gradient = sam_optax.value_and_grad(mlp_loss, rho=0.0, return_info=True)
    loss, grads, info = gradient(params, batch)
    assert_trees_equal((loss, grads), jax.value_and_grad(mlp_loss)(params, batch))
    expected = expected_info(params, batch, rho=0.0) | {"realised_perturbation": 0.0}
    assert_info(info, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_cosine_of_a_million_parameters(dtype):
    # So many are held in less precision where they are real, and complex numbers cannot be.
    rng = np.random.default_rng(0)
    phase = 1j if jnp.issubdtype(dtype, jnp.complexfloating) else 1
    target = jnp.asarray(rng.normal(size=1_000_001) * phase, dtype)
    params = jnp.zeros(1_000_001, dtype)

    def loss_fn(w, batch):
        return jnp.sum(batch) * jnp.sum(jnp.square(jnp.abs(w - target)))

    _, _, info = sam_optax.value_and_grad(loss_fn, rho=1.0, return_info=True)(params, jnp.ones(4))
    assert info.cosine == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("m_sharpness", ["paper", "foret"])
def test_groups_tell_means_and_count_skips(m_sharpness):
    params, batch = mlp_params(), mlp_batch(b=32)

    def ascent_loss(params, batch):  # the first group's ascent gradient is NaN
        bad = jnp.any(batch["x"] == first(mlp_batch(b=32), 1)["x"])
        return jnp.where(bad, jnp.nan, 1.0) * mlp_loss(params, batch)

    gradient = sam_optax.value_and_grad(
        mlp_loss, m=4, m_sharpness=m_sharpness, ascent_loss_fn=ascent_loss, return_info=True
    )
    loss, grads, info = jax.jit(gradient)(params, batch)
    assert info.skipped_ascents == 1 and info.skipped_ascents.dtype == jnp.int32
    np.testing.assert_allclose(info.realised_perturbation, 0.75, rtol=1e-5)
    np.testing.assert_allclose(info.descent_loss, loss)
    np.testing.assert_allclose(info.descent_grad_norm, norm64(grads), rtol=1e-5)


def test_masked_leaves_are_not_in_the_ascent_norm():
    params, batch = mlp_params(), mlp_batch()
    gradient = sam_optax.value_and_grad(
        mlp_loss, perturb={"hidden": True, "out": False}, return_info=True
    )
    _, grads, info = gradient(params, batch)
    hidden = jax.grad(mlp_loss)(params, first(batch, 4))["hidden"]
    np.testing.assert_allclose(info.ascent_grad_norm, norm64(hidden), rtol=1e-5)
    np.testing.assert_allclose(info.descent_grad_norm, norm64(grads), rtol=1e-5)
    np.testing.assert_allclose(info.realised_perturbation, 1.0, rtol=1e-5)


def test_what_is_not_asked_for_costs_nothing():
    params, batch = mlp_params(), mlp_batch()

    def flops(**options):
        gradient = jax.jit(sam_optax.value_and_grad(mlp_loss, **options))
        return gradient.lower(params, batch).compile().cost_analysis()["flops"]

    assert flops() < flops(return_info=True)
    state = sam_optax.sharpness_aware(optax.adam(0.1)).init(params)
    assert_trees_equal(state, optax.adam(0.1).init(params))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("n", [999_999, 1_000_000, 1_040_000, 3_000_000])
@pytest.mark.parametrize("kind", ["constant", "signs", "few"])
def test_cosine_of_a_gradient_of_few_different_numbers(n, kind):
    # Kept in bfloat16, all of its elements are rounded in the same direction.
    gradient = {
        "constant": jnp.ones(n),
        "signs": jnp.where(jnp.arange(n) % 3 == 0, -1.0, 1.0),
        "few": (jnp.arange(n) < 15).astype(jnp.float32),
    }[kind]
    value_and_grad = sam_optax.value_and_grad(
        lambda w, x: jnp.vdot(gradient, w) * jnp.mean(x), return_info=True
    )
    cosine = value_and_grad(jnp.zeros(n), jnp.ones(8))[2].cosine
    np.testing.assert_allclose(cosine, 1, rtol=0, atol=5e-6)


def one_part_of_padding():
    x = jnp.arange(1.0, 17.0).reshape(8, 2) / 8
    batch = {"x": x, "weight": jnp.array([1.0, 1, 1, 1, 0, 0, 0, 0])}

    def loss_fn(w, batch):
        squares = (batch["x"] @ w - 1) ** 2
        return jnp.sum(batch["weight"] * squares) / batch["weight"].sum()

    return loss_fn, jnp.ones(2), batch


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_a_part_of_padding_is_not_in_the_means(on_a_mesh):
    loss_fn, w, batch = one_part_of_padding()
    if on_a_mesh:
        axis_types = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("data",), axis_types, devices=jax.devices()[:2])
        groups = {"group_axes": "data", "mesh": mesh}
    else:
        groups = {"m": 2, "m_sharpness": "foret"}
    gradient = sam_optax.value_and_grad(
        loss_fn,
        loss_reduction=lambda batch: batch["weight"].sum(),
        return_info=True,
        **groups,
    )
    *_, info = jax.jit(gradient)(w, batch)
    *_, expected = sam_optax.value_and_grad(loss_fn, return_info=True)(w, first(batch, 4))
    assert_trees_close(info._replace(skipped_ascents=0), expected._replace(skipped_ascents=0))
    assert info.skipped_ascents == 1


def test_ascent_losses_in_bfloat16_are_averaged_in_float32():
    x = jax.random.normal(jax.random.key(0), (512,))

    def loss_fn(w, x):
        return jnp.mean((w * x - 3) ** 2).astype(jnp.bfloat16)

    options = {"ascent_fraction": 0.5, "m": 256, "m_sharpness": "foret", "return_info": True}
    *_, info = sam_optax.value_and_grad(loss_fn, **options)(1.0, x)
    losses = [float(loss_fn(1.0, x[i : i + 1])) for i in range(0, 512, 2)]
    np.testing.assert_allclose(info.ascent_loss, np.mean(losses), rtol=1e-6)
    assert info.ascent_loss.dtype == info.descent_loss.dtype == jnp.float32


def test_asam_counts_as_skipped_what_it_leaves_at_w():
    def info(w):
        asam = sam_optax.adaptive_perturbation(eta=0.0)
        value_and_grad = sam_optax.value_and_grad(
            lambda w, x: jnp.sum(w) * jnp.mean(x), perturbation=asam, return_info=True
        )
        return value_and_grad(jnp.full(4, w), jnp.ones(8))[2]

    assert (info(0.0).skipped_ascents, info(1.0).skipped_ascents) == (1, 0)
    assert info(0.0).realised_perturbation == 0


@pytest.mark.parametrize(
    "options",
    [{"m": 2}, {"m": 4, "m_sharpness": "foret"}, {"accumulation_steps": 1, "ascent_steps": 2}],
)
def test_rho_zero_with_diagnostics_is_the_plain_step_bit_for_bit(options):
    params, batch = mlp_params(), mlp_batch(b=32)
    gradient = sam_optax.value_and_grad(mlp_loss, rho=0, return_info=True, **options)
    *result, info = jax.jit(gradient)(params, batch)
    assert_trees_equal(tuple(result), jax.jit(jax.value_and_grad(mlp_loss))(params, batch))
    assert 0 < info.cosine < 1


def test_the_derivative_of_the_realised_perturbation_where_there_is_none():
    def realised(rho, scale=1.0):
        def loss_fn(w, x):
            return scale * jnp.mean((x @ w - 1) ** 2)

        step = sam_optax.value_and_grad(loss_fn, rho, return_info=True)
        return step(jnp.zeros(3), jnp.eye(3).repeat(4, axis=0))[2].realised_perturbation

    assert jax.grad(realised)(0.0) == 0
    assert jnp.isfinite(jax.grad(realised)(0.1, 0.0))


def test_numbers_of_python_at_rho_0():
    """Where w_adv is w, as it was given."""
    step = sam_optax.value_and_grad(lambda w, x: jnp.mean((w * x) ** 2), rho=0.0, return_info=True)
    _, grad, info = step(2.0, jnp.ones(8))
    assert grad == 4 and info.realised_perturbation == 0 and info.cosine == 1


@pytest.mark.parametrize("traced", [False, True])
def test_at_rho_0_no_ascent_is_skipped(traced):
    def info(rho):
        asam = sam_optax.adaptive_perturbation()
        step = sam_optax.value_and_grad(mlp_loss, rho, perturbation=asam, return_info=True)
        return step(mlp_params(), mlp_batch())[2]

    assert (jax.jit(info)(0.0) if traced else info(0.0)).skipped_ascents == 0


def square(w, x):
    return jnp.sum(w * w) * jnp.mean(x)


@pytest.mark.parametrize("perturbation", [None, sam_optax.gradient_perturbation])
def test_a_perturbation_that_is_rounded_away_is_not_skipped(perturbation):
    options = {"adversarial_dtype": "bfloat16", "perturbation": perturbation}
    step = sam_optax.value_and_grad(square, 1e-4, return_info=True, **options)
    info = step(jnp.ones(4), jnp.ones(8))[2]
    assert info.realised_perturbation == 0 and info.skipped_ascents == 0


def test_realised_perturbation_of_float32_parameters_in_bfloat16():
    def loss_fn(w, x):
        return square(w, x), w

    @jax.jit
    def step(rho):
        gradient = sam_optax.value_and_grad(
            loss_fn, rho, adversarial_dtype="bfloat16", has_aux=True, return_info=True
        )
        return gradient(w, jnp.ones(8))

    w = jnp.full(64, 1.001)
    (_, w_adv), _, info = step(0.1)
    moved = np.linalg.norm(np.float64(w_adv) - np.float64(w))
    np.testing.assert_allclose(info.realised_perturbation, moved / 0.1, rtol=1e-5)
    assert step(0.0)[2].realised_perturbation == 0


def test_info_of_a_batch_of_padding():
    def loss_fn(w, batch):
        return jnp.sum(batch["weight"] * (w * batch["x"]) ** 2) / batch["weight"].sum()

    options = {
        "m": 2,
        "m_sharpness": "foret",
        "loss_reduction": lambda batch: batch["weight"].sum(),
    }
    step = sam_optax.value_and_grad(loss_fn, return_info=True, **options)
    info = step(jnp.float32(1), {"x": jnp.ones(8), "weight": jnp.zeros(8)})[2]
    assert info.ascent_loss == info.cosine == info.ascent_grad_norm == 0


@pytest.mark.parametrize(("ascent", "descent"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_cosine_is_0_where_one_of_the_two_has_no_gradient(ascent, descent):
    def cosine(w):
        step = sam_optax.value_and_grad(
            lambda w, x: descent * square(w, x),
            ascent_loss_fn=lambda w, x: ascent * square(w, x),
            return_info=True,
        )
        return step(w, jnp.ones(8))[2].cosine

    value, derivative = jax.value_and_grad(cosine)(jnp.ones(2))
    assert value == 0 and jnp.isfinite(derivative).all()


def test_a_rho_that_is_no_integer_of_jax():
    gradient = sam_optax.value_and_grad(lambda w, x: jnp.sum(x @ w), rho=2**31, return_info=True)
    _, _, info = gradient(jnp.ones(4), jnp.ones((8, 4)))
    np.testing.assert_allclose(info.realised_perturbation, 1.0, rtol=1e-5)

"""The ways of computing the perturbation: SAM, ASAM, masks, several steps, one's own."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    assert_trees_close,
    assert_trees_equal,
    mlp_batch,
    mlp_loss,
    mlp_params,
    norm64,
)

import sam_optax
from sam_optax._perturbation import move


def w_adv_of(loss_fn, params, batch, **options):
    def with_params(params, batch):
        return loss_fn(params, batch), params

    (_, w_adv), _ = sam_optax.value_and_grad(with_params, has_aux=True, **options)(params, batch)
    return w_adv


def test_asam_against_the_formula():
    params, batch = mlp_params(), mlp_batch()
    g = jax.grad(mlp_loss)(params, batch)
    eta, rho = 0.01, 0.5
    scaled = jax.tree.map(lambda w, g: (np.abs(w, dtype=np.float64) + eta) * g, params, g)
    length = norm64(scaled)
    expected = jax.tree.map(
        lambda w, g: w + rho * (np.abs(w, dtype=np.float64) + eta) ** 2 * g / length, params, g
    )
    options = {"rho": rho, "ascent_fraction": 1.0}
    w_adv = w_adv_of(
        mlp_loss, params, batch, perturbation=sam_optax.adaptive_perturbation(eta), **options
    )
    assert_trees_close(w_adv, expected)


@pytest.mark.parametrize("factor", [0.1, 32.0])
def test_asam_does_not_see_the_scale_of_layers(factor):
    def loss_fn(params, x):
        return jnp.mean(jnp.square(jax.nn.relu(x @ params["a"]) @ params["b"] - 1))

    rng = np.random.default_rng(0)
    a, b, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(5, 7), (7, 3), (16, 5)])
    asam = sam_optax.adaptive_perturbation(eta=0.0)

    def adversarial_loss(params):
        return sam_optax.value_and_grad(loss_fn, rho=0.3, perturbation=asam)(params, x)[0]

    same_network = {"a": a * factor, "b": b / factor}
    np.testing.assert_allclose(
        adversarial_loss(same_network), adversarial_loss({"a": a, "b": b}), rtol=1e-5
    )
    sam = sam_optax.value_and_grad(loss_fn, rho=0.3)
    assert abs(sam(same_network, x)[0] / sam({"a": a, "b": b}, x)[0] - 1) > 0.01


def test_asam_moves_zero_bfloat16_weights_by_eta():
    w = jnp.array([0.0, 8.0], jnp.bfloat16)
    eps = sam_optax.adaptive_perturbation(0.01)([jnp.ones(2, jnp.bfloat16)], [w], 1.0)[0]
    t = np.array([0.01, 8.01])
    np.testing.assert_allclose(eps, t**2 / np.linalg.norm(t), rtol=1e-5)


def test_eta_is_a_hundredth_by_default():
    g, w = [jnp.array([3.0, 1.0])], [jnp.array([1.0, -4.0])]
    default, stated = (
        make(g, w, 0.5)
        for make in (sam_optax.adaptive_perturbation(), sam_optax.adaptive_perturbation(0.01))
    )
    np.testing.assert_array_equal(default[0], stated[0])


@pytest.mark.parametrize(
    ("eta", "error", "message"),
    [
        (-0.1, ValueError, "eta=-0.1"),
        (float("nan"), ValueError, "eta=nan"),
        ("0.1", TypeError, "eta='0.1'"),
        (None, TypeError, "eta=None"),
    ],
)
def test_bad_eta(eta, error, message):
    with pytest.raises(error, match=message):
        sam_optax.adaptive_perturbation(eta)


@pytest.mark.parametrize(
    "perturb",
    [
        lambda path: path.startswith("hidden/"),
        lambda path: path != "out/kernel",
        {"hidden": True, "out": False},
        {"hidden": {"kernel": True, "bias": True}, "out": {"kernel": False}},
    ],
)
@pytest.mark.parametrize("asam", [False, True])
def test_perturb_a_part_of_the_parameters(perturb, asam):
    params, batch = mlp_params(), mlp_batch()
    options = {"perturbation": sam_optax.adaptive_perturbation()} if asam else {}
    w_adv = w_adv_of(mlp_loss, params, batch, perturb=perturb, **options)
    np.testing.assert_array_equal(w_adv["out"]["kernel"], params["out"]["kernel"])

    def only_hidden(hidden, batch):
        return mlp_loss(params | {"hidden": hidden}, batch)

    assert_trees_close(
        w_adv["hidden"], w_adv_of(only_hidden, params["hidden"], batch, **options), rtol=1e-6
    )


def test_gradients_of_masked_leaves_are_still_returned():
    params, batch = mlp_params(), mlp_batch()
    perturb = {"hidden": True, "out": False}
    w_adv = w_adv_of(mlp_loss, params, batch, perturb=perturb)
    gradient = sam_optax.value_and_grad(mlp_loss, perturb=perturb)
    assert_trees_close(gradient(params, batch), jax.value_and_grad(mlp_loss)(w_adv, batch))


@pytest.mark.parametrize(
    ("perturb", "error", "message"),
    [
        (lambda path: None, TypeError, r"perturb\(path\) must return a bool.*None.*'hidden/bias'"),
        (lambda path: "typo" in path, ValueError, "selects none.*'hidden/bias', 'hidden/kernel'"),
        ({"hidden": True}, ValueError, "does not fit the parameters"),
        ({"hidden": True, "out": {"kernel": False, "bias": True}}, ValueError, "does not fit"),
        ({"hidden": 1, "out": False}, TypeError, r"\['hidden'\] it holds 1\.$"),
        ({"hidden": np.True_, "out": False}, TypeError, r"holds np.True_\..*Python bool"),
        (lambda path: jnp.array(True), TypeError, r"returned Array\(True.*Python bool"),
        ("hidden", TypeError, "predicate on paths or a tree of bools.*'hidden'"),
        (False, ValueError, "selects none.*give static_args"),
    ],
)
def test_bad_masks(perturb, error, message):
    with pytest.raises(error, match=message):
        sam_optax.value_and_grad(mlp_loss, perturb=perturb)(mlp_params(), mlp_batch())


@pytest.mark.parametrize("perturb", [3, "w", {"w": 1}])
def test_what_is_no_mask_of_any_parameters(perturb):
    with pytest.raises(TypeError, match="perturb must be a predicate on paths or a tree of bools"):
        sam_optax.sharpness_aware(perturb=perturb)


def test_several_steps_stay_in_the_ball_and_start_from_w():
    params, batch = mlp_params(), mlp_batch()
    w_adv = w_adv_of(mlp_loss, params, batch, rho=0.6, ascent_steps=3, ascent_fraction=1.0)
    expected = params
    for _ in range(3):
        g = jax.grad(mlp_loss)(expected, batch)
        length = optax.tree.norm(g)
        expected = jax.tree.map(lambda w, g, n=length: w + 0.2 * g / n, expected, g)
    assert_trees_close(w_adv, expected)
    assert norm64(jax.tree.map(jnp.subtract, w_adv, params)) < 0.6


def test_a_perturbation_of_ones_own():
    def sign(grads, params, rho):
        return jax.tree.map(lambda g: rho * jnp.sign(g), grads)

    params, batch = mlp_params(), mlp_batch()
    w_adv = w_adv_of(mlp_loss, params, batch, perturbation=sign, ascent_fraction=1.0)
    g = jax.grad(mlp_loss)(params, batch)
    assert_trees_close(w_adv, jax.tree.map(lambda w, g: w + 0.15 * jnp.sign(g), params, g))


def test_a_perturbation_that_is_falsy():
    class BySign(NamedTuple):  # a tuple without entries
        def __call__(self, grads, params, rho):
            return jax.tree.map(lambda g: rho * jnp.sign(g), grads)

    def loss_fn(w, x):
        return jnp.sum(x @ w**2)

    w, x = jnp.array([1.0, -2.0]), jnp.ones((4, 2))
    w_adv = w_adv_of(loss_fn, w, x, rho=0.5, perturbation=BySign())
    assert_trees_close(w_adv, jnp.array([1.5, -2.5]))


def test_a_narrow_perturbation_does_not_narrow_the_adversarial_point():
    def sign(grads, params, rho):
        return jax.tree.map(lambda g: (rho * jnp.sign(g)).astype(jnp.bfloat16), grads)

    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mlp_params())
    w_adv = w_adv_of(mlp_loss, params, mlp_batch(), perturbation=sign, rho=2.0**-12)
    moved = jax.tree.map(lambda v, w: v - w.astype(jnp.float32), w_adv, params)
    assert all((jnp.abs(x) == 2.0**-12).all() for x in jax.tree.leaves(moved))


@pytest.mark.parametrize(("g", "w"), [(1e37, 100.0), (1e-37, 1e-3)])
def test_asam_where_the_scaled_gradient_is_no_number(g, w):
    # T * g over- or underflows; the direction is that of g all the same.
    grads, params = {"w": jnp.full(4, g)}, {"w": jnp.full(4, w)}
    epsilon = sam_optax.adaptive_perturbation(eta=0.0)(grads, params, 0.1)["w"]
    np.testing.assert_allclose(epsilon, 0.1 * w * 0.5, rtol=1e-6)


@pytest.mark.parametrize(("g", "rho"), [(0.0, 0.1), (np.nan, 0.1), (2.0, 0.0), (-2.0, -0.0)])
@pytest.mark.parametrize(
    ("perturbation", "dtype"),
    [
        (sam_optax.gradient_perturbation, jnp.bfloat16),
        (sam_optax.gradient_perturbation, jnp.complex64),
        (sam_optax.adaptive_perturbation(), jnp.float32),
    ],
    ids=["SAM", "SAM complex", "ASAM"],
)
def test_no_perturbation_is_minus_zero(perturbation, dtype, g, rho):
    epsilon = np.asarray(perturbation(jnp.full(3, g, dtype), jnp.ones(3, dtype), rho))
    assert (epsilon == 0).all() and np.signbit(epsilon.real).all()
    assert not np.iscomplexobj(epsilon) or np.signbit(epsilon.imag).all()


@pytest.mark.parametrize(
    "perturbation", [sam_optax.gradient_perturbation, sam_optax.adaptive_perturbation()]
)
def test_a_wide_rho_does_not_widen_the_perturbation(perturbation):
    with jax.enable_x64(True):
        w = jnp.ones(3, jnp.float32)
        assert perturbation(w, w, np.float64(0.1)).dtype == jnp.float32


def test_the_derivative_of_a_jitted_perturbation_where_promotion_is_strict():
    def w_adv(rho, params):
        return move(params, sam_optax.gradient_perturbation(params, None, rho))

    with jax.enable_x64(True):
        params = {
            "complex": jnp.array([1 + 2j, 3], "complex64"),
            "double": jnp.array([1.0, 2.0], "float64"),
            "half": jnp.array([0.5], "bfloat16"),
        }
        at = (jnp.float32(0.1), params)
        expected = jax.jvp(jax.jit(w_adv), at, at)
        with jax.numpy_dtype_promotion("strict"):
            assert_trees_equal(jax.jvp(jax.jit(w_adv), at, at), expected)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A model that is a pytree and can be called, as Equinox's are."""

    w: Any
    b: Any

    def __call__(self, x):
        return x @ self.w + self.b


def test_a_mask_that_can_be_called_as_the_model_can():
    def loss_fn(model, x):
        return jnp.mean(model(x) ** 2)

    def is_w(path):
        return path == "w"

    model, x = Model(jnp.array([1.0, 2.0]), jnp.array(3.0)), jnp.arange(8.0).reshape(4, 2)
    by_path, *others = (
        sam_optax.value_and_grad(loss_fn, perturb=perturb, return_info=True)(model, x)
        for perturb in (is_w, jax.tree_util.Partial(is_w), Model(True, False))
    )
    for other in others:
        assert_trees_equal(other, by_path)


def test_several_steps_of_asam_are_scaled_by_the_parameters():
    def loss_fn(w, x):
        return jnp.sum(w**2) * jnp.mean(x)

    w, asam = jnp.array([1.0, -2.0]), sam_optax.adaptive_perturbation(0.0)
    found = w_adv_of(loss_fn, w, jnp.ones(4), rho=2.0, ascent_steps=2, perturbation=asam)
    scale, point = np.abs(np.float64(w)), np.float64(w)
    for _ in range(2):
        g = 2 * point
        point = point + scale**2 * g / np.linalg.norm(scale * g)
    np.testing.assert_allclose(found, point, rtol=1e-5)


def test_several_steps_in_bfloat16_add_up():
    # Each step's 0.0015 is rounded away on its own; together they reach the next number.
    options = {"rho": 0.012, "ascent_steps": 4, "adversarial_dtype": "bfloat16"}
    found = w_adv_of(lambda w, x: jnp.sum(w) * jnp.mean(x), jnp.ones(4), jnp.ones(8), **options)
    np.testing.assert_array_equal(np.float32(found), np.float32(jnp.bfloat16(1.006)))
    assert found[0] > 1


def test_several_steps_of_a_part_of_the_parameters():
    params, batch = mlp_params(), mlp_batch()

    def of_hidden(hidden, batch):
        return mlp_loss(params | {"hidden": hidden}, batch)

    perturb = {"hidden": True, "out": False}
    found = w_adv_of(mlp_loss, params, batch, ascent_steps=2, perturb=perturb)
    expected = w_adv_of(of_hidden, params["hidden"], batch, ascent_steps=2)
    assert_trees_close(found["hidden"], expected)


def test_adversarial_dtype_leaves_complex_parameters_complex():
    def loss_fn(params, x):
        return jnp.mean(jnp.abs(x * params["c"][None]) ** 2) + jnp.sum(params["w"] ** 2)

    params = {"c": jnp.array([1 + 2j]), "w": jnp.ones(2)}
    w_adv = w_adv_of(loss_fn, params, jnp.ones((4, 1)), adversarial_dtype="bfloat16")
    assert (w_adv["c"].dtype, w_adv["w"].dtype) == (jnp.complex64, jnp.bfloat16)


def test_a_wide_perturbation_does_not_widen_the_adversarial_point():
    def wide(grads, params, rho):
        return (rho * grads).astype("float64")

    with jax.enable_x64(True):
        w, x = jnp.ones(2, "float32"), jnp.ones(4, "float32")
        w_adv = w_adv_of(lambda w, x: jnp.sum(w * w) * jnp.mean(x), w, x, perturbation=wide)
    assert w_adv.dtype == jnp.float32

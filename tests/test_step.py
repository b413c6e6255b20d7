"""The step computes Algorithm 1: by hand, in NumPy, and against other writings of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from problems import (
    assert_trees_close,
    assert_trees_equal,
    examples_last,
    first,
    mlp_batch,
    mlp_loss,
    mlp_params,
)

import sam_optax


def test_one_step_by_hand_on_a_quadratic():
    # L(w) = 1/2 w.A w - c.w over a batch of one; A = diag(2, 8), w = (2, 0.5), c = (1, 0).
    # grad at w is (3, 4), of norm 5. With rho = 0.5: w_adv = (2.3, 0.9), grad there (3.6, 7.2).
    a, c = jnp.array([2.0, 8.0]), jnp.array([[1.0, 0.0]])
    w = jnp.array([2.0, 0.5])

    def loss_fn(w, c):
        return jnp.mean(0.5 * jnp.sum(a * w * w) - c @ w)

    loss, grads = sam_optax.value_and_grad(loss_fn, rho=0.5)(w, c)
    np.testing.assert_allclose(grads, [3.6, 7.2], rtol=1e-6)
    np.testing.assert_allclose(loss, 0.5 * (2 * 2.3**2 + 8 * 0.9**2) - 2.3, rtol=1e-6)

    tx = sam_optax.sharpness_aware(optax.sgd(0.1), rho=0.5)
    updates, _ = tx.update(None, tx.init(w), w, grad_fn=jax.grad(loss_fn), batch=c)
    np.testing.assert_allclose(optax.apply_updates(w, updates), [1.64, -0.22], rtol=1e-6)


def numpy_gradient(w, x, y):
    """Backpropagation of `mlp_loss` in float64, written out."""
    hidden = np.tanh(x @ w["k1"] + w["b1"])
    error = 2 * (hidden @ w["k2"] - y) / y.size
    back = (error @ w["k2"].T) * (1 - hidden**2)
    return {"k1": x.T @ back, "b1": back.sum(0), "k2": hidden.T @ error}


def numpy_efficient_sam(w, batches, *, rho, fraction, lr, momentum):
    """Algorithm 1 with heavy-ball momentum, in float64, from the paper's text alone."""
    velocity = {k: np.zeros_like(v) for k, v in w.items()}
    for x, y in batches:
        a = int(len(x) * fraction)
        g = numpy_gradient(w, x[:a], y[:a])
        length = np.sqrt(sum((v**2).sum() for v in g.values()))
        w_adv = {k: w[k] + rho * g[k] / length for k in w}
        g = numpy_gradient(w_adv, x, y)
        velocity = {k: momentum * velocity[k] + g[k] for k in w}
        w = {k: w[k] - lr * velocity[k] for k in w}
    return w


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("form", ["value_and_grad", "sharpness_aware"])
def test_twenty_steps_agree_with_numpy_in_float64(form, fraction):
    params = mlp_params()
    batches = [mlp_batch(seed) for seed in range(20)]
    as64 = {
        "k1": np.asarray(params["hidden"]["kernel"], np.float64),
        "b1": np.asarray(params["hidden"]["bias"], np.float64),
        "k2": np.asarray(params["out"]["kernel"], np.float64),
    }
    expected = numpy_efficient_sam(
        as64,
        [(np.asarray(b["x"], np.float64), np.asarray(b["y"], np.float64)) for b in batches],
        rho=0.15,
        fraction=fraction,
        lr=0.1,
        momentum=0.9,
    )

    inner = optax.sgd(0.1, momentum=0.9)
    if form == "sharpness_aware":
        tx = sam_optax.sharpness_aware(inner, rho=0.15, ascent_fraction=fraction)

        def update(params, state, batch):
            return tx.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
    else:
        tx = inner
        gradient = sam_optax.value_and_grad(mlp_loss, rho=0.15, ascent_fraction=fraction)

        def update(params, state, batch):
            return tx.update(gradient(params, batch)[1], state, params)

    @jax.jit
    def train_step(params, state, batch):
        updates, state = update(params, state, batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches:
        params, state = train_step(params, state, batch)
    # 20 steps of float32 rounding, about 1e-7 each.
    np.testing.assert_allclose(params["hidden"]["kernel"], expected["k1"], rtol=0, atol=3e-6)
    np.testing.assert_allclose(params["hidden"]["bias"], expected["b1"], rtol=0, atol=3e-6)
    np.testing.assert_allclose(params["out"]["kernel"], expected["k2"], rtol=0, atol=3e-6)
    assert train_step._cache_size() == 1


def optax_sam(inner, rho, sync_period=2):
    return optax.contrib.sam(
        inner,
        optax.chain(optax.contrib.normalize(), optax.sgd(rho)),
        sync_period=sync_period,
        opaque_mode=True,
    )


@pytest.mark.parametrize("how", ["updates", "as theirs", "batch", "closure"])
def test_full_batch_equals_optax_contrib_sam(how):
    theirs = optax_sam(optax.adam(0.01), 0.1)
    ours = sam_optax.sharpness_aware(optax.adam(0.01), rho=0.1, ascent_fraction=1.0)
    p_theirs = p_ours = mlp_params()
    s_theirs, s_ours = theirs.init(p_theirs), ours.init(p_ours)
    for seed in range(5):
        batch = mlp_batch(seed)
        gradient = jax.grad(mlp_loss)
        u, s_theirs = theirs.update(
            gradient(p_theirs, batch), s_theirs, p_theirs, grad_fn=lambda p, _: gradient(p, batch)
        )
        p_theirs = optax.apply_updates(p_theirs, u)
        if how == "updates":
            call = {"updates": gradient(p_ours, batch), "grad_fn": lambda p: gradient(p, batch)}
        elif how == "as theirs":  # the loop written for theirs moves over in one line
            call = {"updates": gradient(p_ours, batch), "grad_fn": lambda p, _: gradient(p, batch)}
        elif how == "batch":
            call = {"updates": None, "grad_fn": gradient, "batch": batch}
        else:
            call = {"updates": None, "grad_fn": lambda p: gradient(p, batch)}
        u, s_ours = ours.update(state=s_ours, params=p_ours, **call)
        p_ours = optax.apply_updates(p_ours, u)
    assert_trees_close(p_ours, p_theirs, rtol=1e-5, atol=1e-6)


def test_given_updates_are_the_ascent_gradient():
    params, batch = mlp_params(), mlp_batch()
    other = jax.tree.map(jnp.ones_like, params)
    tx = sam_optax.sharpness_aware(optax.sgd(1.0), rho=0.3)
    updates, _ = tx.update(other, tx.init(params), params, grad_fn=jax.grad(mlp_loss), batch=batch)
    length = np.sqrt(sum(x.size for x in jax.tree.leaves(params)))
    w_adv = jax.tree.map(lambda w: w + 0.3 / length, params)
    assert_trees_close(jax.tree.map(jnp.negative, updates), jax.grad(mlp_loss)(w_adv, batch))
    of_its_own = jax.grad(lambda params: mlp_loss(params, batch))
    without_batch, _ = tx.update(other, tx.init(params), params, grad_fn=of_its_own)
    assert_trees_close(without_batch, updates)


@pytest.mark.parametrize("as_schedule", [False, True])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(as_schedule):
    inner = optax.adamw(0.01)
    sam = sam_optax.sharpness_aware(inner, rho=(lambda _: 0.0) if as_schedule else 0.0)

    @jax.jit
    def plain_step(params, state, batch):
        updates, state = inner.update(jax.grad(mlp_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def sam_step(params, state, batch):
        updates, state = sam.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
        return optax.apply_updates(params, updates), state

    plain, with_sam = mlp_params(), mlp_params()
    plain_state, sam_state = inner.init(plain), sam.init(with_sam)
    for seed in range(5):
        plain, plain_state = plain_step(plain, plain_state, mlp_batch(seed))
        with_sam, sam_state = sam_step(with_sam, sam_state, mlp_batch(seed))
    assert_trees_equal(with_sam, plain)
    assert_trees_equal(sam_state.inner_state if as_schedule else sam_state, plain_state)


def test_rho_zero_takes_one_pass():
    passes = []

    def loss_fn(params, batch):
        passes.append(len(batch["x"]))
        return mlp_loss(params, batch)

    sam_optax.value_and_grad(loss_fn, rho=jnp.float32(0))(mlp_params(), mlp_batch())
    assert passes == [16]


def test_traced_rho_of_zero_stays_at_w():
    params, batch = mlp_params(), mlp_batch()
    step = jax.jit(lambda rho: sam_optax.value_and_grad(mlp_loss, rho=rho)(params, batch))
    loss, grads = step(jnp.float32(0.0))
    plain_loss, plain_grads = jax.jit(lambda: jax.value_and_grad(mlp_loss)(params, batch))()
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    assert_trees_close(grads, plain_grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_the_ascent_does_not_depend_on_the_scale_of_its_loss(scale):
    params, batch = mlp_params(), mlp_batch()
    expected = sam_optax.value_and_grad(mlp_loss)(params, batch)
    scaled = sam_optax.value_and_grad(mlp_loss, ascent_loss_fn=lambda p, b: scale * mlp_loss(p, b))(
        params, batch
    )
    assert_trees_close(scaled, expected, rtol=1e-5)


def test_quarter_of_the_batch_is_the_first_quarter():
    params, batch = mlp_params(), mlp_batch(b=16)
    g = jax.grad(mlp_loss)(params, first(batch, 4))
    length = optax.tree.norm(g)
    w_adv = jax.tree.map(lambda w, g: w + 0.15 * g / length, params, g)
    expected = jax.value_and_grad(mlp_loss)(w_adv, batch)
    assert_trees_close(sam_optax.value_and_grad(mlp_loss)(params, batch), expected)


def test_ascent_steps_equal_optax_contrib_sam_with_a_longer_period():
    # optax takes sync_period - 1 steps of length rho; ours take rho altogether.
    params, batch = mlp_params(), mlp_batch()
    gradient = jax.grad(mlp_loss)
    theirs = optax_sam(optax.sgd(1.0), 0.05, sync_period=4)
    expected, _ = theirs.update(
        gradient(params, batch),
        theirs.init(params),
        params,
        grad_fn=lambda p, _: gradient(p, batch),
    )
    ours = sam_optax.sharpness_aware(optax.sgd(1.0), rho=0.15, ascent_fraction=1.0, ascent_steps=3)
    updates, _ = ours.update(None, ours.init(params), params, grad_fn=gradient, batch=batch)
    assert_trees_close(updates, expected)
    one = sam_optax.sharpness_aware(optax.sgd(1.0), rho=0.15, ascent_fraction=1.0)
    different, _ = one.update(None, one.init(params), params, grad_fn=gradient, batch=batch)
    assert abs(different["out"]["kernel"] - updates["out"]["kernel"]).max() > 1e-4


def test_a_grad_fn_written_for_optax_contrib_sam_is_told_the_point():
    params, batches = mlp_params(), [mlp_batch(seed) for seed in range(3)]
    gradient = jax.grad(mlp_loss)
    asked = []

    def grad_fn(params, i):
        asked.append(i)
        return gradient(params, batches[i])

    theirs = optax_sam(optax.sgd(1.0), 0.05, sync_period=4)
    ours = sam_optax.sharpness_aware(optax.sgd(1.0), rho=0.15, ascent_steps=3)
    first = gradient(params, mlp_batch(9))
    expected, _ = theirs.update(
        first,
        theirs.init(params),
        params,
        grad_fn=jax.grad(
            lambda params, i: mlp_loss(params, jax.tree.map(lambda *x: jnp.stack(x)[i], *batches))
        ),
    )
    updates, _ = ours.update(first, ours.init(params), params, grad_fn=grad_fn)
    assert asked == [0, 1, 2]
    assert_trees_close(updates, expected)


def test_a_forgotten_batch_is_no_number_of_a_point():
    tx = sam_optax.sharpness_aware(optax.sgd(1.0), rho=0.1)
    w = jnp.ones(3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'batch'"):
        tx.update(w, tx.init(w), w, grad_fn=jax.grad(lambda w, batch: jnp.sum((w - batch) ** 2)))


def test_extra_arguments_and_aux_pass_through():
    params, batch = mlp_params(), mlp_batch()
    keys = []

    def loss_fn(params, batch, key, *, scale):
        keys.append(key)
        noise = jax.random.bernoulli(key, 0.5, batch["x"].shape[1:]).astype(jnp.float32)
        x = batch["x"] * noise[None]
        loss = scale * mlp_loss(params, batch | {"x": x})
        return loss, {"n": jnp.int32(x.shape[0]), "loss": loss}

    key = jax.random.key(3)
    (loss, aux), grads = sam_optax.value_and_grad(loss_fn, has_aux=True)(
        params, batch, key, scale=2.0
    )
    assert aux["n"] == 16  # the descent pass, on the whole batch
    assert aux["loss"] == loss
    assert len(keys) == 2 and all(
        (jax.random.key_data(k) == jax.random.key_data(key)).all() for k in keys
    )
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_inputs_and_labels_as_separate_arguments():
    params, batch = mlp_params(), mlp_batch()
    expected = sam_optax.value_and_grad(mlp_loss)(params, batch)

    def loss_fn(params, x, temperature, y):
        return temperature * mlp_loss(params, {"x": x, "y": y})

    result = sam_optax.value_and_grad(loss_fn, batch_argnums=(1, 3))(
        params, batch["x"], 1.0, batch["y"]
    )
    assert_trees_close(result, expected)


SETTINGS = [{"rho": 0}, {}, {"m": 4, "m_sharpness": "foret"}, {"accumulation_steps": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_parameters_that_are_not_the_first_argument(settings):
    params, batch = mlp_params(), mlp_batch()

    def loss_fn(model, config, batch, scale, params, *, power):
        return scale**power * model(params, batch), {"config": scale}

    settings = {"has_aux": True, "return_info": True, **settings}
    expected = sam_optax.value_and_grad(
        lambda params, batch: (4 * mlp_loss(params, batch), {"config": 2.0}), **settings
    )(params, batch)
    gradient = sam_optax.value_and_grad(loss_fn, argnums=4, batch_argnums=2, **settings)
    result = gradient(mlp_loss, object(), batch, 2.0, params, power=2)
    assert_trees_equal(result, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_gradient_by_several_arguments(settings):
    params, batch = mlp_params(), mlp_batch()
    hidden, out = params["hidden"], params["out"]

    def loss_of_two(hidden, batch, out):
        return mlp_loss({"hidden": hidden, "out": out}, batch)

    def loss_of_one(params, batch):
        return loss_of_two(params[0], batch, params[1])

    expected = sam_optax.value_and_grad(loss_of_one, **settings)((hidden, out), batch)
    for argnums in ((0, 2), [0, np.int32(2)]):
        gradient = sam_optax.value_and_grad(
            loss_of_two, argnums=argnums, batch_argnums=1, **settings
        )
        assert_trees_equal(gradient(hidden, batch, out), expected)
    if settings == {"rho": 0}:
        assert_trees_equal(expected, jax.value_and_grad(loss_of_two, (0, 2))(hidden, batch, out))
    gradient = sam_optax.value_and_grad(loss_of_two, argnums=(2, 0), batch_argnums=1, **settings)
    assert_trees_close(gradient(hidden, batch, out), (expected[0], expected[1][::-1]))


def test_a_gradient_by_one_argument_of_a_tuple():
    params, batch = mlp_params(), mlp_batch()
    loss, grads = sam_optax.value_and_grad(mlp_loss)(params, batch)
    assert_trees_equal(
        sam_optax.value_and_grad(mlp_loss, argnums=(0,))(params, batch), (loss, (grads,))
    )


def test_a_batch_before_the_parameters():
    params, batch = mlp_params(), mlp_batch()
    swapped = sam_optax.value_and_grad(
        lambda batch, params: mlp_loss(params, batch), argnums=1, batch_argnums=0
    )
    assert_trees_equal(swapped(batch, params), sam_optax.value_and_grad(mlp_loss)(params, batch))


def test_paths_of_several_arguments_begin_with_their_place():
    params, batch = mlp_params(), mlp_batch()
    hidden, out = params["hidden"], params["out"]

    def loss_of_two(out, hidden, batch):
        return mlp_loss({"hidden": hidden, "out": out}, batch)

    gradient = sam_optax.value_and_grad(
        loss_of_two, argnums=(1, 0), batch_argnums=2, perturb=lambda path: path.startswith("0/")
    )
    expected = sam_optax.value_and_grad(mlp_loss, perturb={"hidden": True, "out": False})
    loss, grads = expected(params, batch)
    assert_trees_close(gradient(out, hidden, batch), (loss, (grads["hidden"], grads["out"])))


def test_parameters_that_are_not_given_by_position():
    params, batch = mlp_params(), mlp_batch()
    gradient = sam_optax.value_and_grad(
        lambda _, batch, params: mlp_loss(params, batch), argnums=2, batch_argnums=1
    )
    with pytest.raises(TypeError, match=r"parameters .* argument 2 \(argnums=\(2,\)\).*'params'"):
        gradient(None, batch, params=params)


def test_an_argument_of_the_loss_that_is_called_as_ours():
    params, batch = mlp_params(), mlp_batch()

    def loss_fn(adapters, batch, params):
        return mlp_loss(jax.tree.map(jnp.add, params, adapters), batch)

    zeros = jax.tree.map(jnp.zeros_like, params)
    result = sam_optax.value_and_grad(loss_fn)(zeros, batch, params=params)
    assert_trees_close(result, sam_optax.value_and_grad(loss_fn)(zeros, batch, params))


def test_an_ascent_loss_of_its_own():
    params, batch = mlp_params(), mlp_batch()

    def ascent_loss(params, batch):
        return -mlp_loss(params, batch)

    w_down = sam_optax.value_and_grad(mlp_loss, ascent_loss_fn=ascent_loss)(params, batch)[0]
    w_up = sam_optax.value_and_grad(mlp_loss)(params, batch)[0]
    assert w_down < mlp_loss(params, batch) < w_up


def test_complex_parameters_ascend():
    def loss_fn(w, x):
        return jnp.mean(jnp.abs(x * w[None] - (1 + 2j)) ** 2)

    w, x = jnp.array([0.3 - 0.2j]), jnp.ones((4, 1), jnp.complex64)
    loss, grads, info = sam_optax.value_and_grad(loss_fn, rho=0.1, return_info=True)(w, x)
    assert loss > loss_fn(w, x)
    direction = (w - (1 + 2j)) / jnp.abs(w - (1 + 2j))
    expected = jax.grad(loss_fn)(w + 0.1 * direction, x)
    np.testing.assert_allclose(grads, expected, rtol=1e-5)
    np.testing.assert_allclose(info.realised_perturbation, 1.0, rtol=1e-5)


def test_scan_donate_and_vmap():
    tx = sam_optax.sharpness_aware(optax.adam(0.01), rho=optax.linear_schedule(0.0, 0.1, 4))
    batches = [mlp_batch(seed) for seed in range(4)]
    params = mlp_params()

    def train_step(carry, batch):
        params, state = carry
        updates, state = tx.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    for batch in batches:
        carry, _ = jax.jit(train_step)(carry, batch)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    scanned, _ = jax.lax.scan(train_step, (params, tx.init(params)), stacked)
    assert_trees_close(scanned, carry)
    assert scanned[1].count == 4

    copied = jax.tree.map(jnp.copy, (params, tx.init(params)))
    donated, _ = jax.jit(train_step, donate_argnums=0)(copied, batches[0])
    assert_trees_close(donated, jax.jit(train_step)((params, tx.init(params)), batches[0])[0])

    many = [mlp_params(seed) for seed in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *many)
    gradient = sam_optax.value_and_grad(mlp_loss)
    mapped = jax.vmap(gradient, in_axes=(0, None))(stack, batches[0])
    for i, params in enumerate(many):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], mapped), gradient(params, batches[0]))


@pytest.mark.parametrize("options", [{}, {"m": 2, "ascent_fraction": 0.5}])
def test_the_step_can_be_differentiated(options):
    # Through the norm as well, whose derivative must not meet the scales that were not used.
    params, batch = mlp_params(), mlp_batch()
    parts = options.get("m", 1)

    def by_hand(params, rho):
        losses = []
        for part in range(parts):
            micro_batch = jax.tree.map(lambda x: x[4 * part : 4 * part + 4], batch)
            ascent = jax.grad(mlp_loss)(params, micro_batch)
            scale = rho / optax.tree.norm(ascent)
            losses.append(mlp_loss(jax.tree.map(lambda w, g: w + scale * g, params, ascent), batch))
        return sum(losses) / parts

    def ours(params, rho):
        return sam_optax.value_and_grad(mlp_loss, rho, **options)(params, batch)[0]

    expected = jax.grad(by_hand, argnums=(0, 1))(params, 0.1)
    assert_trees_close(jax.grad(ours, argnums=(0, 1))(params, 0.1), expected)


def test_a_step_without_a_direction_can_be_differentiated():
    def loss_fn(w, batch):
        return jnp.mean(0 * (batch @ w))

    def step(w):
        return sam_optax.value_and_grad(loss_fn, rho=0.1)(w, jnp.ones((8, 3)))[0]

    np.testing.assert_array_equal(jax.grad(step)(jnp.ones(3)), 0)


@pytest.mark.parametrize("slope", [jnp.inf, jnp.nan])
@pytest.mark.parametrize(
    ("derivative", "power"),  # of 1, the second derivatives are the loss's
    [(jax.grad, 1), (jax.jacfwd, 1), (jax.jacfwd, 2)],
    ids=["backward", "forward", "forward, of a square"],
)
def test_a_step_whose_ascent_is_skipped_can_be_differentiated(slope, derivative, power):
    params, batch = mlp_params(), mlp_batch()

    def not_finite(params, batch):
        return mlp_loss(params, batch) + slope * params["out"]["kernel"][0, 0] ** power

    def loss(params, rho):
        gradient = sam_optax.value_and_grad(mlp_loss, rho, ascent_loss_fn=not_finite)
        return gradient(params, batch)[0]

    plain = jax.grad(mlp_loss)(params, batch)
    in_params, in_rho = jax.jit(derivative(loss, argnums=(0, 1)))(params, 0.1)
    assert_trees_close(in_params, plain)
    assert in_rho == 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("perturbation", [None, sam_optax.adaptive_perturbation()])
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_the_derivative_in_rho_at_zero(perturbation, derivative):
    params, batch = mlp_params(), mlp_batch()

    def loss(rho):
        return sam_optax.value_and_grad(mlp_loss, rho, perturbation=perturbation)(params, batch)[0]

    at_zero, next_to_it = derivative(loss)(0.0), derivative(loss)(1e-4)
    assert next_to_it > 0
    np.testing.assert_allclose(at_zero, next_to_it, rtol=1e-2)


def test_labels_left_out_of_batch_argnums():
    w, x, y = jnp.ones(2), jnp.ones((4, 2)), jnp.arange(4.0)

    def loss_fn(w, x, y, key=None):
        return jnp.mean((x @ w - y) ** 2)

    # One example ascends: its prediction would be compared with all four labels, silently.
    with pytest.raises(ValueError, match=r"\(1, 2\) .*4 rows .*batch_argnums=\(1, 2\)"):
        sam_optax.value_and_grad(loss_fn)(w, x, y)
    sam_optax.value_and_grad(loss_fn, batch_argnums=(1, 2))(w, x, y)
    sam_optax.value_and_grad(loss_fn, batch_argnums=1)(w, x, y)
    with pytest.raises(ValueError, match=r"keyword arguments \['y'\] .*4 rows .*by position"):
        sam_optax.value_and_grad(loss_fn)(w, x, y=y)
    sam_optax.value_and_grad(loss_fn, batch_argnums=1)(w, x, y=y)
    sam_optax.value_and_grad(loss_fn)(w, x, y=jnp.arange(3.0)[:1])
    with pytest.raises(ValueError, match=r"\(1, 2\) .*4 rows along batch_axis=1"):
        sam_optax.value_and_grad(lambda w, x, y: jnp.mean((w @ x - y[0]) ** 2), batch_axis=1)(
            w, x.T, y[None]
        )
    pairs = {"of": y, "texts": jnp.ones((4, 3))}  # the inputs of a contrastive loss
    with pytest.raises(ValueError, match=r"keyword arguments \['pairs'\] .*4 rows .*by position"):
        sam_optax.value_and_grad(lambda w, x, pairs: jnp.mean(x @ w))(w, x, pairs=pairs)
    base = {"weights": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    sam_optax.value_and_grad(lambda w, x, base: jnp.mean(x @ w))(w, x, base=base)
    statistics = {"mean": jnp.ones(4), "var": jnp.ones(4)}
    sam_optax.value_and_grad(lambda w, x, stats: jnp.mean(x @ w))(w, x, stats=statistics)
    nothing = {"rho": 0, "return_info": True, "ascent_fraction": 1}
    for whole in ({"ascent_fraction": 1}, {"rho": 0}, nothing):  # nothing is divided: it is right
        sam_optax.value_and_grad(loss_fn, **whole)(w, x, y)
        sam_optax.value_and_grad(loss_fn, **whole)(w, x, y=y)
    accumulated = {"rho": 0, "accumulation_steps": 2}
    reduced = {"ascent_fraction": 1, "reduction_dtype": "float32"}
    groups = {"ascent_fraction": 1, "m": 2}
    for divided in (accumulated, reduced, groups, {"rho": 0, "return_info": True}):
        with pytest.raises(ValueError, match=r"4 rows .*batch_argnums=\(1, 2\)"):
            sam_optax.value_and_grad(loss_fn, **divided)(w, x, y)

    def with_others(w, x, key, stats, constant):
        return loss_fn(w, x, 0.0)

    for b in (2, 4):
        others = (jax.random.PRNGKey(0), {"mean": jnp.ones(b), "of": jnp.ones(3)}, jnp.ones(5))
        sam_optax.value_and_grad(with_others)(w, jnp.ones((b, 2)), *others)


@pytest.mark.parametrize(
    "way", [{}, {"m": 2}, {"m": 2, "m_sharpness": "foret"}, {"accumulation_steps": 4}]
)
def test_pairs_in_two_halves(way):
    def loss_of_pairs(w, pairs):
        chosen, rejected = jnp.tanh(jnp.moveaxis(pairs, 1, 0) @ w)
        return jnp.mean(jax.nn.softplus(rejected - chosen))

    def loss_of_halves(w, both):
        return loss_of_pairs(w, jnp.stack(jnp.split(both, 2), axis=1))

    w, pairs = jnp.arange(3.0), jax.random.normal(jax.random.key(0), (16, 2, 3))
    halves = jnp.concatenate([pairs[:, 0], pairs[:, 1]])
    expected = jax.jit(sam_optax.value_and_grad(loss_of_pairs, **way))(w, pairs)
    gradient = sam_optax.value_and_grad(loss_of_halves, data_shards=2, **way)
    result = jax.jit(gradient)(w, halves)
    assert_trees_close(result, expected)


def test_inputs_and_labels_behind_what_is_no_batch():
    # A quarter of the stacked layers would be left out, silently.
    w, layers, x, y = jnp.ones((6, 6)), jnp.ones((8, 6, 6)), jnp.ones((32, 6)), jnp.arange(32.0)

    def distilled(w, teacher, x, y):
        taught = jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, teacher)[0]
        return jnp.mean((x @ w - taught).sum(1) - y) ** 2

    def gradient(loss_fn, **settings):
        return functools.partial(jax.eval_shape, sam_optax.value_and_grad(loss_fn, **settings))

    with pytest.raises(ValueError, match=r"are \[8\], and .*\(2, 3\) have 32 .*batch_argnums="):
        gradient(distilled)(w, layers, x, y)
    gradient(distilled, batch_argnums=(2, 3))(w, layers, x, y)
    gradient(distilled, batch_argnums=1)(w, layers, x, y)
    gradient(distilled, ascent_fraction=1)(w, layers, x, y)

    # The state of a batch norm in Haiku: one row would be all of them.
    def with_state(w, state, key, batch):
        return jnp.mean((batch["x"] @ w - state["mean"]).sum(1) - batch["y"]) ** 2

    state, batch = {"mean": jnp.ones((1, 6)), "var": jnp.ones((1, 6))}, {"x": x, "y": y}
    with pytest.raises(ValueError, match="batch as argument 3"):
        gradient(with_state)(w, state, None, batch)
    with pytest.raises(ValueError, match=r"are \[1\], and .*\(3,\) have 32 .*batch_argnums="):
        gradient(lambda *args: with_state(*args))(w, state, None, batch)

    # And what an ordinary batch has behind it.
    def with_others(w, x, *others):
        return jnp.mean(x @ w)

    for others in (
        (jnp.ones(6), jnp.ones(6)),  # mean and deviation of the features
        (layers, w),
        ({"a": w, "b": jnp.ones(3)}, {"a": w, "b": jnp.ones(3)}),
        (jax.random.PRNGKey(0), jnp.ones((1, 6)), jnp.ones((1, 6))),
    ):
        gradient(with_others)(w, x, *others)
        gradient(with_others)(w, x[:2], *others)
    gradient(with_others)(w, x[:1], jax.random.split(jax.random.key(0), 4), jnp.ones(6))


def test_a_batch_that_loss_fn_has_elsewhere():
    # LoRA's base in the place of the batch: a quarter of its rows would be looked up, silently.
    base, batch = jnp.arange(24.0).reshape(8, 3), {"ids": jnp.arange(4), "y": jnp.ones(4)}

    def loss_fn(adapter, base, batch, key=None):
        # Indices beyond the rows read the last one.
        return jnp.mean((base[batch["ids"] + 2] @ adapter - batch["y"]) ** 2)

    adapter = jnp.ones(3)
    with pytest.raises(ValueError, match="batch as argument 2, .*'base'.* batch_argnums=2, "):
        sam_optax.value_and_grad(loss_fn)(adapter, base, batch)
    expected = sam_optax.value_and_grad(lambda w, b: loss_fn(w, base, b))(adapter, batch)
    result = sam_optax.value_and_grad(loss_fn, batch_argnums=2)(adapter, base, batch)
    assert_trees_close(result, expected)
    sam_optax.value_and_grad(loss_fn, batch_argnums=1)(adapter, base, batch)  # if one insists
    sam_optax.value_and_grad(loss_fn, ascent_fraction=1)(adapter, base, batch)  # undivided
    with pytest.raises(ValueError, match="batch by keyword, .* by position"):
        sam_optax.value_and_grad(loss_fn)(adapter, base, batch=batch)
    sam_optax.value_and_grad(loss_fn, batch_argnums=1)(adapter, base, batch=batch)
    # No such words in what has no signature, or takes anything.
    sam_optax.value_and_grad(lambda *a: loss_fn(*a))(adapter, base, batch)


def test_an_eager_loop_compiles_nothing_after_its_first_step():
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    params, batch = mlp_params(), mlp_batch()
    gradient = jax.jit(jax.grad(mlp_loss))
    optimizer = sam_optax.sharpness_aware(optax.adam(1e-3))
    state = optimizer.init(params)
    counts = []
    for _ in range(4):
        updates, state = optimizer.update(None, state, params, grad_fn=gradient, batch=batch)
        params = optax.apply_updates(params, updates)
        sam_optax.value_and_grad(mlp_loss, return_info=True)(params, batch)
        counts.append(len(compilations))
    assert 0 < counts[1] == counts[3]  # at the second step, some arrays are the loop's own


def test_nothing_is_asked_of_a_batch_that_is_not_divided():
    sparse = pytest.importorskip("jax.experimental.sparse")
    batch = {"x": sparse.BCOO.fromdense(jnp.eye(4)[:3]), "y": jnp.ones(3), "table": jnp.ones(7)}

    def loss_fn(w, batch):
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    dense = {"x": batch["x"].todense(), "y": batch["y"]}
    expected = sam_optax.value_and_grad(loss_fn, 0.1, 1.0)(jnp.zeros(4), dense)
    assert_trees_close(sam_optax.value_and_grad(loss_fn, 0.1, 1.0)(jnp.zeros(4), batch), expected)


def test_a_batch_of_any_size_is_exported_where_no_ascent_is_taken_of_it():
    (b,) = jax.export.symbolic_shape("2 * b")
    batch = {"x": jax.ShapeDtypeStruct((b, 4), jnp.float32)}

    def loss_fn(w, batch):
        return jnp.mean((batch["x"] @ w) ** 2)

    plain = sam_optax.value_and_grad(loss_fn, rho=0, accumulation_steps=2)
    exported = jax.export.export(jax.jit(plain))(jnp.ones(4), batch)
    assert_trees_close(
        exported.call(jnp.ones(4), {"x": jnp.ones((6, 4))}),
        jax.value_and_grad(loss_fn)(jnp.ones(4), {"x": jnp.ones((6, 4))}),
    )


def test_parameters_of_any_size_are_exported():
    (n,) = jax.export.symbolic_shape("n")

    def loss_fn(w, x):
        return jnp.mean((x @ w - 1) ** 2)

    gradient = jax.jit(sam_optax.value_and_grad(loss_fn, 0.1, return_info=True))
    of_any_size = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n,), (8, n)))
    exported = jax.export.export(gradient, platforms=("cpu", "tpu", "cuda"))(*of_any_size)
    args = jnp.arange(3.0), jnp.eye(8, 3)
    assert_trees_close(exported.call(*args), gradient(*args))


def test_an_ascent_on_a_share_of_a_batch_of_any_size_is_refused():
    (b,) = jax.export.symbolic_shape("4 * b")
    gradient = jax.jit(sam_optax.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2)))
    with pytest.raises(
        ValueError, match=r"b=4\*b examples.*export the step for a batch of a known"
    ):
        jax.export.export(gradient)(jnp.ones(4), jax.ShapeDtypeStruct((b, 4), jnp.float32))


def test_a_sparse_batch():
    sparse = pytest.importorskip("jax.experimental.sparse")
    x = sparse.BCOO.fromdense(jnp.eye(4))
    gradient = sam_optax.value_and_grad(lambda w, batch: jnp.mean(batch["x"] @ w))
    with pytest.raises(TypeError, match=r"batch\[0\]\['x'\] is sparse, BCOO.*give x.todense\(\)"):
        gradient(jnp.ones(4), {"x": x, "y": jnp.ones(4)})
    with pytest.raises(TypeError, match="is sparse"):
        gradient(jnp.ones(4), {"x": x, "y": jnp.ones(7)})
    with pytest.raises(TypeError, match="is sparse"):
        sam_optax.value_and_grad(lambda w, x: jnp.mean(x @ w), ascent_fraction=1, m=2)(
            jnp.ones(4), x
        )
    # Where nothing is divided, it is a batch like any other.
    whole = sam_optax.value_and_grad(lambda w, x: jnp.mean(x @ w), ascent_fraction=1)
    assert_trees_equal(whole(jnp.ones(4), x), whole(jnp.ones(4), x.todense()))


def test_mixed_derivatives_at_rho_zero():
    def epsilon(g, rho):
        return sam_optax.gradient_perturbation(g, None, rho)

    def mixed(rho):
        return jax.jacfwd(jax.jacfwd(epsilon, argnums=0), argnums=1)(jnp.array([3.0, 4.0]), rho)

    expected = [[0.128, -0.096], [-0.096, 0.072]]
    for rho in (0.0, 1e-4):
        np.testing.assert_allclose(mixed(rho), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_shards": 2},
        {"m": 2},
        {"m": 2, "m_sharpness": "foret"},
        {"accumulation_steps": 4},
    ],
    ids=str,
)
def test_examples_along_another_axis(options):
    params, batch = mlp_params(), mlp_batch(b=32)
    expected = sam_optax.value_and_grad(mlp_loss, return_info=True, **options)(params, batch)
    turned = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), batch)
    step = sam_optax.value_and_grad(examples_last, return_info=True, batch_axis=-1, **options)
    assert_trees_close(step(params, turned), expected)


def test_a_scalar_beside_examples_along_the_last_axis():
    def loss_fn(w, x, scale):
        return jnp.mean(w @ x) * scale

    step = sam_optax.value_and_grad(loss_fn, 0.5, batch_axis=-1)
    loss, _ = step(jnp.array([3.0, 4.0]), jnp.array([[3.0] * 8, [4.0] * 8]), jnp.float32(2))
    np.testing.assert_allclose(loss, 2 * (25 + 0.5 * 5), rtol=1e-6)


def of_two_rows(x):
    chex.assert_shape(x, (2, 16))
    return x


@pytest.mark.parametrize(
    "check", [lambda x: x.reshape(2, 16), of_two_rows], ids=["TypeError", "AssertionError"]
)
def test_a_note_counts_examples_along_their_axis(check):
    def loss_fn(w, x):
        return jnp.mean(check(x)) * w

    with pytest.raises((TypeError, AssertionError)) as error:
        sam_optax.value_and_grad(loss_fn, batch_axis=1)(jnp.float32(1), jnp.ones((2, 16)))
    assert any("on 4 of 16 examples" in note for note in error.value.__notes__)


@pytest.mark.parametrize("m_sharpness", ["paper", "foret"])
@pytest.mark.parametrize("with_info", [False, True])
def test_groups_that_are_not_taken_need_not_divide_the_batch(m_sharpness, with_info):
    step = sam_optax.value_and_grad(
        mlp_loss, rho=0, m=3, m_sharpness=m_sharpness, return_info=with_info
    )
    expected = jax.value_and_grad(mlp_loss)(mlp_params(), mlp_batch())
    assert_trees_equal(step(mlp_params(), mlp_batch())[:2], expected)


def test_an_ascent_gradient_in_float32_does_not_widen_the_updates():
    params = mlp_params(dtype=jnp.bfloat16)
    tx = sam_optax.sharpness_aware(optax.sgd(0.1))
    ascent = jax.tree.map(jnp.float32, params)
    call = {"grad_fn": jax.grad(mlp_loss), "batch": mlp_batch()}
    updates, _ = tx.update(ascent, tx.init(params), params, **call)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_the_default_optimizer_is_adafactor_at_1e_3():
    params, call = mlp_params(), {"grad_fn": jax.grad(mlp_loss), "batch": mlp_batch()}
    updates = [
        tx.update(None, tx.init(params), params, **call)[0]
        for tx in (sam_optax.sharpness_aware(), sam_optax.sharpness_aware(optax.adafactor(1e-3)))
    ]
    assert_trees_equal(*updates)


def test_an_inner_optimizer_need_not_take_a_value():
    params, batch = mlp_params(), mlp_batch()
    found, expected = (
        sam_optax.sharpness_aware(inner).update(
            None, inner.init(params), params, grad_fn=jax.value_and_grad(mlp_loss), batch=batch
        )[0]
        for inner in (optax.scale(-0.1), optax.sgd(0.1))
    )
    assert_trees_close(found, expected)


def test_a_value_that_is_given_is_the_one_that_inner_gets():
    seen = {}

    def remember(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), remember)
    call = {"grad_fn": jax.value_and_grad(mlp_loss), "batch": mlp_batch(), "value": 7.0}
    sam_optax.sharpness_aware(inner).update(None, (), mlp_params(), **call)
    assert seen["value"] == 7.0
    seen.clear()
    call = {"grad_fn": jax.grad(mlp_loss), "batch": mlp_batch()}
    sam_optax.sharpness_aware(inner).update(None, (), mlp_params(), **call)
    assert not seen


def test_the_step_count_stays_at_the_largest_number():
    tx = sam_optax.sharpness_aware(optax.sgd(0.1), lambda count: 0.1)
    params, largest = mlp_params(), jnp.iinfo(jnp.int32).max
    state = tx.init(params)._replace(count=jnp.int32(largest))
    call = {"grad_fn": jax.grad(mlp_loss), "batch": mlp_batch()}
    assert tx.update(None, state, params, **call)[1].count == largest


def test_the_gradient_has_the_name_of_the_loss():
    assert sam_optax.value_and_grad(mlp_loss).__name__ == "mlp_loss"


def test_a_mask_of_no_parameters():
    step = sam_optax.value_and_grad(lambda _, x: jnp.mean(x), perturb=lambda path: True)
    assert step({}, jnp.ones(4)) == (1.0, {})


def test_a_gradient_that_is_wider_than_its_parameter_stays_so():
    def grad_fn(w, batch):
        return jax.grad(lambda w: jnp.mean((batch @ w - 1) ** 2))(w.astype(jnp.float32))

    seen = []
    inner = optax.stateless(lambda grads, _: seen.append(grads.dtype) or grads)
    tx = sam_optax.sharpness_aware(inner)
    params, batch = jnp.ones(3, jnp.bfloat16), jnp.eye(4, 3)
    tx.update(None, tx.init(params), params, grad_fn=grad_fn, batch=batch)
    assert seen == [jnp.float32]


@pytest.mark.parametrize("options", [{"m": 2}, {"accumulation_steps": 2}])
def test_a_number_in_the_place_of_an_integers_gradient(options):
    def grad_fn(params, batch):
        grads = jax.grad(lambda w: jnp.mean((batch @ w - params["n"]) ** 2))(params["w"])
        return {"w": grads, "n": 0}

    params, batch = {"w": jnp.ones(3), "n": jnp.int32(2)}, jnp.eye(8, 3)
    expected = sam_optax.value_and_grad(lambda w, batch: jnp.mean((batch @ w - 2) ** 2), **options)(
        params["w"], batch
    )[1]
    tx = sam_optax.sharpness_aware(optax.identity(), **options)
    updates, _ = tx.update(None, tx.init(params), params, grad_fn=grad_fn, batch=batch)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


def test_a_loss_that_pops_from_its_arguments():
    def loss_fn(w, x, variables, *, rest):
        return jnp.mean(x) * w * variables.pop("scale") * rest["more"].pop()

    gradient = sam_optax.value_and_grad(loss_fn)
    args = jnp.float32(1), jnp.ones(8), {"scale": 2.0}
    assert gradient(*args, rest={"more": [3.0]})[1] == 6

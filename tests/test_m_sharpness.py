"""Both forms of m-sharpness, against loops written out."""

import functools

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
    mlp_outputs,
    mlp_params,
)

import sam_optax

ASAM = sam_optax.adaptive_perturbation()


def part(batch, start, stop):
    return jax.tree.map(lambda x: x[start:stop], batch)


def ascend(loss_fn, params, micro_batch, rho=0.15):
    g = jax.grad(loss_fn)(params, micro_batch)
    length = optax.tree.norm(g)
    return jax.tree.map(lambda w, g: w + rho * g / length, params, g)


def mean(trees, weights=None):
    weights = weights or [1.0] * len(trees)
    return jax.tree.map(
        lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights), *trees
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("m", [2, 4])
def test_paper_form(m, jit):
    params, batch = mlp_params(), mlp_batch(b=32)
    size = 8 // m
    results = []
    for i in range(m):
        w_i = ascend(mlp_loss, params, part(batch, i * size, (i + 1) * size))
        results.append(jax.value_and_grad(mlp_loss)(w_i, batch))
    gradient = sam_optax.value_and_grad(mlp_loss, m=m)
    gradient = jax.jit(gradient) if jit else gradient
    assert_trees_close(gradient(params, batch), mean(results))

    tx = sam_optax.sharpness_aware(optax.sgd(1.0), m=m)
    for grad_fn in (jax.grad(mlp_loss), jax.value_and_grad(mlp_loss)):
        updates, _ = tx.update(None, tx.init(params), params, grad_fn=grad_fn, batch=batch)
        assert_trees_close(jax.tree.map(jnp.negative, updates), mean(results)[1])


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("m", [2, 4])
def test_foret_form(m, fraction):
    params, batch = mlp_params(), mlp_batch(b=32)
    size = 32 // m
    results = []
    for i in range(m):
        own = part(batch, i * size, (i + 1) * size)
        w_i = ascend(mlp_loss, params, part(own, 0, int(fraction * size)))
        results.append(jax.value_and_grad(mlp_loss)(w_i, own))
    gradient = sam_optax.value_and_grad(mlp_loss, 0.15, fraction, m, m_sharpness="foret")
    assert_trees_close(gradient(params, batch), mean(results))


def test_the_forms_differ_and_both_differ_from_one_point():
    params, batch = mlp_params(), mlp_batch(b=32)
    one, paper, foret = (
        sam_optax.value_and_grad(mlp_loss, **options)(params, batch)[0]
        for options in ({}, {"m": 4}, {"m": 4, "m_sharpness": "foret"})
    )
    assert len({float(one), float(paper), float(foret)}) == 3


# How a loss of parts makes the loss of the whole: unequal padding, sums and means.


def token_sum_and_count(params, batch):
    error = jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]).sum(-1)
    return jnp.sum(error * batch["weight"]), jnp.sum(batch["weight"])


def sum_loss(params, batch):
    return token_sum_and_count(params, batch)[0]


def token_mean_loss(params, batch):
    total, count = token_sum_and_count(params, batch)
    return total / count


def unequally_padded(b=16):
    weight = np.ones(b, np.float32)
    weight[[1, 5, 6, 7, 13]] = 0  # 3, 1, 4 and 3 of each four examples count
    return mlp_batch(b=b) | {"weight": jnp.asarray(weight)}


@pytest.mark.parametrize(
    ("loss_fn", "reduction"),
    [
        (sum_loss, "sum"),
        (token_mean_loss, lambda batch: batch["weight"].sum()),
        (mlp_loss, "mean"),
    ],
)
def test_split_and_recombined_is_the_whole_batch(loss_fn, reduction):
    # So small a rho that every point is w: what is left is the splitting.
    params, batch = mlp_params(), unequally_padded()
    gradient = sam_optax.value_and_grad(
        loss_fn, rho=1e-30, m=4, m_sharpness="foret", loss_reduction=reduction
    )
    assert_trees_close(gradient(params, batch), jax.value_and_grad(loss_fn)(params, batch))
    if loss_fn is token_mean_loss:
        wrong = sam_optax.value_and_grad(loss_fn, rho=1e-30, m=4, m_sharpness="foret")
        assert abs(wrong(params, batch)[0] - loss_fn(params, batch)) > 1e-3


def test_token_weighted_groups_against_a_loop():
    params, batch = mlp_params(), unequally_padded()
    results, weights = [], []
    for i in range(4):
        own = part(batch, 4 * i, 4 * i + 4)
        w_i = ascend(token_mean_loss, params, part(own, 0, 1))
        results.append(jax.value_and_grad(token_mean_loss)(w_i, own))
        weights.append(float(own["weight"].sum()))
    gradient = sam_optax.value_and_grad(
        token_mean_loss,
        m=4,
        m_sharpness="foret",
        loss_reduction=lambda batch: batch["weight"].sum(),
    )
    assert_trees_close(gradient(params, batch), mean(results, weights))


def test_a_part_that_is_all_padding_adds_nothing():
    params, batch = mlp_params(), unequally_padded()
    batch["weight"] = batch["weight"].at[4:8].set(0)  # its mean loss is 0 / 0
    gradient = sam_optax.value_and_grad(
        token_mean_loss,
        rho=1e-30,
        m=4,
        m_sharpness="foret",
        loss_reduction=lambda batch: batch["weight"].sum(),
    )
    assert_trees_close(gradient(params, batch), jax.value_and_grad(token_mean_loss)(params, batch))


def test_a_batch_that_is_all_padding_adds_nothing():
    params, batch = mlp_params(), unequally_padded()
    batch["weight"] = jnp.zeros_like(batch["weight"])
    gradient = sam_optax.value_and_grad(
        token_mean_loss,
        m=4,
        m_sharpness="foret",
        loss_reduction=lambda batch: batch["weight"].sum(),
    )
    loss, grads = gradient(params, batch)
    assert loss == 0 and not any(x.any() for x in jax.tree.leaves(grads))


def test_paper_form_of_a_sum_is_a_mean_over_points():
    params, batch = mlp_params(), unequally_padded()
    gradient = sam_optax.value_and_grad(sum_loss, rho=1e-30, m=4, loss_reduction="sum")
    assert_trees_close(gradient(params, batch), jax.value_and_grad(sum_loss)(params, batch))


# aux and mutable collections


def loss_with_aux(params, batch):
    outputs = mlp_outputs(params, batch["x"])
    aux = {
        "outputs": outputs,
        "transposed": outputs.T,
        "labels": jnp.argmax(batch["y"], -1),
        "mean": outputs.mean(),
        "key": jax.random.key(0),
    }
    return mlp_loss(params, batch), aux


def test_paper_form_aux_is_the_whole_batch_at_the_last_point():
    params, batch = mlp_params(), mlp_batch(b=16)
    (_, aux), _ = sam_optax.value_and_grad(loss_with_aux, m=2, has_aux=True)(params, batch)
    w_last = ascend(mlp_loss, params, part(batch, 2, 4))
    expected = loss_with_aux(w_last, batch)[1]
    aux.pop("key"), expected.pop("key")
    assert_trees_close(aux, expected, atol=1e-5)


def test_foret_form_aux_is_put_together():
    params, batch = mlp_params(), mlp_batch(b=16)

    def loss_fn(params, batch):
        loss, aux = loss_with_aux(params, batch)
        aux.pop("key")
        return loss, aux

    gradient = sam_optax.value_and_grad(loss_fn, rho=1e-30, m=4, m_sharpness="foret", has_aux=True)
    (_, aux), _ = gradient(params, batch)
    assert_trees_close(aux, loss_fn(params, batch)[1])


def test_foret_form_refuses_an_aux_it_cannot_put_together():
    params, batch = mlp_params(), mlp_batch(b=16)

    def loss_fn(params, batch):
        return mlp_loss(params, batch), {"correct": jnp.sum(batch["y"] > 0)}

    gradient = sam_optax.value_and_grad(loss_fn, m=4, m_sharpness="foret", has_aux=True)
    with pytest.raises(TypeError, match=r"aux\['correct'\] is int32.*4 parts.*combine_aux"):
        gradient(params, batch)
    gradient = sam_optax.value_and_grad(
        loss_fn,
        m=4,
        m_sharpness="foret",
        has_aux=True,
        combine_aux=lambda aux: jax.tree.map(lambda x: x.sum(0), aux),
    )
    assert gradient(params, batch)[0][1]["correct"] == jnp.sum(batch["y"] > 0)


def test_a_weight_that_is_not_a_scalar():
    gradient = sam_optax.value_and_grad(
        mlp_loss, m=2, m_sharpness="foret", loss_reduction=lambda batch: batch["y"]
    )
    with pytest.raises(ValueError, match="must return a real scalar"):
        gradient(mlp_params(), mlp_batch())


@pytest.mark.parametrize("m_sharpness", ["paper", "foret"])
def test_one_adversarial_point_at_a_time(m_sharpness):
    # Big weights, small batch: m copies of them would show, also beside the 32 MiB that cuBLAS
    # works in on a GPU. They are only compiled for.
    params = jax.ShapeDtypeStruct((8000, 8000), jnp.float32)
    batch = jax.ShapeDtypeStruct((64, 8000), jnp.float32)

    def loss_fn(w, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ w) - 1))

    def temporaries(m):
        gradient = sam_optax.value_and_grad(loss_fn, 0.1, 0.5, m, m_sharpness=m_sharpness)
        compiled = jax.jit(gradient).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * params.size)

    assert temporaries(16) < temporaries(2) + 0.5
    assert temporaries(2) < temporaries(1) + 1.5


@pytest.mark.parametrize("options", [{}, {"m": 2}, {"m": 2, "m_sharpness": "foret"}])
def test_text_in_the_aux(options):
    params, batch = mlp_params(), mlp_batch()
    gradient = sam_optax.value_and_grad(
        lambda w, batch: (mlp_loss(w, batch), {"name": "text"}), has_aux=True, **options
    )
    if not options:
        assert gradient(params, batch)[0][1] == {"name": "text"}
        return
    with pytest.raises(TypeError, match=r"aux\['name'\] is 'text'.*must be of arrays"):
        gradient(params, batch)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"data_shards": 2}, {"m": 2}, {"m": 2, "m_sharpness": "foret"}, {"accumulation_steps": 2}],
)
def test_arrays_without_elements_in_the_batch_and_in_aux(options, jit):
    params, batch = mlp_params(), mlp_batch()

    def loss_fn(params, batch):
        return mlp_loss(params, batch), batch["x"][:, :0]

    step = sam_optax.value_and_grad(loss_fn, has_aux=True, **options)
    step = jax.jit(step) if jit else step
    (loss, aux), grads = step(params, batch | {"none": jnp.zeros((16, 0, 2))})
    assert aux.shape == (16, 0)
    expected = sam_optax.value_and_grad(mlp_loss, **options)
    assert_trees_close((loss, grads), expected(params, batch))


def test_the_aux_of_an_ascent_in_several_passes_is_nobodys():
    params, batch = mlp_params(), mlp_batch()
    options = {"ascent_fraction": 1.0, "accumulation_steps": 2}
    expected = sam_optax.value_and_grad(mlp_loss, **options)(params, batch)

    def told_of(aux):
        return lambda w, batch: (mlp_loss(w, batch), aux)

    def step(aux, ascent_aux, **more):
        more |= {"has_aux": True, "ascent_loss_fn": told_of(ascent_aux)}
        return sam_optax.value_and_grad(told_of(aux), **options, **more)(params, batch)

    (loss, aux), grads = step(None, {"name": "text"})
    assert aux is None
    assert_trees_close((loss, grads), expected)
    count = {"n": jnp.int32(1)}
    for ascent_aux in (None, count):
        (_, aux), _ = step(count, ascent_aux, combine_aux=lambda aux: aux["n"].sum())
        assert aux == 2
    for groups in ({}, {"m": 2, "m_sharpness": "foret", "ascent_fraction": 0.5}):
        gradient = sam_optax.value_and_grad(
            mlp_loss, **(options | groups), combine_aux=lambda aux: aux["n"].sum()
        )
        gradient(params, batch)  # no aux, so nothing to combine


def test_parts_of_float64_gradients_are_weighted_in_float64():
    with jax.enable_x64(True):
        params, batch = mlp_params(dtype=jnp.float64), mlp_batch(b=18)
        batch = jax.tree.map(lambda x: x.astype(jnp.float64), batch)
        gradient = sam_optax.value_and_grad(
            mlp_loss,
            rho=0,
            accumulation_steps=3,
            loss_reduction=lambda batch: batch["x"].shape[0] / 7,
        )
        expected = jax.value_and_grad(mlp_loss)(params, batch)
        for x, y in zip(*map(jax.tree.leaves, (gradient(params, batch), expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-13)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("options", [{}, {"m": 2}, {"ascent_steps": 2}, {"perturbation": ASAM}])
def test_rho_of_another_dtype_where_promotion_is_strict(options, dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        rho, params, batch = jnp.asarray(0.25, dtype), mlp_params(), mlp_batch()
        step = sam_optax.value_and_grad(mlp_loss, rho, return_info=True, **options)
        expected = sam_optax.value_and_grad(mlp_loss, 0.25, return_info=True, **options)
        assert_trees_close(jax.jit(step)(params, batch), jax.jit(expected)(params, batch))


@pytest.mark.parametrize("options", [{"m": 2}, {"accumulation_steps": 2}])
def test_float32_parameters_where_float64_is_allowed_and_promotion_is_strict(options):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params, batch = mlp_params(), mlp_batch()
        step = sam_optax.value_and_grad(mlp_loss, return_info=True, **options)
        _, grads, info = step(params, batch)
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
        assert info.realised_perturbation.dtype == jnp.float32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"m": 2, "m_sharpness": "foret"},
        {"accumulation_steps": 2},
        {"return_info": True},
        {"perturbation": ASAM},
    ],
    ids=lambda options: ",".join(options),
)
def test_narrow_parameters_where_promotion_is_strict(options):
    def loss_fn(params, batch):
        return mlp_loss(jax.tree.map(lambda w: w.astype(jnp.float32), params), batch)

    params, batch = mlp_params(), mlp_batch()
    params["out"]["kernel"] = params["out"]["kernel"].astype(jnp.bfloat16)
    gradient = sam_optax.value_and_grad(loss_fn, **options)
    with jax.numpy_dtype_promotion("strict"):
        strict = gradient(params, batch)
    assert_trees_equal(strict, gradient(params, batch))


def complex_parameters():
    def loss_fn(w, x):
        return jnp.mean(jnp.abs(x.astype(w.dtype) @ w - 1) ** 2)

    w = jnp.array([1 + 2j, 0.5 - 1j, -1j])
    return loss_fn, w, jax.random.normal(jax.random.key(0), (8, 3))


def float64_parameters():
    def loss_fn(w, x):
        return jnp.mean((x @ w - 1) ** 2)

    w = jnp.array([1.0, 2.0, -1.0], "float64")
    return loss_fn, w, jax.random.normal(jax.random.key(0), (8, 3), "float64")


def parameters_of_two_widths():
    loss_fn, w, x = float64_parameters()

    def of_both(params, x):
        return loss_fn(jnp.concatenate([params["a"], params["b"].astype("float64")]), x)

    return of_both, {"a": w[:2], "b": w[2:].astype("float32")}, x


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "problem", [complex_parameters, float64_parameters, parameters_of_two_widths]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"m": 2},
        {"m": 2, "m_sharpness": "foret"},
        {"accumulation_steps": 2},
        {"perturbation": ASAM},
    ],
    ids=lambda options: ",".join(options),
)
def test_wide_parameters_where_promotion_is_strict(problem, options):
    with jax.enable_x64(True):
        loss_fn, params, batch = problem()
        gradient = sam_optax.value_and_grad(loss_fn, return_info=True, **options)
        expected = jax.jit(gradient)(params, batch)
        with jax.numpy_dtype_promotion("strict"):
            assert_trees_equal(jax.jit(gradient)(params, batch), expected)
        assert expected[2].skipped_ascents.dtype == jnp.int32


@pytest.mark.parametrize(
    "options", [{"m": 2}, {"m": 2, "m_sharpness": "foret"}, {"accumulation_steps": 2}]
)
def test_a_number_in_the_place_of_an_integers_gradient(options):
    def grad_fn(params, x):
        loss, grads = jax.value_and_grad(lambda w: jnp.mean(jnp.square(x @ w)))(params["w"])
        return loss, {"w": grads, "steps": 0}

    def of_w(w, x):
        return jax.value_and_grad(lambda w: jnp.mean(jnp.square(x @ w)))(w)

    params, x = {"w": jnp.ones(3), "steps": jnp.int32(7)}, jnp.arange(48.0).reshape(16, 3) / 48
    sam = sam_optax.sharpness_aware(optax.sgd(0.1), **options)

    @functools.partial(jax.jit, static_argnums=0)
    def updates_with(grad_fn, w):
        return sam.update(None, sam.init(w), w, grad_fn=grad_fn, batch=x)[0]

    updates, expected = updates_with(grad_fn, params), updates_with(of_w, params["w"])
    np.testing.assert_array_equal(updates["w"], expected)
    assert not updates["steps"]


def test_aux_of_parts_keeps_its_dtype():
    def loss_fn(params, batch):
        loss = mlp_loss(params, batch)
        return loss, {"half": loss.astype(jnp.bfloat16), "complex": loss * (1 + 1j)}

    step = sam_optax.value_and_grad(loss_fn, has_aux=True, accumulation_steps=2)
    (loss, aux), _ = step(mlp_params(), mlp_batch())
    assert aux["half"].dtype == jnp.bfloat16
    np.testing.assert_allclose(aux["complex"], loss * (1 + 1j), rtol=1e-5)


@pytest.mark.parametrize("parts", [{"m": 2, "m_sharpness": "foret"}, {"accumulation_steps": 2}])
def test_aux_of_a_loss_that_is_a_sum_is_a_sum(parts):
    def loss_fn(w, x):
        loss = jnp.sum(w * x)
        return loss, loss

    step = sam_optax.value_and_grad(loss_fn, has_aux=True, loss_reduction="sum", **parts)
    (loss, aux), _ = step(jnp.float32(1), jnp.arange(8.0))
    np.testing.assert_allclose(aux, loss, rtol=1e-6)


def test_aux_of_a_part_of_padding_adds_nothing():
    def loss_fn(w, batch):
        loss = jnp.sum(batch["weight"] * (w * batch["x"]) ** 2) / batch["weight"].sum()
        return loss, loss

    options = {
        "m": 2,
        "m_sharpness": "foret",
        "loss_reduction": lambda batch: batch["weight"].sum(),
    }
    batch = {"x": jnp.arange(1.0, 9), "weight": jnp.array([1.0] * 4 + [0.0] * 4)}
    step = sam_optax.value_and_grad(loss_fn, has_aux=True, **options)
    (loss, aux), _ = step(jnp.float32(1), batch)
    assert np.isfinite(loss)
    np.testing.assert_allclose(aux, loss, rtol=1e-6)


def test_aux_whose_length_is_not_in_proportion_to_the_examples_is_refused():
    def loss_fn(w, x):
        return jnp.mean(w * x), jnp.zeros(len(x) - 1)

    step = sam_optax.value_and_grad(loss_fn, has_aux=True, accumulation_steps=2)
    with pytest.raises(TypeError, match="combine_aux"):
        step(jnp.float32(1), jnp.ones(8))


@pytest.mark.parametrize("dtype", ["int32", "bfloat16"])  # which holds each weight, not their sum
def test_weights_of_other_dtypes(dtype):
    def loss_fn(params, batch):
        errors = jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]).sum(-1)
        n = batch["n"].astype(jnp.float32)
        return jnp.sum(errors * n) / n.sum()

    batch = mlp_batch() | {"n": jnp.full(16, 50, dtype).at[0].set(51)}
    step = sam_optax.value_and_grad(
        loss_fn, 1e-30, accumulation_steps=4, loss_reduction=lambda batch: batch["n"].sum()
    )
    expected = jax.value_and_grad(loss_fn)(mlp_params(), batch)
    assert_trees_close(step(mlp_params(), batch), expected)

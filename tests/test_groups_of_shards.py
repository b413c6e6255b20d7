"""Groups of several shards, such as the slices of a pod: what is reduced where, and to what."""

import functools
import math
import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    assert_trees_close,
    mlp_batch,
    mlp_loss,
    mlp_outputs,
    mlp_params,
    norm64,
)

import sam_optax

SIZES = (8, 16, 4)
AXES = ("slice", "data")
OF_A_SLICE = {"data_axes": AXES, "group_axes": "slice"}
TENSOR_PARALLEL = {
    "hidden": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model", None)},
}


def make_mesh(kind=AxisType.Auto, shape=(2, 4)):
    return jax.make_mesh(shape, (*AXES, "model")[: len(shape)], axis_types=(kind,) * len(shape))


def problem(mesh, specs=None, b=64):
    """Parameters and batch, on the mesh."""
    params = mlp_params(sizes=SIZES)
    specs = specs or jax.tree.map(lambda _: P(), params)
    on_mesh = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), params, specs)
    batch = mlp_batch(b=b, sizes=SIZES)
    # Unequal padding, and the first shard of it alone.
    batch["weight"] = jnp.asarray(np.arange(b) % 7 < 1 + 2 * (np.arange(b) // 8 % 3), jnp.float32)
    batch["weight"] = batch["weight"].at[: b // 8].set(0)
    return on_mesh, jax.device_put(batch, NamedSharding(mesh, P(AXES)))


def token_loss(params, batch):
    error = jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]).sum(-1)
    return jnp.sum(error * batch["weight"]) / batch["weight"].sum()


def total_loss(params, batch):
    return jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]).sum()


def by_hand(params, batch, loss_fn=mlp_loss, **options):
    """Each half of the batch on one device, with the examples of 4 shards in its ascent."""
    step = sam_optax.value_and_grad(loss_fn, data_shards=4, return_info=True, **options)
    b = len(batch["x"])
    halves = [jax.tree.map(lambda x, i=i: x[i : i + b // 2], batch) for i in (0, b // 2)]
    results = [jax.jit(step)(params, half) for half in halves]
    loss, grads, info = jax.tree.map(lambda *x: sum(x) / 2, *results)
    return (
        loss,
        grads,
        info._replace(
            descent_grad_norm=jnp.float32(norm64(grads)),
            skipped_ascents=sum(result[2].skipped_ascents for result in results),
        ),
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", [{}, {"ascent_steps": 2}, {"ascent_fraction": 1}])
@pytest.mark.parametrize("replicated", [False, True])
def test_each_half_of_the_batch_by_hand(options, replicated):
    mesh = make_mesh()
    params, batch = problem(mesh)
    step = sam_optax.value_and_grad(
        mlp_loss, return_info=True, replicated_params=replicated, **OF_A_SLICE, **options
    )
    local = mlp_params(sizes=SIZES), jax.device_get(batch)
    with jax.set_mesh(mesh):
        assert_trees_close(jax.jit(step)(params, batch), by_hand(*local, **options))


def loss_over_time(params, batch):
    """Of a recurrent network, whose state is zero at first: no shard differs from another there."""

    def after(state, x):
        return jnp.tanh(state + x), None

    features = jnp.moveaxis(batch["x"] @ params["hidden"]["kernel"], 1, 0)
    last, _ = jax.lax.scan(after, jnp.zeros(features.shape[1:]), features)
    return mlp_loss(params, batch) + jnp.square(last).mean()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("specs", [None, {**TENSOR_PARALLEL}], ids=["replicated", "model"])
@pytest.mark.parametrize("replicated", [False, True])
def test_losses_that_start_from_a_constant(replicated, specs):
    mesh = make_mesh(shape=(2, 4) if specs is None else (2, 2, 2))
    params, batch = problem(mesh, specs)
    step = sam_optax.value_and_grad(
        loss_over_time, return_info=True, replicated_params=replicated, **OF_A_SLICE
    )
    local = mlp_params(sizes=SIZES), jax.device_get(batch)
    with jax.set_mesh(mesh):
        result = jax.jit(step)(params, batch)
    if specs is None:
        assert_trees_close(result, by_hand(*local, loss_fn=loss_over_time))
    else:  # two data shards a slice
        one_shard = sam_optax.value_and_grad(loss_over_time, data_shards=2)
        halves = [jax.tree.map(lambda x, i=i: x[i : i + 32], local[1]) for i in (0, 32)]
        of_halves = [one_shard(local[0], half) for half in halves]
        assert_trees_close(result[:2], jax.tree.map(lambda *x: sum(x) / 2, *of_halves))


CASES = {
    "tokens": {"loss_reduction": lambda batch: batch["weight"].sum()},
    "sum": {"loss_reduction": "sum"},
    "accumulated": {"accumulation_steps": 2},
    "asam": {"perturbation": sam_optax.adaptive_perturbation()},
    # The gradient of the dual norm, which is ASAM's with eta=0: differentiated where it is used.
    "by a gradient": {
        "perturbation": lambda g, w, rho: jax.tree.map(
            lambda g, w: rho * jax.grad(lambda g: jnp.linalg.norm(w * g))(g), g, w
        )
    },
    "in a loop": {
        "perturbation": lambda g, w, rho: jax.lax.fori_loop(
            0, 2, lambda _, e: jax.tree.map(lambda e, w: e + 0.1 * rho * w, e, w), g
        )
    },
    "mask": {"perturb": lambda path: path.startswith("hidden")},
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", CASES)
def test_one_reduction_has_the_same_result(name, kind, request):
    if kind == AxisType.Explicit and name != "tokens":
        request.getfixturevalue("whole_contract")
    mesh = make_mesh(kind)
    params, batch = problem(mesh)
    loss_fn = {"tokens": token_loss, "sum": total_loss}.get(name, mlp_loss)
    settings = CASES[name] | OF_A_SLICE
    if kind == AxisType.Explicit:
        del settings["data_axes"]
    step = functools.partial(sam_optax.value_and_grad, loss_fn, return_info=True, **settings)
    with jax.set_mesh(mesh):
        once = jax.jit(step(replicated_params=True))(params, batch)
        assert_trees_close(once, jax.jit(step())(params, batch))


def test_the_ascent_is_reduced_in_that_dtype_too():
    mesh = make_mesh()
    step = functools.partial(
        sam_optax.value_and_grad, mlp_loss, return_info=True, replicated_params=True, **OF_A_SLICE
    )
    with jax.set_mesh(mesh):
        wide, narrow = (
            float(jax.jit(step(reduction_dtype=dtype))(*problem(mesh))[2].ascent_grad_norm)
            for dtype in (None, jnp.bfloat16)
        )
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.01)


def test_with_the_parameters_sharded_over_a_model_axis():
    mesh = make_mesh(shape=(2, 2, 2))
    step = functools.partial(sam_optax.value_and_grad, mlp_loss, return_info=True, **OF_A_SLICE)
    with jax.set_mesh(mesh):
        split = jax.jit(step(replicated_params=True))(*problem(mesh, TENSOR_PARALLEL))
        assert_trees_close(split, jax.jit(step())(*problem(mesh)))
    assert split[1]["hidden"]["kernel"].sharding.spec == P(None, "model")


def test_a_group_over_several_axes():
    mesh = make_mesh(shape=(2, 2, 2))
    settings = {"data_axes": (*AXES, "model"), "group_axes": "slice", "return_info": True}
    step = functools.partial(sam_optax.value_and_grad, mlp_loss, **settings)
    with jax.set_mesh(mesh):
        once = jax.jit(step(replicated_params=True))(*problem(mesh))
        assert_trees_close(once, jax.jit(step())(*problem(mesh)))


@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (1, 1)])
def test_axes_of_size_1(shape):
    mesh = make_mesh(shape=shape)
    params, batch = problem(mesh)
    step = functools.partial(sam_optax.value_and_grad, mlp_loss, return_info=True, **OF_A_SLICE)
    with jax.set_mesh(mesh):
        once = jax.jit(step(replicated_params=True))(params, batch)
        assert_trees_close(once, jax.jit(step())(params, batch))


def test_a_slice_without_a_direction():
    mesh = make_mesh()
    params, batch = problem(mesh)
    batch["weight"] = batch["weight"].at[:32].set(0)
    step = sam_optax.value_and_grad(
        token_loss, return_info=True, replicated_params=True, **OF_A_SLICE, **CASES["tokens"]
    )
    with jax.set_mesh(mesh):
        loss, grads, info = jax.jit(step)(params, batch)
    second = jax.tree.map(lambda x: x[32:], jax.device_get(batch))
    alone = sam_optax.value_and_grad(token_loss, return_info=True, data_shards=4, **CASES["tokens"])
    # The second slice's ascent is a mean over shards, which weigh as much as their tokens.
    expected = jax.jit(alone)(mlp_params(sizes=SIZES), second)
    assert info.skipped_ascents == 1
    assert_trees_close((loss, grads), expected[:2])
    assert_trees_close(info._replace(skipped_ascents=0), expected[2]._replace(skipped_ascents=0))


@pytest.mark.parametrize("replicated", [False, True])
def test_an_ascent_on_padding_alone(replicated):
    # Each shard's first examples are padding in the first slice, and its others are not.
    mesh = make_mesh()
    params, batch = problem(mesh)
    weight = jnp.where((jnp.arange(64) < 32) & (jnp.arange(64) % 8 < 2), 0, 1.0)
    batch["weight"] = jax.device_put(weight, batch["weight"].sharding)
    step = sam_optax.value_and_grad(
        token_loss,
        return_info=True,
        replicated_params=replicated,
        **OF_A_SLICE,
        **CASES["tokens"],
    )
    with jax.set_mesh(mesh):
        info = jax.jit(step)(params, batch)[2]
    assert info.skipped_ascents == 1 and np.isfinite([info.cosine, info.descent_loss]).all()
    assert np.isnan([info.ascent_loss, info.ascent_grad_norm]).all()  # 0 / 0, as a mean has it


def test_the_mean_norm_does_not_overflow():
    mesh = make_mesh()
    on_mesh = problem(mesh)

    def steep(params, batch):
        return 1.2e38 * params["out"]["kernel"][0, 0] * jnp.mean(jnp.ones_like(batch["x"]))

    step = sam_optax.value_and_grad(
        steep, rho=1e-3, return_info=True, replicated_params=True, **OF_A_SLICE
    )
    with jax.set_mesh(mesh):
        info = jax.jit(step)(*on_mesh)[2]
    np.testing.assert_allclose(info.ascent_grad_norm, 1.2e38, rtol=1e-6)


def test_aux_is_the_whole_batchs_in_order():
    def loss_fn(params, batch):
        outputs = mlp_outputs(params, batch["x"])
        return mlp_loss(params, batch), {"outputs": outputs, "mean": outputs.mean()}

    mesh = make_mesh()
    params, batch = problem(mesh)
    settings = OF_A_SLICE | {"rho": 1e-30, "has_aux": True, "replicated_params": True}
    with jax.set_mesh(mesh):
        (_, aux), _ = jax.jit(sam_optax.value_and_grad(loss_fn, **settings))(params, batch)
    assert_trees_close(aux, loss_fn(mlp_params(sizes=SIZES), jax.device_get(batch))[1])


def reduced(compiled):
    """Return the bytes of the arrays of rank 1 or more that are reduced, by the kind of group."""
    kinds = {("data",): "in a slice", ("slice",): "between slices", ("slice", "data"): "everywhere"}
    total = dict.fromkeys(kinds.values(), 0)
    for line in compiled.as_text().splitlines():
        if match := re.search(r"= (.*?) all-reduce(?:-start)?\(.*replica_groups=(.*)", line):
            shapes = [
                map(int, dims.split(",")) for dims in re.findall(r"f32\[([\d,]+)\]", match[1])
            ]
            axes = hlo.axes_of(hlo.replica_groups(match[2]), {"slice": 2, "data": 4})
            total[kinds[axes]] += sum(4 * math.prod(shape) for shape in shapes)
    return total


@pytest.mark.parametrize(("replicated", "ways"), [(False, (2, 1, 0)), (True, (1, 0, 1))])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_only_the_descent_gradient_crosses_the_slices(replicated, ways, accumulation_steps):
    mesh = make_mesh()
    on_mesh = problem(mesh)
    step = sam_optax.value_and_grad(
        mlp_loss,
        replicated_params=replicated,
        accumulation_steps=accumulation_steps,
        **OF_A_SLICE,
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*on_mesh).compile()
    copy = sum(w.nbytes for w in jax.tree.leaves(on_mesh[0]))
    in_copies = {kind: n / copy for kind, n in reduced(compiled).items()}
    names = ("in a slice", "between slices", "everywhere")
    assert in_copies == dict(zip(names, ways, strict=True))


def test_the_optimizer_takes_it_too():
    mesh = make_mesh()
    params, batch = problem(mesh)
    tx = sam_optax.sharpness_aware(optax.sgd(1.0), replicated_params=True, **OF_A_SLICE)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(functools.partial(tx.update, grad_fn=jax.grad(mlp_loss)))(
            None, tx.init(params), params, batch=batch
        )
    _, expected, _ = by_hand(mlp_params(sizes=SIZES), jax.device_get(batch))
    assert_trees_close(jax.tree.map(jnp.negative, updates), expected)


def test_parameters_that_are_not_replicated():
    mesh = make_mesh(AxisType.Explicit)
    params, batch = problem(mesh, jax.tree.map(lambda _: P("data"), mlp_params()))
    step = sam_optax.value_and_grad(mlp_loss, group_axes="slice", replicated_params=True)
    message = r"bias.* sharded over \['data'\], but .* leave replicated_params out"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        step(params, batch)
    params, batch = problem(mesh, jax.tree.map(lambda _: P("slice"), mlp_params()))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="leave group_axes out"):
        step(params, batch)


def test_notes_are_of_what_went_wrong():
    mesh = make_mesh(AxisType.Explicit)
    params, batch = problem(mesh)
    settings = {"group_axes": "slice", "replicated_params": True}
    no_weight = sam_optax.value_and_grad(
        mlp_loss, loss_reduction=lambda batch: batch["weight"], **settings
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="must return a real scalar") as error:
        jax.jit(no_weight)(params, batch)
    assert "sam_optax" not in "".join(error.value.__notes__)  # nor of the examples in the ascent

    if jax.__version_info__ < (0, 10):
        return  # JAX 0.9 makes the argument below whole by itself
    step = sam_optax.value_and_grad(lambda w, batch, x: mlp_loss(w, batch) * x.sum(), **settings)
    sharded = jax.device_put(jnp.ones(4), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="in_specs") as error:
        jax.jit(step)(params, batch, sharded)
    assert "argument besides the batch must be whole" in "".join(error.value.__notes__)

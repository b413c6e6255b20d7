"""On a mesh: the same numbers as on one device, no example moved, no more communication."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import bytes_of, collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    assert_trees_close,
    assert_trees_equal,
    examples_last,
    mlp_batch,
    mlp_loss,
    mlp_outputs,
    mlp_params,
    norm64,
)

import sam_optax

SIZES = (8, 16, 4)
REPLICATED = {"hidden": {"kernel": P(), "bias": P()}, "out": {"kernel": P()}}
TENSOR_PARALLEL = {
    "hidden": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model", None)},
}
FSDP = {"hidden": {"kernel": P("data", None), "bias": P("data")}, "out": {"kernel": P("data")}}
BOTH = {
    "hidden": {"kernel": P("data", "model"), "bias": P("model")},
    "out": {"kernel": P("model", "data")},
}
LAYOUTS = {"replicated": REPLICATED, "model": TENSOR_PARALLEL, "fsdp": FSDP, "both": BOTH}


def make_mesh(kind="auto", shape=(4, 2), names=("data", "model")):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names))


def put(mesh, tree, spec):
    specs = jax.tree.map(lambda _: spec, tree) if isinstance(spec, P) else spec
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def problem(mesh, layout=REPLICATED, b=64, data="data"):
    """Parameters and batch on one device, and the same on the mesh."""
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=b, sizes=SIZES)
    return (params, batch), (put(mesh, params, layout), put(mesh, batch, P(data)))


OPTIONS = {
    "sam": ({}, {"data_shards": 4}),
    "paper": ({"m": 2}, {"m": 2, "data_shards": 4}),
    "foret": (
        {"m": 2, "m_sharpness": "foret"},
        {"m": 2, "m_sharpness": "foret", "data_shards": 4},
    ),
    "accumulated": ({"accumulation_steps": 4}, {"data_shards": 4}),
    "two steps": ({"ascent_steps": 2}, {"ascent_steps": 2, "data_shards": 4}),
    "asam": (
        {"perturbation": sam_optax.adaptive_perturbation()},
        {"perturbation": sam_optax.adaptive_perturbation(), "data_shards": 4},
    ),
}


@functools.cache
def step_on_one_device(name):
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=64, sizes=SIZES)
    gradient = sam_optax.value_and_grad(mlp_loss, return_info=True, **OPTIONS[name][1])
    return jax.jit(gradient)(params, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_auto_mesh_equals_one_device(request, name, layout):
    # "both" is both of the others, and "foret" is the form in which groups share the batch out.
    if name != "sam" and (layout in ("model", "fsdp") or name == "paper"):
        request.getfixturevalue("whole_contract")
    sharded, expected = OPTIONS[name][0], step_on_one_device(name)
    mesh = make_mesh()
    _, on_mesh = problem(mesh, LAYOUTS[layout])
    gradient = sam_optax.value_and_grad(mlp_loss, return_info=True, data_axes="data", **sharded)
    with jax.set_mesh(mesh):
        assert_trees_close(jax.jit(gradient)(*on_mesh), expected)
    if layout != "replicated":
        return
    named = sam_optax.value_and_grad(
        mlp_loss, return_info=True, data_axes="data", mesh=mesh, **sharded
    )
    assert_trees_close(jax.jit(named)(*on_mesh), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_explicit_mesh_reads_the_layout_from_the_types(name):
    mesh = make_mesh("explicit")
    _, on_mesh = problem(mesh)
    gradient = sam_optax.value_and_grad(mlp_loss, return_info=True, **OPTIONS[name][0])
    with jax.set_mesh(mesh):
        assert_trees_close(jax.jit(gradient)(*on_mesh), step_on_one_device(name))
        assert sam_optax.ascent_batch(on_mesh[1])["x"].shape == (16, 8)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({}, {"data_shards": 4}),
        ({"data_shards": 4, "m": 2}, {"data_shards": 4, "m": 2}),
        ({"data_axes": "data", "m": 2}, {"data_shards": 4, "m": 2}),
        ({"accumulation_steps": 2}, {"data_shards": 4}),
        ({"reduction_dtype": "float32"}, {"data_shards": 4}),
        ({"group_axes": "data"}, {"m": 4, "m_sharpness": "foret"}),
    ],
)
@pytest.mark.parametrize("as_argument", [False, True])
def test_an_explicit_mesh_that_only_the_types_know(options, alone, as_argument):
    """As `jax.make_mesh` makes it, and without `jax.set_mesh`."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    assert mesh.axis_types == (AxisType.Explicit,)
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=32, sizes=SIZES)
    expected = jax.jit(sam_optax.value_and_grad(mlp_loss, **alone))(params, batch)
    options = options | ({"mesh": mesh} if as_argument else {})
    gradient = jax.jit(sam_optax.value_and_grad(mlp_loss, **options))
    assert_trees_close(gradient(put(mesh, params, P()), put(mesh, batch, P("data"))), expected)


def test_groups_on_an_auto_axis_of_a_mesh_that_only_the_types_know():
    kinds = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    (params, batch), on_mesh = problem(mesh, layout=P())
    gradient = functools.partial(sam_optax.value_and_grad, mlp_loss)
    result = jax.jit(gradient(group_axes="data"))(*on_mesh)
    assert_trees_close(result, jax.jit(gradient(m=4, m_sharpness="foret"))(params, batch))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("return_info", [False, True])
def test_a_schedule_of_rho_whose_count_lies_on_the_mesh(kind, return_info):
    mesh = make_mesh(kind)
    given, on_mesh = problem(mesh)

    def updates(params, batch, **options):
        rho = optax.linear_schedule(0.1, 0.2, 3)
        tx = sam_optax.sharpness_aware(optax.sgd(0.1), rho, **options)
        state = jax.jit(tx.init)(params)
        grad_fn = jax.value_and_grad(mlp_loss)
        step = functools.partial(tx.update, grad_fn=grad_fn, return_info=return_info)
        return jax.jit(lambda p, s, b: step(None, s, p, batch=b))(params, state, batch)

    with jax.set_mesh(mesh):
        result = updates(*on_mesh, data_axes="data", group_axes="data")
    assert_trees_close(result, updates(*given, m=4, m_sharpness="foret"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", [{"m": 2}, {"m": 2, "m_sharpness": "foret"}])
@pytest.mark.parametrize("explicit", ["replica", "data"])
def test_groups_one_after_another_of_a_batch_over_an_explicit_and_an_auto_axis(explicit, options):
    names = ("replica", "data")
    kinds = (AxisType.Explicit if name == explicit else AxisType.Auto for name in names)
    mesh = jax.make_mesh((4, 2), names, axis_types=tuple(kinds))
    (params, batch), on_mesh = problem(mesh, layout=P(), data=names)
    gradient = functools.partial(sam_optax.value_and_grad, mlp_loss, **options)
    with jax.set_mesh(mesh):
        result = jax.jit(gradient(data_axes=names))(*on_mesh)
    assert_trees_close(result, jax.jit(gradient(data_shards=8))(params, batch))


@pytest.mark.parametrize(
    ("data_axes", "groups"),
    [
        ("data", {}),
        ("data", {"group_axes": "data"}),
        (("model", "data"), {}),
        (("model", "data"), {"group_axes": "model"}),
        (("data", "model"), {}),
    ],
)
def test_data_axes_that_the_types_contradict(data_axes, groups):
    mesh = make_mesh("explicit")
    typed = "data" if data_axes == ("data", "model") else ("data", "model")
    _, on_mesh = problem(mesh, layout=P(), data=typed)
    gradient = sam_optax.value_and_grad(mlp_loss, data_axes=data_axes, **groups)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"batch\['x'\] is sharded over"):
        gradient(*on_mesh)


def test_several_data_axes():
    mesh = make_mesh("explicit", (2, 2, 2), ("replica", "data", "model"))
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=32, sizes=SIZES)
    expected = sam_optax.value_and_grad(mlp_loss, data_shards=4)(params, batch)
    axes = ("replica", "data")
    with jax.set_mesh(mesh):
        on_mesh = put(mesh, params, P()), put(mesh, batch, P(axes))
        assert_trees_close(jax.jit(sam_optax.value_and_grad(mlp_loss))(*on_mesh), expected)
    auto = make_mesh("auto", (2, 2, 2), ("replica", "data", "model"))
    on_mesh = put(auto, params, P()), put(auto, batch, P(axes))
    gradient = sam_optax.value_and_grad(mlp_loss, data_axes=axes, mesh=auto)
    assert_trees_close(jax.jit(gradient)(*on_mesh), expected)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_at_least_one_example_a_shard(kind):
    mesh = make_mesh(kind, (8,), ("data",))
    local, on_mesh = problem(mesh, b=16)
    options = {"data_axes": "data"} if kind == "auto" else {}
    with jax.set_mesh(mesh):
        taken = jax.jit(lambda x: sam_optax.ascent_batch(x, **options))(on_mesh[1])
    np.testing.assert_array_equal(taken["x"], local[1]["x"][::2])


# Inside shard_map each shard has its own batch, and its own first examples.


def test_inside_shard_map():
    mesh = make_mesh("auto", (8,), ("data",))
    (params, batch), on_mesh = problem(mesh)

    def loss_fn(params, batch):
        return jax.lax.pmean(mlp_loss(params, batch), "data")

    gradient = sam_optax.value_and_grad(loss_fn, data_axes="data", mesh=mesh)
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    expected = sam_optax.value_and_grad(mlp_loss, data_shards=8)(params, batch)
    assert_trees_close(jax.jit(mapped)(*on_mesh), expected)


def test_inside_shard_map_losses_of_the_shards_alone_are_a_sum():
    mesh = make_mesh("auto", (8,), ("data",))
    (params, batch), on_mesh = problem(mesh)

    def mean_of_all(params, batch):
        return jax.lax.pmean(sam_optax.value_and_grad(mlp_loss)(params, batch), "data")

    mapped = jax.shard_map(mean_of_all, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    loss, grads = sam_optax.value_and_grad(mlp_loss, data_shards=8)(params, batch)
    expected = loss, jax.tree.map(lambda g: 8 * g, grads)
    assert_trees_close(jax.jit(mapped)(*on_mesh), expected)


def test_inside_shard_map_each_shard_may_have_parameters_of_its_own():
    mesh = make_mesh("auto", (4,), ("data",))
    w, x = jnp.arange(8.0).reshape(4, 2), jax.random.normal(jax.random.key(0), (4, 8, 2))

    def gradient(w, x):
        return sam_optax.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2))(w[0], x[0])[1][None]

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    expected = jnp.concatenate([gradient(w[i : i + 1], x[i : i + 1]) for i in range(4)])
    assert_trees_close(jax.jit(mapped)(w, x), expected)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_inside_shard_map_parameters_split_by_hand_need_a_norm_over_all_shards(accumulation_steps):
    mesh = make_mesh("auto", (4,), ("data",))
    w, x = jnp.arange(1.0, 9.0), jax.random.normal(jax.random.key(0), (32, 8))

    def loss_fn(w, x):
        return jnp.mean((x @ w - 1) ** 2)

    def of_a_part(part, x):  # FSDP by hand
        return jax.lax.pmean(loss_fn(jax.lax.all_gather(part, "data", tiled=True), x), "data")

    def along_all(grads, params, rho):
        return rho * grads / jnp.sqrt(jax.lax.psum(jnp.sum(grads**2), "data"))

    def mapped(**options):
        gradient = sam_optax.value_and_grad(
            of_a_part, accumulation_steps=accumulation_steps, **options
        )
        specs = {"in_specs": (P("data"), P("data")), "out_specs": (P(), P("data"))}
        return jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(w, x)

    for ours in (None, sam_optax.gradient_perturbation, sam_optax.adaptive_perturbation()):
        with pytest.raises(ValueError, match=r"all shards of \['data'\], and a parameter is not"):
            mapped(perturbation=ours)
    expected = sam_optax.value_and_grad(loss_fn, data_shards=4)(w, x)
    assert_trees_close(mapped(perturbation=along_all), expected)


def test_inside_shard_map_that_adds_nothing_up_each_shard_is_a_group():
    mesh = make_mesh("auto", (8,), ("data",))
    (params, batch), on_mesh = problem(mesh)

    def mean_of_steps(params, batch):
        return jax.lax.pmean(sam_optax.value_and_grad(mlp_loss)(params, batch), "data")

    mapped = jax.shard_map(
        mean_of_steps, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    expected = sam_optax.value_and_grad(mlp_loss, m=8, m_sharpness="foret")(params, batch)
    assert_trees_close(jax.jit(mapped)(*on_mesh), expected)


# Communication.


def compiled_step(gradient, mesh, on_mesh):
    with jax.set_mesh(mesh):
        return jax.jit(gradient).lower(*on_mesh).compile()


def flops_of(compiled):
    return compiled.cost_analysis()["flops"]


PLAIN = jax.value_and_grad(mlp_loss)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_no_collective_moves_an_example(kind):
    mesh = make_mesh(kind)
    _, on_mesh = problem(mesh)
    options = {"data_axes": "data"} if kind == "auto" else {}
    ours = compiled_step(sam_optax.value_and_grad(mlp_loss, **options), mesh, on_mesh)
    assert {c.kind for c in collectives(ours)} == {"all-reduce"}
    if kind == "auto":  # what it saves: the prefix slice permutes
        prefix = compiled_step(sam_optax.value_and_grad(mlp_loss), mesh, on_mesh)
        assert "collective-permute" in {c.kind for c in collectives(prefix)}


# Not "model" on explicit axes: mlp_loss does not say how its products are sharded.
@pytest.mark.parametrize(
    ("layout", "kind"), [("replicated", "auto"), ("replicated", "explicit"), ("model", "auto")]
)
def test_groups_on_the_mesh_reduce_one_gradient(layout, kind):
    mesh = make_mesh(kind)
    _, on_mesh = problem(mesh, LAYOUTS[layout])
    plain = compiled_step(PLAIN, mesh, on_mesh)
    one_point = compiled_step(sam_optax.value_and_grad(mlp_loss, data_axes="data"), mesh, on_mesh)
    groups = compiled_step(
        sam_optax.value_and_grad(mlp_loss, data_axes="data", group_axes="data"), mesh, on_mesh
    )
    gradient = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(on_mesh[0]))
    assert bytes_of(one_point, "all-reduce") >= bytes_of(plain, "all-reduce") + gradient
    if layout == "replicated":
        assert bytes_of(groups, "all-reduce") == bytes_of(plain, "all-reduce")
        assert len(collectives(groups)) == len(collectives(plain))
        # One multiplication a weight more, by a group's share, for the ascent's all-reduce less.
        weights = sum(x.size for x in jax.tree.leaves(on_mesh[0]))
        assert flops_of(groups) - flops_of(one_point) < weights / 2, weights
    else:  # a quarter more activations cross the model axis, and the norm does
        activations = bytes_of(plain, "all-reduce") - gradient
        extra = bytes_of(groups, "all-reduce") - bytes_of(plain, "all-reduce")
        assert extra <= activations / 4 + 100


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_groups_on_the_mesh_are_foret_groups(kind, fraction):
    mesh = make_mesh(kind)
    local, on_mesh = problem(mesh)
    alone = {"ascent_fraction": fraction, "m": 4, "m_sharpness": "foret", "return_info": True}
    expected = sam_optax.value_and_grad(mlp_loss, **alone)(*local)
    groups = {"ascent_fraction": fraction, "group_axes": "data", "return_info": True}
    with jax.set_mesh(mesh):
        gradient = sam_optax.value_and_grad(mlp_loss, **groups)
        assert_trees_close(jax.jit(gradient)(*on_mesh), expected)


@pytest.mark.parametrize(
    "way",
    [{}, {"group_axes": "data"}, {"reduction_dtype": "float32"}, {"accumulation_steps": 2}],
    ids=str,
)
def test_arguments_besides_the_batch_on_an_explicit_mesh(way):
    """A dropout key, an array, and text, with fewer examples than shards times shards."""

    def loss_fn(params, batch, key, *, target, kind):
        assert kind == "tanh"
        mask = jax.random.bernoulli(key, 0.8, (1, 3))
        return jnp.mean((jnp.tanh(batch * mask @ params) - target) ** 2), {"all": batch[:, 0]}

    params, batch = jax.random.normal(jax.random.key(0), (3,)), jnp.arange(96.0).reshape(32, 3)
    given = params, jax.random.key(1), jnp.float32(0.5)
    results = []
    for kind in ("auto", "explicit"):
        mesh = make_mesh(kind, (8,), ("data",))
        gradient = sam_optax.value_and_grad(loss_fn, has_aux=True, data_axes="data", **way)
        with jax.set_mesh(mesh):
            step = jax.jit(functools.partial(gradient, kind="tanh"))
            w, key, target = put(mesh, given, P())
            results.append(step(w, put(mesh, batch, P("data")), key, target=target))
    assert_trees_close(*jax.tree.map(np.asarray, results))


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("shape", "spec", "shards"),
    [((1, 8), P("data", "model"), 1), ((4, 1), P(("data", "model")), 4)],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{"m": 2, "m_sharpness": "foret"}, {"accumulation_steps": 2}, {"reduction_dtype": "float32"}],
)
def test_explicit_axes_of_size_1(options, shape, spec, shards):
    mesh = make_mesh("explicit", shape)

    def loss_fn(w, batch):
        return jnp.mean(jnp.tanh(batch * w) ** 2)

    batch = jax.random.normal(jax.random.key(0), (32, 8))
    alone = {key: value for key, value in options.items() if key != "reduction_dtype"}
    expected = sam_optax.value_and_grad(loss_fn, data_shards=shards, **alone)(2.0, batch)
    w, batch = put(mesh, jnp.asarray(2.0), P()), put(mesh, batch, spec)
    assert_trees_close(jax.jit(sam_optax.value_and_grad(loss_fn, **options))(w, batch), expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("shape", "kind"), [((1, 1, 8), "auto"), ((1, 4, 2), "explicit")], ids=["auto", "explicit"]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"combine_aux": lambda aux: jax.tree.map(jnp.squeeze, aux)},
        {"accumulation_steps": 2},
        {"reduction_dtype": jnp.bfloat16},
    ],
    ids=lambda options: ",".join(options),
)
def test_one_group_is_the_step_without_groups(options, shape, kind):
    """As with a pod's settings on one of its slices."""
    mesh = make_mesh(kind, shape, ("replica", "data", "model"))

    def loss_fn(params, batch):
        hidden = jnp.tanh(jnp.einsum("bi,ij->bj", batch, params["in"], **out("model")))
        outputs = jnp.einsum("bj,j->b", hidden, params["out"], **out())
        return jnp.mean(jnp.square(outputs - 1)), {"outputs": outputs}

    def out(*axes):
        spec = P(("replica", "data"), *axes)
        return {"out_sharding": NamedSharding(mesh, spec)} if kind == "explicit" else {}

    params = {"in": jnp.ones((8, 16)) / 8, "out": jnp.linspace(-1, 1, 16)}
    batch = jnp.sin(jnp.arange(128.0)).reshape(16, 8)
    with jax.set_mesh(mesh):
        w = put(mesh, params, {"in": P("data", "model"), "out": P("model")})
        x = put(mesh, batch, P(("replica", "data")))

        def step(**options):
            options |= {"data_axes": ("replica", "data"), "has_aux": True, "return_info": True}
            return jax.jit(sam_optax.value_and_grad(loss_fn, **options))(w, x)

        results = step(), step(**options, group_axes="replica")
    assert_trees_close(*jax.tree.map(np.asarray, results))


@pytest.mark.parametrize("size", [1, 8])
def test_an_ascent_reduced_over_one_shard(size):
    mesh = make_mesh(shape=(1, size))
    w, x = put(mesh, jnp.ones((4, 8)), P(None, "model")), put(mesh, jnp.eye(4, 4), P("data"))
    gradient = functools.partial(
        sam_optax.value_and_grad, lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2), data_axes="data"
    )
    with jax.set_mesh(mesh):
        reduced = jax.jit(gradient(reduction_dtype=jnp.bfloat16))(w, x)
        assert_trees_equal(reduced, jax.jit(gradient())(w, x))


def test_the_aux_of_an_ascent_that_is_reduced_is_nobodys():
    gradient = sam_optax.value_and_grad(
        lambda w, batch: (mlp_loss(w, batch), {"name": "text"}),
        has_aux=True,
        data_axes="data",
        mesh=make_mesh(),
        reduction_dtype=jnp.bfloat16,
    )

    def aux_is_kept(params, batch):
        assert gradient(params, batch)[0][1] == {"name": "text"}

    jax.eval_shape(aux_is_kept, mlp_params(), mlp_batch())


@pytest.mark.parametrize("way", [{"m": 2}, {"accumulation_steps": 2}, {"group_axes": "data"}])
def test_a_mesh_of_which_one_axis_is_explicit(way):
    def loss_fn(params, batch):
        hidden = jnp.tanh(batch @ params["in"])
        return jnp.mean((jnp.dot(hidden, params["out"], out_sharding=P(None)) - 1) ** 2)

    auto, explicit = (
        jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, kind))
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
    params = {
        "in": jax.random.normal(jax.random.key(0), (4, 8)),
        "out": jax.random.normal(jax.random.key(1), (8,)),
    }
    batch = jax.random.normal(jax.random.key(2), (32, 4))
    results = []
    for mesh in (auto, explicit):
        with jax.set_mesh(mesh):
            w = put(mesh, params, {"in": P(None, "model"), "out": P("model")})
            gradient = sam_optax.value_and_grad(loss_fn, data_axes="data", **way)
            results.append(jax.jit(gradient)(w, put(mesh, batch, P("data"))))
    assert_trees_close(*jax.tree.map(np.asarray, results))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="JAX 0.9 has no select over an explicit axis of vmap's"
)
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"accumulation_steps": 2},
        {"m": 2, "return_info": True},
        {"m": 2, "m_sharpness": "foret"},
    ],
)
def test_seeds_on_an_explicit_axis(way):
    def loss_fn(params, batch):
        losses = (jnp.tanh(batch["x"] @ params) - 1) ** 2
        return jnp.sum(losses * batch["weight"]) / batch["weight"].sum()

    mesh = make_mesh("explicit", (8,), ("seed",))
    params = jax.random.normal(jax.random.key(0), (8, 3))
    batch = {
        "x": jax.random.normal(jax.random.key(1), (8, 16, 3)),
        "weight": 1.0 + jnp.arange(128.0).reshape(8, 16) % 5,
    }
    gradient = sam_optax.value_and_grad(
        loss_fn, loss_reduction=lambda batch: batch["weight"].sum(), **way
    )
    with jax.set_mesh(mesh):
        of_all = jax.jit(jax.vmap(gradient, spmd_axis_name="seed"))(
            put(mesh, params, P("seed")), put(mesh, batch, P("seed"))
        )
    one_by_one = [gradient(w, jax.tree.map(lambda x: x[i], batch)) for i, w in enumerate(params)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    assert_trees_close(*jax.tree.map(np.asarray, (of_all, together)))


@pytest.mark.parametrize("return_info", [False, True])
def test_seeds_whose_parameters_are_sharded_over_an_explicit_axis(return_info):
    def loss_fn(params, batch):
        whole = jax.sharding.reshard(params, P()) if jax.typeof(params).sharding.spec[0] else params
        return jnp.mean((jnp.tanh(batch @ whole) - 1) ** 2)

    mesh = make_mesh("explicit", (8,), ("data",))
    params = jax.random.normal(jax.random.key(0), (3, 16))
    batch = jax.random.normal(jax.random.key(1), (16, 16))
    gradient = sam_optax.value_and_grad(loss_fn, return_info=return_info)
    with jax.set_mesh(mesh):
        of_all = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(
            put(mesh, params, P(None, "data")), put(mesh, batch, P("data"))
        )
    assert jax.typeof(of_all[1]).sharding.spec == P(None, "data")
    alone = sam_optax.value_and_grad(loss_fn, return_info=return_info, data_shards=8)
    together = jax.tree.map(lambda *x: jnp.stack(x), *(alone(w, batch) for w in params))
    assert_trees_close(*jax.tree.map(np.asarray, (of_all, together)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "tokens"])
def test_groups_on_the_mesh_with_unequal_padding(reduction):
    def total(params, batch):
        error = jnp.square(mlp_outputs(params, batch["x"]) - batch["y"]).sum(-1)
        return jnp.sum(error * batch["weight"])

    def loss_fn(params, batch):
        scale = {"mean": len(batch["x"]), "sum": 1.0, "tokens": batch["weight"].sum()}[reduction]
        return total(params, batch) / scale

    mesh = make_mesh()
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=64, sizes=SIZES)
    batch["weight"] = jnp.asarray(np.arange(64) % 7 < 1 + np.arange(64) // 16, jnp.float32)
    on_mesh = put(mesh, params, P()), put(mesh, batch, P("data"))
    rule = (lambda batch: batch["weight"].sum()) if reduction == "tokens" else reduction
    options = {"rho": 1e-30, "loss_reduction": rule, "data_axes": "data", "mesh": mesh}
    for way in ({"group_axes": "data"}, {"accumulation_steps": 4}):
        gradient = sam_optax.value_and_grad(loss_fn, **options, **way)
        assert_trees_close(jax.jit(gradient)(*on_mesh), jax.value_and_grad(loss_fn)(params, batch))


@pytest.mark.parametrize("way", [{"group_axes": "data"}, {"accumulation_steps": 4}])
def test_aux_of_a_divided_batch_is_in_order(way):
    def loss_fn(params, batch, key, *, scale):
        outputs = mlp_outputs(params, batch["x"]) * scale
        aux = {"outputs": outputs, "mean": outputs.mean(), "ids": batch["id"]}
        return mlp_loss(params, batch), aux

    mesh = make_mesh()
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=64, sizes=SIZES)
    batch["id"] = jnp.arange(64)
    on_mesh = put(mesh, params, P()), put(mesh, batch, P("data"))
    extra = {"scale": 2.0}
    gradient = sam_optax.value_and_grad(
        loss_fn, rho=1e-30, has_aux=True, data_axes="data", mesh=mesh, **way
    )
    (_, aux), _ = jax.jit(gradient)(*on_mesh, jax.random.key(0), **extra)
    _, expected = loss_fn(params, batch, None, **extra)
    assert_trees_close(aux, expected)
    own = sam_optax.value_and_grad(
        loss_fn,
        has_aux=True,
        data_axes="data",
        mesh=mesh,
        combine_aux=lambda aux: aux["ids"].max(),
        **way,
    )
    assert jax.jit(own)(*on_mesh, None, **extra)[0][1] == 63


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("way", [{}, {"group_axes": "data"}])
def test_narrow_reductions_change_the_result_little(way, dtype):
    mesh = make_mesh()
    _, on_mesh = problem(mesh)
    on_mesh = jax.tree.map(lambda w: w.astype(dtype), on_mesh[0]), on_mesh[1]
    options = {"data_axes": "data", "mesh": mesh} | way
    exact = jax.jit(sam_optax.value_and_grad(mlp_loss, **options))(*on_mesh)[1]
    narrow = jax.jit(sam_optax.value_and_grad(mlp_loss, reduction_dtype=jnp.bfloat16, **options))(
        *on_mesh
    )[1]
    exact, narrow = (jax.tree.map(jnp.float32, x) for x in (exact, narrow))
    difference = norm64(jax.tree.map(jnp.subtract, narrow, exact)) / norm64(exact)
    assert 0 <= difference < 0.01
    assert difference > 0 or dtype != jnp.float32


def test_the_optimizer_on_a_mesh():
    mesh = make_mesh()
    local, on_mesh = problem(mesh, TENSOR_PARALLEL)
    alone = sam_optax.sharpness_aware(optax.adam(0.01), data_shards=4)
    sharded = sam_optax.sharpness_aware(optax.adam(0.01), data_axes="data")

    def make_step(tx):
        @jax.jit
        def train_step(params, state, batch):
            updates, state = tx.update(None, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
            return optax.apply_updates(params, updates), state

        return train_step

    params, batch = local
    state, step = alone.init(params), make_step(alone)
    for _ in range(3):
        params, state = step(params, state, batch)
    with jax.set_mesh(mesh):
        params_s, batch_s = on_mesh
        state_s, step_s = jax.jit(sharded.init)(params_s), make_step(sharded)
        for _ in range(3):
            params_s, state_s = step_s(params_s, state_s, batch_s)
        assert step_s._cache_size() <= 2  # the initial state's sharding is the compiler's choice
    assert_trees_close(params_s, params)
    assert params_s["hidden"]["kernel"].sharding.spec == P(None, "model")


# Gradient accumulation.


# In the last, 5 ascent examples do not go into 3 passes of 2.
@pytest.mark.parametrize(
    ("b", "k", "fraction"),
    [(32, 4, 0.125), (32, 4, 0.25), (32, 4, 0.5), (32, 4, 1.0), (20, 10, 0.25)],
)
def test_accumulated_equals_whole(b, k, fraction):
    params, batch = mlp_params(), mlp_batch(b=b)
    sizes = []

    def loss_fn(params, batch):
        sizes.append(len(batch["x"]))
        return mlp_loss(params, batch)

    gradient = sam_optax.value_and_grad(loss_fn, 0.15, fraction, accumulation_steps=k)
    expected = sam_optax.value_and_grad(mlp_loss, 0.15, fraction)(params, batch)
    assert_trees_close(jax.jit(gradient)(params, batch), expected)
    assert max(sizes) <= b // k


def test_accumulation_saves_activations_in_both_passes():
    width, b = 64, 4096
    params = [jnp.zeros((1, width))] + [jnp.zeros((width, width))] * 4

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(jnp.square(x))

    def temporaries(k, fraction):
        gradient = sam_optax.value_and_grad(loss_fn, 0.1, fraction, accumulation_steps=k)
        compiled = jax.jit(gradient).lower(params, jnp.zeros((b, 1))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporaries(1, 0.25)
    for fraction in (0.25, 1.0):
        assert temporaries(8, fraction) < whole / 3


def test_accumulation_composes_with_groups_and_the_optimizer():
    params, batch = mlp_params(), mlp_batch(b=32)
    options = {"accumulation_steps": 2, "m": 2}
    expected = sam_optax.value_and_grad(mlp_loss, m=2)(params, batch)[1]
    tx = sam_optax.sharpness_aware(optax.sgd(1.0), **options)
    updates, _ = tx.update(None, tx.init(params), params, grad_fn=jax.grad(mlp_loss), batch=batch)
    assert_trees_close(jax.tree.map(jnp.negative, updates), expected)
    plain = sam_optax.value_and_grad(mlp_loss, rho=0.0, accumulation_steps=4)
    assert_trees_close(plain(params, batch), jax.value_and_grad(mlp_loss)(params, batch))


def test_accumulation_leaves_alone_what_is_no_larger_than_a_micro_batch():
    settings = {"m": 4, "m_sharpness": "foret"}
    programs = [
        jax.make_jaxpr(sam_optax.value_and_grad(mlp_loss, accumulation_steps=k, **settings))(
            mlp_params(), mlp_batch()
        )
        for k in (1, 2, 4)
    ]
    assert len(set(map(str, programs))) == 1


@pytest.mark.filterwarnings("ignore:.*mesh:DeprecationWarning")
def test_accumulation_inside_groups_of_a_mesh_that_only_the_step_knows():
    # T5X has the mesh in a context of its own, not in jax.set_mesh.
    (params, batch), on_mesh = problem(make_mesh())
    expected = sam_optax.value_and_grad(mlp_loss, m=4, m_sharpness="foret")(params, batch)
    gradient = sam_optax.value_and_grad(
        mlp_loss, group_axes="data", accumulation_steps=2, mesh=make_mesh()
    )
    with make_mesh():
        assert_trees_close(jax.jit(gradient)(*on_mesh), expected)


# What cannot work says so.


@pytest.mark.parametrize(
    ("options", "layout", "b", "message"),
    [
        ({"data_axes": "rows"}, REPLICATED, 64, r"data_axes=\('rows',\).*no \['rows'\].*'data': 4"),
        ({"group_axes": "rows"}, REPLICATED, 64, r"group_axes=\('rows',\).*no \['rows'\]"),
        ({"data_axes": "data"}, REPLICATED, 62, "b=62 .* 4 data shards.* 60 or 64"),
        ({"data_axes": "data", "m": 3}, REPLICATED, 64, "m=3 groups on 4 data shards"),
        (
            {"data_axes": "data", "m": 8, "m_sharpness": "foret"},
            REPLICATED,
            64,
            r"m=8 .* a=32 \(ascent_fraction=0.5\).* group_axes makes groups",
        ),
        ({"data_axes": "data", "group_axes": "model"}, REPLICATED, 64, "must be the first of"),
        ({"group_axes": "data", "m": 2}, REPLICATED, 64, "m=2 is another number of groups"),
        ({"data_axes": "data", "data_shards": 4}, REPLICATED, 64, "give one of them"),
        ({"reduction_dtype": "bfloat16"}, REPLICATED, 64, "not known which: name them"),
        ({"accumulation_steps": 3}, REPLICATED, 64, "accumulation_steps=3: .*b=64 .*63 or 66"),
    ],
)
def test_refusals(options, layout, b, message):
    mesh = make_mesh()
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=b, sizes=SIZES)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        sam_optax.value_and_grad(mlp_loss, **options)(params, batch)


def test_groups_over_an_axis_that_is_manual_already():
    mesh = make_mesh("auto", (2, 4), ("slice", "data"))
    axes = ("slice", "data")
    gradient = sam_optax.value_and_grad(mlp_loss, data_axes=axes, group_axes=axes)
    on_slices = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P(), P("slice")), out_specs=P(), axis_names={"slice"}
    )
    batch = mlp_batch(b=64, sizes=SIZES)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"\['slice'\] are manual .* Leave "):
        jax.jit(on_slices)(mlp_params(sizes=SIZES), batch)


@pytest.mark.parametrize("settings", [{}, {"group_axes": "data"}], ids=str)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_parameters_in_any_arguments(kind, settings):
    mesh = make_mesh(kind)
    _, (params, batch) = problem(mesh)
    settings = {"data_axes": "data", "return_info": True, **settings}

    def loss_fn(hidden, shift, batch, out):
        return mlp_loss({"hidden": jax.tree.map(jnp.add, hidden, shift), "out": out}, batch)

    with jax.set_mesh(mesh):
        shift = jax.tree.map(jnp.ones_like, params["hidden"])
        expected = jax.jit(
            sam_optax.value_and_grad(
                lambda params, batch, shift: loss_fn(params[0], shift, batch, params[1]), **settings
            )
        )((params["hidden"], params["out"]), batch, shift)
        by_two = sam_optax.value_and_grad(loss_fn, argnums=(0, 3), batch_argnums=2, **settings)
        result = jax.jit(by_two)(params["hidden"], shift, batch, params["out"])
    assert_trees_close(result, expected)


def test_groups_over_an_axis_that_the_given_mesh_has_not():
    options = {"mesh": make_mesh(), "data_axes": "data", "group_axes": "dta"}
    with pytest.raises(ValueError, match=r"group_axes=\('dta',\): the mesh has no \['dta'\]"):
        sam_optax.value_and_grad(mlp_loss, **options)


def test_no_mesh_to_find_the_axes_in():
    with pytest.raises(ValueError, match=r"there is none here.*jax.set_mesh\(mesh\)"):
        sam_optax.value_and_grad(mlp_loss, data_axes="data")(mlp_params(), mlp_batch())


@pytest.mark.parametrize("name", ["sam", "paper", "accumulated"])
@pytest.mark.parametrize("with_info", [False, True])
def test_with_fsdp_the_adversarial_point_comes_before_the_descent(name, with_info):
    """All of w_adv is behind one barrier where parameters are known to be sharded over `data`."""

    def gathered_loss(params, batch):
        return mlp_loss(jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params), batch)

    def barriers(kind, layout, **told):
        mesh = make_mesh(kind)
        _, on_mesh = problem(mesh, layout)
        loss_fn = gathered_loss if kind == "explicit" else mlp_loss
        axes = {} if kind == "explicit" else {"data_axes": "data"}
        gradient = sam_optax.value_and_grad(
            loss_fn, return_info=with_info, **axes, **OPTIONS[name][0], **told
        )
        with jax.set_mesh(mesh):
            lowered = jax.jit(gradient).lower(*on_mesh)
            if told:
                results = lowered.compile()(*on_mesh)
                assert_trees_close(results, step_on_one_device(name)[: 2 + with_info])
        return lowered.as_text().count("optimization_barrier")

    without = barriers("auto", FSDP)
    assert barriers("auto", FSDP, replicated_params=False) == without + 1
    assert barriers("auto", REPLICATED, replicated_params=True) == without
    # Types tell it, of axes of the batch and not of others.
    without = barriers("explicit", REPLICATED)
    assert barriers("explicit", TENSOR_PARALLEL) == without
    assert barriers("explicit", FSDP) == without + 1
    assert barriers("explicit", FSDP, replicated_params=True) == without


def test_groups_need_whole_parameters():
    mesh = make_mesh("explicit")
    _, on_mesh = problem(mesh, FSDP)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="sharded over .*'data'.*whole"):
        sam_optax.value_and_grad(mlp_loss, group_axes="data")(*on_mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="gradient of it.*leave reduction_dty"):
        sam_optax.value_and_grad(mlp_loss, reduction_dtype="bfloat16")(*on_mesh)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("where", ["NumPy", "whole"])
def test_groups_need_a_batch_that_lies_over_explicit_axes(jit, where):
    mesh = make_mesh("explicit")
    _, (params, batch) = problem(mesh)
    batch = jax.tree.map(np.asarray, batch) if where == "NumPy" else put(mesh, batch, P())
    gradient = jit(sam_optax.value_and_grad(mlp_loss, group_axes="data"))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"\['x'\] is not sharded over \['da"):
        gradient(params, batch)


def test_groups_of_a_sparse_batch():
    sparse = pytest.importorskip("jax.experimental.sparse")
    x = sparse.BCOO.fromdense(jnp.eye(8))
    gradient = sam_optax.value_and_grad(
        lambda w, x: jnp.mean(x @ w), ascent_fraction=1, group_axes="data"
    )
    with jax.set_mesh(make_mesh()), pytest.raises(TypeError, match="is sparse, BCOO"):
        gradient(jnp.ones(8), x)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("options", [{"group_axes": "data"}, {"reduction_dtype": "float32"}])
def test_constraints_on_the_axes_of_the_groups(kind, options):
    mesh = make_mesh(kind)
    (params, batch), on_mesh = problem(mesh)
    alone = {"m": 4, "m_sharpness": "foret"} if "group_axes" in options else {"data_shards": 4}
    expected = sam_optax.value_and_grad(mlp_loss, **alone)(params, batch)

    def loss_with(constrain):
        return lambda params, batch: mlp_loss(params, {**batch, "x": constrain(batch["x"])})

    def as_documented(x):
        if kind == "explicit":
            return x
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return jax.lax.with_sharding_constraint(x, P(None if "data" in manual else "data"))

    def over_data(x):
        if kind == "explicit":
            return jnp.einsum("bi,ij->bj", x, jnp.eye(SIZES[0]), out_sharding=P("data"))
        return jax.lax.with_sharding_constraint(x, P("data"))

    gradient = functools.partial(sam_optax.value_and_grad, data_axes="data", **options)
    with jax.set_mesh(mesh):
        assert_trees_close(jax.jit(gradient(loss_with(as_documented)))(*on_mesh), expected)
        with pytest.raises(ValueError) as error:
            jax.jit(gradient(loss_with(over_data)))(*on_mesh)
        assert "must not name these axes" in error.value.__notes__[0]


@pytest.mark.parametrize("has_aux", [False, True])
def test_out_shardings_that_leave_the_groups_out_with_few_examples(has_aux):
    """Two examples a shard, which the four shards that the axis has elsewhere do not divide."""
    mesh = make_mesh("explicit")
    (params, batch), on_mesh = problem(mesh, b=8)

    def loss_fn(params, batch):
        axis = None if "data" in jax.sharding.get_abstract_mesh().manual_axes else "data"
        same = jnp.eye(SIZES[0])
        x = jnp.einsum("bi,ij->bj", batch["x"], same, out_sharding=P(axis))
        loss = mlp_loss(params, {**batch, "x": x})
        return (loss, {"x": x, "mean": x.mean()}) if has_aux else loss

    def plain_loss(params, batch):
        loss, x = mlp_loss(params, batch), batch["x"]
        return (loss, {"x": x, "mean": x.mean()}) if has_aux else loss

    gradient = functools.partial(sam_optax.value_and_grad, ascent_fraction=0.5, has_aux=has_aux)
    expected = gradient(plain_loss, m=4, m_sharpness="foret")(params, batch)
    with jax.set_mesh(mesh):
        result = jax.jit(gradient(loss_fn, group_axes="data"))(*on_mesh)
    assert_trees_close(result, expected)


def _from_a_learned_state(params, batch):
    def body(state, x):
        return jnp.tanh(state + x.sum()), None

    return jax.lax.scan(body, params["out"]["kernel"].sum(), batch["x"].T)[0]


def _in_a_loop(params, batch):
    bias = params["hidden"]["bias"].sum()
    return jax.lax.fori_loop(0, 2, lambda _, x: x * batch["y"].mean(), bias)


def _in_a_branch(params, batch):
    bias = params["hidden"]["bias"].sum()
    return jax.lax.cond(batch["y"].mean() > 9, lambda: batch["x"].mean() * bias, lambda: bias)


@jax.custom_vjp
def _halved(w, x):
    return w * x.mean()


_halved.defvjp(lambda w, x: (w * x.mean(), (w, x)), lambda kept, g: (g * kept[1].mean() / 2, None))


def _with_a_derivative_of_its_own(params, batch):
    return _halved(params["out"]["kernel"].sum(), batch["x"])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize(
    "of", [_from_a_learned_state, _in_a_loop, _in_a_branch, _with_a_derivative_of_its_own]
)
def test_groups_of_losses_that_mix_parameters_and_examples(of, has_aux):
    """Inside `shard_map` loops and branches tell what varies over the shards from what does not."""
    mesh = make_mesh()
    (params, batch), on_mesh = problem(mesh)

    def loss_fn(params, batch):
        loss = mlp_loss(params, batch) + of(params, batch)
        return (loss, loss) if has_aux else loss

    gradient = functools.partial(sam_optax.value_and_grad, loss_fn, has_aux=has_aux)
    expected = gradient(m=4, m_sharpness="foret")(params, batch)
    with jax.set_mesh(mesh):
        result = jax.jit(gradient(data_axes="data", group_axes="data"))(*on_mesh)
    assert_trees_close(result, expected)


def _from_a_state_of_zeros(params, batch):
    def body(state, x):
        return jnp.tanh(state + params["out"]["kernel"].sum() * x), x.mean()

    return jax.lax.scan(body, jnp.zeros(len(batch["x"])), batch["x"].T)[0].mean()


def _in_chunks(params, batch):
    def of_one(total, example):
        one = jax.tree.map(lambda x: x[None], example)
        return total + mlp_loss(params, one), None

    return jax.lax.scan(of_one, 0.0, batch)[0] / len(batch["x"])


def _in_a_branch_of_a_constant(params, batch):
    bias = params["hidden"]["bias"].sum()
    return jax.lax.cond(batch["y"].mean() > -9, lambda: batch["x"].mean() * bias, lambda: 0.0)


def _with_a_search_in_it(params, batch):
    return jnp.interp(batch["y"], jnp.arange(4.0), params["hidden"]["bias"][:4]).mean()


@pytest.mark.one_in(9)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    "options",
    [
        {"group_axes": "data", "return_info": True},
        {"group_axes": "data", "has_aux": True, "loss_reduction": lambda batch: batch["x"].size},
        {"group_axes": "data", "accumulation_steps": 2},
        {"reduction_dtype": "float32", "has_aux": True},
    ],
)
@pytest.mark.parametrize(
    "of",
    [_from_a_state_of_zeros, _in_chunks, _in_a_branch_of_a_constant, _with_a_search_in_it],
)
def test_groups_of_losses_that_start_from_a_constant(of, options, kind):
    """JAX refuses these inside a `shard_map` that follows what varies over the shards."""
    mesh = make_mesh(kind)
    (params, batch), on_mesh = problem(mesh)
    if kind == "explicit":  # there JAX refuses some of these of the whole batch, too
        if "group_axes" not in options:
            pytest.skip("the descent is on the whole batch")
        options = {k: v for k, v in options.items() if k != "has_aux"}

    def loss_fn(params, batch):
        loss = mlp_loss(params, batch) + of(params, batch)
        return (loss, {"loss": loss, "x": batch["x"]}) if options.get("has_aux") else loss

    alone = {k: v for k, v in options.items() if k not in ("group_axes", "reduction_dtype")}
    way = {"m": 4, "m_sharpness": "foret"} if "group_axes" in options else {"data_shards": 4}

    def step(rho, params, batch, **options):
        return sam_optax.value_and_grad(loss_fn, rho, **options)(params, batch)

    def derivative_in_rho(rho, params, batch, **options):
        loss, *_ = jax.tree.leaves(step(rho, params, batch, **options)[0])
        return loss

    for function in (step, jax.grad(derivative_in_rho)):
        expected = function(0.1, params, batch, **alone, **way)
        with jax.set_mesh(mesh):
            on_a_mesh = functools.partial(function, data_axes="data", **options)
            assert_trees_close(jax.jit(on_a_mesh)(0.1, *on_mesh), expected)
            if function is step:
                assert_trees_close(on_a_mesh(0.1, *on_mesh), expected)


def test_inside_shard_map_a_loop_must_start_from_what_varies():
    """There JAX adds up gradients that it follows, and would not those of such a loop alone."""
    mesh = make_mesh(names=("slice", "data"))
    (params, batch), _ = problem(mesh)
    gradient = sam_optax.value_and_grad(_from_a_state_of_zeros, group_axes="data")
    with jax.set_mesh(mesh), pytest.raises(TypeError, match="manual axis types") as error:
        jax.eval_shape(
            jax.shard_map(
                lambda *args: jax.lax.pmean(gradient(*args), "slice"),
                in_specs=(P(), P("slice")),
                out_specs=P(),
                axis_names={"slice"},
            ),
            params,
            batch,
        )
    assert "jax.lax.pcast" in error.value.__notes__[0]


@pytest.mark.parametrize("of", [mlp_loss, _from_a_state_of_zeros])
def test_an_error_of_the_loss_itself_is_the_one_that_is_raised(of):
    mesh = make_mesh()
    _, on_mesh = problem(mesh)

    def loss_fn(params, batch):
        return of(params, batch) + jnp.mean(batch["x"] - jnp.ones((1, SIZES[0] + 1)))

    with jax.set_mesh(mesh), pytest.raises(TypeError, match="incompatible shapes") as error:
        jax.jit(sam_optax.value_and_grad(loss_fn, group_axes="data"))(*on_mesh)
    assert not any("group_axes" in note for note in getattr(error.value, "__notes__", ()))


@pytest.mark.parametrize("reduce", [jax.lax.pmean, jax.lax.psum])
def test_a_loss_that_is_reduced_over_the_groups_already(reduce):
    mesh = make_mesh("auto", (2, 4), ("slice", "data"))
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=64, sizes=SIZES)

    def loss_fn(params, batch):
        return reduce(mlp_loss(params, batch), "data")

    gradient = sam_optax.value_and_grad(loss_fn, data_axes="data", group_axes="data")
    with jax.set_mesh(mesh):
        on_slices = jax.shard_map(
            gradient, mesh=mesh, in_specs=(P(), P("slice")), out_specs=P(), axis_names={"slice"}
        )
        for step in (gradient, on_slices):
            # Of a sum the gradient would be 4 times too large.
            with pytest.raises(ValueError, match=r"same on all shards of \['data'\].*leave its"):
                jax.jit(step)(params, put(mesh, batch, P("data")))


def test_a_number_in_the_batch_on_an_explicit_mesh():
    mesh = make_mesh("explicit", (4,), ("data",))
    (params, batch), (w_on_mesh, b_on_mesh) = problem(mesh, P())

    def loss_fn(params, batch):
        return batch["scale"] * mlp_loss(params, batch)

    scale = {"scale": jnp.float32(2)}
    expected = sam_optax.value_and_grad(loss_fn, m=4, m_sharpness="foret")(params, batch | scale)
    with jax.set_mesh(mesh):
        gradient = jax.jit(sam_optax.value_and_grad(loss_fn, group_axes="data"))
        assert_trees_close(gradient(w_on_mesh, b_on_mesh | scale), expected)


@pytest.mark.parametrize("options", [{"group_axes": "data"}, {"reduction_dtype": "float32"}])
def test_a_constraint_of_the_whole_mesh_that_leaves_the_groups_out(options):
    mesh = make_mesh()
    (params, batch), on_mesh = problem(mesh)
    alone = {"m": 4, "m_sharpness": "foret"} if "group_axes" in options else {"data_shards": 4}
    expected = sam_optax.value_and_grad(mlp_loss, **alone)(params, batch)

    def loss_fn(params, batch):
        over_model = NamedSharding(mesh, P(None, "model"))
        x = jax.lax.with_sharding_constraint(batch["x"], over_model)
        return mlp_loss(params, {**batch, "x": x})

    gradient = sam_optax.value_and_grad(loss_fn, data_axes="data", **options)
    with jax.set_mesh(mesh):
        assert_trees_close(jax.jit(gradient)(*on_mesh), expected)


@pytest.mark.parametrize("options", [{"group_axes": "data"}, {"reduction_dtype": "float32"}])
@pytest.mark.parametrize("b", [64, 8])  # of 8 there are 2 on a shard, which 4 cannot divide
def test_what_is_of_the_whole_mesh_cannot_be_in_one_shard_and_is_told_so(b, options):
    mesh = make_mesh()
    _, on_mesh = problem(mesh, b=b)

    def loss_fn(params, batch):
        on_shards = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        return mlp_loss(params, {**batch, "x": on_shards(batch["x"])})

    gradient = sam_optax.value_and_grad(loss_fn, data_axes="data", **options)
    with jax.set_mesh(mesh):
        jax.jit(loss_fn)(*on_mesh)
        with pytest.raises(ValueError) as error:
            jax.jit(gradient)(*on_mesh)
    # JAX 0.9 puts a note of its own before ours.
    assert "must not be a NamedSharding of the whole mesh" in "".join(error.value.__notes__)


@pytest.mark.parametrize("options", [{"group_axes": "data"}, {"reduction_dtype": "float32"}])
def test_a_shard_map_over_other_axes_in_the_loss(options):
    """As documented: with `axis_names`, without a mesh, and what it computes computed again."""
    mesh = make_mesh()
    _, on_mesh = problem(mesh)

    def softmax(x):
        exponents = jnp.exp(x)
        return exponents / jax.lax.psum(exponents.sum(-1, keepdims=True), "model")

    def over_model(x):
        spec, axes = P(None, "model"), {"model"}
        f = jax.checkpoint(softmax)
        return jax.shard_map(f, in_specs=spec, out_specs=spec, axis_names=axes)(x)

    def loss_with(softmax):
        def loss_fn(params, batch):
            return mlp_loss(params, {**batch, "x": softmax(batch["x"] @ params["mix"])})

        return loss_fn

    gradient = functools.partial(sam_optax.value_and_grad, data_axes="data", **options)
    params, batch = on_mesh
    size = batch["x"].shape[1]
    params = {**params, "mix": jnp.linspace(-1, 1, size * size).reshape(size, size)}
    with jax.set_mesh(mesh):
        expected = jax.jit(gradient(loss_with(jax.nn.softmax)))(params, batch)
        assert_trees_close(jax.jit(gradient(loss_with(over_model)))(params, batch), expected)


@pytest.mark.parametrize("groups", [{}, {"group_axes": "data"}])
@pytest.mark.parametrize(
    ("shape", "names"), [((8,), ("data",)), ((2, 4), ("model", "data"))], ids=str
)
def test_a_mesh_that_is_not_the_one_in_force_is_refused(shape, names, groups):
    gradient = sam_optax.value_and_grad(mlp_loss, data_axes="data", mesh=make_mesh(), **groups)
    message = f"'data': 4, 'model': 2.*another here.*'{names[0]}': {shape[0]}"
    other = make_mesh(shape=shape, names=names)
    with jax.set_mesh(other), pytest.raises(ValueError, match=message):
        gradient(mlp_params(), mlp_batch(b=16))


def test_constraints_in_groups_of_a_mesh_that_is_an_argument():
    mesh = make_mesh()
    (params, batch), on_mesh = problem(mesh)

    def loss_fn(params, batch):
        constrained = jax.lax.with_sharding_constraint(batch["x"], P(None, "model"))
        return mlp_loss(params, {**batch, "x": constrained}), constrained

    gradient = sam_optax.value_and_grad(loss_fn, has_aux=True, group_axes="data", mesh=mesh)
    expected = sam_optax.value_and_grad(mlp_loss, m=4, m_sharpness="foret")(params, batch)
    (loss, x), grads = jax.jit(gradient)(*on_mesh)
    assert_trees_close((loss, grads), expected)
    assert_trees_equal(x, batch["x"])


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        (18, {}, r"b=18 .* 4 data shards.* 16 or 20\.$"),
        (16, {"accumulation_steps": 3}, r"accumulation_steps=3: .*b=16 .* 12 or 24\.$"),
    ],
)
@pytest.mark.parametrize("groups", [{}, {"group_axes": "data"}])
def test_batches_that_the_shards_cannot_share(groups, b, options, message):
    gradient = sam_optax.value_and_grad(mlp_loss, data_axes="data", **groups, **options)
    with jax.set_mesh(make_mesh()), pytest.raises(ValueError, match=message):
        gradient(mlp_params(), mlp_batch(b=b))


@pytest.mark.parametrize("groups", [{}, {"group_axes": "data"}])
def test_errors_name_the_leaves_of_the_batch_that_was_given(groups):
    gradient = sam_optax.value_and_grad(mlp_loss, data_axes="data", **groups)
    batch = mlp_batch(b=16) | {"y": jnp.ones(24)}
    sizes = r"batch\['x'\]: 16, batch\['y'\]: 24"
    with jax.set_mesh(make_mesh()), pytest.raises(ValueError, match=sizes):
        gradient(mlp_params(), batch)
    batch = mlp_batch(b=16) | {"name": "a"}
    with jax.set_mesh(make_mesh()), pytest.raises(TypeError, match=r"batch\['name'\] is 'a'"):
        gradient(mlp_params(), batch)


def test_diagnostics_of_a_loss_that_is_reduced_by_hand_are_the_same_on_each_shard():
    mesh = make_mesh()
    params, batch = mlp_params(), mlp_batch(b=16)

    def loss_fn(params, batch):
        return jax.lax.pmean(mlp_loss(params, batch), "data")

    step = jax.shard_map(  # which checks that what leaves it unsharded does not vary
        lambda *args: sam_optax.value_and_grad(loss_fn, return_info=True)(*args),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    alone = sam_optax.value_and_grad(mlp_loss, return_info=True, data_shards=4)
    assert_trees_close(jax.jit(step)(params, batch), alone(params, batch))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", [{"group_axes": "data"}, {"reduction_dtype": "float32"}])
def test_no_tracer_is_kept(options):
    mesh = make_mesh()
    _, on_mesh = problem(mesh)
    gradient = sam_optax.value_and_grad(mlp_loss, data_axes="data", **options)
    with jax.set_mesh(mesh), jax.checking_leaks():
        jax.jit(gradient)(*on_mesh)


@pytest.mark.parametrize(
    ("axes", "groups"), [(("data", "model"), "model"), (("model", "data"), "data")]
)
def test_groups_are_the_first_axes_in_the_types(axes, groups):
    mesh = make_mesh("explicit")
    (params, batch), _ = problem(mesh)
    batch = jax.tree.map(lambda x: put(mesh, x, P(axes)), batch)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="must be the first of the axes"):
        sam_optax.value_and_grad(mlp_loss, group_axes=groups)(params, batch)


def test_leaves_sharded_differently():
    mesh = make_mesh("explicit")
    (params, batch), _ = problem(mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'x'.*data.*'y'.*no axis"):
        batch = {"x": put(mesh, batch["x"], P("data")), "y": put(mesh, batch["y"], P())}
        sam_optax.value_and_grad(mlp_loss)(params, batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data_axes": 3}, TypeError, "data_axes=3 must be the name of a mesh axis"),
        ({"group_axes": ()}, ValueError, r"group_axes=\(\) must name one"),
        ({"data_axes": ("data", "data")}, ValueError, "each once"),
        ({"data_axes": ""}, ValueError, "data_axes='' must name one"),
        ({"mesh": "v5e:4x4"}, TypeError, "mesh='v5e:4x4' must be"),
        ({"reduction_dtype": "int8"}, TypeError, "reduction_dtype='int8'"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps=0"),
        ({"accumulation_steps": 2.5}, TypeError, "accumulation_steps=2.5"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        sam_optax.value_and_grad(mlp_loss, **options)


@pytest.mark.parametrize("jit", [True, False])
def test_integer_leaves_in_groups(jit, request):
    if not jit:
        request.getfixturevalue("whole_contract")  # a program on the mesh for every operation
    if not jit and jax.__version_info__ < (0, 10):
        pytest.skip("JAX 0.9 has no derivative at integers in a shard_map outside of jit")
    mesh = make_mesh()
    params, x = {"w": jnp.ones(3), "step": jnp.int32(0)}, jnp.arange(48.0).reshape(16, 3)

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    gradient = sam_optax.value_and_grad(loss_fn, allow_int=True, group_axes="data", mesh=mesh)
    expected = sam_optax.value_and_grad(loss_fn, allow_int=True, m=4, m_sharpness="foret")
    loss, grads = (jax.jit(gradient) if jit else gradient)(params, put(mesh, x, P("data")))
    assert grads["step"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(grads["w"], expected(params, x)[1]["w"], rtol=1e-5)
    assert loss.sharding.is_fully_replicated


@pytest.mark.parametrize("combine_aux", [None, lambda aux: jax.tree.map(lambda x: x[0], aux)])
def test_a_single_group_needs_no_combining(combine_aux):
    mesh = make_mesh(shape=(1, 2))
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=16, sizes=SIZES)

    def loss_fn(params, batch):
        predictions = jnp.argmax(mlp_outputs(params, batch["x"]), axis=-1)
        return mlp_loss(params, batch), {"predictions": predictions, "count": jnp.int32(16)}

    gradient = sam_optax.value_and_grad(
        loss_fn, has_aux=True, group_axes="data", mesh=mesh, combine_aux=combine_aux
    )
    (loss, aux), grads = jax.jit(gradient)(params, batch)
    (plain_loss, plain_aux), plain_grads = sam_optax.value_and_grad(loss_fn, has_aux=True)(
        params, batch
    )
    assert_trees_close((loss, aux, grads), (plain_loss, plain_aux, plain_grads))
    assert aux["count"].shape == () and aux["count"].dtype == jnp.int32


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_no_aux_needs_no_combining(shape):
    gradient = sam_optax.value_and_grad(
        mlp_loss, group_axes="data", mesh=make_mesh(shape=shape), combine_aux=lambda aux: 1 / 0
    )
    jax.eval_shape(gradient, mlp_params(), mlp_batch())


@pytest.mark.one_in(2)  # outside of jit is a program on the mesh for every operation
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_one_groups_aux_can_be_taken(kind, jit):
    mesh = make_mesh(kind)
    (_, batch), on_mesh = problem(mesh)

    def loss_fn(params, batch, counter, key):
        aux = {"counter": counter + 1, "key": jax.random.fold_in(key, counter), "x": batch["x"]}
        return mlp_loss(params, batch), aux

    gradient = sam_optax.value_and_grad(
        loss_fn,
        has_aux=True,
        data_axes="data",
        group_axes="data",
        combine_aux=lambda aux: jax.tree.map(lambda x: x[-1], aux),
    )
    state = jnp.uint32(3), jax.random.key(0)
    with jax.set_mesh(mesh):
        (_, aux), _ = (jax.jit(gradient) if jit else gradient)(*on_mesh, *state)
    assert aux["counter"] == 4 and aux["key"] == jax.random.fold_in(state[1], 3)
    np.testing.assert_array_equal(aux["x"], batch["x"][-len(batch["x"]) // 4 :])


def test_numbers_of_python_in_the_aux_of_groups():
    mesh = make_mesh()
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=16, sizes=SIZES)
    gradient = sam_optax.value_and_grad(
        lambda w, batch: (mlp_loss(w, batch), 3.0), has_aux=True, group_axes="data", mesh=mesh
    )
    assert jax.jit(gradient)(params, batch)[0][1] == 3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    "options", [{}, {"m": 2}, {"accumulation_steps": 2}, {"group_axes": "data"}]
)
def test_arrays_without_elements_on_a_mesh(kind, options):
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        _, (params, batch) = problem(mesh)
        step = sam_optax.value_and_grad(mlp_loss, data_axes="data", **options)
        expected = jax.jit(step)(params, batch)
        nothing = put(mesh, jnp.zeros((64, 0)), P("data"))
        assert_trees_close(jax.jit(step)(params, batch | {"none": nothing}), expected)


def test_data_shards_other_than_those_of_the_types():
    mesh = make_mesh("explicit")
    params, batch = mlp_params(sizes=SIZES), mlp_batch(b=16, sizes=SIZES)
    with jax.set_mesh(mesh):
        params, batch = put(mesh, params, P()), put(mesh, batch, P("data"))
        with pytest.raises(ValueError, match=r"data_shards=2, but .*\('data',\), which have 4"):
            sam_optax.value_and_grad(mlp_loss, data_shards=2)(params, batch)
        same = sam_optax.value_and_grad(mlp_loss, data_shards=4)(params, batch)
        assert_trees_close(same, sam_optax.value_and_grad(mlp_loss)(params, batch))
        with pytest.raises(ValueError, match=r"no axis batch_axis=2"):
            sam_optax.value_and_grad(mlp_loss, batch_axis=2)(params, batch)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("options", [{"group_axes": "data"}, {"reduction_dtype": "float32"}])
def test_examples_along_another_axis_of_the_batch(options, kind):
    mesh = make_mesh(kind)
    (params, batch), (on_mesh, _) = problem(mesh)
    alone = {"m": 4, "m_sharpness": "foret"} if "group_axes" in options else {"data_shards": 4}
    expected = sam_optax.value_and_grad(mlp_loss, **alone)(params, batch)
    place = NamedSharding(mesh, P(None, "data"))
    turned = jax.tree.map(lambda x: jax.device_put(jnp.moveaxis(x, 0, -1), place), batch)
    axes = {"data_axes": "data"} if kind == "auto" else {}
    step = sam_optax.value_and_grad(examples_last, batch_axis=-1, **axes, **options)
    with jax.set_mesh(mesh):
        assert_trees_close(jax.jit(step)(on_mesh, turned), expected)


@pytest.mark.parametrize("groups", [{"group_axes": "data"}, {}])
def test_a_narrow_reduction_leaves_complex_gradients_alone(groups):
    def loss_fn(w, x):
        return jnp.mean(jnp.abs(x * w[None] - 1) ** 2)

    mesh = make_mesh("auto")
    w, x = jnp.array([1 + 2j, 0.5 - 1j]), jnp.arange(1.0, 33).reshape(16, 2) / 8
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    options = {"data_axes": "data", "mesh": mesh} | groups
    narrow = sam_optax.value_and_grad(loss_fn, reduction_dtype="bfloat16", **options)
    exact = sam_optax.value_and_grad(loss_fn, **options)
    np.testing.assert_allclose(jax.jit(narrow)(w, x)[1], jax.jit(exact)(w, x)[1], rtol=1e-5)


def test_data_axes_of_an_explicit_mesh_that_the_batch_is_not_sharded_over():
    mesh = make_mesh("explicit")
    whole = jax.device_put((mlp_params(), mlp_batch()), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        found = jax.jit(sam_optax.value_and_grad(mlp_loss, data_axes="data"))(*whole)
    expected = sam_optax.value_and_grad(mlp_loss, data_shards=4)(mlp_params(), mlp_batch())
    assert_trees_close(found, expected)


def test_no_pass_over_several_shards_is_larger_than_a_micro_batch():
    sizes = []

    def loss_fn(params, batch):
        sizes.append(len(batch["x"]))
        return mlp_loss(params, batch)

    step = sam_optax.value_and_grad(loss_fn, accumulation_steps=6, data_shards=2)
    jax.eval_shape(step, mlp_params(), mlp_batch(b=24))
    assert max(sizes) == 24 // 6

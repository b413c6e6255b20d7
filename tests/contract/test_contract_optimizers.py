"""Every optimizer of Optax passes one contract, in `sharpness_aware` and fed by `value_and_grad`.

What an optimizer cannot do is in the table, `optimizers.py`, with the reason.
"""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layer import RHO, SHARDS, layer_batch, layer_loss, layer_params, sam_gradient_by_hand
from optimizers import (
    EXCLUDED,
    OPTIMIZERS,
    PARTS,
    base,
    cannot,
    is_installed,
    needs,
    public_factories,
)
from problems import assert_trees_close, assert_trees_equal, norm64

import sam_optax

BATCHES = [layer_batch(seed) for seed in range(3)]
GRADIENT = jax.jit(sam_optax.value_and_grad(layer_loss, rho=RHO, data_shards=SHARDS))


def names(table, *, check="gradient"):
    """Return the names in the table that can pass the check; a test skips what is not installed."""
    missing = pytest.mark.skip(reason=f"Optax {optax.__version__} does not have it")
    return [
        pytest.param(name, marks=() if is_installed(name) else missing)
        for name in table
        if not {"gradient", check} & cannot(name).keys()
    ]


def test_the_table_has_every_transformation_of_the_installed_optax():
    listed = OPTIMIZERS.keys() | PARTS.keys() | EXCLUDED.keys()
    assert public_factories() - listed == set(), "add them to tests/contract/optimizers.py"
    assert len(OPTIMIZERS) > 50 and not EXCLUDED.keys() & (OPTIMIZERS.keys() | PARTS.keys())


def extra_arguments(name, batch):
    """What some optimizers need, and one that none knows."""

    def objective(params):
        return layer_loss(params, batch)

    every = {"value_fn": objective, "obj_fn": objective, "temperature": 3.0}
    if "extra" not in cannot(name):
        return every
    return {k: v for k, v in every.items() if k in needs(name)}


def takes_value(name):
    return "extra" not in cannot(name) or "value" in needs(name)


def sam_step(name, **options):
    """A train step with `sharpness_aware` around the optimizer."""
    tx = sam_optax.sharpness_aware(base(name), **options)
    # With the value, `sharpness_aware` gives value and gradient to the optimizer, unasked.
    grad_fn = jax.value_and_grad(layer_loss) if takes_value(name) else jax.grad(layer_loss)

    def train_step(params, state, batch):
        extra = extra_arguments(name, batch)
        updates, state = tx.update(None, state, params, grad_fn=grad_fn, batch=batch, **extra)
        return optax.apply_updates(params, updates), state

    return train_step


def fed_step(name):
    """A train step with the optimizer alone, on the value and gradient that it is given."""
    tx = base(name)

    def train_step(params, state, batch, value, grads):
        extra = extra_arguments(name, batch)
        if takes_value(name):
            extra |= {"value": value, "grad": grads}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return train_step


def step_alone(name, value_and_grad):
    """A train step without `sharpness_aware`: the optimizer on this gradient."""
    fed = fed_step(name)

    def train_step(params, state, batch):
        return fed(params, state, batch, *value_and_grad(params, batch))

    return train_step


def copied(tree):
    """Give each leaf a buffer of its own, to be donated: some states hold the parameters."""
    return jax.tree.map(jnp.copy, tree)


def numbers(tree):
    """Return the tree with the data of its PRNG keys, which cannot be compared themselves."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@functools.cache
def compiled_sam_step(name):
    return jax.jit(sam_step(name, rho=RHO, data_shards=SHARDS), donate_argnums=(0, 1))


@functools.cache
def sam_run(name, seed=0):
    """Return parameters and state before the first step and after each, in donated buffers."""
    carry = layer_params(seed), base(name).init(layer_params(seed))
    carries = [carry]
    for batch in BATCHES:
        carry = compiled_sam_step(name)(*copied(carry), batch)
        carries.append(carry)
    return carries


# The same operations give the same bits, on every backend and with every compiler.


def program(name, train_step):
    """Return the step's operations as text, and the types of what it returns."""
    arguments = layer_params(), base(name).init(layer_params()), BATCHES[0]
    lowered = jax.jit(train_step).lower(*arguments)
    return lowered.as_text(), lowered.out_info


def test_a_step_is_the_program_of_the_optimizer_on_the_gradient(name_of_a_program):
    name = name_of_a_program
    text, results = program(name, sam_step(name, rho=RHO))
    gradient = sam_optax.value_and_grad(layer_loss, rho=RHO)
    assert (text, results) == program(name, step_alone(name, gradient))

    plain = program(name, step_alone(name, jax.value_and_grad(layer_loss)))
    assert program(name, sam_step(name, rho=0)) == plain
    ignores_the_gradient = name in ("set_to_zero", "contrib.hutchinson_estimator_diag_hessian")
    assert (text == plain[0]) == ignores_the_gradient


@pytest.mark.parametrize("batch", BATCHES)
def test_that_gradient_by_hand(batch):
    loss, grads = GRADIENT(layer_params(), batch)
    assert_trees_close(grads, sam_gradient_by_hand(layer_params(), batch), rtol=1e-4)
    assert loss > layer_loss(layer_params(), batch)


@pytest.mark.parametrize("name", ["adam", "contrib.muon", "contrib.prodigy", "polyak_sgd", "sgd"])
def test_steps_are_the_optimizers_on_the_gradient_by_hand(name):
    fed = jax.jit(fed_step(name))
    carries = sam_run(name)
    for before, after, batch in zip(carries, carries[1:], BATCHES, strict=False):
        by_hand = jax.tree.map(jnp.float32, sam_gradient_by_hand(before[0], batch))
        expected = fed(*before, batch, GRADIENT(before[0], batch)[0], by_hand)
        assert_trees_close(after, expected, rtol=1e-3, atol=1e-4)
    assert any((carries[-1][0][k] != carries[0][0][k]).all() for k in ("w", "b"))


# Compiled once, in a loop, in a scan and for several seeds at once.


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", names(OPTIMIZERS, check="types"))
def test_types_stay_and_nothing_compiles_twice(name):
    assert len({str(types(carry)) for carry in sam_run(name)}) == 1
    assert len({jax.tree.structure(carry) for carry in sam_run(name)}) == 1
    assert compiled_sam_step(name)._cache_size() == 1


def test_scan_over_steps_under_vmap_over_seeds_is_the_loop(name_in_scan):
    name = name_in_scan
    train_step = sam_step(name, rho=RHO, data_shards=SHARDS)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)

    def run(params, state):
        carry, _ = jax.lax.scan(
            lambda c, batch: (train_step(*c, batch), None), (params, state), batches
        )
        return carry

    starts = jax.tree.map(lambda *x: jnp.stack(x), *(sam_run(name, seed)[0] for seed in (0, 1)))
    ends = jax.jit(jax.vmap(run))(*starts)
    for seed in (0, 1):
        end = jax.tree.map(lambda x: x[seed], ends)
        assert_trees_close(numbers(end), numbers(sam_run(name, seed)[-1]), rtol=1e-4, atol=1e-5)


# On a mesh with explicit axes, where types include the sharding.


def on_explicit_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"w": P(None, "model"), "b": P()}
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    params = jax.device_put(layer_params(), shardings)
    batches = [jax.device_put(batch, NamedSharding(mesh, P("data"))) for batch in BATCHES]
    return mesh, params, batches


def types_after(train_step, *carry, batch=BATCHES[0]):
    """Return the types of parameters and state after a step, which is not run."""
    program, after = jax.make_jaxpr(train_step, return_shape=True)(*carry, batch)
    return jax.tree.unflatten(jax.tree.structure(after), program.out_avals)


def sharded_types(name, train_step):
    """Return the types of parameters and state on the mesh, before a step and after."""
    mesh, params, batches = on_explicit_mesh()
    with jax.set_mesh(mesh):
        before = params, base(name).init(params)
        return types(before), types_after(train_step, *before, batch=batches[0])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", names(OPTIMIZERS, check="sharded"))
def test_shardings_stay(name):
    before, after = sharded_types(name, sam_step(name, rho=RHO))
    assert str(after) == str(before)
    assert "8@model" in str(after)


def pytest_generate_tests(metafunc):
    """Run some optimizers in what takes long, and all of them with `--whole-contract`."""
    whole = metafunc.config.getoption("whole_contract")
    few = dict.fromkeys(["adafactor", "adam", "contrib.schedule_free", "sgd"])
    if "name_on_mesh" in metafunc.fixturenames:
        metafunc.parametrize("name_on_mesh", names(OPTIMIZERS if whole else few, check="sharded"))
    if "name_in_scan" in metafunc.fixturenames:
        some = {name: OPTIMIZERS[name] for name in [*few, *list(OPTIMIZERS)[::8]]}
        metafunc.parametrize("name_in_scan", names(OPTIMIZERS if whole else some))
    if "name_of_a_program" in metafunc.fixturenames:
        every = [*names(OPTIMIZERS), *names(PARTS)]
        metafunc.parametrize("name_of_a_program", every if whole else every[::4])


def test_steps_on_the_mesh_are_those_of_one_device(name_on_mesh):
    name = name_on_mesh
    mesh, params, batches = on_explicit_mesh()
    with jax.set_mesh(mesh):
        # Under jit, so that the state is on the mesh too, as noisy_sgd's key otherwise is not.
        carry = params, jax.jit(base(name).init)(params)
        start = types(carry)
        # Each shard's first examples, without being told that there are shards.
        train_step = jax.jit(sam_step(name, rho=RHO), donate_argnums=(0, 1))
        for batch in batches:
            carry = train_step(*copied(carry), batch)
            assert types(carry) == start
        if "one program on a mesh" not in cannot(name):
            assert train_step._cache_size() == 1
        assert carry[0]["w"].sharding == params["w"].sharding
    assert_trees_close(numbers(carry), numbers(sam_run(name)[-1]), rtol=1e-4, atol=1e-5)


# The state, for tools that look into it or store it; with a schedule for rho it has a count.


def scheduled(name):
    return sam_optax.sharpness_aware(base(name), rho=optax.constant_schedule(RHO))


def scheduled_state(name):
    """The state of a run with a schedule, after three steps."""
    fresh = scheduled(name).init(layer_params())
    return fresh._replace(count=jnp.int32(3), inner_state=sam_run(name)[-1][1])


def marked(tx, state):
    """Say which leaves of the state belong to parameters."""
    return optax.tree_utils.tree_map_params(
        tx, lambda _: "of a parameter", state, transform_non_params=lambda _: "other"
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", names(OPTIMIZERS, check="map_params"))
def test_tree_map_params(name):
    state = scheduled_state(name)
    of_base = marked(base(name), state.inner_state)
    assert marked(scheduled(name), state) == state._replace(count="other", inner_state=of_base)
    constant = sam_optax.sharpness_aware(base(name), rho=RHO)
    assert marked(constant, state.inner_state) == of_base


def through_flax(state, like):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def through_orbax(state, like, folder):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, like)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", names(OPTIMIZERS, check="flax"))
def test_flax_round_trip(name):
    state = scheduled_state(name)
    restored = through_flax(state, scheduled(name).init(layer_params()))
    assert_trees_equal(numbers(restored), numbers(state))
    assert restored.count == 3


@pytest.fixture(scope="module")
def all_states_through_orbax(tmp_path_factory):
    able = [p.values[0] for p in names(OPTIMIZERS, check="orbax") if not p.marks]
    states = {name: scheduled_state(name) for name in able}
    fresh = {name: scheduled(name).init(layer_params()) for name in able}
    return through_orbax(states, fresh, tmp_path_factory.mktemp("orbax") / "states")


@pytest.mark.parametrize("name", names(OPTIMIZERS, check="orbax"))
def test_orbax_round_trip(name, all_states_through_orbax):
    restored = all_states_through_orbax[name]
    assert_trees_equal(numbers(restored), numbers(scheduled_state(name)))
    assert restored.count == 3


# What the table says cannot work: the optimizer alone fails, and with SAM it fails the same way.


def step_of(name, form):
    plain = jax.value_and_grad(layer_loss)
    return sam_step(name) if form == "sam" else step_alone(name, plain)


def unknown_argument(name, form):
    known = {k: v for k, v in extra_arguments(name, BATCHES[0]).items() if k in needs(name)}

    def update(params, state, batch):
        call = known | {"temperature": 3.0}
        if form == "sam":
            tx, grad_fn = sam_optax.sharpness_aware(base(name)), jax.value_and_grad(layer_loss)
            return tx.update(None, state, params, grad_fn=grad_fn, batch=batch, **call)
        value, grads = jax.value_and_grad(layer_loss)(params, batch)
        return base(name).update(grads, state, params, value=value, grad=grads, **call)

    jax.eval_shape(update, layer_params(), base(name).init(layer_params()), BATCHES[0])


def gradient_of_the_batch(name, form):
    before = layer_params(), base(name).init(layer_params())
    jax.eval_shape(step_of(name, form), *before, BATCHES[0])


def sharded_parameters(name, form):
    before, after = sharded_types(name, step_of(name, form))
    assert str(after) == str(before)


def one_program_on_a_mesh(name, form):
    mesh, params, batches = on_explicit_mesh()
    with jax.set_mesh(mesh):
        train_step, carry = (
            jax.jit(step_of(name, form)),
            (params, jax.jit(base(name).init)(params)),
        )
        for batch in batches:
            carry = train_step(*carry, batch)
    assert train_step._cache_size() == 1


def map_params(name, form):
    state = scheduled(name).init(layer_params())
    marked(scheduled(name), state) if form == "sam" else marked(base(name), state.inner_state)


def stored_by_flax(name, form):
    state = scheduled(name).init(layer_params())
    state = state if form == "sam" else state.inner_state
    through_flax(state, state)


def stored_by_orbax(name, form, folder):
    state = scheduled(name).init(layer_params())
    state = state if form == "sam" else state.inner_state
    through_orbax(state, state, folder / form)


def types_after_a_step(name, form):
    before = layer_params(), base(name).init(layer_params())
    assert types_after(step_of(name, form), *before) == types(before)


CHECKS = {
    "types": types_after_a_step,
    "extra": unknown_argument,
    "gradient": gradient_of_the_batch,
    "sharded": sharded_parameters,
    "one program on a mesh": one_program_on_a_mesh,
    "map_params": map_params,
    "flax": stored_by_flax,
    "orbax": stored_by_orbax,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "check"),
    [(name, check) for name in OPTIMIZERS | PARTS for check in cannot(name)],
)
def test_what_cannot_work_fails_as_the_optimizer_alone_does(name, check, tmp_path):
    if not is_installed(name):
        pytest.skip(f"Optax {optax.__version__} does not have it")
    folder = {"folder": tmp_path} if check == "orbax" else {}
    errors = {}
    for form in ("alone", "sam"):
        try:
            CHECKS[check](name, form, **folder)
        except Exception as error:
            errors[form] = type(error)
    # Another version may be able to; then SAM must be able to as well.
    assert errors.get("sam") == errors.get("alone"), cannot(name)[check]


def test_a_gradient_for_each_example_feeds_differential_privacy():
    # Each example is a batch of its own, with an adversarial point of its own.
    gradient = sam_optax.value_and_grad(layer_loss, rho=RHO)
    gradient = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))
    params, examples = layer_params(), jax.tree.map(lambda x: np.asarray(x)[:, None], BATCHES[0])
    by_hand = [
        sam_gradient_by_hand(params, jax.tree.map(lambda x: x[i], examples), shards=1)
        for i in range(16)
    ]
    lengths = [norm64(grads) for grads in by_hand]
    limit = float(np.median(lengths))  # half of them are clipped
    clipped = [
        jax.tree.map(lambda g: g * min(1, limit / length), grads)
        for grads, length in zip(by_hand, lengths, strict=True)
    ]

    tx = optax.contrib.differentially_private_aggregate(limit, 0.0, key=jax.random.key(0))
    updates, _ = tx.update(gradient(params, examples)[1], tx.init(params))
    expected = jax.tree.map(lambda *g: np.mean(g, axis=0), *clipped)
    assert_trees_close(updates, expected, rtol=1e-4)

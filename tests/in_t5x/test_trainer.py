"""The trainer inside real T5X: equal to T5X's where it must be, and to the core's SAM."""

import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax

pytest.importorskip("t5x.trainer", reason="T5X is not installed (t5x_configs/README.md says how)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X's own
    from flax.core import FrozenDict
    from t5x import metrics as metrics_lib
    from t5x import models, optimizers, partitioning, trainer
    from tiny import BASE, SAM, CountingModel, LinearModel, Run, batch_at, make_model

    from sam_optax import t5x_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # T5X's, and its dependencies'
FSDP = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
    """Start one process for each number of devices; return parameters by case."""
    folder = tmp_path_factory.mktemp("devices")
    results = {}

    def run(n):
        if n not in results:
            out = folder / f"{n}.npz"
            command = [sys.executable, str(WORKER), str(n), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-3000:]
            results[n] = dict(np.load(out))
        return results[n]

    return run


def case(results, name):
    found = {k: v for k, v in results.items() if k.startswith(f"{name}|[")}
    assert found, f"no case {name!r}"
    return {k.split("|")[1]: v for k, v in found.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_close(a, b, atol=3e-6):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)


def distance(a, b):
    return max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_rho_zero_is_the_base_trainer_bit_for_bit(on_devices, devices):
    results = on_devices(devices)
    variants = {1: [", dropout, 2 micro-batches"]}.get(devices, [", 2 partitions"])
    for variant in ["", *variants]:
        assert_same(case(results, "base" + variant), case(results, "rho 0" + variant))


def test_micro_batches_devices_and_partitions_agree(on_devices):
    reference = case(on_devices(1), "sam")
    assert distance(reference, case(on_devices(1), "base")) > 1e-4
    for devices in (1, 4, 8):
        for name in ("sam", "sam, 2 micro-batches"):
            assert_close(case(on_devices(devices), name), reference)
    for devices in (4, 8):
        assert_close(case(on_devices(devices), "sam, 2 partitions"), reference)
    assert_close(case(on_devices(8), "sam, 2 partitions, 2 micro-batches"), reference)
    # On its own, the trainer takes the ascent examples as the mesh has them: 8 shards here.
    assert_close(case(on_devices(8), "own shards"), reference)
    assert_close(case(on_devices(8), "own shards, bf16"), reference, atol=1e-4)


def test_groups_on_the_mesh_are_the_groups_of_one_device(on_devices):
    one, eight = on_devices(1), on_devices(8)
    assert_close(case(eight, "groups"), case(one, "foret 8"))
    assert_close(case(eight, "groups, 2 micro-batches"), case(one, "foret 8"))
    assert_close(case(eight, "groups, 2 partitions"), case(one, "foret 4"))
    assert distance(case(one, "foret 4"), case(one, "foret 8")) > 1e-4


@pytest.mark.parametrize(
    ("m", "options"),
    [
        (2, {"group_axes": "replica"}),
        (2, {"group_axes": "replica", "k": 2}),
        (2, {"group_axes": "replica", "rules": FSDP}),
        (8, {"group_axes": ("replica", "data"), "diagnostics": False}),
    ],
    ids=["slices", "micro-batches", "FSDP", "shards"],
)
def test_groups_on_a_mesh_of_several_slices(m, options):
    of_one = Run(devices=1, m=m, m_sharpness="foret", ascent_fraction=1.0)
    of_eight = Run(devices=8, slices=2, ascent_fraction=1.0, **options)
    # A mesh axis with parameters whole along it is the trainer's to find.
    assert of_eight.trainer._options.replicated_params == ("rules" not in options)
    expected, found = of_one.steps(2), of_eight.steps(2)
    assert distance(of_one.params, of_eight.params) < 3e-6
    same = [name for name in found if name in expected and "timing" not in name]
    assert ("sam/cosine" in same) == ("diagnostics" not in options)
    assert {name: found[name] for name in same} == pytest.approx(
        {name: expected[name] for name in same}, rel=1e-4
    )


def test_no_example_leaves_its_device(on_devices):
    results = on_devices(8)
    assert str(results["base|collectives"]) == "all-reduce"
    assert str(results["own shards|collectives"]) == "all-reduce"
    assert set(str(results["groups|collectives"]).split(",")) <= {"all-reduce", "all-gather"}


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_compiles_once(on_devices, devices):
    counts = {k: int(v) for k, v in on_devices(devices).items() if k.endswith("|compiled")}
    assert set(counts.values()) == {1}, counts


def core_run(steps, model=None, packed=False, **options):
    """T5X's model and optimizer in a loop that has the core's gradient."""
    run = Run(BASE, model=model, packed=packed)
    state = run.state

    @jax.jit
    def step(state, batch, key):
        gradient = sam_optax.value_and_grad(
            run.model.loss_fn, has_aux=True, loss_reduction="sum", **options
        )
        _, grads = gradient(state.params, batch, key)
        return state.apply_gradient(grads, learning_rate=1e-3)

    for i in range(steps):
        state = step(state, run.batch_at(i), jax.random.fold_in(jax.random.key(1), i))
    return state.params


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.05},
        {"ascent_fraction": 0.5, "m": 2},
        {"ascent_steps": 2},
        {"perturbation": sam_optax.adaptive_perturbation()},
        {"perturb": lambda path: "layer_norm" not in path},
    ],
    ids=lambda options: ",".join(options),
)
def test_equals_the_core(options):
    model = make_model(dropout_rate=0.1)
    run = Run(devices=1, model=model, **options)
    run.steps(2)
    assert distance(run.params, core_run(2, model=model, **options)) < 2e-6


def test_a_dict_says_which_parameters_are_perturbed():
    """As Gin and JSON write it, where T5X's parameters are a FrozenDict."""
    as_predicate = Run(devices=1, perturb=lambda path: path.startswith("encoder"))
    assert isinstance(as_predicate.params, FrozenDict)
    names = list(as_predicate.params)
    as_dict = Run(devices=1, perturb={name: name == "encoder" for name in names})
    for run in (as_dict, as_predicate):
        run.steps(2)
    assert distance(as_dict.params, as_predicate.params) == 0


def test_packed_batches_equal_the_core():
    run = Run(devices=1, packed=True)
    run.steps(2)
    packed = core_run(2, packed=True)
    assert distance(run.params, packed) < 2e-6
    assert distance(core_run(2), packed) > 1e-4


def test_a_schedule_that_gives_no_number_is_refused():
    with pytest.raises(TypeError, match=r"rho='0\.1' must be a number"):
        Run(devices=1, rho=lambda step: "0.1").steps(1)


def test_rho_schedule_follows_the_step():
    run = Run(devices=1, rho=lambda step: jnp.where(step < 2, 0.0, 0.1))
    base = Run(BASE, devices=1)
    first = run.steps(2)
    base.steps(2)
    assert distance(run.params, base.params) < 1e-6
    assert first["sam/rho"] == 0
    assert run.steps(2, start=2)["sam/rho"] == pytest.approx(0.1)
    base.steps(2, start=2)
    assert distance(run.params, base.params) > 1e-4


def test_metrics_are_those_of_the_step_and_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(devices=1, rho=0.05, summary_dir=str(tmp_path))
    (loss, _), _, info = sam_optax.value_and_grad(
        run.model.loss_fn, rho=0.05, has_aux=True, loss_reduction="sum", return_info=True
    )(run.params, run.batch_at(0), jax.random.fold_in(jax.random.key(1), 0))
    values = run.steps(1)
    assert values["loss"] == pytest.approx(float(loss), rel=1e-5)
    for name in ("ascent_loss", "ascent_grad_norm", "descent_grad_norm", "cosine"):
        assert values[f"sam/{name}"] == pytest.approx(float(getattr(info, name)), rel=1e-4), name
    assert values["sam/realised_perturbation"] == pytest.approx(1, abs=1e-5)
    assert values["sam/rho"] == pytest.approx(0.05)
    assert values["sam/skipped_ascents"] == 0
    run.trainer.close()
    events = EventAccumulator(str(tmp_path / "train"), size_guidance={"tensors": 0}).Reload()
    written = {name for name in events.Tags()["tensors"] if name.startswith("sam/")}
    assert written == {name for name in values if name.startswith("sam/")}


@pytest.mark.parametrize("options", [{}, {"m": 2, "m_sharpness": "foret", "ascent_fraction": 0.5}])
def test_without_diagnostics_the_step_is_the_same(options):
    with_them, without = Run(devices=1, **options), Run(devices=1, diagnostics=False, **options)
    values, fewer = with_them.steps(2), without.steps(2)
    assert fewer.keys() == {name for name in values if not name.startswith("sam/")}
    assert fewer["loss"] == pytest.approx(values["loss"], rel=1e-5)
    assert distance(with_them.params, without.params) < 1e-6


def test_an_ascent_without_direction_is_counted_and_the_step_is_the_plain_one():
    def without_targets(step):
        batch = batch_at(step)
        ascent = slice(0, len(batch["decoder_loss_weights"]) // 4)
        for name in ("decoder_loss_weights", "decoder_target_tokens"):
            batch[name][ascent] = 0
        return batch

    run, base = Run(devices=1), Run(BASE, devices=1)
    run.batch_at = base.batch_at = without_targets
    values = run.steps(2)
    base.steps(2)
    assert values["sam/skipped_ascents"] == 2
    assert distance(run.params, base.params) < 1e-6


def test_weight_metrics_are_those_of_the_sam_gradient():
    run = Run(devices=1, weight_metrics=trainer.WeightMetricsComputer())
    values = run.steps(1)
    assert values["weight_gradient_norm"] == pytest.approx(
        values["sam/descent_grad_norm"], rel=1e-4
    )


@pytest.mark.parametrize("k", [None, 2])
def test_mutables_come_from_the_descent_pass(k):
    counting = {"model": make_model(kind=CountingModel), "devices": 1, "k": k}
    run, base = Run(**counting), Run(BASE, **counting)
    run.steps(2)
    base.steps(2)
    counts, expected = run.state.flax_mutables["counts"], base.state.flax_mutables["counts"]
    assert int(counts["calls"]) == int(expected["calls"]) == 2 * (k or 1)
    assert float(counts["mean"]) == pytest.approx(float(expected["mean"]), rel=1e-5)


def test_mutables_of_groups_are_put_together():
    run = Run(devices=1, model=make_model(kind=CountingModel), m=2, m_sharpness="foret")
    run.steps(2)
    counts = run.state.flax_mutables["counts"]
    assert int(counts["calls"]) == 2
    means = [batch_at(step)["decoder_loss_weights"].mean() for step in range(2)]
    assert float(counts["mean"]) == pytest.approx(sum(means), rel=1e-5)


def test_of_parts_mutables_that_are_not_floating_the_last_are_kept():
    stacked = {"mean": jnp.array([1, 3], jnp.bfloat16), "count": jnp.array([2, 5])}
    kept = t5x_trainer._means_or_last(stacked)
    assert kept["mean"] == 2 and kept["mean"].dtype == jnp.bfloat16
    assert kept["count"] == 5


def test_bfloat16_model():
    run = Run(devices=1, model=make_model(dtype="bfloat16"))
    values = run.steps(2)
    assert values["sam/realised_perturbation"] == pytest.approx(1, abs=1e-3)
    assert {w.dtype for w in jax.tree.leaves(run.params)} == {np.dtype("float32")}


def test_other_optimizers_of_t5x():
    model = make_model(optimizers.wrap_optax_optimizer(optax.adamw)(1e-3))
    run, base = Run(devices=1, model=model), Run(BASE, devices=1, model=model)
    run.steps(2)
    base.steps(2)
    assert jax.tree.structure(run.state) == jax.tree.structure(base.state)
    assert distance(run.params, base.params) > 1e-5


def saved_and_restored(run, folder):
    from t5x import checkpoints

    step = int(run.state.step)
    args = (run.partitioner, str(folder))
    checkpoints.Checkpointer(run.state, *args).save(run.state)
    return checkpoints.Checkpointer(run.state, *args).restore(step=step)


def test_stopped_and_restarted_is_as_if_it_had_not_been(tmp_path):
    model = make_model(dropout_rate=0.1)
    whole = Run(devices=1, model=model)
    whole.steps(4)
    first = Run(devices=1, model=model)
    first.steps(2)
    second = Run(devices=1, model=model, state=saved_and_restored(first, tmp_path))
    second.steps(2, start=2)
    assert distance(whole.state, second.state) == 0


def test_a_checkpoint_moves_from_the_baseline_to_sam_and_back(tmp_path):
    base = Run(BASE, devices=1)
    base.steps(2)
    sam = Run(devices=1, state=saved_and_restored(base, tmp_path / "1"))
    assert distance(sam.state, base.state) == 0
    sam.steps(2, start=2)
    back = Run(BASE, devices=1, state=saved_and_restored(sam, tmp_path / "2"))
    back.steps(2, start=4)
    assert int(back.state.step) == 6

    # The same with no checkpoint between.
    states = Run(BASE, devices=1)
    states.steps(2)
    states = Run(devices=1, state=states.state)
    states.steps(2, start=2)
    states = Run(BASE, devices=1, state=states.state)
    states.steps(2, start=4)
    assert distance(states.state, back.state) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho=-1.0"),
        ({"ascent_fraction": 0.0}, ValueError, "ascent_fraction=0.0"),
        ({"m": 0}, ValueError, "m=0"),
        ({"m_sharpness": "mean"}, ValueError, "m_sharpness='mean'"),
        ({"group_axes": "data", "m": 2}, ValueError, "give one of them"),
        ({"group_axes": "data", "data_shards": 4}, ValueError, "data_shards=4.*leave one out"),
        (
            {"reduction_dtype": "bfloat16", "data_shards": 4},
            ValueError,
            "data_shards=4.*reduction_dtype='bfloat16'.*leave one out",
        ),
        ({"loss_reduction": "median"}, ValueError, "loss_reduction='median'"),
        ({"group_axes": "model"}, ValueError, "must be the first of"),
        ({"group_axes": "dta"}, ValueError, r"no \['dta'\], only .*'data': 2"),
        ({"perturb": {"encoder": True}}, ValueError, "does not fit the parameters"),
        ({"perturb": lambda path: "layernorm" in path}, ValueError, "selects none"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_range_is_refused_when_the_trainer_is_made(options, error, message):
    with pytest.raises(error, match=message):
        Run(devices=2, **options)


@pytest.mark.parametrize("setting", [{"group_axes": "data"}, {"reduction_dtype": "bfloat16"}])
def test_parameters_that_are_sharded_over_data_are_refused_where_they_must_be_whole(setting):
    rules = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
    with pytest.raises(ValueError, match="needs every parameter whole"):
        Run(devices=2, rules=rules, **setting)
    Run(devices=2, rules=rules).steps(1)


def test_a_batch_that_micro_batches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"num_microbatches=3 cannot .*b=16 .*\[1, 2, 4, 8, 16\]"):
        Run(devices=1, k=3).steps(1)
    with pytest.raises(ValueError, match=r"num_microbatches=4 .* 8 parts .* of 32, .* in \[1, 2\]"):
        Run(devices=8, k=4, group_axes="data").steps(1)
    for k in (None, 2):
        with pytest.raises(ValueError, match="m=3"):
            Run(devices=1, k=k, m=3, m_sharpness="foret").steps(1)


@pytest.mark.parametrize("k", ["2", 2.0, True])
def test_a_number_of_micro_batches_that_is_none_is_refused_when_the_trainer_is_made(k):
    with pytest.raises(TypeError, match=f"num_microbatches={k!r} must be an integer"):
        Run(devices=1, k=k)


@pytest.mark.parametrize(
    ("k", "fraction"), [(None, 0.25), (1, 0.25), (2, 0.25), (4, 0.25), (4, 0.5)]
)
def test_both_passes_have_one_dropout_key(k, fraction):
    model = make_model(kind=LinearModel)
    run = Run(devices=1, model=model, k=k, ascent_fraction=fraction)
    assert run.steps(1)["sam/cosine"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("k", [None, 2])
def test_metrics_of_several_points_are_their_mean(k):
    run = Run(devices=1, k=k, m=2, rho=2.0)
    model, params, batch = run.model, run.params, jax.tree.map(jnp.asarray, run.batch_at(0))

    def loss_and_accuracy(params, batch):
        loss, metrics = model.loss_fn(params, batch, jax.random.key(0))
        return loss, metrics["accuracy"].compute()

    groups, _ = sam_optax.ascent_groups(batch, m=2)
    found = []
    for group in (jax.tree.map(lambda x, i=i: x[i], groups) for i in range(2)):
        ascent = jax.grad(lambda w, group=group: loss_and_accuracy(w, group)[0])(params)
        epsilon = sam_optax.gradient_perturbation(ascent, params, 2.0)
        found.append(loss_and_accuracy(jax.tree.map(jnp.add, params, epsilon), batch))
    (one, other), metrics = np.asarray(found), run.steps(1)
    assert abs(one[0] / other[0] - 1) > 1e-4
    np.testing.assert_allclose([metrics["loss"], metrics["accuracy"]], (one + other) / 2, rtol=1e-5)


@pytest.mark.parametrize("factor", [233.0, "NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"])
def test_groups_of_a_normalised_loss_make_the_loss_of_the_batch(factor):
    def run(cls, **options):
        model = make_model(optimizers.wrap_optax_optimizer(optax.sgd)(0.1))
        model._loss_normalizing_factor = factor
        run = Run(cls, devices=1, model=model, **options)
        return run.steps(1)["loss"], run.params

    loss, params = run(BASE)
    for options in ({"m": 2, "m_sharpness": "foret"}, {"m": 1}):
        sam_loss, sam_params = run(SAM, rho=1e-6, **options)
        assert sam_loss == pytest.approx(loss, rel=1e-4)
        assert distance(params, sam_params) < 1e-5


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("factor", ["NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"])
def test_every_metric_of_groups_of_a_normalised_loss_is_that_of_the_batch(factor, k):
    def run(cls, **options):
        model = make_model(optimizers.wrap_optax_optimizer(optax.sgd)(0.1))
        model._loss_normalizing_factor = factor
        run = Run(cls, devices=4, model=model, k=k, **options)
        before = run.params
        return run.steps(1), distance(before, run.params)

    metrics, length = run(BASE)
    # T5X adds up the averages of its micro-batches, whose numbers of tokens differ.
    near = 0.1 if k and factor == "NUM_REAL_TARGET_TOKENS" else 1e-4
    expected = {name: value for name, value in metrics.items() if "timing" not in name}
    assert len(expected) > 8
    foret = {"m": 2, "m_sharpness": "foret", "ascent_fraction": 0.5}
    for options in ({"group_axes": "data"}, foret):
        of_groups, of_their_length = run(SAM, rho=1e-6, **options)
        assert of_their_length == pytest.approx(length, rel=near)
        assert {name: of_groups[name] for name in expected} == pytest.approx(expected, rel=near)


class MeanLossModel(models.EncoderDecoderModel):
    """A model that takes a mean by itself, over tokens or places."""

    number = staticmethod(lambda batch: batch["decoder_loss_weights"].size)

    def loss_fn(self, params, batch, dropout_rng):
        loss, _ = super().loss_fn(params, batch, dropout_rng)
        loss = loss / self.number(batch)
        return loss, {"loss": metrics_lib.AveragePerStep(total=loss)}


def tokens(batch):
    return jnp.sum(batch["decoder_loss_weights"])


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", tokens], ids=["mean", "tokens"])
def test_groups_of_a_model_that_takes_a_mean_by_itself(reduction, k):
    def run(cls, **options):
        sgd = optimizers.wrap_optax_optimizer(optax.sgd)(0.1)
        model = make_model(sgd, kind=MeanLossModel)
        if callable(reduction):
            model.number = reduction
        run = Run(cls, devices=4, model=model, k=k, **options)
        before = run.params
        return run.steps(1)["loss"], distance(before, run.params)

    loss, length = run(BASE)
    # T5X adds up the means of its micro-batches, whose numbers of tokens differ.
    near = 0.1 if k and callable(reduction) else 1e-4
    foret = {"m": 2, "m_sharpness": "foret", "ascent_fraction": 0.5}
    for options in ({"group_axes": "data"}, foret):
        of_groups = run(SAM, rho=1e-6, loss_reduction=reduction, **options)
        assert of_groups == pytest.approx((loss, length), rel=near)
    as_sums, too_long = run(SAM, rho=1e-6, group_axes="data")
    assert too_long == pytest.approx(4 * length, rel=0.2) and as_sums > 3 * loss


def test_micro_batches_smaller_than_the_shards():
    Run(devices=8, k=4, reduction_dtype="bfloat16").steps(1)


def test_a_batch_that_is_not_sharded():
    rules = [
        (a, None if a == "batch" else b) for a, b in partitioning.standard_logical_axis_rules()
    ]
    run, base = (
        Run(cls, devices=2, partitions=2, rules=rules, **options)
        for cls, options in ((SAM, {"rho": 1e-6}), (BASE, {}))
    )
    run.steps(1)
    base.steps(1)
    assert distance(run.params, base.params) < 1e-5

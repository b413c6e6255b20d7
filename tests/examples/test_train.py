import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finetune import data
from finetune.checkpoints import Checkpoints, DamagedCheckpoint, shapes_of
from finetune.gradient import plain_gradient, sam_gradient
from finetune.interrupt import Interrupted
from finetune.loss import make_loss_fn
from finetune.train import Progress, initial_state, make_train_step, train


@pytest.fixture(scope="module")
def gradients(tiny, tiny_problem):
    loss_fn = make_loss_fn(tiny_problem.model)
    return {"plain": plain_gradient(loss_fn), "sam": sam_gradient(loss_fn, tiny)}


@pytest.fixture(scope="module")
def whole(tiny, tiny_problem, gradients, tmp_path_factory):
    """The run with SAM that nothing stopped, and its folder."""
    run_dir = tmp_path_factory.mktemp("whole")
    return train(tiny, tiny_problem, gradients["sam"], run_dir, "sam"), run_dir


def _assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


# 6 lies between evaluations, 8 is one.
@pytest.mark.parametrize("stop", [6, 8])
def test_a_stopped_and_resumed_run_is_the_same_bit_for_bit(
    stop, whole, tiny, tiny_problem, gradients, tmp_path, request
):
    if stop == 8:
        request.getfixturevalue("whole_contract")  # what is saved then is what is there anyway
    arguments = (tiny, tiny_problem, gradients["sam"], tmp_path, "sam")
    with pytest.raises(Interrupted, match=f"step {stop}"):
        train(*arguments, should_stop=lambda step: step == stop)
    resumed = train(*arguments)
    _assert_same(resumed.last_params, whole[0].last_params)
    _assert_same(resumed.best_params, whole[0].best_params)
    assert resumed.best_step == whole[0].best_step
    assert resumed.progress.records == whole[0].progress.records
    assert resumed.progress.step_flops == whole[0].progress.step_flops


def test_a_finished_run_is_only_read_back(whole, tiny, tiny_problem, tmp_path):
    def no_gradient(*_):
        raise AssertionError("trained again")

    again = train(tiny, tiny_problem, no_gradient, whole[1], "sam")
    _assert_same(again.last_params, whole[0].last_params)


def test_plain_and_sam_differ_and_both_learn(whole, tiny, tiny_problem, gradients, tmp_path):
    plain = train(tiny, tiny_problem, gradients["plain"], tmp_path, "plain")
    for result in (plain, whole[0]):
        losses = [record["train_loss"] for record in result.progress.records]
        assert losses[-1] < losses[0] < np.log(264) + 0.5
    distance = optax.tree.norm(jax.tree.map(np.subtract, plain.last_params, whole[0].last_params))
    assert distance > 1e-3


def test_records_are_taken_at_every_evaluation(whole):
    assert [record["step"] for record in whole[0].progress.records] == [4, 8, 12]


def test_keeps_the_best_and_the_last_checkpoint_only(whole):
    kept = {int(path.name) for path in (whole[1] / "checkpoints").iterdir()}
    assert kept == {whole[0].best_step, 12}


def test_best_is_by_exact_match_then_error_rate_then_earliest():
    def record(step, exact_match, errors):
        return {"step": step, "exact_match": exact_match, "phoneme_error_rate": errors}

    records = [record(1, 5, 1), record(2, 7, 9), record(3, 7, 8), record(4, 7, 8)]
    assert Progress(records).best_step() == 3
    assert Progress().best_step() is None


RESTORE = """
import sys
import jax.numpy as jnp
from finetune.checkpoints import Checkpoints, DamagedCheckpoint, shapes_of
try:
    Checkpoints(sys.argv[1]).restore(12, shapes_of([jnp.zeros(1000)] * 20))
except DamagedCheckpoint as error:
    print(error)
"""


def test_a_damaged_checkpoint_is_named(tmp_path):
    state = [jnp.arange(1000.0) + i for i in range(20)]
    Checkpoints(tmp_path).save(12, state, {"records": []}, keep=set())
    for path in (tmp_path / "12" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # In a process of its own: Orbax gives up at the first array that it cannot read, and then
    # TensorStore complains to a closed event loop about the others, at whatever runs by then.
    command = [sys.executable, "-c", RESTORE, str(tmp_path)]
    examples = str(Path(__file__).resolve().parents[2] / "examples")
    env = os.environ | {"PYTHONPATH": examples}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert f"{tmp_path / '12'} is damaged" in done.stdout, done.stderr


def test_a_missing_best_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = {"w": jnp.ones(2)}
    checkpoints.save(12, state, {"records": []}, keep=set())
    with pytest.raises(DamagedCheckpoint, match=f"{tmp_path}/8 is missing"):
        checkpoints.restore(8, shapes_of(state))
    assert checkpoints.restore(12, shapes_of(state))[1] == {"records": []}


def test_a_checkpoint_with_another_checksum_is_damaged(
    whole, tiny, tiny_problem, gradients, tmp_path
):
    shutil.copytree(whole[1], tmp_path / "copy")
    metadata = tmp_path / "copy" / "checkpoints" / "12" / "progress" / "metadata"
    text = metadata.read_text()
    start = text.index('"sha256": "') + len('"sha256": "')
    metadata.write_text(text[:start] + "0" * 64 + text[start + 64 :])
    with pytest.raises(DamagedCheckpoint, match="checksum"):
        train(tiny, tiny_problem, gradients["sam"], tmp_path / "copy", "sam")


def test_the_step_compiles_once_and_takes_over_its_state(tiny, tiny_problem, gradients):
    optimizer = optax.adafactor(tiny.learning_rate)
    step = make_train_step(gradients["sam"], optimizer, tiny.seed)
    state = initial_state(tiny_problem.model, optimizer, tiny.seed)
    first = state
    for k in range(3):
        batch = data.batch_at(tiny_problem.train.features, 0, k, tiny.batch_size)
        state, _ = step(state, batch)
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def test_evaluation_ignores_the_padding_of_its_last_batch(tiny_problem, whole):
    features, evaluator = tiny_problem.train.features, tiny_problem.evaluator
    params = whole[0].last_params
    whole_loss = evaluator.loss(params, {k: v[:300] for k, v in features.items()})
    loss_fn = make_loss_fn(tiny_problem.model)
    expected = loss_fn(params, {k: v[:300] for k, v in features.items()})[0]
    assert whole_loss == pytest.approx(float(expected), rel=1e-5)


def test_evaluation_scores_the_models_own_predictions(tiny_problem, whole):
    split = tiny_problem.validation
    predictions = tiny_problem.evaluator.predict(whole[0].last_params, split.features)
    assert len(predictions) == len(split)
    told = dataclasses.replace(split, accepted=[p or "x" for p in predictions])
    metrics = tiny_problem.evaluator.metrics(whole[0].last_params, told)
    expected = 100 * np.mean([bool(p) for p in predictions])
    assert metrics["exact_match"] == pytest.approx(expected)

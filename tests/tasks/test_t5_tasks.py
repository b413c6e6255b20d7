"""Samples of the tasks that PyPI's `t5` registers."""

import subprocess
import sys

import pytest
import seqio
import tensorflow_datasets as tfds

from sam_optax import tasks

pytest.importorskip("t5.data.mixtures", reason="needs PyPI's t5")

from sam_optax.tasks import glue  # noqa: F401
from sam_optax.tasks.__main__ import data_sets

MIXTURES = ("super_glue_v102_proportional", "glue_v002_proportional", "glue_v200_proportional")


@pytest.mark.parametrize("name", [MIXTURES[0], MIXTURES[2]])
def test_tfds_still_makes_the_data(name):
    assert len(data_sets(name)) >= 9
    for data_set in data_sets(name):
        assert tfds.builder(data_set).version.tfds_version_to_prepare is None, data_set


def test_glue_on_new_data_is_otherwise_t5s():
    ours, theirs = (seqio.MixtureRegistry.get(f"glue_{v}_proportional") for v in ("v200", "v002"))
    assert len(ours.tasks) == len(theirs.tasks) >= 11
    for mine, other in zip(ours.tasks, theirs.tasks, strict=True):
        assert mine.name == other.name.replace("_v002", "_v200") != other.name
        data = other.source.tfds_dataset.name
        assert mine.source.tfds_dataset.name == data.replace(":1.0.0", ":2.0.0") != data
        assert mine.source._splits == other.source._splits
        assert ours.get_rate(mine) == theirs.get_rate(other)
        assert mine.preprocessors == other.preprocessors
        assert mine._postprocess_fn == other._postprocess_fn
        assert mine.metric_fns == other.metric_fns and mine.output_features == other.output_features


@pytest.mark.parametrize("name", MIXTURES)
def test_weights_stay_in_proportion(name):
    mixture = seqio.MixtureRegistry.get(name)
    sample = seqio.MixtureRegistry.get(tasks.sampled(name, 0.05, seed=1))
    weights = {f"{task.name}_at_5pct_seed1": mixture.get_rate(task) for task in mixture.tasks}
    assert {task.name: 20 * sample.get_rate(task) for task in sample.tasks} == pytest.approx(
        weights
    )
    assert 0 in weights.values() and max(weights.values()) > 100_000


@pytest.mark.parametrize(
    "name, size",
    [("super_glue_cb_v102", 200), ("super_glue_record_v102", 40), ("glue_stsb_v002", 200)],
)
def test_part_of_the_data_that_tfds_makes_up(name, size, mock_tfds, in_bytes):
    task = in_bytes(name)
    tfds_name = task.source.tfds_dataset.name
    mock_tfds({tfds_name: {"train": size, "validation": size, "test": size}})
    sample = seqio.TaskRegistry.get(tasks.sampled(name, 0.2))

    def texts(task, split):
        examples = task.get_dataset(None, split, shuffle=False).as_numpy_iterator()
        return [(e["inputs_pretokenized"], e["targets_pretokenized"]) for e in examples]

    everything, some = texts(task, "train"), texts(sample, "train")
    assert set(some) < set(everything)
    assert len(some) / len(everything) == pytest.approx(0.2, abs=0.15)
    assert texts(sample, "validation") == texts(task, "validation")
    assert sample.num_input_examples("train") == size / 5
    assert sample.num_input_examples("validation") == size


def test_the_pronouns_of_wsc_are_trained_and_evaluated_by_different_tasks(mock_tfds, in_bytes):
    mock_tfds({"super_glue/wsc.fixed:1.0.2": {"train": 8, "validation": 8, "test": 8}})
    sample = seqio.MixtureRegistry.get(tasks.sampled("super_glue_v102_proportional", 0.4))
    splits = {task.name: set(task.splits) for task in sample.tasks if "wsc" in task.name}
    assert splits == {
        "super_glue_wsc_v102_simple_train_at_40pct_seed0": {"train"},
        "super_glue_wsc_v102_simple_eval_at_40pct_seed0": {"validation", "test"},
    }


def test_t5_is_imported_when_a_name_needs_it():
    program = (
        "import sys; from sam_optax import tasks; assert 't5' not in sys.modules; "
        "print(tasks.sampled('super_glue_v102_proportional', 0.05, 2))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "super_glue_v102_proportional_at_5pct_seed2", result.stderr


@pytest.mark.parametrize(("version", "data"), [("v002", "1.0.0"), ("v200", "2.0.0")])
def test_a_whole_mixture_reads_from_tfds(mock_tfds, in_bytes, version, data):
    mixture = in_bytes(f"glue_{version}_proportional")
    splits = dict.fromkeys(("train", "validation", "test"), 20)
    evaluated = {
        f"glue/ax:{data}": {"test": 20},
        f"glue/mnli_matched:{data}": {"validation": 20, "test": 20},
        f"glue/mnli_mismatched:{data}": {"validation": 20, "test": 20},
    }
    names = [task.source.tfds_dataset.name for task in mixture.tasks]
    mock_tfds({**dict.fromkeys(names, splits), **evaluated})
    sample = seqio.MixtureRegistry.get(tasks.sampled(f"glue_{version}_proportional", 0.8))
    dataset = sample.get_dataset({"inputs": 512, "targets": 84}, "train", seed=0)
    assert len(list(dataset.take(100))) == 100

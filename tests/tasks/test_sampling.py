import collections
import itertools
import json
import math
import sys
import types
import unittest.mock

import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from sam_optax import tasks
from sam_optax.tasks._sampling import SampledSource, _identity

NQ = "natural_questions_open:1.0.0"
SIZE = 600


def _prepare(directory, raw, files):
    """Run TFDS's own reading, writing and sharding of the data set, without its download."""
    builder = tfds.builder(NQ, data_dir=directory)
    config = tfds.download.DownloadConfig(num_shards=files)
    with unittest.mock.patch.object(
        tfds.download.DownloadManager, "download", lambda self, urls: raw
    ):
        builder.download_and_prepare(download_config=config)
    return str(directory)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Natural Questions as TFDS stores it, once in one file and once in eight."""
    directory = tmp_path_factory.mktemp("raw")
    raw = {split: str(directory / split) for split in ("train", "validation")}
    for split, size in {"train": SIZE, "validation": 100}.items():
        rows = [{"question": f"{split} {i}?", "answer": [f"{i}", "x"]} for i in range(size)]
        (directory / split).write_text("\n".join(map(json.dumps, rows)))
    return {
        files: _prepare(tmp_path_factory.mktemp(f"tfds{files}"), raw, files) for files in (1, 8)
    }


@pytest.fixture
def stored_in(stored, in_bytes):
    """A function of a number of files that makes the task read the data stored in so many."""
    task = in_bytes("cbqa_natural_questions")

    def use(files):
        source = task.source.tfds_dataset
        source.override_data_dir(stored[files])
        seqio.TfdsDataSource.list_shards.cache_clear()
        assert len(task.source.list_shards("train")) == files

    use(8)
    yield use
    task.source.tfds_dataset.override_data_dir(None)


def _read(name, split="train", **kwargs):
    """The questions' numbers, in the order in which the task gives them."""
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split, **kwargs)
    inputs = [e["inputs_pretokenized"].decode() for e in dataset.as_numpy_iterator()]
    return [int(text.split()[-1].strip("?")) for text in inputs]


def _sample(rate, subset=0, **kwargs):
    return _read(tasks.sampled("cbqa_natural_questions", rate, subset), **kwargs)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("files, hosts", [(1, 1), (1, 3), (8, 3), (8, 4)])
def test_the_subset_does_not_depend_on_files_and_hosts(stored_in, files, hosts):
    stored_in(8)
    expected = sorted(_sample(0.2, shuffle=False))
    stored_in(files)
    shards = [
        _sample(0.2, shard_info=seqio.ShardInfo(index, hosts), seed=5) for index in range(hosts)
    ]
    assert sorted(itertools.chain(*shards)) == expected


def test_the_subset_does_not_depend_on_order_epoch_or_memory(stored_in):
    expected = _sample(0.05, shuffle=False)
    orders = [_sample(0.05, shuffle=True, seed=3), _sample(0.05, shuffle=True, seed=4)]
    assert expected != orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(expected)
    assert sorted(_sample(0.05, try_in_mem_cache=False)) == sorted(expected)
    epochs = collections.Counter(_sample(0.05, num_epochs=3))
    assert epochs == dict.fromkeys(expected, 3)


def test_the_subset_of_a_seed_never_changes(stored_in):
    # Written down once: another hash or identity would silently change what a restarted run sees.
    assert _sample(0.02, shuffle=False)[:3] == [511, 135, 392]


def test_smaller_subsets_lie_inside_larger_ones_of_the_seed(stored_in):
    subsets = [set(_sample(rate, 1)) for rate in (0.02, 0.05, 0.8, 1)]
    for smaller, larger in itertools.pairwise(subsets):
        assert smaller < larger
    assert len(subsets[-1]) == SIZE


def test_seeds_take_independent_subsets_of_about_the_stated_size(stored_in):
    def close(count, share):
        return abs(count - SIZE * share) < 4 * math.sqrt(SIZE * share * (1 - share))

    for rate in (0.1, 0.8):
        subsets = [set(_sample(rate, seed)) for seed in (0, 1, 12)]
        assert all(close(len(subset), rate) for subset in subsets)
        for a, b in itertools.combinations(subsets, 2):
            assert close(len(a & b), rate**2)


def test_evaluation_splits_are_untouched(stored_in):
    name = tasks.sampled("cbqa_natural_questions", 0.02)
    sample, task = seqio.TaskRegistry.get(name), seqio.TaskRegistry.get("cbqa_natural_questions")
    assert set(sample.splits) == set(task.splits)
    assert sample.num_input_examples("validation") == 100
    original, subset = (
        list(t.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
        for t in (task, sample)
    )
    assert len(subset) == 100
    tf.nest.map_structure(
        lambda a, b: tf.debugging.assert_equal(tf.constant(a), tf.constant(b)), original, subset
    )
    assert sample.metric_fns == task.metric_fns
    assert sample.postprocessor is task.postprocessor


def test_a_sample_is_of_the_training_split_alone_when_tfds_makes_up_the_data(mock_tfds, in_bytes):
    mock_tfds({"tydi_qa/goldp:3.0.0": {"train": 200, "validation-te": 200}})
    in_bytes("tydiqa_goldp")
    tasks.sampled("tydiqa_goldp", 0.2)

    def size(task, split):
        name = f"{task}_at_20pct_seed0"
        return sum(1 for _ in seqio.TaskRegistry.get(name).get_dataset(None, split))

    assert 20 < size("tydiqa_goldp_train", "train") < 60
    assert size("tydiqa_goldp_te", "validation") == 200


def test_every_member_of_a_mixture_is_sampled_and_stays_in_proportion(mock_tfds, in_bytes):
    sizes = {"natural_questions_open": 80, "web_questions": 20}
    sizes = {f"{name}:1.0.0": {"train": size} for name, size in sizes.items()}
    mock_tfds({**sizes, "trivia_qa/unfiltered.nocontext:1.1.0": {"train": 40}})
    in_bytes("cbqa_proportional")
    name = tasks.sampled("cbqa_proportional", 0.5, seed=7)
    assert name == "cbqa_proportional_at_50pct_seed7"
    mixture = seqio.MixtureRegistry.get(name)
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        "cbqa_natural_questions_at_50pct_seed7": 40,
        "cbqa_trivia_qa_at_50pct_seed7": 20,
        "cbqa_web_questions_at_50pct_seed7": 10,
    }
    dataset = mixture.get_dataset(None, "train", num_epochs=1, seed=0)
    assert 40 < sum(1 for _ in dataset) < 200


def test_rates_of_mixtures_in_mixtures_follow():
    def sample_fn(datasets, rates, seed):
        return tf.data.Dataset.sample_from_datasets(datasets, rates, seed)

    def examples(task):
        return 45 if "_at_50pct" in task.name else 90

    nq, wq, trivia = tasks.CLOSED_BOOK_TASKS
    seqio.MixtureRegistry.add("inner", [(nq, 30.0), (wq, 0.0)])
    seqio.MixtureRegistry.add("outer", [("inner", 10), (trivia, examples)], sample_fn=sample_fn)
    sample, outer = (
        seqio.MixtureRegistry.get(name) for name in (tasks.sampled("outer", 0.5), "outer")
    )

    def shares(mixture):
        total = sum(map(mixture.get_rate, mixture.tasks))
        return [mixture.get_rate(task) / total for task in mixture.tasks]

    assert shares(outer) == pytest.approx([0.1, 0.9, 0])
    assert shares(sample) == pytest.approx([0.1, 0.9, 0])
    assert sample._sample_fn is sample_fn


def test_names():
    assert tasks.sampled("cbqa_trivia_qa", 0.05) == "cbqa_trivia_qa_at_5pct_seed0"
    assert tasks.sampled("cbqa_trivia_qa", 0.8, seed=11) == "cbqa_trivia_qa_at_80pct_seed11"
    assert tasks.sampled("cbqa_trivia_qa", 0.025) == "cbqa_trivia_qa_at_2p5pct_seed0"
    assert tasks.sampled("cbqa_trivia_qa", 0.1) == "cbqa_trivia_qa_at_10pct_seed0"
    assert tasks.sampled("cbqa_trivia_qa", 1e-6) == "cbqa_trivia_qa_at_0p0001pct_seed0"
    assert tasks.sampled("cbqa_trivia_qa", 1) == tasks.sampled("cbqa_trivia_qa", 1.0, 5)
    assert tasks.sampled("cbqa_trivia_qa", 1) == "cbqa_trivia_qa"


def test_a_second_call_finds_the_first_ones_task():
    for name in ("cbqa_web_questions", "cbqa_proportional"):
        first = seqio.get_mixture_or_task(tasks.sampled(name, 0.3, seed=2))
        assert seqio.get_mixture_or_task(tasks.sampled(name, 0.3, seed=2)) is first


def test_gin_can_name_the_sample(tmp_path):
    gin = pytest.importorskip("gin")
    config = """
        from __gin__ import dynamic_registration
        from sam_optax import tasks
        SAMPLING_RATE = 0.05
        SAMPLING_SEED = 3
        MIXTURE_OR_TASK_NAME = @tasks.sampled()
        tasks.sampled.name = "cbqa_proportional"
        tasks.sampled.rate = %SAMPLING_RATE
        tasks.sampled.seed = %SAMPLING_SEED
        """
    with gin.unlock_config():
        gin.clear_config()
        gin.parse_config("\n".join(line.strip() for line in config.splitlines()))
        name = gin.query_parameter("%MIXTURE_OR_TASK_NAME").scoped_configurable_fn()
        gin.clear_config()
    assert name == "cbqa_proportional_at_5pct_seed3"


@pytest.mark.parametrize("rate", [0, 0.0, -0.1, 5, 1.0001, 1e-9, math.nan, math.inf])
def test_rates_that_are_no_shares_are_refused(rate):
    with pytest.raises(ValueError, match=rf"rate={rate!r} must be in \(0, 1\].* For 5%, say 0.05"):
        tasks.sampled("cbqa_trivia_qa", rate)


@pytest.mark.parametrize(
    "arguments", [{"rate": "0.05"}, {"rate": True}, {"rate": 0.1, "seed": 0.5}]
)
def test_arguments_that_are_no_numbers_are_refused(arguments):
    with pytest.raises(TypeError, match="must be a"):
        tasks.sampled("cbqa_trivia_qa", **arguments)


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        tasks.sampled("cbqa_trivia_qa", 0.1, seed=-1)


def test_unknown_names_are_refused(monkeypatch):
    name = "sam_optax.tasks.glue"  # which registers t5's, too
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ValueError, match="name='cbqa_trivia' is not .* it is in neither"):
        tasks.sampled("cbqa_trivia", 0.1)


def test_the_error_says_how_to_install_t5(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam_optax.tasks.glue", None)  # as if t5 were not there
    with pytest.raises(
        ValueError, match="'glue' is not .* pip install --no-deps t5 && pip .* babel"
    ):
        tasks.sampled("glue", 0.1)


def test_cached_data_are_looked_for_under_the_samples_name(stored_in):
    sample = seqio.get_mixture_or_task(tasks.sampled("cbqa_natural_questions", 0.2))
    assert sample.supports_caching
    with pytest.raises(
        AssertionError, match="cbqa_natural_questions_at_20pct_seed0' does not exist"
    ):
        sample.get_dataset(None, use_cached=True)


def test_a_sample_of_a_sample_is_refused():
    name = tasks.sampled("cbqa_trivia_qa", 0.5)
    with pytest.raises(ValueError, match="is a sample already"):
        tasks.sampled(name, 0.1)


def test_an_empty_sample_is_an_error(stored_in):
    with pytest.raises(ValueError, match="No training example of .*natural.* of 1e-06 of the data"):
        _sample(1e-6)


class _Source(seqio.FunctionDataSource):
    def __init__(self, examples):
        def dataset(split, shuffle_files, seed=None):
            return tf.data.Dataset.from_tensor_slices(examples)

        super().__init__(dataset, splits=["train"])


def test_any_difference_makes_another_example_and_any_type_will_do():
    base = {"idx": {"p": 1, "q": 2}, "text": "a", "score": 0.5, "flag": True, "all": [1, 2]}
    others = [
        {"idx": {"p": 2, "q": 1}},
        {"text": "A"},
        {"score": 0.25},
        {"flag": False},
        {"all": [2, 1]},
        {"idx": {"p": 1, "q": 3}},
    ]
    examples = [{**base, **other} for other in ({}, *others)]
    tensors = [
        {k: v if k == "idx" else tf.constant(v) for k, v in example.items()} for example in examples
    ]
    for example in tensors:
        example["idx"] = {k: tf.constant(v) for k, v in example["idx"].items()}
    ragged = (
        {"rows": tf.ragged.constant([[1], [2, 3]])},
        {"rows": tf.ragged.constant([[1, 2], [3]])},
    )
    identities = {_identity(example).numpy() for example in (*tensors, *ragged)}
    assert len(identities) == len(examples) + 2


def test_where_an_example_is_stored_is_no_part_of_it():
    example = {"text": tf.constant("a")}
    stored = {**example, "tfds_id": tf.constant("data-train.tfrecord-00001-of-00007__3")}
    assert _identity(stored) == _identity(example)


def test_examples_without_an_id_are_told_apart_by_what_they_say():
    texts = [f"text {i // 2}" for i in range(200)]  # each twice
    source = SampledSource(_Source({"text": texts}), 300_000, seed=0)
    kept = collections.Counter(e["text"] for e in source.get_dataset().as_numpy_iterator())
    assert 10 < len(kept) < 50
    assert set(kept.values()) == {2}


@pytest.mark.parametrize("able", [False, True])
def test_a_sample_can_do_what_its_source_can(able):
    class Source(seqio.DataSource):
        supports_arbitrary_sharding = able

        def list_shards(self, split):
            return [split]

        def get_dataset(self, **kwargs):
            return tf.data.Dataset.from_tensors({"x": "a"})

        def num_input_examples(self, split):
            return math.inf

    source = Source(["train"], caching_permitted=able, performs_internal_shuffling=able)
    sample = SampledSource(source, 500_000, seed=0)
    for name in ("supports_arbitrary_sharding", "caching_permitted", "performs_internal_shuffling"):
        assert getattr(sample, name) == able, name
    assert sample.num_input_examples("train") == math.inf

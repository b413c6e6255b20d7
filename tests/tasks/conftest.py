"""Data sets that need no network, read by TFDS's own code, and vocabularies likewise."""

import contextlib
import pathlib

import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

BYTES = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)


@pytest.fixture(autouse=True)
def separate_registries(monkeypatch):
    """Let no test see what another registered, or a TFDS builder that another made."""
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(seqio.utils.LazyTfdsLoader, "_MEMOIZED_BUILDERS", {})
    seqio.TfdsDataSource.list_shards.cache_clear()


@pytest.fixture
def in_bytes(monkeypatch):
    """A function that gives a task, or all of a mixture, a vocabulary that is not in the cloud."""

    def give(name):
        provider = seqio.get_mixture_or_task(name)
        for task in seqio.dataset_providers.get_subtasks(provider):
            monkeypatch.setattr(task, "_output_features", {"inputs": BYTES, "targets": BYTES})
        return provider

    return give


@pytest.fixture
def mock_tfds(tmp_path):
    """A function of data sets' splits and sizes that makes TFDS give such data, made up by it.

    `rows` are the examples to give instead, for each split.
    """
    with contextlib.ExitStack() as stack:

        def mock(sizes, rows=None):
            for name, splits in sizes.items():
                _write_metadata(name, splits, tmp_path)
            as_dataset = None
            if rows is not None:

                def as_dataset(builder, split, **kwargs):
                    spec = builder.info.features.get_tensor_spec()
                    return tf.data.Dataset.from_generator(
                        lambda: iter(rows[split]), output_signature=spec
                    )

            most = max(size for splits in sizes.values() for size in splits.values())
            stack.enter_context(
                tfds.testing.mock_data(most, data_dir=str(tmp_path), as_dataset_fn=as_dataset)
            )

        yield mock


def _write_metadata(name, splits, data_dir):
    builder = tfds.builder(name, data_dir=data_dir)
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[size],
            num_bytes=1,
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=builder.name,
                data_dir=builder.data_dir,
                split=split,
                filetype_suffix="tfrecord",
            ),
        )
        for split, size in splits.items()
    ]
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    pathlib.Path(builder.data_dir).mkdir(parents=True)
    builder.info.write_to_directory(builder.data_dir)

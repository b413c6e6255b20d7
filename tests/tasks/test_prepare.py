"""`python -m sam_optax.tasks`, which makes the data that tasks read."""

import pytest
import seqio
import tensorflow_datasets as tfds

from sam_optax import tasks
from sam_optax.tasks.__main__ import data_sets, main


@pytest.fixture
def prepared(monkeypatch):
    """The data sets that TFDS is asked to prepare, each with its folder."""
    asked = []

    def prepare(builder):
        asked.append((builder.info.full_name, str(builder.data_dir)))

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    return asked


def test_every_data_set_of_a_mixture_and_of_a_sample_once(prepared, tmp_path, capsys):
    sample = tasks.sampled("cbqa_proportional", 0.05)
    assert main([sample, "cbqa_trivia_qa", "tydiqa_goldp", "--tfds_data_dir", str(tmp_path)]) == 0
    names = [
        "natural_questions_open/1.0.0",
        "trivia_qa/unfiltered.nocontext/1.1.0",
        "web_questions/1.0.0",
        "tydi_qa/goldp/3.0.0",
    ]
    assert prepared == [(name, str(tmp_path / name)) for name in names]
    assert capsys.readouterr().out.splitlines() == [":".join(name.rsplit("/", 1)) for name in names]


def test_tasks_without_data_of_tfds_have_nothing_to_prepare(prepared):
    source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=("train",))
    seqio.TaskRegistry.add("of_a_function", source=source, output_features={}, preprocessors=[])
    assert main(["of_a_function"]) == 0 and prepared == []


def test_an_unknown_name_is_an_error_before_anything_is_downloaded(prepared, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["cbqa_proportional", "no_such_task"])
    assert "name='no_such_task' is not a task or mixture" in capsys.readouterr().err
    assert prepared == []


@pytest.mark.parametrize("name", ["cbqa_proportional", "tydiqa_goldp"])
def test_tfds_still_makes_the_data(name):
    for data_set in data_sets(name):
        assert tfds.builder(data_set).version.tfds_version_to_prepare is None, data_set

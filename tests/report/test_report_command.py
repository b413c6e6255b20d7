"""The command, from run folders to tables, files and exit code."""

import contextlib
import csv
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from recorded_runs import make_run, write_config, write_evaluation_config, write_scores

from sam_optax.report import main, plot
from sam_optax.report.tasks import BENCHMARKS

RTE = "super_glue_rte_v102"
LOGGERS = "JSONLogger", "TensorBoardLogger"


@pytest.fixture
def report(capsys):
    """Return a function that runs the command, and returns exit code, output and warnings."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        return code, output, errors

    return run


def super_glue(value, step=1000, without=()):
    """Return scores that are `value` everywhere."""
    scores = {}
    for pair in BENCHMARKS["SuperGLUE"]:
        if pair.column not in without:
            task = pair.task + ("_v102_simple_eval" if pair.column == "WSC" else "_v102")
            scores.setdefault(task, {step: {}})[step][pair.metric] = value
    return scores


def row(output, *words):
    """Return the cells of the first line that begins with the words."""
    for line in output.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if cells[: len(words)] == list(words):
            return cells[len(words) :]
    raise AssertionError(f"no line {words} in\n{output}")


@pytest.fixture
def two(tmp_path):
    baseline = {RTE: {s: {"accuracy": v} for s, v in [(1000, 70.0), (2000, 80.04), (3000, 80.04)]}}
    sam = {RTE: {s: {"accuracy": v} for s, v in [(1000, 86.0), (2000, 84.0)]}}
    make_run(tmp_path / "plain", baseline)
    make_run(tmp_path / "sharp", sam, rho=0.15)
    return tmp_path / "plain", tmp_path / "sharp"


def test_side_by_side_with_the_paper(two, report):
    code, output, errors = report(*reversed(two))
    assert code == 0 and not errors
    title = "t5_1_1_base, 100% of the training data, trained on a mixture"
    assert output.startswith(title)
    header = ["baseline", "SAM rho=0.15", "paper: baseline -> SAM (rho)", "its table"]
    assert row(output, "benchmark", "task", "metric") == header
    assert row(output, "SuperGLUE", "RTE", "accuracy") == [
        "80.0",
        "86.0",
        "80.9 -> 85.9 (0.15)",
        "1",
    ]
    average = ["1 of 8 tasks", "1 of 8 tasks", "75.3 -> 78.5 (0.15)", "1"]
    assert row(output, "SuperGLUE", "average", "-") == average
    # Best, the earliest of equals, and last.
    cells = ["80.0", "2000", "80.0", "3000", "3 checkpoints"]
    assert row(output, "plain", "baseline", RTE, "accuracy") == cells
    cells = ["86.0", "1000", "84.0", "2000", "2 checkpoints"]
    assert row(output, "sharp", "SAM rho=0.15", RTE, "accuracy") == cells


FRACTION = "t5x_trainer.SharpnessAwareTrainer.ascent_fraction = 0.0625"


def test_a_row_of_the_paper_with_another_ascent_fraction_says_so(two, tmp_path, report):
    make_run(tmp_path / "few", super_glue(80.0), 0.15, more=FRACTION)
    _, output, _ = report(two[0], tmp_path / "few")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[2].endswith("(0.15 ascent_fraction=0.0625)")


def test_averages_and_seeds(tmp_path, report):
    runs = [make_run(tmp_path / f"seed{k}", super_glue(70.0 + k), 0.05, seed=k) for k in range(3)]
    code, output, _ = report(*runs, "--csv", tmp_path / "out.csv")
    assert code == 0
    assert row(output, "SuperGLUE", "CB", "accuracy")[0] == "71.0 (mean of 3)"
    assert row(output, "SuperGLUE", "average", "-")[:2] == [
        "71.0 (mean of 3)",
        "75.3 -> 77.2 (0.05)",
    ]
    assert row(output, "seed2", "SAM rho=0.05", "SuperGLUE average")[:2] == ["72.0", "72.0"]
    lines = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    of_cb = [line for line in lines if line["task"] == "super_glue_cb_v102"]
    assert [(x["run"], x["runs"], x["seed"]) for x in of_cb if x["metric"] == "accuracy"] == [
        *((f"seed{k}", "1", str(k)) for k in range(3)),
        ("mean", "3", ""),
    ]


def test_an_average_is_of_the_best_checkpoints_or_of_the_last(tmp_path, report):
    best, last = super_glue(80.0), super_glue(70.0, step=2000)
    make_run(tmp_path / "run", {task: {**best[task], **last[task]} for task in last})
    _, output, _ = report(tmp_path / "run")
    assert row(output, "run", "baseline", "SuperGLUE average")[:2] == ["80.0", "70.0"]


def test_a_run_may_be_called_mean_or_be_the_current_folder(tmp_path, report, monkeypatch):
    make_run(tmp_path / "mean", super_glue(70.0))
    monkeypatch.chdir(make_run(tmp_path / "here", super_glue(80.0), seed=1))
    _, output, _ = report("../mean", ".")
    assert row(output, str(tmp_path / "mean"), "baseline", "super_glue_cb_v102")[1] == "70.0"
    assert row(output, "here", "baseline", "super_glue_cb_v102")[1] == "80.0"


def test_one_run_has_no_mean(tmp_path, report):
    tasks = super_glue(70.0)
    for task, steps in tasks.items():
        make_run(tmp_path / task, {task: steps}, mixture=task)
    report(*(tmp_path / task for task in tasks), "--csv", tmp_path / "out.csv")
    lines = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    means = [line["task"] for line in lines if line["run"] == "mean"]
    assert means == ["SuperGLUE average"]


def test_runs_of_other_settings_are_no_seeds(tmp_path, report):
    kept = "utils.SaveCheckpointConfig.keep = %BATCH_SIZE\n"  # which is not compared
    make_run(tmp_path / "a", super_glue(70.0), batch_size=64, more=kept)
    make_run(tmp_path / "b", super_glue(80.0), seed=1)
    _, output, _ = report(tmp_path / "a", tmp_path / "b")
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == ["baseline, BATCH_SIZE=128", "baseline, BATCH_SIZE=64"]
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:2] == ["80.0", "70.0"]
    _, output, _ = report(f"small={tmp_path / 'a'}", tmp_path / "b")
    assert row(output, "benchmark", "task", "metric")[:2] == ["baseline", "small"]


def test_a_run_of_t5x_main_is_one_of_t5x_train(tmp_path, report):
    for seed, name in enumerate(("train", "main")):
        make_run(tmp_path / name, super_glue(60.0 + seed), seed=seed)
    config = tmp_path / "main" / "config.gin"
    config.write_text(config.read_text().replace("train_script.train.", "train.train."))
    _, output, _ = report(tmp_path / "train", tmp_path / "main")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "60.5 (mean of 2)"


def test_the_checkpoint_that_a_run_starts_from_is_none_of_its_own(tmp_path, report):
    start, end = super_glue(90.0, step=1_000_000), super_glue(70.0, step=1_005_000)
    make_run(tmp_path / "run", {task: {**start[task], **end[task]} for task in end})
    _, output, _ = report(tmp_path / "run")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "70.0"
    assert "1000000" not in output
    make_run(tmp_path / "not trained", start)
    _, output, _ = report(tmp_path / "not trained")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "90.0"


def test_random_weights_are_no_checkpoint_of_the_run(tmp_path, report):
    start, end = super_glue(90.0, step=0), super_glue(70.0, step=5_000)
    make_run(tmp_path / "run", {task: {**start[task], **end[task]} for task in end})
    config = tmp_path / "run" / "config.gin"
    from_scratch = re.sub(r"(CHECKPOINT_PATH) = \\\n.*", r"\1 = None", config.read_text())
    no_number = config.read_text().replace("/checkpoint_1000000", "/best")
    # Nothing is known without a config, or of a checkpoint without its step.
    for text, best in ((from_scratch, "70.0"), ("", "90.0"), (no_number, "90.0")):
        config.write_text(text)
        _, output, _ = report(tmp_path / "run")
        assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == best


def test_runs_of_one_seed_are_named(tmp_path, report):
    for name, score, step in (("first", 70.0, 1_005_000), ("went on", 72.0, 1_006_000)):
        make_run(tmp_path / name, super_glue(score, step=step))
    _, output, warnings = report(tmp_path / "first", tmp_path / "went on")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "71.0 (mean of 2)"
    (line,) = [line for line in warnings.splitlines() if "averaged as 2 runs" in line]
    assert f"{tmp_path / 'first'}, {tmp_path / 'went on'}: " in line and "RANDOM_SEED=0" in line
    make_run(tmp_path / "another", super_glue(74.0), seed=1)
    _, _, warnings = report(tmp_path / "first", tmp_path / "another")
    assert "averaged as" not in warnings
    for sample in ("_at_5pct_seed0", "_at_5pct_seed1"):
        scores = {f"{RTE}{sample}": {1000: {"accuracy": 70.0}}}
        make_run(tmp_path / sample, scores, mixture=f"super_glue{sample}")
    _, output, warnings = report(tmp_path / "_at_5pct_seed0", tmp_path / "_at_5pct_seed1")
    assert "mean of 2" in output and "averaged as" not in warnings


def test_a_name_of_two_lines_is_one_cell(tmp_path, report):
    make_run(tmp_path / "two\nlines", super_glue(70.0))
    _, output, _ = report(tmp_path / "two\nlines")
    assert "two lines" in output and "two\nlines" not in output


def test_what_differs_beside_sam_is_told(tmp_path, report):
    make_run(tmp_path / "plain", super_glue(70.0))
    make_run(tmp_path / "like it", super_glue(72.0), rho=0.15, seed=1)
    make_run(tmp_path / "not like it", super_glue(75.0), rho=0.3, batch_size=64)
    _, output, warnings = report(*(tmp_path / name for name in ("plain", "like it", "not like it")))
    header = row(output, "benchmark", "task", "metric")
    assert header[:3] == ["baseline", "SAM rho=0.15", "SAM rho=0.3"]
    (line,) = [line for line in warnings.splitlines() if "in more than SAM" in line]
    assert "/not like it: differs from every baseline in more than SAM: BATCH_SIZE=64." in line
    _, _, warnings = report(tmp_path / "plain", f"other={tmp_path / 'not like it'}")
    assert "in more than SAM" not in warnings
    make_run(tmp_path / "its baseline", super_glue(65.0), batch_size=64)
    _, _, warnings = report(*tmp_path.iterdir())
    assert "in more than SAM" not in warnings


def test_one_setting_told_in_two_ways_is_one(tmp_path, report):
    own = "t5x_trainer.SharpnessAwareTrainer."
    told = {
        "macro": {"rho": 0.05, "more": ""},
        "default": {"rho": 0.05, "more": f"{own}m = 1\n{own}ascent_fraction = 0.250\n"},
        "scope": {"rho": 0.05, "more": f"other/{own}rho = 0.3\n{own}ascent_steps = 1\n"},
        "parameter": {"rho": 0.15, "more": f"{own}rho = 5e-2\n"},
        "number": {"rho": 0.05, "more": "BATCH_SIZE = 128.0\n"},
        "plain": {"more": ""},
        "rho 0": {"rho": 0.05, "more": f"{own}rho = 0.0\n"},
    }
    for seed, (name, settings) in enumerate(told.items()):
        make_run(tmp_path / name, {RTE: {1000: {"accuracy": 60.0 + seed}}}, seed=seed, **settings)
    _, output, _ = report(*(tmp_path / name for name in told))
    assert row(output, "benchmark", "task", "metric")[:2] == ["baseline", "SAM rho=0.05"]
    means = ["65.5 (mean of 2)", "62.0 (mean of 5)"]
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:2] == means
    for name, rho in (("one", "1"), ("the same", "1.0")):
        make_run(tmp_path / name, super_glue(70.0), rho)
    _, output, _ = report(tmp_path / "one", tmp_path / "the same")
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == ["SAM rho=1", "paper: baseline -> SAM (rho)"]


def test_a_parameter_given_in_the_place_of_its_macro_is_compared(tmp_path, report):
    own = "train/utils.DatasetConfig.batch_size"
    make_run(tmp_path / "a", super_glue(60.0), batch_size=64)
    make_run(tmp_path / "b", super_glue(70.0), more=f"{own} = 64\n")
    make_run(tmp_path / "c", super_glue(90.0), more=f"{own} = 32\n")
    _, output, _ = report(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == [f"baseline, {own}=32", f"baseline, {own}=64"]
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:2] == ["90.0", "65.0 (mean of 2)"]


def test_a_parameter_that_one_run_has_not_is_told(tmp_path, report):
    more = "D = [@a(),\n    @b()]\nanother.setting = %D\n"
    make_run(tmp_path / "a", super_glue(60.0), more=more)
    make_run(tmp_path / "b", super_glue(70.0))
    _, output, _ = report(tmp_path / "a", tmp_path / "b")
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == [f"baseline, D={x}" for x in ("[@a(), @b()]", "not set")]


def test_trainings_evaluated_on_other_splits_are_told_by_their_parameters(tmp_path, report):
    own = "infer_eval/utils.DatasetConfig.split"
    for split in ("test", "validation"):
        make_run(tmp_path / split, super_glue(60.0), more=f"{own} = '{split}'\n")
    _, output, _ = report(tmp_path / "test", tmp_path / "validation")
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == [f"baseline, {own}='{split}'" for split in ("test", "validation")]


def test_one_macro_for_unlike_parameters_is_told_by_their_names(tmp_path, report):
    for name, parameter, value in (("a", "cycle", 60.0), ("b", "decay", 80.0)):
        more = f"D = 1000\nscheduler.offset = %D\nscheduler.steps_per_{parameter} = %D\n"
        make_run(tmp_path / name, super_glue(value), more=more)
    make_run(tmp_path / "plain", super_glue(10.0))
    _, output, _ = report(*(tmp_path / name for name in ("a", "b", "plain")))
    assert "mean of" not in output


def test_a_macro_of_which_only_one_parameter_differs_is_told_by_that(tmp_path, report):
    make_run(tmp_path / "a", super_glue(60.0), more="D = 1\nits.first = %D\nits.second = 2\n")
    make_run(tmp_path / "b", super_glue(70.0), more="D = 2\nits.first = %D\nits.second = %D\n")
    _, output, _ = report(tmp_path / "a", tmp_path / "b")
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == ["baseline, its.first=1", "baseline, its.first=2"]


@pytest.mark.parametrize("groups", [True, False])
def test_a_mesh_counts_where_its_shards_are_the_groups(tmp_path, report, groups):
    own = "t5x_trainer.SharpnessAwareTrainer.group_axes = 'data'\n" if groups else ""
    for shards, value in ((1, 60.0), (4, 80.0)):
        more = f"{own}partitioning.PjitPartitioner.num_partitions = {shards}\n"
        make_run(tmp_path / str(shards), super_glue(value), 0.15, more=more)
    _, output, _ = report(tmp_path / "1", tmp_path / "4")
    assert ("mean of" in output) == (not groups)


def test_a_sample_of_everything_is_no_sample(tmp_path, report):
    """With `sampled.gin`, whose tasks have no name of their own at a rate of 1."""
    make_run(tmp_path / "plain", super_glue(70.0))
    more = "SAMPLING_RATE = 1\ntasks.sampled.name = 'super_glue'\n"
    more += "tasks.sampled.rate = %SAMPLING_RATE\ntrain/utils.DatasetConfig.seed = 0\n"
    make_run(tmp_path / "all", super_glue(80.0), more=more, seed=1)
    text = (tmp_path / "all" / "config.gin").read_text()
    text = text.replace("NAME = 'super_glue'", "NAME = @tasks.sampled()")
    (tmp_path / "all" / "config.gin").write_text(text)
    _, output, _ = report(tmp_path / "plain", tmp_path / "all")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "75.0 (mean of 2)"


def test_with_rho_zero_it_is_the_baseline(tmp_path, report):
    bound = (
        "ASCENT_FRACTION = 0.25\n"
        "t5x_trainer.SharpnessAwareTrainer.ascent_fraction = %ASCENT_FRACTION\n"
        "num_microbatches/copy.deepcopy.x = @num_microbatches/gin_config.query_parameter()\n"
        "num_microbatches/gin_config.query_parameter.binding_key = \\\n"
        "    't5x.trainer.Trainer.num_microbatches'\n"
    )
    make_run(tmp_path / "a", super_glue(70.0))
    make_run(tmp_path / "b", super_glue(80.0), 0, seed=1, more=bound)
    _, output, _ = report(tmp_path / "a", tmp_path / "b")
    assert row(output, "benchmark", "task", "metric")[0] == "baseline"
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "75.0 (mean of 2)"
    # What it shares with T5X's trainer is no part of SAM.
    for name, function in (("c", "utils.create_learning_rate_scheduler"), ("d", "other")):
        bound = f"t5x_trainer.SharpnessAwareTrainer.learning_rate_fn = @{function}()\n"
        make_run(tmp_path / name, super_glue(90.0), 0, seed=2, more=bound)
    _, output, _ = report(tmp_path / "a", tmp_path / "c")
    assert row(output, "benchmark", "task", "metric")[0] == "baseline"
    _, output, _ = report(tmp_path / "a", tmp_path / "d")
    expected = "baseline, trainer.Trainer.learning_rate_fn=@other()"
    assert row(output, "benchmark", "task", "metric")[0] == expected
    make_run(tmp_path / "e", super_glue(80.0), seed=1, more=bound)  # T5X's own trainer
    _, output, _ = report(tmp_path / "a", tmp_path / "e")
    assert row(output, "benchmark", "task", "metric")[0] == "baseline"


def test_other_settings_are_no_seeds_where_the_samples_differ_too(tmp_path, report):
    for k, batch_size in enumerate((64, 128)):
        mixture = f"super_glue_at_5pct_seed{k}"
        scores = {f"{task}_at_5pct_seed{k}": steps for task, steps in super_glue(60.0).items()}
        make_run(tmp_path / str(k), scores, mixture=mixture, batch_size=batch_size)
    _, output, _ = report(tmp_path / "0", tmp_path / "1")
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == ["baseline, BATCH_SIZE=128", "baseline, BATCH_SIZE=64"]


def test_an_evaluation_of_a_checkpoint_is_its_runs(tmp_path, report):
    make_run(tmp_path / "run", super_glue(70.0), 0.15)
    make_run(tmp_path / "seed", super_glue(80.0), 0.15, seed=1)
    for step, value in ((500, 90.0), (1000, 10.0)):
        checkpoint = tmp_path / "run" / f"checkpoint_{step}"
        on_validation = "utils.DatasetConfig.split = 'validation'\n"  # of which "seed" says nothing
        evaluation = write_evaluation_config(tmp_path / f"eval{step}", checkpoint, on_validation)
        write_scores(evaluation, super_glue(value, step), ("JSONLogger",))
    evaluations = [tmp_path / "eval500", tmp_path / "eval1000"]
    _, output, errors = report(*evaluations, tmp_path / "run")
    # The evaluation at a step that the run has evaluated itself does not count.
    assert row(output, "run", "SAM rho=0.15", RTE)[:4] == ["accuracy", "90.0", "500", "70.0"]
    assert "mean of" not in output and f"{evaluations[0]}: of a checkpoint of" in errors
    _, output, _ = report(*evaluations)
    assert row(output, "eval500", "SAM rho=0.15", RTE)[1:4] == ["90.0", "500", "10.0"]
    assert "mean of" not in output
    _, output, _ = report(evaluations[0], tmp_path / "seed")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "85.0 (mean of 2)"
    _, output, _ = report(evaluations[0], f"mine={tmp_path / 'run'}")
    assert row(output, "run", "mine", RTE)[:3] == ["accuracy", "90.0", "500"]


def test_an_evaluation_on_another_split_is_left_out(tmp_path, report):
    # As T5X writes it: training has three data sets, and the third is what `t5x.eval` evaluates.
    more = "".join(
        f"{use}/utils.DatasetConfig.split = '{split}'\n"
        for use, split in {"train": "train", "infer_eval": "validation"}.items()
    )
    make_run(tmp_path / "run", super_glue(70.0), 0.15, more=more)
    for split, value in {"train": 99.0, "validation": 90.0}.items():
        evaluation = write_evaluation_config(
            tmp_path / split,
            tmp_path / "run" / "checkpoint_500",
            f"utils.DatasetConfig.split = '{split}'\n",
        )
        write_scores(evaluation, super_glue(value, 500), ("JSONLogger",))
    _, output, errors = report(tmp_path / "run", tmp_path / "validation", tmp_path / "train")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:1] == ["90.0"]
    assert f"{tmp_path / 'train'}: left out." in errors
    assert "split='train', not 'validation'" in errors
    _, output, _ = report(tmp_path / "run", f"on_train={tmp_path / 'train'}")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:2] == ["70.0", "99.0"]


def test_an_evaluation_on_some_of_the_examples_is_left_out(tmp_path, report):
    make_run(tmp_path / "run", super_glue(70.0), 0.15)
    some = write_evaluation_config(
        tmp_path / "some",
        tmp_path / "run" / "checkpoint_500",
        "seqio.Evaluator.num_examples = 16\n",
    )
    write_scores(some, super_glue(99.0, 500), ("JSONLogger",))
    _, output, errors = report(tmp_path / "run", some)
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:1] == ["70.0"]
    assert f"{some}: left out." in errors and "num_examples=16, not None" in errors


def test_evaluations_on_other_examples_are_no_seeds_where_no_training_is_given(tmp_path, report):
    more = "infer_eval/utils.DatasetConfig.split = 'validation'\n"
    for seed in (0, 1):
        make_run(tmp_path / f"run{seed}", super_glue(70.0), 0.15, seed=seed, more=more)
    on_train = write_evaluation_config(
        tmp_path / "on_train",
        tmp_path / "run1" / "checkpoint_500",
        "utils.DatasetConfig.split = 'train'\n",
    )
    write_scores(on_train, super_glue(99.0, 500), ("JSONLogger",))
    _, output, _ = report(tmp_path / "run0", on_train)
    header = row(output, "benchmark", "task", "metric")
    assert header[:2] == ["SAM rho=0.15, split='train'", "SAM rho=0.15, split='validation'"]
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:2] == ["99.0", "70.0"]


def test_an_evaluation_that_may_be_of_two_runs_is_left_out(tmp_path, report):
    """Of a folder in which two were trained, on two machines, and then copied."""
    for seed, name in enumerate("ab"):
        make_run(tmp_path / name, super_glue(70.0), 0.15, seed=seed)
        config = tmp_path / name / "config.gin"
        config.write_text(config.read_text().replace(str(tmp_path / name), "/tmp/model"))
    of_one = write_evaluation_config(tmp_path / "e", "/tmp/model/checkpoint_500")
    write_scores(of_one, super_glue(99.0, 500), ("JSONLogger",))
    _, output, errors = report(tmp_path / "a", tmp_path / "b", of_one)
    assert "99.0" not in output and f"{of_one}: left out." in errors
    assert f"of which of {tmp_path / 'a'}, {tmp_path / 'b'} is not known" in errors


def test_an_evaluation_that_is_said_to_be_of_the_baseline_is(tmp_path, report):
    """Of a folder where the baseline went on with SAM, which is what its config tells."""
    make_run(tmp_path / "run", super_glue(65.0, 4000), 0.15)
    before = write_evaluation_config(tmp_path / "before", tmp_path / "run" / "checkpoint_2000")
    write_scores(before, super_glue(80.0, 2000), ("JSONLogger",))
    _, output, _ = report(tmp_path / "run", "--baseline", before)
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:2] == ["80.0", "65.0"]
    # What is said of the run is said of its evaluations.
    table = tmp_path / "out.csv"
    _, output, _ = report("--baseline", tmp_path / "run", before, "--csv", table)
    assert row(output, "run", "baseline", RTE)[1:4] == ["80.0", "2000", "65.0"]
    assert {line["rho"] for line in csv.DictReader(table.read_text().splitlines())} == {""}


def test_an_evaluation_of_a_sampled_run_has_tasks_without_the_sample(tmp_path, report):
    scores = {f"{task}_at_5pct_seed0": steps for task, steps in super_glue(60.0).items()}
    make_run(tmp_path / "run", scores, 0.15, mixture="super_glue_at_5pct_seed0")
    checkpoint = tmp_path / "run" / "checkpoint_200"
    evaluation = write_evaluation_config(tmp_path / "eval", checkpoint)
    write_scores(evaluation, super_glue(90.0, 200), ("JSONLogger",))
    _, output, _ = report(tmp_path / "run", evaluation)
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:1] == ["90.0"]


def test_an_evaluation_goes_to_the_run_in_its_folder_not_to_one_that_was_moved_away(
    tmp_path, report
):
    make_run(tmp_path / "new", super_glue(70.0), 0.15)
    (tmp_path / "new").rename(tmp_path / "moved")
    make_run(tmp_path / "new", super_glue(80.0), 0.15, seed=1)
    evaluation = write_evaluation_config(tmp_path / "eval", tmp_path / "new" / "best")
    write_scores(evaluation, super_glue(90.0, 200), ("JSONLogger",))
    _, output, _ = report(tmp_path / "moved", tmp_path / "new", evaluation)
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:1] == ["80.0 (mean of 2)"]
    assert row(output, "new", "SAM rho=0.15", RTE)[:3] == ["accuracy", "90.0", "200"]


def test_disjoint_tasks_make_one_average(tmp_path, report):
    some = super_glue(80.0, without=("RTE", "WSC"))
    rest = {k: v for k, v in super_glue(60.0).items() if k not in some}
    make_run(tmp_path / "some", some)
    make_run(tmp_path / "rest", rest, batch_size=32)
    _, output, _ = report(tmp_path / "some", tmp_path / "rest")
    assert row(output, "SuperGLUE", "average", "-")[0] == "75.0"
    assert row(output, "some", "baseline", "SuperGLUE average") == ["-", "-", "6 of 8 tasks"]


def test_sampled_tasks_stand_beside_table_6(tmp_path, report):
    scores = {f"{task}_at_5pct_seed1": steps for task, steps in super_glue(60.0).items()}
    make_run(tmp_path / "a", scores, mixture="super_glue_at_5pct_seed1")
    _, output, _ = report(tmp_path / "a")
    assert output.startswith("t5_1_1_base, 5% of the training data")
    assert row(output, "SuperGLUE", "average", "-") == ["60.0", "52.9 -> 56.7 (0.15)", "6"]


@pytest.mark.parametrize(
    ("mixture", "figures"),
    [("cbqa", "22.5 -> 24.5 (0.15)"), ("cbqa_web_questions", "26.0 -> 27.5 (0.15)")],
)
def test_single_task_cbqa_stands_beside_table_5(tmp_path, report, mixture, figures):
    make_run(tmp_path / "a", {"cbqa_web_questions": {200: {"em": 20.0}}}, mixture=mixture)
    _, output, _ = report(tmp_path / "a")
    assert row(output, "CBQA", "Web_Questions", "em")[:2] == ["20.0", figures]


def test_tydiqa_averages_each_metric(tmp_path, report):
    languages = ["en", "ar", "bn", "fi", "id", "ko", "ru", "sw", "te"]
    scores = {f"tydiqa_goldp_{x}": {200: {"f1": 80.0, "em": 70.0}} for x in languages}
    make_run(tmp_path / "a", scores, model="mt5_small", mixture="tydiqa_goldp")
    _, output, _ = report(tmp_path / "a")
    assert row(output, "TyDiQA F1", "average", "-")[:2] == ["80.0", "73.4 -> 74.3 (0.02)"]
    assert row(output, "TyDiQA EM", "average", "-")[:2] == ["70.0", "62.1 -> 63.0 (0.02)"]


def test_losses_are_better_when_lower_and_have_no_paper(tmp_path, report):
    scores = {"pronounce": {s: {"eval_loss": v} for s, v in [(1, 0.5), (2, 0.25), (3, 0.75)]}}
    make_run(tmp_path / "a", scores)
    _, output, _ = report(tmp_path / "a")
    assert row(output, "-", "pronounce", "eval_loss") == ["0.25", "-", "-"]
    cells = ["0.25", "2", "0.75", "3", "3 checkpoints"]
    assert row(output, "a", "baseline", "pronounce", "eval_loss") == cells


def test_what_the_folders_do_not_tell(tmp_path, report):
    for name in "abc":
        write_scores(tmp_path / name, super_glue(60.0), ["JSONLogger"])
    a, b, c = (tmp_path / name for name in "abc")
    _, output, _ = report(a, b)
    assert row(output, "benchmark", "task", "metric")[:2] == ["a", "b"]  # their names, no mean
    assert output.startswith("unknown model")
    assert row(output, "SuperGLUE", "RTE", "accuracy") == ["60.0", "60.0", "-", "-"]
    _, output, _ = report("--baseline", a, "--sam", b, f"mine={c}", "--model", "t5_1_1_small")
    assert row(output, "benchmark", "task", "metric")[:3] == ["baseline", "SAM", "mine"]
    figures = row(output, "SuperGLUE", "RTE", "accuracy")[3]
    assert figures == "69.3 -> 69.7 (0.05)"
    told = make_run(tmp_path / "told", super_glue(70.0))
    _, output, errors = report("--baseline", a, "--baseline", told, "--model", "t5_1_1_base")
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "65.0 (mean of 2)"
    _, _, errors = report(f"one={a}", f"one={b}")
    assert "averaged as" not in errors  # their seeds are not known


def test_damage_is_named_and_the_rest_reported(two, report, tmp_path):
    file = two[1] / "inference_eval" / f"{RTE}-metrics.jsonl"
    file.write_text(file.read_text()[:-5])
    code, output, errors = report(*two, tmp_path / "gone", "--markdown", tmp_path / "out.md")
    assert code == 0
    assert f"{file}: line 2" in errors and f"{tmp_path / 'gone'}: no such folder" in errors
    assert row(output, "SuperGLUE", "RTE", "accuracy")[:2] == ["80.0", "86.0"]
    assert f"- {file}: line 2" in (tmp_path / "out.md").read_text()


def test_into_what_takes_any_text(two):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main([str(two[0])]) == 0
    assert row(output.getvalue(), "SuperGLUE", "RTE", "accuracy")[0] == "80.0"


def test_nothing_to_report(tmp_path, report):
    code, output, errors = report(tmp_path)
    assert code == 1 and not output and "nothing to report" in errors


def test_a_folder_counts_once(two, report):
    for again in (two[0], two[0] / "inference_eval"):
        _, output, errors = report(two[0], again)
        assert "given twice" in errors
    assert row(output, "SuperGLUE", "RTE", "accuracy")[0] == "80.0"


def test_a_folder_counts_once_by_whichever_name_and_that_may_have_an_equals_sign(
    two, report, tmp_path
):
    link = tmp_path / "a=b"
    link.symlink_to(two[0])
    _, output, errors = report(two[0], link)
    assert "given twice" in errors and "no such folder" not in errors
    _, output, errors = report(f"mine={link}")
    assert row(output, "benchmark", "task", "metric")[0] == "mine" and not errors


def test_a_run_has_the_name_of_its_folder_whichever_is_given(two, report):
    _, output, _ = report(two[0] / "inference_eval", two[1] / "inference_eval")
    assert row(output, "plain", "baseline", RTE, "accuracy")[0] == "80.0"


@pytest.mark.parametrize("option", ["--baseline", "--sam"])
def test_what_is_said_of_a_folder_holds_where_it_is_given_twice(two, report, option):
    _, once, _ = report(option, two[0])
    _, output, errors = report(two[0], option, two[0])
    assert "given twice" in errors and output == once


def test_two_versions_of_a_task_are_not_two_runs(tmp_path, report):
    make_run(tmp_path / "a", {"glue_rte_v001": {1: {"accuracy": 5.0}}, **super_glue(60.0)})
    make_run(tmp_path / "b", {f"glue_rte_v00{k}": {1: {"accuracy": 5.0 + k}} for k in (1, 2)})
    _, output, errors = report(tmp_path / "a", tmp_path / "b")
    assert "glue_rte_v002, accuracy is there a second time" in errors
    assert row(output, "b", "baseline", "glue_rte_v001", "accuracy")[0] == "6.0"


@pytest.fixture
def sweep(tmp_path):
    rho = [None, 0.05, 0.15]
    runs = [make_run(tmp_path / f"{x}", super_glue(70 + 100 * (x or 0)), rho=x) for x in rho]
    few = {f"{k}_at_5pct_seed0": v for k, v in super_glue(50.0).items()}
    return [*runs, make_run(tmp_path / "few", few)]


def test_files(sweep, report, tmp_path):
    code, _, errors = report(*sweep, "--output", tmp_path / "new" / "out")
    assert code == 0 and not errors
    folder = tmp_path / "new" / "out"
    assert {file.name for file in folder.iterdir()} == {"report.md", "report.csv", "report.png"}
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    markdown = (folder / "report.md").read_text()
    cells = (
        "| SuperGLUE | average | - | 70.0 | 75.0 | 85.0 | 75.3 -> 77.2 (0.05), 78.5 (0.15) | 1, 9 |"
    )
    assert cells in markdown
    lines = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    (best,) = (x for x in lines if x["rho"] == "0.15" and x["task"] == "SuperGLUE average")
    assert float(best["best"]) == pytest.approx(85.0) and best["tasks"] == "8 of 8"
    assert (best["paper"], best["paper_rho"], best["paper_table"]) == ("78.5", "0.15", "1")


def test_a_file_with_a_place_of_its_own_is_not_in_the_folder(two, report, tmp_path):
    folder, table = tmp_path / "out", tmp_path / "own.csv"
    folder.mkdir()
    code, _, _ = report(*two, "--output", folder, "--csv", table)
    assert code == 0 and table.exists()
    assert {file.name for file in folder.iterdir()} == {"report.md", "report.png"}


def figures(directories, monkeypatch, **named):
    """Return what is drawn of the runs."""
    from matplotlib.figure import Figure

    from sam_optax.report.best import results_of
    from sam_optax.report.compare import compare
    from sam_optax.report.plot import draw
    from sam_optax.report.runs import read_run

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    runs = [read_run(directory, pytest.fail) for directory in directories]
    runs += [
        read_run(directory, pytest.fail, name)
        for name, given in named.items()
        for directory in (given if isinstance(given, list) else [given])
    ]
    draw(compare([r for run in runs for r in results_of(run, pytest.fail)]), "png")
    return saved


def drawn(sweep, monkeypatch, **named):
    """Return, by title and x axis, the lines that the plot has."""
    (figure,) = figures(sweep, monkeypatch, **named)
    return {
        (axis.get_title(), axis.get_xlabel().split(" (")[0]): [
            list(zip(*line.get_data(), strict=True)) for line in axis.lines
        ]
        for axis in figure.axes
    }


def test_plot_against_step_rho_and_rate(sweep, monkeypatch):
    panels = drawn(sweep, monkeypatch)
    assert [(1000, 85.0)] in panels[RTE, "step"]
    for title in (RTE, "SuperGLUE average"):
        line = next(line for line in panels[title, "rho"] if len(line) == 3)
        assert line == [(0.0, 70.0), (0.05, pytest.approx(75.0)), (0.15, pytest.approx(85.0))]
        assert [(5.0, 50.0), (100.0, 70.0)] in panels[title, "training data"]
    assert not panels["SuperGLUE average", "step"]


def names(axis):
    """Return the names in a legend, without the spaces and where lines are broken."""
    return ["".join(text.get_text().split()) for text in axis.get_legend().get_texts()]


def test_plot_against_step_has_a_line_for_each_run_and_a_colour_for_each_setting(
    two, tmp_path, monkeypatch
):
    seed = make_run(tmp_path / "seed", {RTE: {s: {"accuracy": s / 100} for s in (1, 2)}}, seed=1)
    (figure,) = figures([*two, seed], monkeypatch)
    lines = figure.axes[0].lines
    dots = [[tuple(point) for point in line.get_xydata()] for line in lines[1::2]]
    assert dots == [[(2000, 80.04)], [(2, 0.02)], [(1000, 86.0)]]
    assert [line.get_color() for line in lines] == ["C0"] * 4 + ["C1"] * 2
    assert names(figure.axes[0]) == ["baseline", "SAMrho=0.15"]


def test_plot_tells_groups_apart_by_what_they_differ_in(tmp_path, monkeypatch):
    scores, alone = {1: {"accuracy": 50.0}}, {1: {"loss": 1.0}}
    runs = [
        make_run(tmp_path / "all", {RTE: scores, "pronounce": alone}),
        make_run(tmp_path / "one", {RTE: scores}, mixture=RTE),
        make_run(
            tmp_path / "few", {f"{RTE}_at_5pct_seed0": scores}, mixture="super_glue_at_5pct_seed0"
        ),
    ]
    (figure,) = figures(runs, monkeypatch)
    assert names(figure.axes[0]) == [
        "baseline,t5_1_1_base,5%",
        "baseline,t5_1_1_base,100%,amixture",
        "baseline,t5_1_1_base,100%,singletasks",
    ]
    assert names(figure.axes[2]) == ["baseline"]


def test_plot_against_rho_has_a_line_for_each_setting_of_sam(tmp_path, monkeypatch):
    values = {(None, 1): 60.0, (0.1, 1): 70.0, (0.2, 1): 80.0, (0.1, 2): 50.0, (0.2, 2): 55.0}
    runs = [
        make_run(
            tmp_path / f"{rho} {m}",
            {RTE: {1: {"accuracy": value}}},
            rho,
            more=f"t5x_trainer.SharpnessAwareTrainer.m = {m}\n" if rho else "another.setting = 1\n",
        )
        for (rho, m), value in values.items()
    ]
    runs.append(make_run(tmp_path / "by step", {RTE: {1: {"accuracy": 10.0}}}, "@schedule()"))
    (figure,) = figures(runs, monkeypatch)
    assert names(figure.axes[1]) == ["t5_1_1_base,100%", "t5_1_1_base,100%,m=2"]
    assert [line.get_xydata().tolist() for line in figure.axes[1].lines[::2]] == [
        [[0.0, 60.0], [0.1, 70.0], [0.2, 80.0]],
        [[0.0, 60.0], [0.1, 50.0], [0.2, 55.0]],
    ]


def test_plot_against_rho_has_a_line_for_each_setting(tmp_path, monkeypatch):
    points = {  # by batch size, of the baseline and of SAM by rho
        128: {None: 60.0, 0.1: 70.0, 0.2: 80.0},
        16: {None: 40.0, 0.1: 50.0, 0.2: 20.0},
    }
    runs = [
        make_run(tmp_path / f"{size} {rho}", {RTE: {1: {"accuracy": value}}}, rho, batch_size=size)
        for size, values in points.items()
        for rho, value in values.items()
    ]
    (figure,) = figures(runs, monkeypatch)
    axis = next(axis for axis in figure.axes if axis.get_xlabel().startswith("rho"))
    lines = {line.get_label(): [*map(float, line.get_ydata())] for line in axis.lines}
    for size, values in points.items():
        (label,) = (label for label in lines if label.endswith(f"BATCH_SIZE={size}"))
        assert lines[label] == [*values.values()]


def test_plot_against_rho_leaves_out_what_has_a_name_of_its_own(tmp_path, monkeypatch):
    values = {None: 60.0, 0.1: 70.0, 0.2: 80.0}
    runs = [make_run(tmp_path / str(r), {RTE: {1: {"accuracy": v}}}, r) for r, v in values.items()]
    named = make_run(tmp_path / "other", {RTE: {1: {"accuracy": 10.0}}}, 0.2)
    alone = make_run(tmp_path / "alone", {RTE: {1: {"accuracy": 90.0}}}, 0.3)
    panels = drawn(runs, monkeypatch, named=named, alone=alone)
    assert [(0.0, 60.0), (0.1, 70.0), (0.2, 80.0), (0.3, 90.0)] in panels[RTE, "rho"]


def test_plot_keeps_evaluations_on_other_examples_apart(tmp_path, monkeypatch):
    few, runs = "_at_5pct_seed0", []
    for name, rho, sample, value in [
        ("few", None, few, 40.0),
        ("plain", None, "", 60.0),
        ("near", 0.1, "", 70.0),
        ("far", 0.2, "", 80.0),
    ]:
        write_config(tmp_path / name, rho, mixture=f"super_glue{sample}")
        for split, score in (("train", value + 10), ("validation", value)):
            evaluation = write_evaluation_config(
                tmp_path / f"{name} {split}",
                tmp_path / name / "checkpoint_500",
                f"utils.DatasetConfig.split = '{split}'\n",
            )
            scores = {f"{RTE}{sample}": {500: {"accuracy": score}}}
            runs.append(write_scores(evaluation, scores, ("JSONLogger",)))
    panels = drawn(runs, monkeypatch)
    for start in (10.0, 0.0):
        line = [(rho, value + start) for rho, value in ((0.0, 60.0), (0.1, 70.0), (0.2, 80.0))]
        assert line in panels[RTE, "rho"]
        assert [(5.0, 40.0 + start), (100.0, 60.0 + start)] in panels[RTE, "training data"]


def test_plot_against_rho_of_an_average_over_single_tasks(tmp_path, monkeypatch):
    runs = []
    for rho, value in ((None, 60.0), (0.1, 70.0), (0.2, 80.0)):
        tasks = super_glue(value).items()
        for number, (task, steps) in enumerate(reversed(tasks) if rho == 0.1 else tasks):
            folder = tmp_path / f"{rho}_{number}"
            runs.append(make_run(folder, {task: steps}, rho, mixture=task))
    panels = drawn(runs, monkeypatch)
    line = [(0.0, pytest.approx(60.0)), (0.1, pytest.approx(70.0)), (0.2, pytest.approx(80.0))]
    assert line in panels["SuperGLUE average", "rho"]


def test_plot_against_the_share_of_the_data_keeps_settings_apart(tmp_path, monkeypatch):
    runs = [
        make_run(
            tmp_path / str(size),
            {f"{RTE}{sample}": {1: {"accuracy": value}}},
            batch_size=size,
            mixture=f"super_glue{sample}",
        )
        for size, value, sample in ((16, 40.0, "_at_5pct_seed0"), (128, 60.0, ""))
    ]
    assert sorted(drawn(runs, monkeypatch)[RTE, "training data"])[:2] != [
        (5.0, 40.0),
        (100.0, 60.0),
    ]
    other = make_run(
        tmp_path / "5",
        {f"{RTE}_at_5pct_seed0": {1: {"accuracy": 50.0}}},
        mixture="super_glue_at_5pct_seed0",
    )
    assert [(5.0, 50.0), (100.0, 60.0)] in drawn([*runs, other], monkeypatch)[RTE, "training data"]


def test_plot_against_the_share_of_the_data_has_a_line_for_each_setting(tmp_path, monkeypatch):
    def scores_of(value, sample=""):
        return {f"{RTE}{sample}": {1: {"accuracy": value}}}

    few = "_at_5pct_seed0"
    runs = [
        make_run(tmp_path / "a", scores_of(60.0)),
        make_run(tmp_path / "b", scores_of(70.0), seed=1),
        make_run(tmp_path / "few", scores_of(40.0, few), mixture=f"super_glue{few}"),
        make_run(tmp_path / "one", scores_of(50.0), mixture=RTE),
        write_scores(tmp_path / "unknown", scores_of(30.0), ("JSONLogger",)),
    ]
    mine = [make_run(tmp_path / f"of {b}", scores_of(b), batch_size=b) for b in (10, 20)]
    (figure,) = figures(runs, monkeypatch, mine=mine)
    lines = [[*map(tuple, line.get_xydata())] for line in figure.axes[1].lines[::2]]
    assert dict(zip(names(figure.axes[1]), lines, strict=True)) == {
        str(tmp_path / "unknown"): [(100.0, 30.0)],
        "baseline,t5_1_1_base,MIXTURE_OR_TASK_NAME='super_glue'": [(5.0, 40.0), (100.0, 65.0)],
        f"baseline,t5_1_1_base,MIXTURE_OR_TASK_NAME='{RTE}'": [(100.0, 50.0)],
        "mine,t5_1_1_base": [(100.0, 15.0)],
    }


def test_no_name_in_a_plot_is_wider_than_half_a_panel(monkeypatch, tmp_path):
    more = "t5x_trainer.SharpnessAwareTrainer.adversarial_dtype = 'bfloat16'\n"
    more += "t5x_trainer.SharpnessAwareTrainer.group_axes = 'data'\n"
    runs = [
        make_run(tmp_path / str(size), super_glue(70.0), 0.15, more=more, batch_size=size)
        for size in (64, 128)
    ]
    (figure,) = figures(runs, monkeypatch)
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    names = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert any("BATCH_SIZE" in name for name in names)
    assert max(len(line) for name in names for line in name.splitlines()) <= 36


def test_only_so_many_panels_are_laid_out_with_care(tmp_path, monkeypatch):
    runs = [
        make_run(tmp_path / f"run{sample}", {f"t{i}{sample}": {1: {"x": 1.0}} for i in range(3)})
        for sample in ("", "_at_5pct_seed0")
    ]
    for most, with_care in ((6, True), (5, False)):
        monkeypatch.setattr(plot, "_MOST", most)
        (figure,) = figures(runs, monkeypatch)
        assert (figure.get_layout_engine() is not None) == with_care
        figure.draw_without_rendering()
        for upper, lower in itertools.pairwise(figure.axes[::2]):
            assert upper.get_tightbbox().y0 > lower.get_tightbbox().y1


def test_averages_come_last_and_have_no_panel_against_step(sweep, monkeypatch):
    (figure,) = figures(sweep, monkeypatch)
    assert {axis.get_title() for axis in figure.axes[-3:]} == {"SuperGLUE average"}
    assert [axis.axison for axis in figure.axes[-6:]] == [True, True, True, False, True, True]


def test_plot_of_one_setting_has_steps_alone(sweep, monkeypatch):
    for runs in (sweep[:1], sweep[:2]):  # the baseline beside one rho, too
        panels = drawn(runs, monkeypatch)
        assert {x for _, x in panels} == {"step"} and ("SuperGLUE average", "step") not in panels


def test_wrong_command_lines(two, report, capsys, monkeypatch, tmp_path):
    for arguments, words in [
        ([], "no RUN_DIR"),
        ([two[0], "--plot", "a.txt"], ".png, .pdf, .svg"),
        (["gs://b/run"], "copy the folder here first"),
        (["base=gs://b/run"], "'checkpoint_.*' gs://b/run RUN_DIR"),
        (["--sam", "s3://b/run"], "s3://b/run is not on this machine"),
        ([two[0], "--output", "gs://b/out"], "--output: gs://b/out is not on this machine"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            report(*arguments)
        assert words in capsys.readouterr().err
    code, output, errors = report(two[0], "--csv", tmp_path / "no" / "such.csv")
    assert code == 1 and str(tmp_path / "no" / "such.csv") in errors and output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        report(two[0], "--plot", "a.png")
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_model_that_the_paper_has_not(two, report):
    code, output, errors = report(*two, "--model", "T5_1_1_base")
    assert code == 0 and "--model T5_1_1_base: not of the paper, which has t5_1_1_small" in errors
    assert "80.9 -> 85.9" not in output and "86.0" in output


def test_a_name_that_is_no_text_in_every_kind_of_file(tmp_path):
    strange = os.fsdecode(b"t\xff\nx")
    scores = {"t": {1: {"accuracy": 50.0}, 2: {"accuracy": 60.0}}}
    runs = [write_scores(tmp_path / kind, scores, [kind]) for kind in LOGGERS]
    inside = [run / "inference_eval" for run in runs]
    try:
        (inside[0] / "t-metrics.jsonl").rename(inside[0] / f"{strange}-metrics.jsonl")
        (inside[1] / "t").rename(inside[1] / strange)
        runs[0] = runs[0].rename(tmp_path / strange)
    except OSError:
        pytest.skip("the file system takes no such name")
    command = [sys.executable, "-m", "sam_optax.report", *runs, "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "60" in done.stdout, done.stderr
    assert "not read: TensorBoard's reader wants a path that is UTF-8" in done.stderr
    table = (tmp_path / "out" / "report.md").read_text()
    assert "t\\udcff x" in table
    assert all(line[0] in "|#-B" for line in table.splitlines() if line)


def test_more_panels_than_matplotlib_draws(tmp_path, report, monkeypatch):
    """Of 190, three inches each, it says that the image is too large."""
    monkeypatch.setattr(plot, "_MOST", 2)
    monkeypatch.setattr(plot, "_PIXELS", 900)
    scores = {f"t{i}": {1: {"x": 1.0}} for i in range(5)}
    code, _, errors = report(make_run(tmp_path / "run", scores), "--plot", tmp_path / "x.png")
    assert code == 0 and not errors
    assert 800 < len(matplotlib.image.imread(tmp_path / "x.png")) <= 900


def test_a_folder_that_is_a_loop_does_not_end_the_report(two, report, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    code, output, errors = report(*two, tmp_path / "loop", f"x={'y' * 300}")
    assert code == 0 and "80.9 -> 85.9 (0.15)" in output
    assert f"{tmp_path / 'loop'}: no such folder" in errors and "yyy: no such folder" in errors


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_name_in_a_plot_is_no_formula(tmp_path, report, kind):
    scores = {r"$\frac$": {1: {"x^{$ $_": 1.0}, 2: {"x^{$ $_": 2.0}}}
    run = make_run(tmp_path / r"lr $3$ vs $\foo$", scores)
    code, output, errors = report(run, "--plot", tmp_path / f"x.{kind}")
    assert code == 0 and not errors and r"$\frac$" in output
    assert (tmp_path / f"x.{kind}").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["csv", "markdown", "plot"])
def test_a_full_disk_is_named(two, report, tmp_path, kind):
    full = tmp_path / "full.pdf"
    full.symlink_to("/dev/full")
    code, output, errors = report(*two, f"--{kind}", full)
    assert code == 1 and f"cannot write {full}: No space left" in errors and output


PROBE = """
import sys, types
package = types.ModuleType("sam_optax")  # without its __init__, which imports JAX
package.__path__ = [sys.argv[1]]
sys.modules["sam_optax"] = package
from sam_optax.report import main, plot
heavy = "jax", "numpy", "tensorboard", "matplotlib", "tensorflow", "seqio", "t5x"
assert not [name for name in heavy if name in sys.modules], sorted(sys.modules)
assert main(sys.argv[2:]) == 0
heavy = "jax", "tensorflow", "seqio", "t5x", "matplotlib.pyplot"
assert not [name for name in heavy if name in sys.modules]
assert "tensorboard" in sys.modules and "matplotlib" in sys.modules
"""


def test_no_heavy_imports(tmp_path):
    import sam_optax

    scores = {RTE: {1: {"accuracy": 70.0}}}
    run = write_scores(tmp_path / "run", scores, ["TensorBoardLogger"])
    package = Path(sam_optax.__file__).parent
    arguments = [str(package), str(run), "--plot", str(tmp_path / "x.svg")]
    command = [sys.executable, "-W", "error", "-c", PROBE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "70.0" in result.stdout and not result.stderr


def test_a_reader_that_has_enough_and_a_name_that_is_no_text(two, tmp_path):
    """`| head` leaves before the table is written; in a folder whose name is not UTF-8."""
    strange = Path(os.fsdecode(os.fsencode(tmp_path / "run") + b"\xff"))
    try:
        two[0].rename(strange)
    except OSError:
        pytest.skip("the file system takes no such name")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sam_optax.report", strange, two[1], "--output", out]
    reader, writer = os.pipe()
    os.close(reader)
    own = {"PYTHONIOENCODING": "utf-8:strict", "PYTHONUNBUFFERED": ""}
    strict = {"env": os.environ | own, "stderr": subprocess.PIPE}
    done = subprocess.run(command, stdout=writer, text=True, timeout=120, **strict)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "\\udcff" in (out / "report.md").read_text(encoding="utf-8")
    assert (out / "report.csv").exists() and (out / "report.png").exists()
    done = subprocess.run(command[:-2], stdout=subprocess.PIPE, text=True, timeout=120, **strict)
    assert done.returncode == 0 and "\\udcff" in done.stdout, done.stderr
    assert "80.9 -> 85.9 (0.15)" in done.stdout
    with open("/dev/full", "w") as full:
        done = subprocess.run(command[:-2], stdout=full, text=True, timeout=120, **strict)
    assert done.returncode == 1 and "cannot print the tables: No space left" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr

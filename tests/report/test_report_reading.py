"""What evaluators write, whole and damaged."""

import json
import sys
import warnings
from pathlib import Path

import pytest
from recorded_runs import write_config, write_evaluation_config, write_scores

from sam_optax.report.best import best_score, results_of
from sam_optax.report.compare import compare
from sam_optax.report.runs import Run, read_run, with_evaluations
from sam_optax.report.settings import BASELINE, SAM, Settings, method_name, read_settings

RTE, CB = "super_glue_rte_v102", "super_glue_cb_v102"
SCORES = {
    RTE: {1000: {"accuracy": 60.1}, 2000: {"accuracy": 62.3}, 3000: {"accuracy": 61.7}},
    CB: {1000: {"accuracy": 70.0, "mean_3class_f1": 55.0}},
}


def read(directory, **options):
    told = []
    run = read_run(directory, told.append, **options)
    return run, told


def values(steps, metric):
    return {step: metrics[metric] for step, metrics in steps.items()}


def test_json_lines(tmp_path):
    run, told = read(write_scores(tmp_path, SCORES))
    assert not told
    assert run.scores[RTE]["accuracy"] == values(SCORES[RTE], "accuracy")  # exact: not float32
    assert run.scores[CB] == {"accuracy": {1000: 70.0}, "mean_3class_f1": {1000: 55.0}}


def test_event_files_where_there_is_no_json(tmp_path):
    run, told = read(write_scores(tmp_path, SCORES, ["TensorBoardLogger"]))
    assert not told
    assert run.scores.keys() == SCORES.keys()
    assert run.scores[RTE]["accuracy"] == pytest.approx(values(SCORES[RTE], "accuracy"), abs=1e-5)


@pytest.mark.parametrize("where", ["inference_eval", "."])
def test_other_folders_to_point_at(tmp_path, where):
    directory = write_scores(tmp_path / "run", SCORES)
    if where == ".":
        directory = (directory / "inference_eval").rename(tmp_path / "elsewhere")
    run, told = read(directory / where)
    assert run.scores.keys() == SCORES.keys() and not told


def test_training_eval(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from clu import metric_writers
    write_scores(tmp_path, SCORES)
    writer = metric_writers.create_default_writer(
        tmp_path, collection=f"training_eval/{RTE}", asynchronous=False
    )
    scalars = {"accuracy": 0.9, "loss_per_nonpadding_target_token": 0.5, "timing/seqs": 3.0}
    writer.write_scalars(1000, scalars)
    writer.close()
    assert read(tmp_path)[0].scores[RTE].keys() == {"accuracy"}
    run, told = read(tmp_path, training_eval=True)
    assert not told
    assert run.scores[RTE]["training_eval/loss_per_nonpadding_target_token"] == {1000: 0.5}
    assert run.scores[RTE]["accuracy"] == values(SCORES[RTE], "accuracy")
    assert not any("timing" in metric for metric in run.scores[RTE])
    inside, told = read(tmp_path / "inference_eval", training_eval=True)
    assert inside.scores == run.scores and not told
    _, told = read(write_scores(tmp_path / "other", SCORES), training_eval=True)
    assert len(told) == 1 and "no teacher-forced metrics" in told[0]


def json_file(directory):
    return directory / "inference_eval" / f"{RTE}-metrics.jsonl"


DAMAGE = {
    "truncated": (lambda text: text[:-12], "line 3 not readable", {1000, 2000}),
    "junk": (lambda text: b"\x89PNG\xff\x00\n\xfe{]", "lines 1, 2 not readable", set()),
    "junk inside": (lambda text: b"\xff\xfe\n" + text, "line 1 not", {1000, 2000, 3000}),
    "empty": (lambda text: b"", "empty", set()),
    "no step": (lambda text: b'{"accuracy": 5}\n' + text, "line 1 not", {1000, 2000, 3000}),
    "no object": (lambda text: b"[1]\n7\n" + text, "lines 1, 2 not", {1000, 2000, 3000}),
    "infinite step": (
        lambda text: b'{"step": Infinity, "accuracy": 5}\n{"step": 1e400, "accuracy": 5}\n' + text,
        "lines 1, 2 not",
        {1000, 2000, 3000},
    ),
    "huge number": (
        lambda text: b'{"step": 4000, "accuracy": 1' + b"0" * 400 + b"}\n" + text,
        "line 1 not",
        {1000, 2000, 3000},
    ),
    "no number of a step": (
        lambda text: (
            b"".join(
                b'{"step": %s, "accuracy": 5}\n' % step
                for step in (b"true", b'"4000"', b"1.5", b"9" * 310)
            )
            + text
        ),
        "lines 1, 2, 3, 4 not",
        {1000, 2000, 3000},
    ),
    "much": (lambda text: b"?\n" * 9 + text, "1, 2, 3, 4, 5 and 4 more", {1000, 2000, 3000}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_json_file(tmp_path, damage):
    change, words, steps = DAMAGE[damage]
    file = json_file(write_scores(tmp_path, SCORES, ["JSONLogger"]))
    file.write_bytes(change(file.read_bytes()))
    run, told = read(tmp_path)
    assert len(told) == 1 and str(file) in told[0] and words in told[0]
    assert set(run.scores.get(RTE, {}).get("accuracy", {})) == steps
    assert run.scores[CB]["accuracy"] == {1000: 70.0}


def test_event_files_fill_what_a_damaged_json_file_lacks(tmp_path):
    file = json_file(write_scores(tmp_path, SCORES))
    file.write_bytes(file.read_bytes()[:-12])
    run, told = read(tmp_path)
    assert run.scores[RTE]["accuracy"] == pytest.approx(values(SCORES[RTE], "accuracy"))
    assert run.scores[RTE]["accuracy"][1000] == 60.1  # the file's own, not rounded to float32
    assert any("event files" in warning for warning in told)


def test_a_json_file_that_ends_before_the_event_files_is_named(tmp_path):
    """It may have been copied while the run went on, or they may be of another run."""
    file = json_file(write_scores(tmp_path, SCORES))
    whole, told = read(tmp_path)
    assert not told
    file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:-1]))
    run, told = read(tmp_path)
    steps = whole.scores[RTE]["accuracy"]
    assert set(run.scores[RTE]["accuracy"]) == set(steps) - {max(steps)}
    assert len(told) == 1 and str(file) in told[0] and f"go on to {max(steps)}" in told[0]


def test_of_event_files_beside_a_whole_json_file_no_damage_is_told(tmp_path):
    write_scores(tmp_path, SCORES)
    (file,) = (tmp_path / "inference_eval" / RTE).iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    run, told = read(tmp_path)
    assert run.scores[RTE]["accuracy"] == values(SCORES[RTE], "accuracy") and not told


def test_a_json_file_that_the_event_files_contradict_is_named(tmp_path):
    file = json_file(write_scores(tmp_path, SCORES))
    file.write_text(file.read_text().replace("62.3", "26.3"))
    run, told = read(tmp_path)
    assert run.scores[RTE]["accuracy"][2000] == 26.3
    (line,) = told
    assert f"{file}: accuracy at step 2000 is another" in line and "62.3 for 26.3" in line


def test_a_repeated_evaluation_counts_where_its_line_is_the_damaged_one(tmp_path):
    write_scores(tmp_path, {RTE: {1000: {"accuracy": 90.25}, 2000: {"accuracy": 50.1}}})
    file = json_file(write_scores(tmp_path, {RTE: {1000: {"accuracy": 90.5}}}))
    file.write_bytes(file.read_bytes()[:-12])
    run, _ = read(tmp_path)
    assert run.scores[RTE]["accuracy"] == {1000: 90.5, 2000: 50.1}


@pytest.mark.parametrize(
    ("keep", "change", "steps"),
    [
        (-7, None, {1000, 2000}),
        (0, None, set()),
        (None, b"no event file", set()),
        (20, None, set()),
    ],
    ids=["truncated", "empty", "junk", "first record"],
)
def test_a_damaged_event_file(tmp_path, keep, change, steps):
    write_scores(tmp_path, SCORES, ["TensorBoardLogger"])
    (file,) = (tmp_path / "inference_eval" / RTE).iterdir()
    file.write_bytes(change or file.read_bytes()[:keep])
    run, told = read(tmp_path)
    assert len(told) == 1 and str(file) in told[0]
    assert set(run.scores.get(RTE, {}).get("accuracy", {})) == steps
    assert run.scores[CB]["accuracy"] == {1000: 70.0}


def test_an_event_file_of_something_else(tmp_path):
    import tensorflow as tf

    write_scores(tmp_path, SCORES, ["TensorBoardLogger"])
    (file,) = (tmp_path / "inference_eval" / RTE).iterdir()
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(b"no event")
    run, told = read(tmp_path)
    assert len(told) == 1 and f"{file}: damaged" in told[0] and run.scores.keys() == {CB}


def test_a_changed_bit_of_an_event_file(tmp_path):
    write_scores(tmp_path, SCORES, ["TensorBoardLogger"])
    (file,) = (tmp_path / "inference_eval" / RTE).iterdir()
    content = bytearray(file.read_bytes())
    content[-10] ^= 1  # in the last record
    file.write_bytes(content)
    run, told = read(tmp_path)
    assert len(told) == 1 and "crc" in told[0]
    assert set(run.scores[RTE]["accuracy"]) == {1000, 2000}


@pytest.mark.parametrize("logger", ["JSONLogger", "TensorBoardLogger"])
def test_of_a_step_recorded_twice_the_later_counts(tmp_path, logger):
    write_scores(tmp_path, SCORES, [logger])
    if logger == "TensorBoardLogger":  # a resumed run has a file of its own, named by the time
        (first,) = (tmp_path / "inference_eval" / RTE).iterdir()
        first.rename(first.with_name("events.out.tfevents.1500000000.host"))
    write_scores(tmp_path, {RTE: {2000: {"accuracy": 50.0}}}, [logger])
    run, told = read(tmp_path)
    assert run.scores[RTE]["accuracy"] == pytest.approx({1000: 60.1, 2000: 50.0, 3000: 61.7})
    assert list(run.scores[RTE]["accuracy"]) == [1000, 2000, 3000]
    if logger == "JSONLogger":  # 3000 is of the run before the restart
        assert len(told) == 1 and "step 3000 evaluated before smaller ones" in told.pop()
    assert not told
    write_scores(tmp_path, {RTE: {3000: {"accuracy": 55.0}}}, [logger])
    run, told = read(tmp_path)
    assert run.scores[RTE]["accuracy"] == pytest.approx({1000: 60.1, 2000: 50.0, 3000: 55.0})
    assert not told


def test_every_step_that_a_smaller_one_comes_after_is_named(tmp_path):
    scores = {RTE: {step: {"accuracy": 1.0} for step in (2, 3, 1)}}
    _, told = read(write_scores(tmp_path, scores, ["JSONLogger"]))
    assert len(told) == 1 and "steps 2, 3 evaluated before smaller ones" in told[0]


def test_what_is_not_a_finite_number(tmp_path):
    scores = {RTE: {1: {"accuracy": float("nan")}, 2: {"accuracy": 5.0}}, CB: {1: {"f1": 1e999}}}
    run, told = read(write_scores(tmp_path, scores))
    assert run.scores == {RTE: {"accuracy": {2: 5.0}}}
    assert len(told) == 2 and all("not a finite number at step 1" in text for text in told)
    assert RTE in told[1] or RTE in told[0]


def test_many_steps_that_are_not_finite_are_not_all_named(tmp_path):
    scores = {RTE: {step: {"accuracy": float("nan")} for step in range(900)}}
    _, told = read(write_scores(tmp_path, scores, ["JSONLogger"]))
    assert "steps 0, 1, 2, 3, 4 and 895 more" in told[0] and len(told[0]) < 300


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("accuracy", 50.0),
        ("exact_match", 50.0),
        ("bleu", 50.0),
        ("error_detection_f1", 50.0),
        ("credit", 50.0),
        ("lossless_ratio", 50.0),
        ("loss_per_nonpadding_target_token", 10.0),
        ("phoneme_error_rate", 10.0),
        ("edit_distance", 10.0),
        ("exact_match_error", 10.0),
        ("", 50.0),
        ("WER", 10.0),
        ("edit_similarity", 50.0),
        ("levenshtein_ratio", 50.0),
        ("mean_negative_log_likelihood", 10.0),
        ("log_likelihood", 50.0),
        ("nll", 10.0),
        ("bits_per_byte", 10.0),
        ("training_eval/cross_ent_loss", 10.0),
    ],
)
def test_which_checkpoint_is_the_best(metric, best):
    assert best_score(metric, {1: 50.0, 2: 10.0}).value == best


def test_text_and_lists_are_no_scores(tmp_path):
    file = json_file(write_scores(tmp_path, SCORES, ["JSONLogger"]))
    record = {"step": 4000, "accuracy": 63, "note": "x", "list": [1], "ok": True, "none": None}
    file.write_text(file.read_text() + json.dumps(record) + "\n")
    run, told = read(tmp_path)
    assert run.scores[RTE].keys() == {"accuracy"} and run.scores[RTE]["accuracy"][4000] == 63
    assert not told


def test_a_missing_folder_and_one_without_metrics(tmp_path):
    assert "no such folder" in read(tmp_path / "nowhere")[1][0]
    assert "no metrics found" in read(tmp_path)[1][0]
    for name in ("base", "base_sam"):
        write_scores(tmp_path / name, SCORES)
    assert read(tmp_path)[1][0].endswith("Runs in it, to be named each: base, base_sam.")


def test_without_tensorboard(tmp_path, monkeypatch):
    write_scores(tmp_path, {RTE: SCORES[RTE]}, ["TensorBoardLogger"])
    write_scores(tmp_path, {CB: SCORES[CB]}, ["JSONLogger"])
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    run, told = read(tmp_path)
    assert len(told) == 1 and "pip install tensorboard" in told[0] and RTE in told[0]
    assert run.scores.keys() == {CB}


def test_settings_of_a_sam_run(tmp_path):
    more = "t5x_trainer.SharpnessAwareTrainer.ascent_fraction = 0.125\n"
    write_config(
        tmp_path, 0.05, mixture="super_glue_v102_proportional_at_2p5pct_seed3", seed=7, more=more
    )
    settings = read_settings(tmp_path, pytest.fail)
    assert settings.method == SAM and settings.model == "t5_1_1_base" and settings.seed == 7
    assert settings.sam == {"rho": 0.05, "ascent_fraction": 0.125, "m": 1}
    assert (settings.percent, settings.sample_seed) == (2.5, 3)
    assert settings.mixture == "super_glue_v102_proportional"
    assert method_name(settings) == "SAM rho=0.05 ascent_fraction=0.125"


@pytest.mark.parametrize("rho", [None, 0.0])
def test_settings_of_a_baseline(tmp_path, rho):
    write_config(tmp_path, rho, model="mt5_xl")
    settings = read_settings(tmp_path, pytest.fail)
    assert (settings.method, settings.sam, settings.model) == (BASELINE, {}, "mt5_xl")


@pytest.mark.parametrize(("rate", "percent"), [("0.07", 7.0), ("1", 100.0), ("@other()", None)])
def test_settings_of_a_run_on_a_sample(tmp_path, rate, percent):
    """As `t5x_configs/sampled.gin` has it, where the config does not hold the sample's name."""
    more = f"SAMPLING_RATE = {rate}\nSAMPLING_SEED = 2\nTASK = 'cbqa_proportional'\n" + "".join(
        f"tasks.sampled.{k} = %{v}\n"
        for k, v in [("name", "TASK"), ("rate", "SAMPLING_RATE"), ("seed", "SAMPLING_SEED")]
    )
    write_config(tmp_path, 0.05, more=more)
    text = (tmp_path / "config.gin").read_text()
    (tmp_path / "config.gin").write_text(text.replace("'super_glue'", "@tasks.sampled()"))
    settings = read_settings(tmp_path, pytest.fail)
    assert (settings.mixture, settings.percent) == ("cbqa_proportional", percent)
    assert settings.sample_seed == (2 if percent else None)
    assert "SAMPLING_SEED" not in settings.bindings  # what may differ between runs of one setting


def test_settings_of_an_evaluation_are_those_of_the_training(tmp_path):
    write_config(tmp_path / "train", 0.05, mixture="cbqa")
    checkpoint = tmp_path / "train" / "checkpoint_1100000"
    evaluation = write_evaluation_config(tmp_path / "eval", checkpoint)
    settings = read_settings(evaluation, pytest.fail)
    assert (settings.method, settings.mixture) == (SAM, "cbqa") and settings.sam["rho"] == 0.05
    assert settings.bindings == read_settings(tmp_path / "train", pytest.fail).bindings
    more = "utils.RestoreCheckpointConfig.path = %CHECKPOINT_PATH\n"  # no start of a training
    alone = write_evaluation_config(tmp_path / "alone", tmp_path / "gone" / "checkpoint_500", more)
    assert read_settings(alone, pytest.fail).start is None


@pytest.mark.parametrize("value", ["[%A, %A, %A]", "%A", "0x" + "f" * 5000])
def test_macros_without_end_are_read(tmp_path, value):
    write_config(tmp_path, 0.05, more=f"A = {value}\nsome.parameter = %A\n")
    assert read_settings(tmp_path, pytest.fail).method == SAM


def test_a_config_that_tells_nothing(tmp_path):
    told = []
    assert read_settings(tmp_path, told.append) == Settings() and not told
    (tmp_path / "config.gin").write_bytes(b"\x80\xff\x00")
    assert read_settings(tmp_path, told.append).method is None
    assert len(told) == 1 and str(tmp_path / "config.gin") in told[0]


@pytest.mark.parametrize(
    ("until", "words"),
    [("train_script.train.model_dir", "which trainer"), ("AwareTrainer\n", "middle of a line")],
)
def test_a_config_that_was_cut_short_is_named(tmp_path, until, words):
    write_config(tmp_path, 0.05)
    text = (tmp_path / "config.gin").read_text()
    (tmp_path / "config.gin").write_text(text[: text.rindex(until)])
    told = []
    read_settings(tmp_path, told.append)
    assert len(told) == 1 and words in told[0] and str(tmp_path / "config.gin") in told[0]


@pytest.mark.parametrize("value", ["{[1]: 2}", "-" * 20_000 + "1", "None"])
def test_a_config_with_a_strange_value_is_read(tmp_path, value):
    write_config(tmp_path, value)
    assert read_settings(tmp_path, pytest.fail).method == SAM


def test_what_is_only_logged_or_kept_makes_no_other_setting(tmp_path):
    logged = "".join(
        f"{setting}\n"
        for setting in (
            "t5x_trainer.SharpnessAwareTrainer.diagnostics = False",
            "t5x_trainer.SharpnessAwareTrainer.weight_metrics_computer = "
            "@trainer.WeightMetricsComputer()",
            "KEEP_CHECKPOINTS = None",
            "CHECKPOINT_PERIOD = 5000",
            "JSON_WRITE_N_RESULTS = 0",
            "utils.SaveCheckpointConfig.keep = 7",
            "seqio.JSONLogger.write_n_results = 0",
            "partitioning.PjitPartitioner.num_partitions = 2",
            "trainer.Trainer.num_microbatches = 4",
            "USE_HARDWARE_RNG = True",
            "USE_CACHED_TASKS = False",
            "EVAL_STEPS = 7",
            "EVALUATOR_USE_MEMORY_CACHE = False",
            "train.eval_steps = 7",
            "seqio.Evaluator.use_memory_cache = False",
            "partitioning.PjitPartitioner.model_parallel_submesh = (2, 2, 1, 1)",
            "partitioning.PjitPartitioner.dcn_mesh_shape = (2, 1, 1)",
            "train_script.train.stats_period = 10",
            "train_script.train.gc_period = 100",
            "train_script.train.run_eval_before_training = True",
        )
    )
    write_config(tmp_path / "a", 0.3)
    write_config(tmp_path / "b", 0.3, more=logged)
    a, b = (read_settings(tmp_path / name, pytest.fail) for name in "ab")
    assert method_name(a) == method_name(b) == "SAM rho=0.3"
    assert a.bindings == b.bindings


def test_files_that_cannot_be_read(tmp_path):
    # A folder in the place of a file: root, too, cannot read that.
    write_scores(tmp_path, SCORES, ["JSONLogger"])
    for file in (json_file(tmp_path), tmp_path / "config.gin"):
        file.unlink(missing_ok=True)
        file.mkdir()
    events = tmp_path / "inference_eval" / RTE / "events.out.tfevents.1.host"
    events.mkdir(parents=True)
    run, told = read(tmp_path)
    assert run.scores.keys() == {CB}
    for file in (json_file(tmp_path), tmp_path / "config.gin"):
        assert any(f"{file}: not readable" in text for text in told), told
    assert any(f"{events}: damaged" in text for text in told), told


def test_links_that_lead_nowhere(tmp_path):
    run = write_scores(tmp_path / "run", SCORES, ["JSONLogger"])
    file = json_file(run)
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    found, told = read(run)
    assert found.scores.keys() == {CB} and any(f"{file}: not readable" in text for text in told)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "no such folder" in read(tmp_path / "loop")[1][0]
    assert "no such folder" in read(tmp_path / ("x" * 300))[1][0]


def test_summaries_that_are_no_numbers(tmp_path):
    import numpy as np
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(tmp_path / "inference_eval" / RTE))
    kinds = {"accuracy": np.float32(61), "text": np.array(b"hello"), "list": np.ones(3)}
    found = [Summary.Value(tag=tag, tensor=make_tensor_proto(x)) for tag, x in kinds.items()]
    found.append(Summary.Value(tag="picture", image=Summary.Image(height=1, width=1)))
    found.append(Summary.Value(tag="odd", tensor={"dtype": 99}))
    found.append(Summary.Value(tag="cut", tensor={"dtype": 1, "tensor_content": b"cut"}))
    writer.add_event(Event(step=1000, summary=Summary(value=found)))
    writer.close()
    run, told = read(tmp_path)
    assert run.scores == {RTE: {"accuracy": {1000: 61}}} and not told


def test_the_steps_of_an_evaluation_are_in_order_among_the_runs():
    of_training, of_evaluation = {2: 1.0}, {1: 1.0, 3: 1.0}
    training = Run(Path("a"), Settings(trained_in="/m"), {RTE: {"accuracy": of_training}})
    settings = Settings(trained_in="/m", is_evaluation=True)
    evaluation = Run(Path("b"), settings, {RTE: {"accuracy": of_evaluation}})
    (whole,) = with_evaluations([training, evaluation], print)
    assert list(whole.scores[RTE]["accuracy"]) == [1, 2, 3]


def results(settings, task="cbqa_trivia_qa", path="run"):
    return results_of(Run(Path(path), settings, {task: {"f1": {1: 2.0}}}), print)


@pytest.mark.parametrize(
    ("settings", "task", "percent", "seed"),
    [
        ({}, "cbqa_trivia_qa_at_5pct_seed3", 5, 3),
        ({"percent": 20.0, "sample_seed": 1}, "cbqa_trivia_qa_at_5pct_seed0", 5, 0),
        ({"percent": 20.0, "sample_seed": 1}, "cbqa_trivia_qa", 20, 1),
        ({}, "cbqa_trivia_qa", 100, None),
    ],
)
def test_a_sample_is_in_its_tasks_name_or_else_in_the_settings(settings, task, percent, seed):
    (result,) = results(Settings(**settings), task)
    assert (result.group.percent, result.sample_seed) == (percent, seed)


def test_settings_are_in_the_order_of_rho():
    found = [x for rho in (10, 2) for x in results(Settings(SAM, {"rho": rho}), path=str(rho))]
    (comparison,) = compare(found)
    assert list(comparison.settings) == ["SAM rho=2", "SAM rho=10"]


def test_groups_are_in_the_order_of_the_share_of_the_data():
    found = [x for percent in (80, 5, 20) for x in results(Settings(percent=percent))]
    assert [comparison.group.percent for comparison in compare(found)] == [5, 20, 80]


@pytest.mark.parametrize(
    ("setting", "counts"),
    [("group_axes = 'data'", True), ("data_shards = 4", True), ("m = 2", False)],
)
def test_the_mesh_counts_where_the_shards_do(setting, counts, tmp_path):
    mesh = "partitioning.PjitPartitioner.num_partitions"
    (tmp_path / "config.gin").write_text(
        "train_script.train.trainer_cls = @t5x_trainer.SharpnessAwareTrainer\n"
        f"t5x_trainer.SharpnessAwareTrainer.{setting}\n{mesh} = 2\n"
    )
    assert (mesh in read_settings(tmp_path, print).bindings) == counts

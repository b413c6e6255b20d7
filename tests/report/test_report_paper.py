"""The paper's figures, and the averages."""

import pytest

from sam_optax.report.paper import ROWS, find_rows, matching_row
from sam_optax.report.settings import BASELINE, MIXTURE, SAM, SINGLE, Group, Settings
from sam_optax.report.tasks import AVERAGES, BENCHMARKS, Average, average, find_pair, sampling


def test_the_averages_are_the_papers_own():
    off = {}
    for row in ROWS:
        for name, printed in row.averages.items():
            ours = average(name, {pair: [score] for pair, score in row.scores.items()}).value
            assert ours == pytest.approx(printed, abs=0.1)
            if abs(ours - printed) > 0.05 + 1e-9:
                off[row.table, row.model, row.rho, row.m, name] = round(ours, 3), printed
    # The paper averaged unrounded scores, and these are rounded to 0.1.
    assert off == {
        (1, "t5_1_1_large", 0.15, 1, "SuperGLUE"): (84.537, 84.6),
        (6, "t5_1_1_small", None, 1, "SuperGLUE"): (50.256, 50.2),
        (8, "mt5_base", 0.02, 1, "TyDiQA F1"): (82.056, 82.0),
        (9, "t5_1_1_base", 0.15, 4, "SuperGLUE"): (78.356, 78.3),
    }


def test_the_tables_are_complete():
    counts = {table: sum(row.table == table for row in ROWS) for table in range(1, 10)}
    # Table 3 is a column of Table 8.
    assert counts == {1: 8, 2: 8, 3: 0, 4: 8, 5: 8, 6: 8, 7: 8, 8: 8, 9: 15}
    for table in (1, 2, 4, 5, 6, 7, 8):
        rows = [row for row in ROWS if row.table == table]
        sizes = [row.model.rpartition("_")[2] for row in rows[::2]]
        assert sizes == ["small", "base", "large", "xl"]
        assert all(row.rho is None for row in rows[::2]) and all(row.rho for row in rows[1::2])


@pytest.mark.parametrize(
    ("group", "method", "task", "metric", "figure"),
    [
        (("t5_1_1_large", 100, MIXTURE), {}, "super_glue_copa_v102", "accuracy", 89.0),
        (("t5_1_1_xl", 100, MIXTURE), {"rho": 0.15}, "glue_cola_v002", "matthews_corrcoef", 69.7),
        (("t5_1_1_base", 100, MIXTURE), {"rho": 0.15}, "cbqa_web_questions", "em", 24.5),
        (("t5_1_1_base", 100, SINGLE), {"rho": 0.15}, "cbqa_web_questions", "em", 27.5),
        (("t5_1_1_base", 5, MIXTURE), {}, "cbqa_web_questions", "f1", 13.7),
        (("mt5_small", 100, MIXTURE), {"rho": 0.02}, "tydiqa_goldp_te", "em", 75.0),
        (("t5_1_1_base", 100, MIXTURE), {"rho": 0.3}, "super_glue_record_v102", "f1", 79.8),
        (
            ("t5_1_1_base", 100, MIXTURE),
            {"m": 4},
            "super_glue_wsc_v102_simple_eval",
            "accuracy",
            79.8,
        ),
        (("t5_1_1_base", 100, MIXTURE), {"ascent_fraction": 1}, "super_glue_rte", "accuracy", 87.0),
        # A setting that the paper does not have: its own choice.
        (("t5_1_1_base", 100, MIXTURE), {"rho": 0.07}, "super_glue_rte_v102", "accuracy", 85.9),
        (("t5_1_1_base", 20, MIXTURE), {}, "super_glue_rte_v102", "accuracy", None),
        (("t5_base", 100, MIXTURE), {}, "super_glue_rte_v102", "accuracy", None),
    ],
)
def test_lookup(group, method, task, metric, figure):
    pair = find_pair(task, metric)
    settings = Settings(BASELINE)
    if method:
        settings = Settings(SAM, {"rho": 0.15, "ascent_fraction": 0.25, "m": 1, **method})
    row = matching_row(find_rows(pair.benchmark, Group(*group)), settings)
    assert (row and row.scores[pair]) == figure


def test_an_average_needs_every_task():
    scores = {pair: [50.0] for pair in BENCHMARKS["SuperGLUE"]}
    assert average("SuperGLUE", scores) == Average(50.0, 8, 8, "1")
    del scores[find_pair("super_glue_cb_v102", "accuracy")]  # one of two metrics
    assert average("SuperGLUE", scores) == Average(None, 7, 8, "1")


def test_tasks_with_two_metrics_count_once():
    scores = {pair: [0.0] for pair in AVERAGES["SuperGLUE"]}
    scores[find_pair("super_glue_cb_v102", "accuracy")] = [80.0]
    assert average("SuperGLUE", scores).value == 80 / 2 / 8


def test_the_names_are_those_of_t5():
    glue_utils = pytest.importorskip("t5.data.glue_utils")
    names = {"GLUE": glue_utils.GLUE_METRICS, "SuperGLUE": glue_utils.SUPERGLUE_METRICS}
    for benchmark, tasks in names.items():
        prefix = {"GLUE": "glue_", "SuperGLUE": "super_glue_"}[benchmark]
        ours = {pair.task.removeprefix(prefix) for pair in BENCHMARKS[benchmark]}
        assert ours - {"wsc"} <= set(tasks)


@pytest.mark.parametrize(
    ("name", "task", "percent", "seed"),
    [
        ("super_glue_boolq_v102_at_5pct_seed0", "super_glue_boolq_v102", 5.0, 0),
        ("cbqa_trivia_qa_at_2p5pct_seed11", "cbqa_trivia_qa", 2.5, 11),
        ("super_glue_wsc_v102_simple_eval_at_80pct", "super_glue_wsc_v102_simple_eval", 80.0, None),
        ("look_at_this", "look_at_this", None, None),
    ],
)
def test_names_of_sampled_tasks(name, task, percent, seed):
    rest, sample = sampling(name)
    assert (rest, sample.percent, sample.seed) == (task, percent, seed)

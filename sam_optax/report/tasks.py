"""The paper's benchmarks: their tasks, their metrics, and how a benchmark is averaged."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from statistics import fmean

SAMPLED = re.compile(r"(?:_at)?_(\d+(?:p\d+)?)pct(?:_seed(\d+))?")
_VERSION = re.compile(r"_v\d+(?=_|$)|_simple_eval$")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A task-metric pair of a benchmark.

    Attributes:
      benchmark: such as "GLUE".
      column: the task as tables call it, such as "MNLI_matched".
      task: the task's name without version and sampling, such as "glue_mnli_matched".
      metric: the metric's name in the evaluator's files, such as "accuracy".
    """

    benchmark: str
    column: str
    task: str
    metric: str


def _pairs(benchmark: str, prefix: str, lines: str) -> tuple[Pair, ...]:
    return tuple(
        Pair(benchmark, column, prefix + column.lower(), metric)
        for column, *metrics in (line.split() for line in lines.strip().splitlines())
        for metric in metrics
    )


# Metrics stand in the order in which the paper's tables give them.
BENCHMARKS: Mapping[str, tuple[Pair, ...]] = {
    "SuperGLUE": _pairs(
        "SuperGLUE",
        "super_glue_",
        """
        BoolQ accuracy
        CB mean_3class_f1 accuracy
        COPA accuracy
        MultiRC f1 exact_match
        ReCoRD f1 em
        RTE accuracy
        WiC accuracy
        WSC accuracy
        """,
    ),
    "GLUE": _pairs(
        "GLUE",
        "glue_",
        """
        CoLA matthews_corrcoef
        SST2 accuracy
        MRPC f1 accuracy
        STSB pearson_corrcoef spearman_corrcoef
        QQP f1 accuracy
        MNLI_matched accuracy
        MNLI_mismatched accuracy
        QNLI accuracy
        RTE accuracy
        """,
    ),
    "CBQA": _pairs(
        "CBQA",
        "cbqa_",
        """
        Natural_Questions f1 em
        Web_Questions f1 em
        Trivia_QA f1 em
        """,
    ),
    "TyDiQA": _pairs(
        "TyDiQA",
        "tydiqa_goldp_",
        "\n".join(
            f"{language} f1 em"
            for language in ["en", "ar", "bn", "fi", "id", "ko", "ru", "sw", "te"]
        ),
    ),
}

# As the paper averages: GLUE has nine tasks, as both parts of MNLI count. It has no average over
# closed-book QA.
AVERAGES: Mapping[str, tuple[Pair, ...]] = {
    "SuperGLUE": BENCHMARKS["SuperGLUE"],
    "GLUE": BENCHMARKS["GLUE"],
    "TyDiQA F1": tuple(pair for pair in BENCHMARKS["TyDiQA"] if pair.metric == "f1"),
    "TyDiQA EM": tuple(pair for pair in BENCHMARKS["TyDiQA"] if pair.metric == "em"),
}

_PAIRS = {(pair.task, pair.metric): pair for pairs in BENCHMARKS.values() for pair in pairs}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a name says on sampling: percent of the training data, and the seed of the sample."""

    percent: float | None = None
    seed: int | None = None


def sampling(name: str) -> tuple[str, Sampling]:
    """Return the name of a task without its sampling, and the sampling.

    >>> sampling("super_glue_boolq_v102_at_2p5pct_seed1")
    ('super_glue_boolq_v102', Sampling(percent=2.5, seed=1))
    """
    found = SAMPLED.search(name)
    if found is None:
        return name, Sampling()
    percent, seed = found.groups()
    rest = name[: found.start()] + name[found.end() :]
    return rest, Sampling(float(percent.replace("p", ".")), None if seed is None else int(seed))


def find_pair(task: str, metric: str) -> Pair | None:
    """Return the pair of a benchmark that a task, without its sampling, and a metric are.

    >>> find_pair("super_glue_wsc_v102_simple_eval", "accuracy").column
    'WSC'
    """
    return _PAIRS.get((_VERSION.sub("", _VERSION.sub("", task)), metric))


@dataclasses.dataclass(frozen=True)
class Average:
    """A benchmark's average.

    Attributes:
      value: the average; `None` unless every task is there.
      present: how many of the tasks are there.
      tasks: how many there should be.
      runs: of how many runs its tasks' scores are means, such as "3", or "1-3".
    """

    value: float | None
    present: int
    tasks: int
    runs: str


def average(name: str, scores: Mapping[Pair, Sequence[float]]) -> Average:
    """Average a benchmark: over its tasks, of which those with two metrics are averaged first.

    Args:
      name: one in `AVERAGES`.
      scores: for each pair, those of one or more runs.
    """
    columns: dict[str, list[Pair]] = {}
    for pair in AVERAGES[name]:
        columns.setdefault(pair.column, []).append(pair)
    means = [
        fmean(fmean(scores[pair]) for pair in pairs)
        for pairs in columns.values()
        if all(pair in scores for pair in pairs)
    ]
    runs = {len(scores[pair]) for pair in AVERAGES[name] if pair in scores}
    return Average(
        value=fmean(means) if len(means) == len(columns) else None,
        present=len(means),
        tasks=len(columns),
        runs="-".join(map(str, sorted({min(runs), max(runs)}))),
    )

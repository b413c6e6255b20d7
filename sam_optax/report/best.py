"""Each run's results: the best checkpoint for each task-metric pair, and the last."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from .runs import Run
from .settings import MIXTURE, SINGLE, Group
from .tasks import Pair, find_pair, sampling

# A metric is better when it is lower if a word of its name is among the first of these, and none is
# among the second, or that word is the last: `error_detection_f1` is an F1, `f1_error` an error.
_LOWER = {
    *("loss", "nll", "ent", "entropy", "perplexity", "ppl", "bits", "bpb", "brier", "ece"),
    *("error", "errors", "wer", "cer", "ter", "mse", "rmse", "mae", "mape", "edit", "distance"),
    *("logloss", "divergence", "levenshtein", "hamming", "negative_log_likelihood"),
}
_HIGHER = {
    *("accuracy", "acc", "auc", "bleu", "em", "f1", "match", "precision", "recall"),
    *("ratio", "score", "sim", "similarity"),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """A value, and the step of the checkpoint that has it."""

    step: int
    value: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One run's result on one task-metric pair.

    Attributes:
      run: the run.
      group: what it may be compared with.
      task: the task, without sampling.
      metric: the metric's name in the evaluator's files.
      pair: which pair of a benchmark they are, or `None`.
      sample_seed: the seed of the sample of the training data.
      steps: every checkpoint's value.
    """

    run: Run
    group: Group
    task: str
    metric: str
    pair: Pair | None
    sample_seed: int | None
    steps: Mapping[int, float]

    @property
    def best(self) -> Score:
        """The best checkpoint's, the earliest of equal ones."""
        return best_score(self.metric, self.steps)

    @property
    def last(self) -> Score:
        """The last checkpoint's."""
        step = max(self.steps)
        return Score(step, self.steps[step])


def best_score(metric: str, steps: Mapping[int, float]) -> Score:
    """Return the best of all checkpoints, the earliest of equal ones.

    Higher is better, but for losses, error rates, perplexities and distances, known by the words of
    their names.

    >>> best_score("accuracy", {200: 71.5, 100: 71.5, 300: 70.0})
    Score(step=100, value=71.5)
    """
    words = re.findall("negative_log_likelihood|[a-z0-9]+", metric.lower()) or [""]
    is_lower = not _LOWER.isdisjoint(words) and _HIGHER.isdisjoint(words)
    sign = 1 if is_lower or words[-1] in _LOWER else -1
    step = min(steps, key=lambda step: (sign * steps[step], step))
    return Score(step, steps[step])


def results_of(run: Run, warn: Callable[[str], None], model: str | None = None) -> list[Result]:
    """Return a run's results.

    Args:
      run: the run.
      warn: called with a line on each result that is left out.
      model: the model, if not the one in the run's config.
    """
    results: dict[tuple[Any, ...], Result] = {}
    model = model or run.settings.model or ""
    for name, metrics in run.scores.items():
        task, sample = sampling(name)
        percent = sample.percent or run.settings.percent or 100.0
        seed = run.settings.sample_seed if sample.seed is None else sample.seed
        for metric, every in metrics.items():
            # T5X can evaluate before training, too: that is the checkpoint the run starts from.
            steps = {k: v for k, v in every.items() if k != run.settings.start} or every
            group = Group(model, percent, _trained_on(run, task))
            pair = find_pair(task, metric)
            result = Result(run, group, task, metric, pair, seed, steps)
            key = (group, pair or (task, metric))
            if key in results:
                # Two versions, or two samples, of a task in one run are not two runs.
                warn(f"{run.directory}: {name}, {metric} is there a second time; left out.")
            else:
                results[key] = result
    return list(results.values())


def _trained_on(run: Run, task: str) -> str:
    if run.settings.mixture is not None:
        return SINGLE if run.settings.mixture == task else MIXTURE
    return SINGLE if len({sampling(name)[0] for name in run.scores}) == 1 else MIXTURE

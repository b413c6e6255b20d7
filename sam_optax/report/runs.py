"""A run's scores: everything that its evaluators wrote."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

from .events import read_events
from .json_lines import Values, read_json_lines, some
from .settings import Settings, read_settings
from .tasks import sampling

_JSON = "-metrics.jsonl"
_TRAINING_EVAL = ("accuracy", "loss_per_nonpadding_target_token")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      directory: its folder, which is also its name.
      settings: what it was.
      scores: by task and metric and step; finite numbers only.
      label: what the user calls its setting, or `None`.
      stated: the method that the user says it is of, or `None`.
    """

    directory: Path
    settings: Settings
    scores: dict[str, Values]
    label: str | None = None
    stated: str | None = None


def read_run(
    directory: Path,
    warn: Callable[[str], None],
    label: str | None = None,
    training_eval: bool = False,
) -> Run:
    """Return the run in a folder: T5X's model folder, or the output folder of `t5x.eval`.

    Args:
      directory: that folder, or the `inference_eval` in it.
      warn: called with a line on each file that cannot be read in full.
      label: what the user calls the run's setting, or `None`.
      training_eval: whether to read the teacher-forced metrics too.
    """
    if not os.path.isdir(directory):  # nor does it raise for a name that cannot be
        warn(f"{directory}: no such folder.")
        return Run(directory, Settings(), {}, label)
    inside = directory.name == "inference_eval"
    folder = directory if inside else directory / "inference_eval"
    if not folder.is_dir() and any(directory.glob("*" + _JSON)):
        folder = directory  # an evaluator with a log_dir of its own
    scores = _read_tasks(folder, warn) if folder.is_dir() else {}
    if training_eval:
        found = _read_training_eval(run_folder(directory) / "training_eval", warn)
        if not found:
            warn(f"{directory}: no teacher-forced metrics; they should be in training_eval.")
        for task, values in found.items():
            scores.setdefault(task, {}).update(values)
    scores = {
        task: _finite(values, f"{directory}: {task}", warn) for task, values in scores.items()
    }
    scores = {task: values for task, values in scores.items() if values}
    if not scores:
        inner = sorted(path.parent.name for path in directory.glob("*/inference_eval"))
        those = f" Runs in it, to be named each: {', '.join(inner)}." if inner else ""
        warn(f"{directory}: no metrics found; they should be in {folder}.{those}")
    settings = read_settings(run_folder(directory), warn)
    return Run(directory, settings, scores, label)


def run_folder(directory: Path) -> Path:
    """Return the folder of the run that is named by it, or by the `inference_eval` in it."""
    return directory.parent if directory.name == "inference_eval" else directory


def with_evaluations(runs: list[Run], warn: Callable[[str], None]) -> list[Run]:
    """Return the runs; what `t5x.eval` made of a checkpoint is its training's, and no seed.

    So is one evaluation of a training that is not among the runs the other's. Of a figure that two
    have for one step, the training's or else the first is kept. One on another split, or on fewer
    examples, is left out: its figures are not to be compared with the others. So is one that may
    be of several.
    """
    whole: list[Run] = []
    for run in sorted(runs, key=lambda run: run.settings.is_evaluation):
        places = _places_of_training(run, whole)
        if not places:
            whole.append(run)
            continue
        if len(places) > 1:
            those = ", ".join(str(whole[place].directory) for place in places)
            warn(
                f"{run.directory}: left out. It is of a checkpoint in {run.settings.trained_in}, "
                f"and of which of {those} is not known. Give it a name: NAME={run.directory}."
            )
            continue
        (place,) = places
        training = whole[place]
        others = _other_examples(run.settings, training.settings)
        if others:
            warn(
                f"{run.directory}: left out. It is of a checkpoint of {training.directory}, but "
                f"with {others}. Report it by itself, or give it a name: NAME={run.directory}."
            )
            continue
        warn(f"{run.directory}: of a checkpoint of {training.directory}, so counted as that run's.")
        whole[place] = dataclasses.replace(training, scores=_both(training.scores, run.scores))
    return whole


def _other_examples(ours: Settings, trainings: Settings) -> str:
    """Return what an evaluation is on that its training was not evaluated on, if anything."""
    both = ours.evaluated_on.keys() & trainings.evaluated_on.keys()
    return ", ".join(
        f"{name}={ours.evaluated_on[name]}, not {trainings.evaluated_on[name]}"
        for name in sorted(both)
        if ours.evaluated_on[name] != trainings.evaluated_on[name]
    )


def _places_of_training(run: Run, runs: list[Run]) -> list[int]:
    """Return which of the runs this evaluation is of, by its folder or else by its MODEL_DIR."""
    trained_in = run.settings.trained_in
    if not run.settings.is_evaluation or not trained_in:
        return []
    by_folder, by_name = [], []
    for place, other in enumerate(runs):
        if run.label not in (None, other.label):
            continue
        if other.settings.is_evaluation and run.settings != other.settings:
            continue
        if run.stated not in (None, other.settings.method):
            continue
        if os.path.realpath(run_folder(other.directory)) == os.path.realpath(trained_in):
            by_folder.append(place)
        elif other.settings.trained_in == trained_in:
            by_name.append(place)
    if by_folder:
        return by_folder[:1]
    trainings = [place for place in by_name if not runs[place].settings.is_evaluation]
    return trainings or by_name[:1]


def _both(ours: dict[str, Values], others: dict[str, Values]) -> dict[str, Values]:
    """Return all scores, by the names of `ours`: an evaluation's say nothing of the sample."""
    scores = {task: dict(values) for task, values in ours.items()}
    names = {sampling(task)[0]: task for task in ours}
    for task, values in others.items():
        name = task if task in ours else names.get(sampling(task)[0], task)
        mine = scores.setdefault(name, {})
        for metric, steps in values.items():
            mine[metric] = dict(sorted({**steps, **mine.get(metric, {})}.items()))
    return scores


def _read_tasks(folder: Path, warn: Callable[[str], None]) -> dict[str, Values]:
    tasks = {file.name.removesuffix(_JSON) for file in folder.glob("*" + _JSON)}
    tasks |= {file.parent.name for file in folder.glob("*/*tfevents*")}
    return {task: _read_task(folder, task, warn) for task in sorted(tasks)}


def _read_task(folder: Path, task: str, warn: Callable[[str], None]) -> Values:
    file = folder / (task + _JSON)
    there = os.path.lexists(file)  # a link that leads nowhere, too, is to be warned about
    values, whole = read_json_lines(file, warn) if there else ({}, False)
    if whole:  # TensorBoard's files have the same again, in float32
        _compare_with_events(file, values, folder / task, warn)
        return values
    events = _events(folder / task, warn)
    for metric, steps in events.items():
        values[metric] = _completed(values.get(metric, {}), steps)
    if there and events:
        warn(f"{file}: what it lacks was taken from the event files in {folder / task}.")
    return values


def _events(folder: Path, warn: Callable[[str], None]) -> Values:
    events = read_events(folder, warn) if folder.is_dir() else {}
    return {tag.removeprefix("eval/"): steps for tag, steps in events.items()}


def _compare_with_events(
    file: Path, values: Values, folder: Path, warn: Callable[[str], None]
) -> None:
    """Warn if a file ends before the event files beside it, or has other values.

    It may have been copied too early, or be of another run.
    """
    last = max((step for steps in values.values() for step in steps), default=0)
    events = _events(folder, lambda _: None)
    later = {step for metric in values for step in events.get(metric, ()) if step > last}
    if later:
        warn(
            f"{file}: ends at step {last}, but the event files in {folder} go on to {max(later)}. "
            "If they are of this run, copy it again, or take it away to have them read."
        )
    for metric, steps in values.items():
        of_events = events.get(metric, {})
        other = [x for x in steps if x in of_events and not _alike(steps[x], of_events[x])]
        if other:
            step = min(other)
            warn(
                f"{file}: {metric} at {some('step', other)} is another in the event files in "
                f"{folder}, at {step} {of_events[step]:g} for {steps[step]:g}, which is taken."
            )


def _alike(value: float, in_float32: float) -> bool:
    both = math.isnan(value) and math.isnan(in_float32)
    return both or math.isclose(value, in_float32, rel_tol=1e-6, abs_tol=1e-37)


def _completed(values: dict[int, float], events: dict[int, float]) -> dict[int, float]:
    """Return values by step from a damaged file, with what the event files have besides.

    Where the two differ by more than the events' rounding to float32, the file's value is of an
    evaluation that was repeated, and the line that said so is what is damaged.
    """
    same = {
        step: value
        for step, value in values.items()
        if step not in events or _alike(value, events[step])
    }
    return {**events, **same}


def _read_training_eval(folder: Path, warn: Callable[[str], None]) -> dict[str, Values]:
    tasks = sorted({file.parent for file in folder.glob("*/*tfevents*")})
    return {
        task.name: {
            f"training_eval/{tag}": steps
            for tag, steps in read_events(task, warn).items()
            if tag in _TRAINING_EVAL
        }
        for task in tasks
    }


def _finite(values: Values, where: str, warn: Callable[[str], None]) -> Values:
    for metric, steps in values.items():
        bad = [step for step, value in steps.items() if not math.isfinite(value)]
        if bad:
            warn(f"{where}, {metric}: not a finite number at {some('step', bad)}.")
    finite = {
        metric: {step: value for step, value in sorted(steps.items()) if math.isfinite(value)}
        for metric, steps in values.items()
    }
    return {metric: steps for metric, steps in finite.items() if steps}

"""Runs side by side: which are runs of one setting, and their means."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .best import Result
from .paper import Row, find_rows, matching_row
from .runs import Run, run_folder
from .settings import BASELINE, SAM, Group, Settings, method_name
from .tasks import AVERAGES, Average, Pair, average, sampling

MEAN = "mean"
"""In the place of a run's name, where figures are means over runs."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results that may stand side by side, by setting.

    Attributes:
      group: what they have in common.
      settings: results by the setting's label: baseline first, then SAM by rho, then the others.
    """

    group: Group
    settings: Mapping[str, list[Result]]

    @property
    def results(self) -> list[Result]:
        """All of them."""
        return [result for results in self.settings.values() for result in results]

    def paper(self, benchmark: str) -> list[Row]:
        """Return the paper's rows for these settings: its baseline first, then SAM."""
        rows = find_rows(benchmark, self.group)
        chosen = [row for row in rows if row.rho is None]
        for result in self.results:
            row = matching_row(rows, result.run.settings)
            if row is not None and row not in chosen:
                chosen.append(row)
        if len(chosen) < 2:  # runs of the baseline alone, or such as go by a label
            chosen += [row for row in rows if row.rho is not None][:1]
        return chosen


def compare(results: list[Result]) -> list[Comparison]:
    """Return the results by group and setting."""
    groups: dict[Group, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return [Comparison(group, _by_setting(groups[group])) for group in sorted(groups)]


def averages(results: list[Result], which: str = "best") -> dict[str, Average]:
    """Return the averages of the benchmarks that results have tasks of.

    Args:
      results: of one run; or of the runs of one setting, whose mean is then taken for each pair.
      which: "best" or "last" checkpoint.
    """
    values: dict[Pair, list[float]] = {}
    for result in results:
        if result.pair is not None:
            values.setdefault(result.pair, []).append(getattr(result, which).value)
    return {
        name: average(name, values)
        for name, pairs in AVERAGES.items()
        if any(pair in values for pair in pairs)
    }


def run_names(runs: list[Run]) -> dict[Path, str]:
    """Return what to call each run: its folder's name, or the whole path where two are alike.

    The whole path also where the folder is called "mean", as the lines of means are.
    """
    full = {run.directory: run.directory.resolve() for run in runs}
    last = {f: run_folder(p).name for f, p in full.items()}
    told = [name for name in last.values() if name != MEAN]
    return {f: name if told.count(name) == 1 else str(full[f]) for f, name in last.items()}


def _by_setting(results: list[Result]) -> dict[str, list[Result]]:
    runs = list({result.run.directory: result.run for result in results}.values())
    names = run_names(runs)
    labels = {run.directory: _label(run, names, runs) for run in runs}
    by_label: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: _order(r.run, labels[r.run.directory])):
        by_label.setdefault(labels[result.run.directory], []).append(result)
    return by_label


def _label(run: Run, names: Mapping[Path, str], runs: list[Run]) -> str:
    """Return the label of a run's setting: equal for runs that differ in nothing but seeds."""
    if run.label is not None:
        return run.label
    method = method_name(run.settings)
    if method is None:
        return names[run.directory]
    alike = [
        other.settings
        for other in runs
        if other.label is None
        and method_name(other.settings) == method
        and _tasks(other) & _tasks(run)  # disjoint tasks may have settings of their own
    ]
    return ", ".join((method, *differences(run.settings, alike)))


def differences(ours: Settings, others: Iterable[Settings]) -> list[str]:
    """Return what sets these settings apart from others, besides method and seeds.

    By the macro that it is bound to, if all have it from that one and all that is bound to it
    differs, and is the same. Of a training of which nothing is known nothing differs.
    """
    others = list(others)
    *theirs, own = comparable([*others, ours])
    known = [bindings for bindings in theirs if bindings]
    names = {name for bindings in known for name in bindings} if own else set()
    differing = {name for name in names if any(x.get(name) != own.get(name) for x in known)}
    called = _called(differing, own, [ours, *others])
    told = [f"{called[name]}={own.get(name, 'not set')}" for name in differing]
    for name, text in ours.evaluated_on.items():
        evaluations = others if ours.is_evaluation else [x for x in others if x.is_evaluation]
        if any(other.evaluated_on.get(name, text) != text for other in evaluations):
            told.append(f"{name}={text}")
    return sorted({" ".join(text.split()) for text in told})


def confounded(comparison: Comparison) -> Iterator[str]:
    """Yield a line on each run of SAM that no baseline beside it differs from in SAM alone."""
    runs = {r.run.directory: r.run for r in comparison.results if r.run.label is None}.values()
    baselines = [run for run in runs if run.settings.method == BASELINE]
    for run in runs:
        beside = [x.settings for x in baselines if _tasks(x) & _tasks(run)]
        if run.settings.method == SAM and beside:
            nearest = min((differences(run.settings, [x]) for x in beside), key=len)
            if nearest:
                told = ", ".join(nearest)
                yield f"{run.directory}: differs from every baseline in more than SAM: {told}."


def of_one_seed(comparison: Comparison) -> Iterator[str]:
    """Yield a line on runs that are averaged as several seeds and were given the same one."""
    for label, results in comparison.settings.items():
        alike: dict[tuple[Any, ...], list[Path]] = {}
        for result in results:
            seed = result.run.settings.seed
            if seed is not None:
                key = (seed, result.sample_seed, result.task, result.metric)
                alike.setdefault(key, []).append(result.run.directory)
        for seed, runs in sorted({(seed, tuple(runs)) for (seed, *_), runs in alike.items()}):
            if len(runs) > 1:
                those = ", ".join(map(str, runs))
                yield (
                    f"{those}: averaged as {len(runs)} runs of {label}, and all have RANDOM_SEED="
                    f"{seed}. If one goes on where another ended, put their files into one folder."
                )


def comparable(settings: Iterable[Settings]) -> list[dict[str, str]]:
    """Return the bindings, but for a macro that one run has no use for and others have.

    There the parameter that it stands for was given, and is compared.
    """
    settings = list(settings)
    used = {macro for one in settings for macro in one.macros.values()}
    return [{x: text for x, text in one.bindings.items() if x not in used} for one in settings]


def _called(names: set[str], own: Mapping[str, str], settings: list[Settings]) -> dict[str, str]:
    """Return what to call each: by its macro, which is shorter, or by itself."""
    bound: dict[str, set[str]] = {}
    for one in settings:
        for name, macro in one.macros.items():
            if name in one.bindings:
                bound.setdefault(macro, set()).add(name)

    def called(name: str) -> str:
        macros = {one.macros.get(name, name) for one in settings if name in one.bindings}
        (macro,) = macros if len(macros) == 1 else (name,)
        alike = bound.get(macro, {name})
        return macro if alike <= names and len({own.get(x) for x in alike}) == 1 else name

    return {name: called(name) for name in names}


def _tasks(run: Run) -> set[str]:
    """Return the run's tasks, whatever sample of their data it was trained on."""
    return {sampling(task)[0] for task in run.scores}


def _order(run: Run, label: str) -> tuple[int, float, str, str]:
    rho = run.settings.sam.get("rho")
    place = {BASELINE: 0, SAM: 1}.get(run.settings.method or "", 2)
    return place, rho if isinstance(rho, int | float) else 0.0, label, str(run.directory)

"""The picture: each metric against step, and against rho or sampling rate where there are several.

Only `draw` needs matplotlib.
"""

import dataclasses
import io
import textwrap
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from .best import Result
from .compare import Comparison, averages, comparable, differences
from .runs import Run
from .settings import BASELINE, SAM, Group, method_name

_SIZE = 4.2, 3.0  # inches of a panel
_LETTERS = 36  # of a line in its legend
_PIXELS = 2**16 - 1  # of a side; matplotlib draws no more
_MOST = 50  # panels that are laid out so that no label meets another, which takes minutes for more


def draw(comparisons: list[Comparison], kind: str) -> bytes:
    """Return the picture: a row for each task-metric pair, a column for each kind of x axis.

    Args:
      comparisons: what is drawn.
      kind: "png", "pdf" or "svg".
    """
    from matplotlib import rc_context

    picture = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # a $ in a name is no formula
        figure = _figure(comparisons)
        figure.savefig(picture, format=kind, dpi=min(120, _PIXELS // max(figure.get_size_inches())))
    return picture.getvalue()


def _figure(comparisons: list[Comparison]) -> Any:
    from matplotlib.figure import Figure  # without pyplot it needs no display

    results = [result for comparison in comparisons for result in comparison.results]
    comparisons = [_with_averages(comparison) for comparison in comparisons]
    panels: list[Callable[[Any, list[Comparison]], None]] = [_against_step]
    if len({rho for result in results if (rho := _rho(result)) is not None} - {0.0}) > 1:
        panels.append(_against_rho)
    if len({result.group.percent for result in results}) > 1:
        panels.append(_against_percent)
    pairs = sorted({_key(result) for c in comparisons for result in c.results})
    if len(panels) == 1:
        pairs = [pair for pair in pairs if pair[2]]
    few = len(panels) * len(pairs) <= _MOST
    figure = Figure(
        (_SIZE[0] * len(panels), _SIZE[1] * len(pairs)), layout="constrained" if few else None
    )
    if not few:
        figure.subplots_adjust(0.15, 0.3 / len(pairs), 0.97, 1 - 0.3 / len(pairs), 0.3, 0.6)
    axes = figure.subplots(len(pairs), len(panels), squeeze=False)
    for row, pair in zip(axes, pairs, strict=True):
        chosen = [_only(comparison, pair) for comparison in comparisons]
        for axis, panel in zip(row, panels, strict=True):
            panel(axis, [comparison for comparison in chosen if comparison.settings])
            axis.set(title=_as_text(pair[1]), ylabel=_as_text(pair[2]))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
            if axis.lines:
                lines, labels = axis.get_legend_handles_labels()
                wrapped = [textwrap.fill(_as_text(label), _LETTERS) for label in labels]
                axis.legend(lines, wrapped, frameon=False, fontsize=7)
            else:
                axis.set_axis_off()
    return figure


def _as_text(name: str) -> str:
    """Return a folder's or a file's name as what can be drawn."""
    return name.encode(errors="backslashreplace").decode()


def _key(result: Result) -> tuple[str, str, str]:
    return result.pair.benchmark if result.pair else "~", result.task, result.metric


def _with_averages(comparison: Comparison) -> Comparison:
    """Return it with the settings' averages, as results that have no metric."""
    settings = {}
    for label, results in comparison.settings.items():
        settings[label] = list(results)
        for name, average in averages(results).items():
            if average.value is not None:
                as_result = dataclasses.replace(
                    results[0],
                    run=_with_common_settings(results),
                    task=f"{name} average",
                    metric="",
                    pair=None,
                    steps={0: average.value},  # it is of no one checkpoint
                )
                settings[label].append(as_result)
    return Comparison(comparison.group, settings)


def _with_common_settings(results: list[Result]) -> Run:
    """Return the first run, with the bindings that all have: each may be of a task of its own."""
    run = results[0].run
    common = set.intersection(*(set(x.run.settings.bindings.items()) for x in results))
    settings = dataclasses.replace(run.settings, bindings=dict(common))
    return dataclasses.replace(run, settings=settings)


def _only(comparison: Comparison, pair: tuple[str, str, str]) -> Comparison:
    chosen = {
        label: [result for result in results if _key(result) == pair]
        for label, results in comparison.settings.items()
    }
    return Comparison(comparison.group, {label: some for label, some in chosen.items() if some})


def _against_step(axis: Any, comparisons: list[Comparison]) -> None:
    """Draw every run, with a dot at its best checkpoint; runs of a setting share a colour."""
    settings = [(c.group, *item) for c in comparisons for item in c.settings.items()]
    for number, (group, label, results) in enumerate(settings):
        name = f"{label}, {_short(group, comparisons)}" if len(comparisons) > 1 else label
        for result in results:
            if result.metric:
                steps, values = zip(*result.steps.items(), strict=True)
                axis.plot(steps, values, color=f"C{number}", label=name)
                axis.plot(result.best.step, result.best.value, "o", color=f"C{number}")
                name = None
    axis.set_xlabel("step (dot: best checkpoint)")


def _against_rho(axis: Any, comparisons: list[Comparison]) -> None:
    """Draw the best checkpoints against rho, a line for each setting but for rho.

    The baseline has rho = 0, and is a line's where no binding of the two differs.
    """
    for comparison in comparisons:
        results = [result for result in comparison.results if _rho(result) is not None]
        lines: dict[Any, list[tuple[Result, dict[str, str]]]] = {}
        bindings = comparable([result.run.settings for result in results])
        baseline = [(x, own) for x, own in zip(results, bindings, strict=True) if not _rho(x)]
        for result, own in zip(results, bindings, strict=True):
            if _rho(result):
                key = _besides_rho(result), frozenset(own.items()), _examples(result)
                lines.setdefault(key, []).append((result, own))
        for (others, *_), line in lines.items():
            first, ours = line[0]
            alike = [x[0][0].run.settings for (name, *_), x in lines.items() if name == others]
            start = [
                x
                for x, own in baseline
                if _agree(own, ours)
                and _agree(x.run.settings.evaluated_on, first.run.settings.evaluated_on)
            ]
            points = _unlabelled([*start, *(result for result, _ in line)])
            told = [_short(comparison.group, comparisons) + others]
            told += differences(first.run.settings, alike)
            _line(axis, points, ", ".join(told))
    axis.set_xlabel("rho (0: baseline)")


def _agree(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    return all(others.get(name, text) == text for name, text in some.items())


def _unlabelled(results: list[Result]) -> list[tuple[float, float]]:
    """Return the points, without those of runs with a name where others have the same rho."""
    taken = {_rho(result) for result in results if result.run.label is None}
    return [
        (_rho(result) or 0.0, result.best.value)
        for result in results
        if result.run.label is None or _rho(result) not in taken
    ]


def _examples(result: Result) -> Any:
    """Return what an evaluation is of; trainings are told apart by their bindings."""
    settings = result.run.settings
    return tuple(sorted(settings.evaluated_on.items())) if settings.is_evaluation else None


def _against_percent(axis: Any, comparisons: list[Comparison]) -> None:
    """Draw the best checkpoints against the share of the training data."""
    results = [result for comparison in comparisons for result in comparison.results]
    lines: dict[Any, list[Result]] = {}
    bindings = comparable([result.run.settings for result in results])
    for result, own in zip(results, bindings, strict=True):
        run, group = result.run, result.group
        setting = run.label or method_name(run.settings) or str(run.directory)
        name = ", ".join(filter(None, (setting, group.model)))
        settings = frozenset(own.items()) if run.label is None else None
        key = name, group.trained_on, settings, _examples(result)
        lines.setdefault(key, []).append(result)
    for (name, *_), line in lines.items():
        told, first = [name], line[0].run
        if first.label is None:
            alike = [x[0].run.settings for (other, *_), x in lines.items() if other == name]
            told += differences(first.settings, alike)
        points = [(result.group.percent, result.best.value) for result in line]
        _line(axis, points, ", ".join(told))
    axis.set_xlabel("training data (%)")


def _line(axis: Any, points: list[tuple[float, float]], label: str) -> None:
    """Draw every run as a dot, and a line through the means."""
    places = sorted({x for x, _ in points})
    means = [fmean([y for x, y in points if x == place]) for place in places]
    (line,) = axis.plot(places, means, label=label)
    axis.plot(*zip(*points, strict=True), "o", color=line.get_color())


def _rho(result: Result) -> float | None:
    settings = result.run.settings
    rho = 0.0 if settings.method == BASELINE else settings.sam.get("rho")
    return float(rho) if isinstance(rho, int | float) else None


def _besides_rho(result: Result) -> str:
    """Return SAM's other settings that are not the default."""
    name = method_name(result.run.settings) or SAM
    told = [part for part in name.split()[1:] if not part.startswith("rho=")]
    return "".join(f", {part}" for part in told)


def _short(group: Group, comparisons: list[Comparison]) -> str:
    """Return what tells the group from the others."""
    name = f"{group.model or 'unknown model'}, {group.percent:g}%"
    alike = {
        other.group
        for other in comparisons
        if (other.group.model, other.group.percent) == (group.model, group.percent)
    }
    return f"{name}, {group.trained_on}" if len(alike) > 1 else name

"""The report as tables: for the terminal, in Markdown, and as CSV."""

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from .best import Result
from .compare import MEAN, Comparison, averages, run_names
from .paper import Row, find_rows, matching_row
from .tasks import AVERAGES, BENCHMARKS, Average, Pair

NOTE = (
    "Best checkpoint for each task-metric pair, as in the paper, which ran everything once. Its "
    "figures are dev scores, and test scores on CBQA, of models trained on a mixture of the "
    "benchmark's tasks (Table 5: on one task)."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [_in_one_line(cells) for cells in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        pad = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines]
        return "\n".join([self.title, "", *(line.rstrip() for line in pad)])

    def markdown(self) -> str:
        """Return it in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        cells = ([cell.replace("|", r"\|") for cell in _in_one_line(x)] for x in lines)
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(row)} |" for row in cells)])


def _in_one_line(cells: Sequence[str]) -> list[str]:
    return [" ".join(cell.splitlines()) for cell in cells]


def comparison_table(comparison: Comparison) -> Table:
    """Return the settings side by side, with the paper's figures."""
    header = ["benchmark", "task", "metric", *comparison.settings]
    rows = []
    for benchmark, pairs in BENCHMARKS.items():
        paper = comparison.paper(benchmark)
        tables = ", ".join(map(str, sorted({row.table for row in paper})))
        for pair in pairs:
            cells = [_mean(_of(results, pair)) for results in comparison.settings.values()]
            if any(cells):
                figures = _paper([(row, row.scores[pair]) for row in paper])
                rows.append([benchmark, pair.column, pair.metric, *cells, figures, tables])
        of_settings = [averages(results) for results in comparison.settings.values()]
        for name in _averages_of(benchmark):
            if any(name in of_setting for of_setting in of_settings):
                cells = [_average(of_setting.get(name)) for of_setting in of_settings]
                figures = _paper([(row, row.averages[name]) for row in paper])
                rows.append([name, "average", "", *cells, figures, tables])
    others = sorted({(r.task, r.metric) for r in comparison.results if r.pair is None})
    for task, metric in others:
        of_settings = [
            [r for r in results if (r.task, r.metric) == (task, metric)]
            for results in comparison.settings.values()
        ]
        rows.append(["", task, metric, *map(_mean, of_settings), "", ""])
    header += ["paper: baseline -> SAM (rho)", "its table"]
    return Table(str(comparison.group), header, [[c or "-" for c in row] for row in rows])


def runs_table(comparison: Comparison) -> Table:
    """Return every run's best and last checkpoint."""
    header = ["run", "setting", "task", "metric", "best", "at step", "last", "at step", "of"]
    rows = [
        [
            *(row[name] for name in ("run", "setting", "task", "metric")),
            *(_number(row["best"], row["benchmark"]), str(row["best_step"])),
            *(_number(row["last"], row["benchmark"]), str(row["last_step"])),
            f"{row['tasks']} tasks" if row["tasks"] else f"{row['checkpoints']} checkpoints",
        ]
        for row in records([comparison])
        if row["run"] != MEAN
    ]
    return Table(f"Every run: {comparison.group}", header, rows)


def csv_text(comparisons: list[Comparison]) -> str:
    """Return every result, average and mean over runs, one a line."""
    rows = list(records(comparisons))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def records(comparisons: list[Comparison]) -> Iterator[dict[str, Any]]:
    """Yield the lines of the CSV file: each run's results and averages, and the settings' means."""
    for comparison in comparisons:
        names = run_names(list({r.run.directory: r.run for r in comparison.results}.values()))
        for setting, results in comparison.settings.items():
            of_runs = {
                name: [result for result in results if result.run.directory == directory]
                for directory, name in names.items()
            }
            for name, some in of_runs.items():
                yield from ({**_about(name, setting, r), **_scores([r])} for r in some)
                yield from _average_records(name, setting, some)
            if sum(map(bool, of_runs.values())) > 1:
                for several in _by_pair(results).values():
                    if len(several) > 1:
                        about = _about(MEAN, setting, several[0])
                        yield {**about, **_scores(several), "seed": "", "sample_seed": ""}
                yield from _average_records(MEAN, setting, results)


def _about(name: str, setting: str, result: Result) -> dict[str, Any]:
    run, group, pair = result.run.settings, result.group, result.pair
    benchmark = pair.benchmark if pair else ""
    row = matching_row(find_rows(benchmark, group), run)
    about = {
        **{"run": name, "setting": setting, "method": run.method},
        **{key: run.sam.get(key) for key in ("rho", "ascent_fraction", "m")},
        **{"model": group.model, "percent": group.percent, "trained_on": group.trained_on},
        **{"seed": run.seed, "sample_seed": result.sample_seed},
        **{"benchmark": benchmark, "task": result.task, "metric": result.metric},
        "paper": row.scores[pair] if row and pair else None,
        "paper_rho": row.rho if row else None,
        "paper_table": row.table if row else None,
    }
    return {key: "" if value is None else value for key, value in about.items()}


def _scores(results: list[Result]) -> dict[str, Any]:
    """Return one run's scores, or the means of several runs'."""
    one = results[0] if len(results) == 1 else None
    return {
        "best": fmean([result.best.value for result in results]),
        "best_step": one.best.step if one else "",
        "last": fmean([result.last.value for result in results]),
        "last_step": one.last.step if one else "",
        "checkpoints": len(one.steps) if one else "",
        "runs": len(results),
        "tasks": "",
    }


def _average_records(name: str, setting: str, results: list[Result]) -> Iterator[dict[str, Any]]:
    last = averages(results, "last")
    for average, best in averages(results).items():
        like = next(result for result in results if result.pair in AVERAGES[average])
        about = _about(name, setting, like)
        row = matching_row(find_rows(about["benchmark"], like.group), like.run.settings)
        yield {
            **about,
            **{"task": f"{average} average", "metric": "", "paper": ""},
            **({"paper": row.averages[average]} if row else {}),
            **{"best": "" if best.value is None else best.value, "best_step": ""},
            **{"last": "" if best.value is None else last[average].value, "last_step": ""},
            **{"checkpoints": "", "runs": best.runs, "tasks": f"{best.present} of {best.tasks}"},
        }


def _by_pair(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return results by task and metric, in order."""
    pairs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        pairs.setdefault((result.task, result.metric), []).append(result)
    return pairs


def _averages_of(benchmark: str) -> list[str]:
    return [name for name, pairs in AVERAGES.items() if pairs[0].benchmark == benchmark]


def _of(results: list[Result], pair: Pair) -> list[Result]:
    return [result for result in results if result.pair == pair]


def _mean(results: list[Result]) -> str:
    if not results:
        return ""
    n = len(results)
    text = _number(fmean([result.best.value for result in results]), results[0].pair)
    return text if n == 1 else f"{text} (mean of {n})"


def _average(value: Average | None) -> str:
    if value is None:
        return ""
    if value.value is None:
        return f"{value.present} of {value.tasks} tasks"
    return f"{value.value:.1f}" + ("" if value.runs == "1" else f" (mean of {value.runs})")


def _paper(figures: list[tuple[Row, float]]) -> str:
    """Return such as "75.4 -> 77.5 (0.15), 76.2 (0.02)"."""
    baseline = [f"{figure:.1f}" for row, figure in figures if row.rho is None]
    sam = [f"{figure:.1f} ({_sam(row)})" for row, figure in figures if row.rho is not None]
    return " -> ".join(part for part in (", ".join(baseline), ", ".join(sam)) if part)


def _sam(row: Row) -> str:
    fraction = "" if row.ascent_fraction == 0.25 else f" ascent_fraction={row.ascent_fraction:g}"
    return f"{row.rho:g}{fraction}" + ("" if row.m == 1 else f" m={row.m}")


def _number(value: Any, in_percent: Any) -> str:
    if value == "":
        return "-"
    return f"{value:.1f}" if in_percent else f"{value:.4g}"

"""Draws the results that are in `benchmarks/results`.

  python benchmarks/plots.py

Writes `figure_1.svg` (labels), `figure_2.svg` (rho, ascent fraction, m), `sharpness.svg`,
`landscapes.svg` and `step_cost.svg` next to the results, each if its results are there.
"""

import argparse
import fractions
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there may be no display

import matplotlib.pyplot as plt
import numpy as np
import paper_questions
from study import runs, summary
from study.runs import Run
from study.summary import exact_match, last_loss

RESULTS = Path(__file__).resolve().parent / "results"
PLAIN, SAM, OTHERS = "#b5482a", "#1f6f8b", "#8c8c8c"
# The same file from the same results.
matplotlib.rcParams["svg.hashsalt"] = "sam_optax"
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["axes.spines.top"] = matplotlib.rcParams["axes.spines.right"] = False

ALL_RHOS = (*runs.RHOS, *runs.LARGER_RHOS)

Records = dict[Run, dict[str, Any]]


def load(path: Path) -> Records:
    """The study's records by run, those of its default setup."""
    found = paper_questions.load(path, runs.Setup()).values()
    return {Run(**record["run"]): record for record in found}


def gains(records: Records, wanted: Iterable[Run], value: Any = exact_match) -> dict[str, float]:
    """SAM minus plain over the seeds of both."""
    with_sam, without = {}, {}
    for run in wanted:
        plain = Run(run.seed, tasks=run.tasks, data_fraction=run.data_fraction)
        if run in records and plain in records:
            with_sam[run.seed] = value(records[run])
            without[run.seed] = value(records[plain])
    return summary.paired(with_sam, without)


Panel = dict[Any, list[Run]]  # the runs by what is on the x axis


def _draw_gains(axis: Any, records: Records, lines: dict[str, Panel], value: Any) -> None:
    pairs = {
        name: {x: gains(records, wanted, value) for x, wanted in panel.items()}
        for name, panel in lines.items()
    }
    xs = sorted({x for line in pairs.values() for x, pair in line.items() if pair["seeds"] > 1})
    for (name, line), colour in zip(pairs.items(), (SAM, OTHERS), strict=False):
        here = [x for x in xs if x in line and line[x]["seeds"] > 1]
        differences = [line[x]["difference"] for x in here]
        errors = [line[x]["error"] for x in here]
        places = [xs.index(x) for x in here]
        axis.errorbar(places, differences, errors, fmt="o-", color=colour, capsize=3, label=name)
    axis.set_xticks(range(len(xs)), map(str, xs))
    axis.axhline(0, color=PLAIN, linewidth=1)
    axis.grid(alpha=0.25)
    if len(lines) > 1:
        axis.legend(frameon=False)


def figure_2(records: Records, seeds: range, rho: float) -> Any:
    """Gain in exact match and in loss, for every rho, ascent fraction and m."""

    def runs_of(**settings: Any) -> list[Run]:
        return [Run(s, **{"rho": rho, **settings}) for s in seeds]

    forms = {"paper": runs.GROUPS["paper"], "foret": (1, *runs.GROUPS["foret"])}
    panels: dict[str, dict[str, Panel]] = {
        "rho": {"SAM": {x: runs_of(rho=x) for x in ALL_RHOS}},
        "ascent fraction a/b": {
            "SAM": {
                fractions.Fraction(x): runs_of(ascent_fraction=x) for x in runs.ASCENT_FRACTIONS
            }
        },
        "m": {
            f'"{form}"': {
                # Of one group there is one form.
                m: runs_of(m=m, m_sharpness=form if m > 1 else "paper")
                for m in numbers
            }
            for form, numbers in forms.items()
        },
    }
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), sharey="row", layout="constrained")
    for column, (name, lines) in zip(axes.T, panels.items(), strict=True):
        _draw_gains(column[0], records, lines, exact_match)
        _draw_gains(column[1], records, lines, last_loss)
        column[1].set_xlabel(name)
    axes[0, 0].set_ylabel("SAM - plain: exact match, points")
    axes[1, 0].set_ylabel("SAM - plain: loss of the last")
    figure.suptitle(f"{len(seeds)} seeds in pairs, mean and standard error; others at rho {rho}")
    return figure


def figure_1(records: Records, seeds: range, rho: float) -> Any:
    """Exact match and loss against the share of the training words, with and without SAM.

    Solid with as many steps, dashed with as many passes over the words as the smallest share has.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    steps, passes = dict.fromkeys(runs.DATA_FRACTIONS, 1), {Run(0).data_fraction: 1, **runs.LENGTHS}
    ways = [("plain", PLAIN, 0.0), ("SAM", SAM, rho)]
    for axis, value in zip(axes, (exact_match, last_loss), strict=True):
        for (name, colour, its_rho), (lengths, line, added) in itertools.product(
            ways, [(steps, "o-", ""), (passes, "o--", ", as many passes")]
        ):
            wanted = {
                100 * x: [Run(s, rho=its_rho, data_fraction=x, length=length) for s in seeds]
                for x, length in lengths.items()
            }
            found = {x: [value(records[r]) for r in rs if r in records] for x, rs in wanted.items()}
            found = {x: values for x, values in found.items() if len(values) > 1}
            errors = [np.std(v, ddof=1) / len(v) ** 0.5 for v in found.values()]
            means = [np.mean(v) for v in found.values()]
            label = name + added
            axis.errorbar([*found], means, errors, fmt=line, color=colour, capsize=3, label=label)
        axis.set_xscale("log")
        axis.set_xticks(
            [100 * x for x in runs.DATA_FRACTIONS], [f"{100 * x:g}%" for x in runs.DATA_FRACTIONS]
        )
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(alpha=0.25)
        axis.set_xlabel("share of the training words")
    axes[0].set_ylabel("exact match on test words, %")
    axes[1].set_ylabel("loss of the last on test words")
    axes[0].legend(frameon=False)
    figure.suptitle(f"rho {rho}; mean and standard error over seeds")
    return figure


def figure_sharpness(records: Records, seeds: range) -> Any:
    """Top eigenvalue and epsilon-sharpness of the last checkpoints against rho, every seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = {"top_eigenvalue": "top Hessian eigenvalue", "epsilon_sharpness": "epsilon-sharpness"}
    for axis, (key, name) in zip(axes, names.items(), strict=True):
        for place, rho in enumerate((0.0, *ALL_RHOS)):
            values = [
                records[Run(s, rho=rho)]["sharpness"][key]
                for s in seeds
                if Run(s, rho=rho) in records
            ]
            axis.plot([place] * len(values), values, "o", color=SAM if rho else PLAIN, alpha=0.6)
        axis.set_yscale("log")
        axis.set_xticks(range(len(ALL_RHOS) + 1), ["plain", *map(str, ALL_RHOS)])
        axis.grid(alpha=0.25)
        axis.set(xlabel="rho", ylabel=name)
    figure.suptitle("On training words, last checkpoints; a point is a seed")
    return figure


def figure_landscapes(found: list[dict[str, Any]]) -> Any:
    """The loss along two directions for every seed, and over a plane for the first."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), layout="constrained")
    for axis, name in zip(axes[0], found[0]["along"], strict=True):
        for way in found:
            colour, label = (SAM, f"SAM, rho {way['rho']}") if way["rho"] else (PLAIN, "plain")
            for on, style in (("training", "-"), ("test", ":")):
                label_once = f"{label}, {on} words" if way["seed"] == 0 else None
                losses = way["along"][name][on]
                axis.plot(way["distances"][name], losses, style, color=colour, label=label_once)
        axis.set(xlabel=f"distance along the {name}", ylabel="loss")
        axis.grid(alpha=0.25)
    axes[0, 1].legend(frameon=False, fontsize=8)
    planes = [way for way in found if "plane" in way]
    least = min(np.min(way["plane"]) for way in planes)
    levels = np.geomspace(least, np.max(planes[0]["plane"]), 12)[1:]  # the same for both
    for axis, way in zip(axes[1], planes, strict=True):
        line = way["distances"]["top eigenvector"]
        contours = axis.contour(line, line, np.transpose(way["plane"]), levels=levels)
        axis.clabel(contours, fontsize=7, fmt="%.2g")
        axis.plot(0, 0, "+", color="black")
        name = f"SAM, rho {way['rho']}" if way["rho"] else "plain"
        axis.set(xlabel="top eigenvector", ylabel="second eigenvector", title=name)
        axis.set_aspect("equal")
    seeds = len({way["seed"] for way in found})
    figure.suptitle(f"Loss around the last checkpoints: {seeds} seeds; planes of the first")
    return figure


def figure_step_cost(cells: list[dict[str, Any]], on_gpu: list[dict[str, Any]]) -> Any:
    """FLOPs and wall-clock of every way in the first cell, of ours in all cells, and on a GPU."""
    columns = 1 + (len(cells) > 1) + bool(on_gpu)
    figure, axes = plt.subplots(
        1, columns, figsize=(2 + 4.5 * columns, 4.5), layout="constrained", squeeze=False
    )
    bars = axes[0, 0]
    rows = cells[0]["ratios_to_plain"]
    places = np.arange(len(rows))[::-1]
    ours = [name.startswith(("a/b", "m =")) for name in rows]
    colours = [SAM if mine else PLAIN if name == "plain" else OTHERS
               for name, mine in zip(rows, ours, strict=True)]  # fmt: skip
    bars.barh(places, [row["flops"] for row in rows.values()], color=colours)
    bars.plot([row["wall_clock"] for row in rows.values()], places, "k|", label="wall-clock")
    bars.set_yticks(places, [*rows])
    bars.legend(frameon=False)
    bars.set(xlabel="FLOPs, as a ratio to the plain step", title="A step; ours in blue")
    if len(cells) > 1:
        _draw_grid(axes[0, 1], cells)
    if on_gpu:
        _draw_gpu(axes[0, -1], on_gpu)
    return figure


def _draw_gpu(bars: Any, cells: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for cell in cells for name in cell["ratios_to_plain"]))
    places = np.arange(len(names))[::-1]
    thick = 0.8 / len(cells)
    for number, (cell, colour) in enumerate(zip(cells, itertools.cycle((SAM, OTHERS)))):
        seconds = [cell["ratios_to_plain"].get(name, {}).get("wall_clock", 0) for name in names]
        label = f"{cell['size']}, {cell['batch']['examples']} examples"
        bars.barh(places + 0.4 - (number + 0.5) * thick, seconds, thick, color=colour, label=label)
    flops = [
        next(cell["ratios_to_plain"][n]["flops"] for cell in cells if n in cell["ratios_to_plain"])
        for n in names
    ]
    bars.plot(flops, places, "k|", label="FLOPs")
    bars.set_yticks(places, names)
    bars.legend(frameon=False, loc=(0.62, 0.2))
    device = cells[0]["device"].split(" (")[0]
    bars.set(xlabel="wall-clock, as a ratio to the plain step", title=f"T5.1.1 on one {device}")


def _draw_grid(lines: Any, cells: list[dict[str, Any]]) -> None:
    for size in dict.fromkeys(cell["size"] for cell in sorted(cells, key=_parameters)):
        its = {
            cell["batch"]["examples"]: cell["ratios_to_plain"]["a/b = 1/4"]["flops"]
            for cell in cells
            if cell["size"] == size
        }
        lines.semilogx(*zip(*sorted(its.items()), strict=True), "o-", base=2, label=size)
    lines.axhline(1.25, color="black", linewidth=0.8, linestyle=":")
    lines.set(xlabel="examples in the batch", ylabel="FLOPs ratio", title="a/b = 1/4")
    lines.legend(frameon=False, title="parameters")
    lines.grid(alpha=0.25)


def _parameters(cell: dict[str, Any]) -> int:
    return cell["parameters"]


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    directory = parser.parse_args().results
    figures = {}
    if (path := directory / "paper_questions.jsonl").exists():
        records = load(path)
        # Of the runs that the figures pair; from pre-trained weights there are more.
        seeds = range(1 + max(run.seed for run in records if run == Run(run.seed)))
        rho = summary.chosen_rho(records.values())
        figures["figure_1"] = figure_1(records, seeds, rho)
        figures["figure_2"] = figure_2(records, seeds, rho)
        figures["sharpness"] = figure_sharpness(records, seeds)
    if (path := directory / "landscapes.json").exists():
        figures["landscapes"] = figure_landscapes(json.loads(path.read_text()))
    if (path := directory / "step_cost.json").exists():
        gpu = directory / "gpu_step_cost.json"
        on_gpu = json.loads(gpu.read_text())["cells"] if gpu.exists() else []
        figures["step_cost"] = figure_step_cost(json.loads(path.read_text())["cells"], on_gpu)
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        print(directory / f"{name}.svg")


if __name__ == "__main__":
    main()

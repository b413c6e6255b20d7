"""From the results of the runs to tables, paired by seed."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from study.runs import LARGER_RHOS, Run

SETTINGS = tuple(x.name for x in dataclasses.fields(Run) if x.name not in ("seed", "rho"))
BASE = Run(seed=0)


def chosen_rho(records: Iterable[dict[str, Any]]) -> float | None:
    """The rho with the highest validation exact match, over all seeds, of the first panel.

    Of the paper's range: the larger ones were tried when everything else had been.
    """
    scores = defaultdict(list)
    for record in records:
        run = Run(**record["run"])
        if run.rho > 0 and run.rho not in LARGER_RHOS and _settings(run) == _settings(BASE):
            scores[run.rho].append(max(p["cmudict"]["exact_match"] for p in record["curve"]))
    return max(scores, key=lambda rho: np.mean(scores[rho])) if scores else None


def paired(with_sam: dict[int, float], without: dict[int, float]) -> dict[str, float]:
    """Mean difference over the seeds that both have, its standard error, and a t test's p."""
    seeds = sorted(set(with_sam) & set(without))
    difference = np.array([with_sam[seed] - without[seed] for seed in seeds])
    if len(seeds) < 2:
        return {"seeds": len(seeds), "difference": float(difference.sum()), "error": np.nan}
    if np.ptp(difference) < 1e-9:  # no spread to test against
        return {"seeds": len(seeds), "difference": float(difference.mean()), "error": 0.0}
    return {
        "seeds": len(seeds),
        "difference": float(difference.mean()),
        "error": float(stats.sem(difference)),
        "p": float(stats.ttest_1samp(difference, 0.0).pvalue),
    }


def markdown(records: list[dict[str, Any]], rho: float | None) -> str:
    """A row for every setting: test figures with and without SAM, and their paired difference."""
    groups: dict[str, dict[float, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        run = Run(**record["run"])
        way = run.rho, run.ascent_fraction, run.m_sharpness != "paper", run.m
        groups[_plain_settings(run)][way][run.seed] = record
    lines = [
        f"rho chosen on validation words: {rho}",
        "",
        "| data | task | rho | a/b | m | seeds | exact match | against plain | p "
        "| loss of the last | against plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for settings, ways in groups.items():
        plain = next((ways[way] for way in ways if way[0] == 0), {})
        for way in sorted(ways):
            for task in json.loads(settings)[0]:
                lines.append(_row(settings, way, ways[way], plain, task))
    return "\n".join(lines)


def controls_markdown(records: list[dict[str, Any]], rho: float | None) -> str:
    """A row for every way of training plainly for longer or with more dropout, against SAM."""
    ways: dict[Run, dict[int, dict]] = defaultdict(dict)
    for record in records:
        run = Run(**record["run"])
        ways[dataclasses.replace(run, seed=0)][run.seed] = record
    lines = [
        "| weights | plain training | seeds | exact match | SAM against it | p | loss of the last "
        "| SAM against it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for base in (BASE, dataclasses.replace(BASE, pretrained=True)):
        with_sam = ways.get(base.with_rho(rho or 0), {})
        for way in sorted(ways, key=lambda way: (way.length, way.dropout_rate or 0)):
            if dataclasses.replace(way, length=1, dropout_rate=None) == base:
                told = f"{way.length:g} times the steps" if way.length != 1 else "as SAM"
                told = told if way.dropout_rate is None else f"dropout {way.dropout_rate:g}"
                weights = "pre-trained" if base.pretrained else "random"
                lines.append(_control_row([weights, told], ways[way], with_sam))
    return "\n".join(lines)


def _control_row(told: list[str], plain: dict[int, dict], with_sam: dict[int, dict]) -> str:
    cells: list[Any] = [*told, len(plain)]
    for measure, digits in ((exact_match, 2), (last_loss, 3)):
        theirs = {seed: measure(record) for seed, record in plain.items()}
        pair = paired({seed: measure(record) for seed, record in with_sam.items()}, theirs)
        cells += [_mean(theirs, digits), _difference(pair, digits)]
        if measure is exact_match:
            cells.append(f"{pair['p']:.2g}" if "p" in pair else "")
    return "| " + " | ".join(map(str, cells)) + " |"


def exact_match(record: dict[str, Any]) -> float:
    """On test words, of the best checkpoint."""
    return record["best"]["cmudict"]["exact_match"]


def last_loss(record: dict[str, Any]) -> float:
    """On test words, of the last checkpoint."""
    return record["last"]["cmudict"]["loss"]


def sharpness_markdown(records: list[dict[str, Any]]) -> str:
    """A row for every rho: sharpness of the last checkpoints, and its ratio to plain in pairs."""
    groups: dict[float, dict[int, dict]] = defaultdict(dict)
    for record in records:
        if "sharpness" in record:
            run = Run(**record["run"])
            groups[run.rho][run.seed] = record["sharpness"]
    lines = [
        "| rho | seeds | top Hessian eigenvalue | ratio to plain | p | epsilon-sharpness "
        "| ratio to plain | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rho in sorted(groups):
        cells = ["plain" if rho == 0 else str(rho), str(len(groups[rho]))]
        for key in ("top_eigenvalue", "epsilon_sharpness"):
            log = {s: np.log(found[key]) for s, found in groups[rho].items()}
            cells.append(f"{np.exp(np.mean(list(log.values()))):.3g}")
            pair = paired(log, {s: np.log(found[key]) for s, found in groups.get(0.0, {}).items()})
            ratio = f"{np.exp(pair['difference']):.2f}"
            cells += ["", ""] if rho == 0 else [ratio, f"{pair.get('p', np.nan):.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(settings: str, way: Any, runs: dict, plain: dict, task: str) -> str:
    tasks, fraction, pretrained, length, dropout_rate = json.loads(settings)
    match = {s: r["best"][task]["exact_match"] for s, r in runs.items()}
    loss = {s: r["last"][task]["loss"] for s, r in runs.items()}
    rho, ascent, foret, m = way
    name = "+".join(tasks) + (", pre-trained" if pretrained else "")
    data = f"{100 * fraction:g}%" + (f", {length} times the steps" if length > 1 else "")
    data += "" if dropout_rate is None else f", dropout {dropout_rate}"
    cells = [data, f"{task} ({name})" if name != task else task]
    if rho == 0:
        cells += ["plain", "", "", len(runs), _mean(match), "", "", _mean(loss, 3), ""]
    else:
        better = paired(match, {s: r["best"][task]["exact_match"] for s, r in plain.items()})
        lower = paired(loss, {s: r["last"][task]["loss"] for s, r in plain.items()})
        cells += [
            rho,
            f"{ascent:g}",
            f"{m}, Foret" if foret else m,
            len(runs),
            _mean(match),
            _difference(better),
        ]
        cells += [f"{better['p']:.2g}" if "p" in better else "", _mean(loss, 3)]
        cells.append(_difference(lower, 3))
    return "| " + " | ".join(map(str, cells)) + " |"


def _settings(run: Run) -> list:
    return [getattr(run, name) for name in SETTINGS]


def _plain_settings(run: Run) -> str:
    return json.dumps([run.tasks, run.data_fraction, run.pretrained, run.length, run.dropout_rate])


def _mean(values: dict[int, float], digits: int = 2) -> str:
    return f"{np.mean(list(values.values())):.{digits}f}"


def _difference(pair: dict[str, float], digits: int = 2) -> str:
    if pair["seeds"] < 2:
        return ""
    return f"{pair['difference']:+.{digits}f} ± {pair['error']:.{digits}f}"

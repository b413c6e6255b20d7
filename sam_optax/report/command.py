"""The command line."""

import argparse
import dataclasses
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .best import results_of
from .compare import Comparison, compare, confounded, of_one_seed
from .paper import MODELS
from .plot import draw
from .runs import Run, read_run, run_folder, with_evaluations
from .settings import BASELINE, SAM
from .tables import NOTE, Table, comparison_table, csv_text, runs_table

_NAMES = {"markdown": "report.md", "csv": "report.csv", "plot": "report.png"}
_PICTURES = (".png", ".pdf", ".svg")
_ELSEWHERE = re.compile(r"(?:.*=)?([a-z][a-z0-9+.-]*://.*)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Report on runs.

    Args:
      arguments: the command line's, if not the process's own.

    Returns:
      0 if there was anything to report and it could be written where it was asked for, or else 1.
    """
    options = _parse(arguments)
    warnings: list[str] = []

    def warn(message: str) -> None:
        warnings.append(message)
        print(f"warning: {message}", file=sys.stderr)

    if options.model and options.model not in MODELS:
        warn(f"--model {options.model}: not of the paper, which has {', '.join(MODELS)}.")
    runs = _read(options, warn)
    results = [result for run in runs for result in results_of(run, warn, options.model)]
    if not results:
        print("error: there is nothing to report; the warnings say why.", file=sys.stderr)
        return 1
    comparisons = compare(results)
    for comparison in comparisons:
        for message in (*confounded(comparison), *of_one_seed(comparison)):
            warn(message)
    tables = [table(c) for c in comparisons for table in (comparison_table, runs_table)]
    status = 0
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print("\n\n".join([*(table.text() for table in tables), NOTE]), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        if not isinstance(error, BrokenPipeError):  # as of `| head`, which has read enough
            print(f"error: cannot print the tables: {error.strerror}", file=sys.stderr)
            status = 1
    try:
        _write(options, comparisons, tables, warnings)
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        status = 1
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; `--output` is a name for each of the files."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.runs or options.baseline or options.sam):
        parser.error("no RUN_DIR given: name T5X's model folders")
    for name in (*options.runs, *options.baseline, *options.sam):
        if elsewhere := _ELSEWHERE.fullmatch(name):
            parser.error(
                f"{name} is not on this machine: copy the folder here first, without its "
                f"checkpoints: gcloud storage rsync -r -x 'checkpoint_.*' {elsewhere[1]} RUN_DIR"
            )
    if options.plot and options.plot.suffix not in _PICTURES:
        parser.error(f"--plot {options.plot}: its name must end in one of {', '.join(_PICTURES)}")
    if options.output:
        for name, file in _NAMES.items():
            setattr(options, name, getattr(options, name) or options.output / file)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "the plot needs matplotlib: pip install matplotlib, or ask for --markdown and --csv"
        )
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam_optax.report",
        description="Results of T5X runs, with and without SAM, beside the paper's.",
    )
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN_DIR",
        nargs="*",
        help="T5X's model folder, or the output folder of t5x.eval; NAME=RUN_DIR calls it NAME, "
        "and runs of one NAME are runs of one setting",
    )
    add("--baseline", metavar="DIR", action="append", default=[], help="a run without SAM")
    add("--sam", metavar="DIR", action="append", default=[], help="a run with SAM")
    add("--model", help="the runs' model, if not what their configs say: t5_1_1_base, mt5_small")
    add("--training-eval", action="store_true", help="teacher-forced loss and accuracy too")
    add("--markdown", metavar="FILE", type=_path, help="write the tables in Markdown")
    add("--csv", metavar="FILE", type=_path, help="write every result as CSV")
    add("--plot", metavar="FILE", type=_path, help="draw the metrics; .png, .pdf or .svg")
    add("--output", metavar="DIR", type=_path, help="write report.md, report.csv and report.png")
    return parser


def _path(text: str) -> Path:
    if _ELSEWHERE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine: write here, and copy it.")
    return Path(text)


def _read(options: argparse.Namespace, warn: Callable[[str], None]) -> list[Run]:
    """Return the runs, each folder once."""
    # Of a folder that is given twice the first stands: first those of which something is said.
    wanted = [(Path(text), None, BASELINE) for text in options.baseline]
    wanted += [(Path(text), None, SAM) for text in options.sam]
    wanted += [(*_labelled(text), None) for text in options.runs]
    runs: dict[str, Run] = {}
    for directory, label, method in wanted:
        place = os.path.realpath(run_folder(directory))
        if place in runs:
            warn(f"{directory}: given twice, counted once.")
            continue
        run = read_run(directory, warn, label, options.training_eval)
        if method is not None:
            sam = run.settings.sam if method == SAM else {}
            settings = dataclasses.replace(run.settings, method=method, sam=sam)
            run = dataclasses.replace(run, settings=settings, stated=method)
        runs[place] = run
    return with_evaluations(list(runs.values()), warn)


def _labelled(text: str) -> tuple[Path, str | None]:
    """Return folder and label of DIR or NAME=DIR."""
    name, equals, directory = text.partition("=")
    if not equals or os.path.exists(text):
        return Path(text), None
    return Path(directory), name


def _write(
    options: argparse.Namespace,
    comparisons: list[Comparison],
    tables: list[Table],
    warnings: list[str],
) -> None:
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    if options.markdown:
        parts = ["# Results", NOTE, *(table.markdown() for table in tables)]
        if warnings:
            parts += ["## Warnings", "\n".join(f"- {' '.join(x.splitlines())}" for x in warnings)]
        _write_file(options.markdown, _encoded("\n\n".join(parts) + "\n"))
    if options.csv:
        _write_file(options.csv, _encoded(csv_text(comparisons)))
    if options.plot:
        _write_file(options.plot, draw(comparisons, options.plot.suffix[1:]))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")


def _write_file(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:  # of a full disk it does not say which file
        raise OSError(error.errno, error.strerror, str(file)) from error

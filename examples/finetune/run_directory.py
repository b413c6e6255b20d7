"""The folder of one command: who may write to it, and files that are never half-written."""

import dataclasses
import json
import os
from pathlib import Path

from finetune.experiment import Experiment


class RunDirectoryError(RuntimeError):
    """The folder cannot be used as asked, in words for the user."""


def write_json(path: Path, value) -> None:
    """Writes a file that is either the old one or the whole new one, whenever the process dies."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def check(run_dir: Path, experiment: Experiment, resume: bool) -> None:
    """Raises unless `run_dir` can take a new run or, with `resume`, holds this experiment's."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RunDirectoryError(f"--run_dir={run_dir} is a file, not a folder")
    # A process killed while it wrote config.json leaves nothing worth protecting.
    in_use = run_dir.exists() and any(path.suffix != ".tmp" for path in run_dir.iterdir())
    if in_use and not resume:
        raise RunDirectoryError(
            f"{run_dir} is not empty. Use --resume to go on with the run in it, or --run_dir=PATH "
            "for another folder, or delete it."
        )
    if in_use:
        _check_same_settings(run_dir / "config.json", _plain(experiment))


def claim(run_dir: Path, experiment: Experiment) -> None:
    """Marks `run_dir` as this experiment's, once it is known that it can be run."""
    if not (run_dir / "config.json").exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", _plain(experiment))


def _plain(experiment: Experiment) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def _check_same_settings(config: Path, settings: dict) -> None:
    if not config.exists():
        raise RunDirectoryError(
            f"{config.parent} holds something else than a run of this command (it has no "
            "config.json), so there is nothing to resume. Use another --run_dir."
        )
    saved, now = _flat(json.loads(config.read_text())), _flat(settings)
    changed = [
        f"{name}: {saved.get(name)} then, {now.get(name)} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise RunDirectoryError(
            f"The run in {config.parent} has other settings ({'; '.join(changed)}). Resume it with "
            "the settings it was started with, or use another --run_dir."
        )


def _flat(settings: dict) -> dict:
    return {**settings, **settings["model"], "model": None}

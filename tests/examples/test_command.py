"""The command as a user runs it; what shows only in a process of its own, there."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parents[2] / "examples" / "finetune_t5.py"
# One device, as users have; the tests of the library ask XLA for several.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"]),
}


def _run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(COMMAND), *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


class _CtrlC(threading.Thread):
    """Presses Ctrl-C once a path is there, unless it is stopped before."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self._path, self._stopped = path, threading.Event()

    def run(self):
        while not self._path.exists():
            if self._stopped.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGINT)

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self._stopped.set()
        self.join()


def _run_here(arguments):
    """Run the command in this process, which has loaded TensorFlow: status, output and errors."""
    import finetune_t5

    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", [str(COMMAND), *arguments])
        status = finetune_t5.main(arguments)
    return status, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that Ctrl-C ends while it trains: status, output, errors, checkpoints and folder."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    # The handler of Ctrl-C is there before the curves are.
    with _CtrlC(run_dir / "plain" / "tensorboard"):
        ended = _run_here(["--smoke", "--run_dir", str(run_dir)])
    saved = [path.name for path in (run_dir / "plain" / "checkpoints").iterdir()]
    return *ended, saved, run_dir


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A run to its end: status, output, errors and its folder."""
    run_dir = tmp_path_factory.mktemp("smoke") / "run"
    return *_run_here(["--smoke", "--run_dir", str(run_dir)]), run_dir


@pytest.mark.usefixtures("whole_contract")  # in CI: test_train.py, of training alone
def test_ctrl_c_saves_and_says_how_to_go_on(interrupted):
    status, output, errors, saved, run_dir = interrupted
    assert status == 130, errors
    assert f"{COMMAND} --smoke --run_dir {run_dir} --resume" in output
    assert "Traceback" not in errors
    assert len(saved) == 1 and int(saved[0]) < 40


def test_smoke_run_prints_the_table_and_saves_picture_and_figures(smoke):
    status, output, errors, run_dir = smoke
    assert status == 0, errors
    for row in ("test exact match", "test phoneme error rate", "training loss", "sharpness"):
        assert row in output
    picture = (run_dir / "comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert list(run_dir.glob("sam/tensorboard/events.*"))
    results = json.loads((run_dir / "results.json").read_text())
    assert set(results["runs"]) == {"plain", "sam"}


def test_sam_step_costs_five_quarters_of_a_plain_one(smoke):
    runs = json.loads((smoke[-1] / "results.json").read_text())["runs"]
    ratio = runs["sam"]["step_flops"] / runs["plain"]["step_flops"]
    # 1.25 for a/b = 1/4, and a little for the norm and the perturbation of so small a model.
    assert 1.22 < ratio < 1.32


def test_a_used_folder_is_refused_with_the_way_out(smoke):
    done = _run("--smoke", "--run_dir", smoke[-1], cwd=smoke[-1])
    assert done.returncode == 2
    assert "is not empty. Use --resume" in done.stderr
    assert "Loading TensorFlow" not in done.stdout


def test_resuming_with_other_settings_is_refused(smoke):
    done = _run("--smoke", "--resume", "--gin.rho=0.7", "--run_dir", smoke[-1], cwd=smoke[-1])
    assert done.returncode == 2
    assert "rho: 0." in done.stderr and "then, 0.7 now" in done.stderr


@pytest.mark.parametrize("setting", ["batch_size=1000000", "data_fraction=1e-9"])
def test_a_setting_that_the_data_cannot_meet_leaves_the_folder_free(tmp_path, setting, capsys):
    import finetune_t5
    import sweep_rho

    arguments = ["--gin_file", "smoke.gin", f"--gin.{setting}", "--run_dir", str(tmp_path / "run")]
    for main in (finetune_t5.main, sweep_rho.main):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and setting.split("=")[0] in told
        assert not (tmp_path / "run").exists()


def test_resuming_where_there_is_something_else_is_refused(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    done = _run("--resume", "--run_dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "something else than a run" in done.stderr


@pytest.mark.usefixtures("whole_contract")  # in CI: test_train.py, of training alone
def test_a_damaged_checkpoint_is_an_error_that_names_it(smoke, tmp_path):
    shutil.copytree(smoke[-1], tmp_path / "run")
    latest = tmp_path / "run" / "plain" / "checkpoints" / "40"
    (latest / "progress" / "metadata").write_text("{")
    done = _run("--smoke", "--resume", "--run_dir", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{latest} is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def _comparable(run_dir):
    """All results but the durations."""
    results = json.loads((run_dir / "results.json").read_text())["runs"]
    return {
        name: {k: v for k, v in run.items() if not k.endswith("_seconds")}
        for name, run in results.items()
    }


@pytest.mark.usefixtures("whole_contract")  # in CI: test_train.py, of training alone
def test_an_interrupted_run_that_goes_on_ends_the_same(smoke, interrupted):
    run_dir = interrupted[-1]
    status, _, errors = _run_here(["--smoke", "--run_dir", str(run_dir), "--resume"])
    assert status == 0, errors
    assert _comparable(run_dir) == _comparable(smoke[-1])


@pytest.mark.usefixtures("whole_contract")  # it loads TensorFlow and compiles all there is
def test_smoke_run_in_a_process_of_its_own_is_quiet_and_short(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _run("--smoke", "--run_dir", "run", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Loading TensorFlow")
    assert (tmp_path / "run" / "comparison.png").exists()
    assert not [x for x in done.stderr.splitlines() if x and "step/s" not in x], done.stderr
    # Processor time: the clock would also count what else the machine does. It is a minute
    # where this was written.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180


def test_sweep_skips_what_is_done(tmp_path, monkeypatch, capsys):
    # In this process, which has loaded TensorFlow, and on few validation words: the sweep decodes
    # all of them for every run, which takes most of its minute. The step of that rho is compiled.
    import sweep_rho
    from finetune import data

    whole = data.load_split
    monkeypatch.setattr(data, "load_split", lambda *arguments: whole(*arguments[:3], 32))
    settings = ["--gin_file", "smoke.gin", "--gin.steps=4", "--run_dir", str(tmp_path)]
    results = tmp_path / "results.jsonl"

    assert sweep_rho.main([*settings, "--rhos", "0"]) == 0
    first = capsys.readouterr()
    (line,) = results.read_text().splitlines()
    assert sweep_rho.main([*settings, "--rhos", "0", "0.4"]) == 0
    again = capsys.readouterr()
    lines = results.read_text().splitlines()
    assert lines[0] == line
    assert [json.loads(line)["rho"] for line in lines] == [0, 0.4]
    assert (first.err.count("4/4"), again.err.count("4/4")) == (1, 1)
    assert [row.split()[:2] for row in again.out.splitlines()[-2:]] == [["0", "1"], ["0.4", "1"]]
    assert again.out.splitlines()[-2] == first.out.splitlines()[-1]

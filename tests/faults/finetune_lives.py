"""Trains the example in processes that are killed, or whose disk fills up.

  python finetune_lives.py FOLDER

Each line of standard input is one life, as JSON; it is answered by a line that says how it ended:

  {"run": "a"}                          nothing happens to it
  {"run": "a", "die": ["time", 0.8]}    killed 0.8 s after its first step began
  {"run": "a", "die": ["save", 2, 17]}  killed at the 17th file operation of its second save
  {"run": "a", "die": ["open", 1, 5]}   the same, while it opens its checkpoints
  {"run": "a", "die": ["half", 2, 1]}   at the first one that finds a folder half-written or deleted
  {"run": "a", "ballast": 4096}         a file fills the disk before the second save, but for 4 kB
  {"run": "a", "largest_file": 4096}    from the second save on no file may grow larger
  {"restore": ["a", "b"]}               trains nothing, reads the last checkpoint of each run
  {"command": "a"}                      the command, whose first checkpoint cannot be written

Every life resumes what is in the folder of the run. Importing JAX and TensorFlow takes longer than
a life, so each is a fork of this process, which has imported them and started neither.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAST = 12  # step
LONGEST_LIFE = 240  # seconds
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def experiment():
    """Six checkpoints in a second or two, by programs that `--smoke` has, too."""
    from finetune.gin_config import read_experiment

    return dataclasses.replace(
        read_experiment(["smoke.gin"], []), steps=LAST, eval_every=2, eval_words=16
    )


def digest(state) -> str:
    import jax

    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


class FileOperations:
    """Counts what the process does with files during some calls, and kills it at one of them."""

    def __init__(self, checkpoints: Path):
        self.counts = {"open": [], "save": []}
        self.die_at = None
        self._checkpoints = checkpoints
        self._now = None
        sys.addaudithook(self._operation)

    def during(self, name, method):
        @functools.wraps(method)
        def counted(*args, **kwargs):
            self.counts[name].append(0)
            self._now = name
            try:
                return method(*args, **kwargs)
            finally:
                self._now = None

        return counted

    def _operation(self, event, _):
        if self._now is None or event not in FILE_OPERATIONS:
            return
        counts = self.counts[self._now]
        counts[-1] += 1
        if self.die_at is None or [len(counts), counts[-1]] < self.die_at[1:]:
            return
        half = self.die_at[0] == "half" and self._now == "save" and self._is_half_written()
        if half or self.die_at[0] == self._now:
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_half_written(self):
        return any(not name.isdigit() for name in os.listdir(self._checkpoints))


def before_the_second(method, action):
    calls = []

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            action()
        return method(*args, **kwargs)

    return wrapped


def fill_disk(ballast: Path, leave: int) -> None:
    free = shutil.disk_usage(ballast.parent).free
    assert free < 1e9, "this is no disk to fill"
    ballast.write_bytes(bytes(max(0, free - leave)))


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    # The log may be larger than that already, and is not what is meant.
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def live(request, run_dir: Path, splits, began) -> dict:
    """One life, which may not come to its end."""
    from finetune.checkpoints import Checkpoints

    operations, saved = FileOperations(run_dir / "checkpoints"), {}
    if request.get("die", ["time"])[0] != "time":
        operations.die_at = request["die"]
    save = operations.during("save", Checkpoints.save)
    ballast = run_dir.parent / "ballast"
    ballast.unlink(missing_ok=True)
    if "ballast" in request:
        save = before_the_second(save, lambda: fill_disk(ballast, request["ballast"]))
    elif "largest_file" in request:
        save = before_the_second(save, lambda: limit_files(request["largest_file"]))

    def save_and_remember(self, step, state, *rest):
        save(self, step, state, *rest)
        saved[step] = digest(state)

    Checkpoints.save = save_and_remember
    Checkpoints.__init__ = operations.during("open", Checkpoints.__init__)
    outcome = train(run_dir, splits, began)
    return outcome | {"saved": saved, "operations": operations.counts}


def restore(runs: list[Path]) -> list:
    """Returns the step and state of each run's last checkpoint, or the error."""
    from finetune.checkpoints import CheckpointError, Checkpoints, shapes_of
    from finetune.model import T5
    from finetune.train import initial_state, optax

    settings = experiment()
    optimizer = optax.adafactor(settings.learning_rate)
    like = shapes_of(initial_state(T5(settings.model), optimizer, settings.seed))

    def last(run_dir):
        checkpoints = Checkpoints(run_dir / "checkpoints")
        try:
            step = checkpoints.latest_step()
            return [step, step and digest(checkpoints.restore(step, like)[0])]
        except CheckpointError as error:
            return str(error)

    return [last(run) for run in runs]


def command(run_dir: Path) -> dict:
    """Returns status and standard error of the command where its first checkpoint fails."""
    import finetune_t5
    from finetune import command
    from finetune.checkpoints import Checkpoints

    def save(_, run_dir):
        limit_files(1_000_000)
        Checkpoints(run_dir / "checkpoints").save(
            2, {"w": np.random.default_rng(0).random(300_000)}, {}, set()
        )

    command.run, stderr = save, io.StringIO()
    with contextlib.redirect_stderr(stderr):
        status = finetune_t5.main(["--smoke", "--run_dir", str(run_dir)])
    return {"status": status, "stderr": stderr.getvalue()}


def train(run_dir, splits, began) -> dict:
    import finetune.train
    import jax
    from finetune import task
    from finetune.evaluate import Evaluator
    from finetune.gradient import sam_gradient
    from finetune.loss import make_loss_fn
    from finetune.model import T5
    from finetune.train import Problem, train

    # A restored state is on its device by request, a fresh one by default. JAX would compile the
    # step once for each.
    fresh = finetune.train.initial_state
    finetune.train.initial_state = lambda *args: jax.device_put(fresh(*args), jax.devices()[0])
    settings, model = experiment(), T5(experiment().model)
    name = task.register_task(settings.data_fraction, settings.seed)
    evaluator = Evaluator(model, name, task.SEQUENCE_LENGTH["targets"], batch_size=64)
    problem = Problem(model, *splits, evaluator)
    gradient_fn = sam_gradient(make_loss_fn(problem.model), settings)
    starts = []

    def should_stop(_):
        if not starts:
            starts.append(time.monotonic())
            began()
        return False

    result = train(settings, problem, gradient_fn, run_dir, "sam", should_stop)
    return {
        "params": digest(result.last_params),
        "best": [result.best_step, digest(result.best_params)],
        "records": result.progress.records,
        "seconds": time.monotonic() - starts[0] if starts else 0.0,
    }


def load_splits(pipe) -> None:
    """Sends what `Problem.load` reads with TensorFlow, which must not run where forks are made."""
    from finetune.train import Problem

    problem = Problem.load(experiment())
    with os.fdopen(pipe, "wb") as out:
        pickle.dump((problem.train, problem.validation), out)
    os._exit(0)


def in_the_child(request, folder, splits, pipe) -> None:
    signal.alarm(LONGEST_LIFE)
    with os.fdopen(pipe, "w") as out:

        def say(what):
            print(json.dumps(what), file=out, flush=True)

        try:
            if "restore" in request:
                say({"restored": restore([folder / run for run in request["restore"]])})
            elif "command" in request:
                say(command(folder / request["command"]))
            else:
                say(live(request, folder / request["run"], splits, lambda: say("began")))
        except Exception as error:
            say({"error": type(error).__name__, "message": str(error)})
    os._exit(0)


def fork(in_the_child, *arguments) -> tuple[int, int]:
    """Returns the process in which `in_the_child` runs, and the end of the pipe to read from."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        in_the_child(*arguments, writing)
    os.close(writing)
    return child, reading


def run(request, folder: Path, splits) -> dict:
    """Returns how a life ended: what it said last, or `{"killed": SIGNAL}`."""
    child, reading = fork(in_the_child, request, folder, splits)
    outcome, kind = None, request.get("die", [None])[0]
    with os.fdopen(reading) as lines:
        for line in lines:
            outcome = json.loads(line)
            if outcome == "began" and kind == "time":
                time.sleep(request["die"][1])
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if isinstance(outcome, dict):  # it came to its end before it could be killed
        return outcome
    return {"killed": os.waitstatus_to_exitcode(status)}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the example prints, too
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]
    from finetune import quiet_tensorflow

    quiet_tensorflow.load()
    import finetune.train  # noqa: F401

    child, reading = fork(load_splits)
    with os.fdopen(reading, "rb") as pipe:
        splits = pickle.load(pipe)
    os.waitpid(child, 0)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), folder, splits)), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""The example's training in processes of its own, for the tests that kill it or fill its disk."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("finetune_lives.py")
# Mounted where no other process sees it, and gone with the process.
ON_A_SMALL_DISK = ["sh", "-c", 'mount -t tmpfs -o size=8m none "$0" && exec "$@"']


class Lives:
    """Calls `finetune_lives.py`, whose head says what a life may be asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        disk = folder / "disk"
        disk.mkdir()
        own_mounts = _own_mounts(disk)
        self.has_small_disk = own_mounts is not None
        small_disk = [*own_mounts, *ON_A_SMALL_DISK, str(disk)] if own_mounts else []
        # One device, as users have.
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"]),
        }
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [*small_disk, sys.executable, str(WORKER), str(folder)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n", self.log()

    def __call__(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.log()
        return json.loads(answer)

    def log(self):
        return (self.folder / "log").read_text()[-3000:]

    def end(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._log.close()


def _own_mounts(disk):
    """Returns the command before a command that may mount a disk of its own, or None."""
    for own_mounts in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        command = [*own_mounts, *ON_A_SMALL_DISK, str(disk), "true"]
        try:
            if subprocess.run(command, capture_output=True).returncode == 0:
                return own_mounts
        except FileNotFoundError:
            return None
    return None


# In CI, of training in one process: tests/examples/test_train.py, which stops a run that goes on,
# and damages checkpoints.
@pytest.fixture(scope="session")
def lives(whole_contract, tmp_path_factory):
    lives = Lives(tmp_path_factory.mktemp("lives"))
    yield lives
    lives.end()


@pytest.fixture(scope="session")
def whole(lives):
    """The run that nothing happened to, in the folder "whole"."""
    outcome = lives(run="whole")
    assert "params" in outcome, (outcome, lives.log())
    return outcome

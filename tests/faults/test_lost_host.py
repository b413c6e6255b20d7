"""One of two hosts is killed: the other ends, and the last complete checkpoint can be restored."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lost_host_worker
import optax
import orbax.checkpoint as ocp
import pytest
from problems import mlp_params

WORKER = Path(lost_host_worker.__file__)
AT_MOST = lost_host_worker.HEARTBEAT_TIMEOUT + 45  # seconds, on a machine that is busy


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder, coordinator, host, *moment):
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        # A host that is killed while it writes a program would leave half of it for other tests.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parents[2])]),
    }
    with (folder / f"log{host}").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "checkpoints"), coordinator, str(host)]
            + [str(x) for x in moment],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def digests(folder, host):
    """What the host printed: the digest of parameters and state after each step."""
    lines = (line.split() for line in (folder / f"log{host}").read_text().splitlines())
    return {int(words[0]): words[1] for words in lines if len(words) == 2 and words[0].isdigit()}


def restored(directory):
    """Step and digest of the last checkpoint, read by this process alone."""
    params = mlp_params(sizes=lost_host_worker.SIZES)
    like = params, optax.adam(1e-3).init(params)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(directory, options=options) as manager:
        step = manager.latest_step()
        state = manager.restore(step, args=ocp.args.StandardRestore(like))
    return step, lost_host_worker.digest(state)


# Host 0 is the coordinator, and it is the one that completes a checkpoint: 22 file operations, of
# which the last renames it. Host 1 does two.
MOMENTS = [  # each takes as long as two processes take to start
    (1, "step", 6),
    (0, "save", 9),
    (0, "step", 6),
    (0, "save", 22),
    (1, "save", 2),
]


@pytest.mark.usefixtures("whole_contract")  # in CI: ../test_multihost.py, where nobody is killed
@pytest.mark.parametrize(("lost", "what", "number"), MOMENTS)
def test_the_other_host_ends_and_leaves_a_checkpoint(tmp_path, lost, what, number):
    coordinator = f"127.0.0.1:{free_port()}"
    moments = {lost: (what, number)}
    hosts = [start(tmp_path, coordinator, i, *moments.get(i, ())) for i in range(2)]
    try:
        assert hosts[lost].wait(timeout=120) == -signal.SIGKILL
        began = time.monotonic()
        status = hosts[1 - lost].wait(timeout=AT_MOST)
        print(f"the other host ended with {status} after {time.monotonic() - began:.1f} s")
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert status != 0
    ours, theirs = (digests(tmp_path, host) for host in (lost, 1 - lost))
    assert max(theirs) < lost_host_worker.STEPS
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    complete = sorted(int(name) for name in names if name.isdigit())
    assert complete == ([2, 4] if what == "step" else [2])
    assert (what == "save") == any("tmp" in name for name in names), names
    # It is what both hosts had at that step, to the last bit.
    step, digest = restored(tmp_path / "checkpoints")
    assert step == complete[-1] and digest == ours[step] == theirs[step]

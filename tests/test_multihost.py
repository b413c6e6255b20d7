"""Two hosts on loopback, four devices each, do what one host with eight does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from problems import mlp_params

WORKER = Path(__file__).with_name("multihost_worker.py")


def start(*args):
    devices = 8 if len(args) == 1 else 4
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(*processes):
    """What each printed, line by line; none of them outlives this call."""
    try:
        printed = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return [out.strip().splitlines() for out, _ in printed]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def restored(path):
    """The checkpoint, on the first device of this process."""
    like = {"one point": mlp_params(), "groups": mlp_params()}
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def test_two_processes_equal_one(tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    hosts = outputs(*(start(tmp_path / "two", coordinator, i) for i in range(2)))
    assert [lines[-2] for lines in hosts] == ["devices 4 of 8"] * 2
    assert hosts[0][-1] == hosts[1][-1], "the hosts disagree on the parameters"

    ((*_, devices, _),) = outputs(start(tmp_path / "one"))
    assert devices == "devices 8 of 8"
    # Saved by two processes, restored by this one.
    one, two = restored(tmp_path / "one"), restored(tmp_path / "two")
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

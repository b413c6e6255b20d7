"""Runs of T5X's trainer on as many CPU devices as asked for: `worker.py DEVICES OUT.npz`.

The parameters after three steps of every case, by the case's name.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[1]}"
os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from collectives import collectives
from tiny import BASE, SAM, Run, make_model

DEVICES = int(sys.argv[1])
# The same eight examples wherever it runs.
SAME = {"ascent_fraction": 0.5, "data_shards": 8}


def cases():
    yield "base", Run(BASE)
    yield "rho 0", Run(SAM, rho=0.0)
    yield "sam", Run(**SAME)
    yield "sam, 2 micro-batches", Run(k=2, **SAME)
    if DEVICES == 1:
        dropout = {"model": make_model(dropout_rate=0.1), "k": 2}
        yield "base, dropout, 2 micro-batches", Run(BASE, **dropout)
        yield "rho 0, dropout, 2 micro-batches", Run(SAM, rho=0.0, **dropout)
        foret = {"ascent_fraction": 0.5, "m_sharpness": "foret"}
        yield "foret 4", Run(m=4, **foret)
        yield "foret 8", Run(m=8, **foret)
        return
    yield "base, 2 partitions", Run(BASE, partitions=2)
    yield "rho 0, 2 partitions", Run(SAM, partitions=2, rho=0.0)
    yield "sam, 2 partitions", Run(partitions=2, **SAME)
    if DEVICES == 8:
        yield "sam, 2 partitions, 2 micro-batches", Run(partitions=2, k=2, **SAME)
        yield "groups", Run(group_axes="data", ascent_fraction=0.5)
        groups = {"group_axes": "data", "ascent_fraction": 0.5}
        yield "groups, 2 partitions", Run(partitions=2, **groups)
        yield "groups, 2 micro-batches", Run(k=2, **groups)
        yield "own shards", Run(ascent_fraction=0.5)
        yield "own shards, bf16", Run(ascent_fraction=0.5, reduction_dtype="bfloat16")


def kinds_of_collectives(run):
    partitioner, step = run.partitioner, run.trainer._partitioned_train_step
    compiled = partitioner.compile(step, run.state, run.batch_at(0))
    return ",".join(sorted({c.kind for c in collectives(compiled)}))


results = {}
for name, run in cases():
    run.steps(3)
    for path, w in jax.tree_util.tree_leaves_with_path(run.params):
        results[f"{name}|{jax.tree_util.keystr(path)}"] = w
    compiled = run.trainer._partitioned_train_step._pjitted_fn._cache_size()
    results[f"{name}|compiled"] = np.array(compiled)
    if name in ("base", "own shards", "groups"):
        results[f"{name}|collectives"] = np.array(kinds_of_collectives(run))
np.savez(sys.argv[2], **results)

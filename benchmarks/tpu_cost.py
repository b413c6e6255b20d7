"""What a step costs on a TPU slice, as a ratio to the plain step, without a TPU.

  python benchmarks/tpu_cost.py --sizes small base --slices v5e:4x4 --layouts data fsdp
  python benchmarks/tpu_cost.py --sizes xl --slices v5e:4x4 --layouts "fsdp, scanned"

Compiles the train step of T5.1.1 for the slice with libtpu's compiler, as `ahead_of_time.py` says.
"""

import os

# The slice is described, not attached: libtpu must not look for it, and has no device that it would
# have to keep other processes from.
os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    JAX_PLATFORMS="cpu",
    # No collective matmuls: they are loops, whose bodies cost analysis counts once.
    LIBTPU_INIT_ARGS="--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
)

import ahead_of_time
import numpy as np
from jax.experimental import topologies

# Batch shards times model shards; libtpu's name of the slice stands before the comma. 128 examples
# do not go over 256 chips, so there each batch shard is 8 chips with a model parallel among them,
# or 4 for models of 12 heads, which T5X does not spread over 8.
SLICES: dict[str, dict[str, int]] = {
    "v5e:4x4": {"data": 16, "model": 1},
    "v5e:4x4, 4 x 4": {"data": 4, "model": 4},
    "v5e:4x4, 4 groups": {"group": 4, "data": 4, "model": 1},
    "v5e:16x16": {"data": 32, "model": 8},
    "v5e:16x16, 64 x 4": {"data": 64, "model": 4},
    "v5p:4x4x4": {"data": 64, "model": 1},
}


def describe(slice_name: str) -> np.ndarray:
    """The devices of a slice, as libtpu describes them."""
    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=slice_name).devices)


if __name__ == "__main__":
    ahead_of_time.main(SLICES, describe, ahead_of_time.RESULTS / "tpu_cost.json")

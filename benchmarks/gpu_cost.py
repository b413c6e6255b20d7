"""What a step costs on nodes of GPUs, as a ratio to the plain step, without a GPU.

  pip install "jax[cuda12]" && python benchmarks/gpu_cost.py --sizes base --layouts data fsdp

Compiles the train step of T5.1.1 for the GPUs with XLA's compiler for them, as `ahead_of_time.py`
says: memory and collectives. FLOPs it does not say; `step_cost.py` counts them. Where no GPU is,
kernels cannot be tuned, so products are cuBLAS's, and what its kernels work in is not counted.
"""

import os

os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",  # it would ask the driver, and there is none
    JAX_PLATFORMS="cpu",
    XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
)

import ahead_of_time
import numpy as np
from cost_table import GPU_HEAD
from jax.experimental import topologies

SLICES: dict[str, dict[str, int]] = {
    "h100:1x8": {"data": 8, "model": 1},
    "h100:1x8, 4 x 2": {"data": 4, "model": 2},
    "h100:4x8": {"data": 32, "model": 1},
}

# An H100 SXM, as XLA's GpuTargetConfigProto has it.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 85899345920
}
"""


def describe(name: str) -> np.ndarray:
    """The devices of `h100:NODESxGPUS`, in the order of the nodes."""
    nodes = name.removeprefix("h100:")
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{nodes}", target_config=H100
    )
    return np.array(topology.devices)


if __name__ == "__main__":
    ahead_of_time.main(
        SLICES,
        describe,
        ahead_of_time.RESULTS / "gpu_cost.json",
        efforts=[0.0],
        head=GPU_HEAD,
    )

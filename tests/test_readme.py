"""Every Python block of the README runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_readme_has_its_blocks():
    assert len(BLOCKS) >= 5
    assert README.index("python examples/finetune_t5.py") < README.index("&& pytest")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(block):
    if "jax_num_cpu_devices" not in block:
        exec(compile(block, "README.md", "exec"), {})
        return
    # It chooses its devices itself, so it needs a process of its own.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-W", "error", "-c", block], env=env, check=True, timeout=120)

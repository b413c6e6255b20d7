"""Every Python block of the README and of the documentation runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


README = blocks_of(ROOT / "README.md")
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if blocks_of(page)]


def test_the_readme_has_its_blocks():
    assert len(README) >= 5
    text = (ROOT / "README.md").read_text()
    assert text.index("python examples/finetune_t5.py") < text.index("&& pytest")


@pytest.mark.parametrize("block", README, ids=range(len(README)))
def test_block_of_the_readme(block):
    if "jax_num_cpu_devices" not in block:
        exec(compile(block, "README.md", "exec"), {})
        return
    run_in_its_own_process(block)


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_page(page):
    """The blocks of a page follow one another, so they share their names."""
    blocks = blocks_of(page)
    if any("jax_num_cpu_devices" in block for block in blocks):
        run_in_its_own_process("\n".join(blocks))
        return
    names = {}
    with jax.numpy_rank_promotion("allow"):  # the default; Flax promotes
        for block in blocks:
            exec(compile(block, page.name, "exec"), names)


def run_in_its_own_process(code):
    """For code that chooses its devices itself."""
    env = os.environ | {"XLA_FLAGS": re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"])}
    warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache"]
    subprocess.run([sys.executable, *warnings, "-c", code], env=env, check=True, timeout=120)

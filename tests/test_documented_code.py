"""Every Python block of the README and of the documentation runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


README = blocks_of(ROOT / "README.md")


def test_the_readme_has_its_blocks():
    assert len(README) >= 5
    text = (ROOT / "README.md").read_text()
    assert text.index("python examples/finetune_t5.py") < text.index("&& pytest")


@pytest.mark.parametrize("block", README, ids=range(len(README)))
def test_block_of_the_readme(block):
    if "jax_num_cpu_devices" not in block:
        exec(compile(block, "README.md", "exec"), {})
        return
    # It chooses its devices itself, so it needs a process of its own.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-W", "error", "-c", block], env=env, check=True, timeout=120)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_page(page):
    """The blocks of a page follow one another, so they share their names."""
    names = {}
    for block in blocks_of(page):
        exec(compile(block, page.name, "exec"), names)

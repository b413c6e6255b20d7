"""The documentation's pages against the repository, without Sphinx: names, links and headings."""

import ast
import re
from pathlib import Path

import pytest

import sam_optax

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("*/results/*.md")),
]
FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:`[^`]*`|[^\[\]`])*\]\(([^()\s]+)\)")
AUTODOC = re.compile(r"^\.\. (?:auto(?:function|class)|py:data):: sam_optax\.(\S+)$", re.MULTILINE)


def prose(page):
    return FENCE.sub("", page.read_text())


def headings(page):
    """The anchors that GitHub and MyST give to headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_api_page_lists_what_is_public():
    public = set(sam_optax.__all__) - {"sharpness"}
    listed = AUTODOC.findall((DOCS / "api.md").read_text())
    assert len(listed) == len(set(listed))
    assert {name for name in listed if "." not in name} == public


def test_the_api_page_lists_the_other_modules():
    public = {"t5x_trainer.SharpnessAwareTrainer"}
    for module in ("sharpness", "tasks"):  # read, not imported: `tasks` needs SeqIO
        text = (ROOT / "sam_optax" / module / "__init__.py").read_text()
        names = re.search(r"^__all__ = (\[[^\]]*\])$", text, re.MULTILINE)
        assert names is not None
        public |= {f"{module}.{name}" for name in ast.literal_eval(names[1])}
    listed = {name for name in AUTODOC.findall((DOCS / "api.md").read_text()) if "." in name}
    assert listed == public


def test_every_page_is_in_the_table_of_contents():
    text = (DOCS / "index.md").read_text()
    listed = set()
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                pattern = line.partition("<")[2].rstrip(">") or line
                found = set(DOCS.glob(f"{pattern}.md"))
                assert found, f"no page {pattern}"
                listed |= found
    assert listed == set(PAGES) - {DOCS / "index.md"}


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert file.suffix != ".md" or prose(file).strip(), f"{target}: on GitHub nothing is there"
        if anchor:
            assert anchor in headings(file), target

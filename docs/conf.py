"""Sphinx's settings. `python -m sphinx -W --keep-going -n -b html docs OUT` builds the site.

The build needs no network, so there is no intersphinx: names of other packages are not links.
"""

import ast
import os
import re
import textwrap
from importlib import metadata
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.ext.autodoc.mock import _MockObject
from sphinx.util import inspect

import sam_optax

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

project = "sam_optax"
author = "The sam_optax authors"
copyright = author
release = version = metadata.version("sam_optax")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"sam_optax {release}"
html_show_copyright = False
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # links to headings, as on GitHub
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# What `t5x_trainer` and `tasks` import; nobody has to install it to build this site.
autodoc_mock_imports = ["flax", "seqio", "t5x", "tensorflow"]
_MockObject.__or__ = lambda self, other: self  # for annotations such as `seqio.ShardInfo | None`
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False

# Types of Python and of other packages, in signatures; the head of this file says why.
nitpick_ignore_regex = [("py:class", r"(collections|jax|numpy|optax)\..*")]

# Files of the repository that are pages here, too.
_PAGES = {
    "CHANGELOG.md": "changelog",
    "benchmarks/README.md": "evidence/benchmarks",
    "benchmarks/results/gpu_cost.md": "evidence/gpu_cost",
    "benchmarks/results/paper_questions.md": "evidence/paper_questions",
    "benchmarks/results/t5x_tpu_cost.md": "evidence/t5x_tpu_cost",
    "benchmarks/results/tpu_cost.md": "evidence/tpu_cost",
    "examples/README.md": "evidence/finetuning",
    "t5x_configs/README.md": "how_to/t5x_configs",
}

# The README is no page; these are where its sections are.
_SECTIONS_OF_THE_README = {
    "": "index",
    "settings": "settings",
    "on-a-mesh": "meshes",
    "in-t5x": "how_to/t5x",
    "what-a-step-tells": "how_to/diagnostics",
    "when-it-helps-and-what-it-costs": "evidence",
    "how-it-differs-from-optaxcontribsam": "moving_over",
}

_INCLUDE = re.compile(
    r"^```\{include\} (\S+)\n((?::(?:start-after|end-before): .*\n)*)```$", re.MULTILINE
)
_FENCE_LINK_OR_CODE = re.compile(
    r"^(?P<ticks>```+).*?^(?P=ticks)$"
    r"|(?P<image>!?)\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>[^()\s]+)\)"
    r"|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)


def _with_links_of_the_site(text: str, folder: Path, page: str) -> str:
    """Return Markdown whose relative links, right in `folder`, are right on `page` of the site."""

    def replace(match: re.Match) -> str:
        target = match["target"]
        if target is None or re.match(r"\w+:", target):
            return match[0]
        if match["image"]:
            here = os.path.relpath((folder / target).resolve(), (DOCS / page).parent)
            return f"![{match['text']}]({Path(here).as_posix()})"
        new = _target(target, folder, page)
        return f"[{match['text']}]({new})" if new else match["text"]

    return _FENCE_LINK_OR_CODE.sub(replace, text)


def _target(target: str, folder: Path, page: str) -> str | None:
    """Return where a link leads on the site: to a page, or to a file to download."""
    path, _, anchor = target.partition("#")
    if not path and folder != ROOT:
        return target  # a heading of the page itself
    file = (folder / path).resolve() if path else ROOT / "README.md"
    if not file.is_relative_to(ROOT) or not file.exists():
        raise ExtensionError(f"{page}: the link {target} leads nowhere from {folder}.")
    if file.is_dir():
        return None  # a folder is no page, so only the words are left
    name = file.relative_to(ROOT).as_posix()
    if name == "README.md":
        if anchor not in _SECTIONS_OF_THE_README:
            raise ExtensionError(f"{page}: docs/conf.py does not say where {target} is here.")
        file, anchor = DOCS / f"{_SECTIONS_OF_THE_README[anchor]}.md", ""
    elif name in _PAGES:
        file = DOCS / f"{_PAGES[name]}.md"
    relative = Path(os.path.relpath(file, (DOCS / page).parent)).as_posix()
    return f"{relative}#{anchor}" if anchor else relative


def _expand_source(app, docname: str, source: list[str]) -> None:
    """Put the included files into a page, and make all links lead to pages."""
    page = DOCS / f"{docname}.md"

    def included(match: re.Match) -> str:
        file = (page.parent / match[1]).resolve()
        text = file.read_text()
        for name, value in re.findall(r":(\S+): (.*)", match[2]):
            before, found, after = text.partition(ast.literal_eval(value))
            if not found:
                raise ExtensionError(f"{docname}: {match[1]} does not contain {value}.")
            text = {"start-after": after, "end-before": before}[name]
        app.env.note_dependency(str(file))
        return _with_links_of_the_site(text.strip("\n"), file.parent, docname)

    parts, end = [], 0
    for match in _INCLUDE.finditer(source[0]):
        parts += [_with_links_of_the_site(source[0][end : match.start()], page.parent, docname)]
        parts += [included(match)]
        end = match.end()
    parts += [_with_links_of_the_site(source[0][end:], page.parent, docname)]
    source[0] = "".join(parts)


_PUBLIC = set(sam_optax.__all__)
_BACKTICKS = re.compile(r"(?P<link>`[^`]+ <\S+>`)_|(?<![`:])`(?P<code>[^`]+)`(?![`_])")
_FIRST_SECTION = re.compile(r"^(?:Args|Attributes|Example|Raises|Returns)::?$", re.MULTILINE)
_ENTRY = re.compile(r"^  (\S[^:\n]*): ", re.MULTILINE)
_TABLE = re.compile(r"\|(?P<header>.*)\|\n\|[-|]+\|\n(?P<rows>(?:\|.*\|(?:\n|$))+)")


def _as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, whose words are set as in Markdown."""

    def inline(match: re.Match) -> str:
        if match["link"]:
            return f"{match['link']}__"
        code = match["code"]
        return f":py:obj:`~sam_optax.{code}`" if code in _PUBLIC else f"``{code}``"

    text = _BACKTICKS.sub(inline, "\n".join(lines))
    # Napoleon takes the words before a colon in the first line for a type; so that is an empty one.
    text = re.sub(r"^Returns:\n", "Returns:\n  \\\\\n", text, flags=re.MULTILINE)
    first = _FIRST_SECTION.search(text)
    head, sections = (text[: first.start()], text[first.start() :]) if first else (text, "")
    paragraphs = []
    for paragraph in head.split("\n\n"):
        if _ENTRY.match(paragraph):
            paragraph = textwrap.dedent(_ENTRY.sub(r"  * ``\1``: ", paragraph))
        elif paragraph.startswith("  "):
            paragraph = f".. code-block:: text\n\n{paragraph}"
        elif table := _TABLE.fullmatch(paragraph):
            rows = [f"  {row.strip('|')}" for row in table["rows"].splitlines()]
            head = [".. csv-table::", f"  :header: {table['header']}", "  :delim: |", ""]
            paragraph = "\n".join([*head, *rows])
        paragraphs.append(paragraph)
    lines[:] = ("\n\n".join(paragraphs) + sections).split("\n")


def _signature(app, what, name, obj, options, signature: str, result: str):
    """Correct the signatures of two classes, which autodoc takes from their bases."""
    if obj is sam_optax.Perturbation:
        return "", ""
    if name.endswith(".SharpnessAwareTrainer"):
        # Without types, half of which are T5X's.
        init = inspect.signature(obj.__init__, bound_method=True)
        return inspect.stringify_signature(init, show_annotation=False), ""
    return signature, result


def setup(app):
    """Connect."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _expand_source)
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)

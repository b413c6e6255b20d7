"""What a `config.gin` says, read as text: without gin, and without what it configures."""

import ast
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Bindings = Mapping[str, str]
"""What is bound by name, as text. A macro's name has no dot."""

_BINDING = re.compile(r"^([\w./]+) = (.*(?:\n[ \t]+.*)*)", re.MULTILINE)
# What `python -m t5x.main` calls `train.train` is `train_script.train` to `python -m t5x.train`.
_ONE_NAME = functools.partial(re.compile(r"^train\.train(?=\.)").sub, "train_script.train")
_MACRO = re.compile(r"%([\w./]+)")
_NESTED = 50  # macros of macros; more is a circle
_LONGEST = 1_000_000  # letters of a value with macros in it; more is one that grows


def read(directory: Path, warn: Callable[[str], None]) -> dict[str, str]:
    """Return the bindings that the run in a folder left; none of them if it has no `config.gin`."""
    file = directory / "config.gin"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        warn(f"{file}: not readable ({error.strerror}); the run goes by its folder's name.")
        return {}
    bindings = parse(text)
    if not bindings:
        warn(f"{file}: no settings in it; the run goes by its folder's name.")
    elif not text.endswith("\n"):
        warn(f"{file}: ends in the middle of a line; what is cut off of its settings is not known.")
    elif not ending(bindings, "trainer_cls") and "CHECKPOINT_PATH" not in bindings:
        warn(f"{file}: does not say which trainer it is of; the run goes by its folder's name.")
    return bindings


def parse(text: str) -> dict[str, str]:
    r"""Return the bindings of a gin file that gin itself wrote, values as text.

    >>> parse("# Macros:\nRHO = 0.15\nPATH = \\\n    'a/b'\nt5x_trainer.Trainer.rho = %RHO")
    {'RHO': '0.15', 'PATH': "'a/b'", 't5x_trainer.Trainer.rho': '%RHO'}
    """
    unwrapped = re.sub(r"\\\n\s*", "", text)
    return {_ONE_NAME(name): value.strip() for name, value in _BINDING.findall(unwrapped)}


def resolved(bindings: Bindings) -> dict[str, str]:
    """Return the bindings with macros' values in the place of their names.

    So it is told as the same whether a run was given a macro or the parameter itself, and 1 and
    1.0 are, too. A macro that nothing here refers to stays.

    >>> resolved({"RHO": "1.0", "OTHER": "2", "Trainer.rho": "%RHO"})
    {'OTHER': '2', 'Trainer.rho': '1'}
    """
    used = {macro for text in bindings.values() for macro in _MACRO.findall(text)}
    return {
        name: _normal(_without_macros(text, bindings))
        for name, text in bindings.items()
        if name not in used
    }


def macros(bindings: Bindings) -> dict[str, str]:
    """Return the macro that a parameter is bound to, by the parameter's name."""
    found = {name: _MACRO.fullmatch(text) for name, text in bindings.items() if "." in name}
    return {name: macro[1] for name, macro in found.items() if macro and macro[1] in bindings}


def value(bindings: Bindings, name: str) -> Any:
    """Return a binding's value, through macros; what is no Python literal stays text."""
    if name not in bindings:
        return None
    text = _without_macros(bindings[name], bindings)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def ending(bindings: Bindings, parameter: str) -> list[str]:
    """Return the names of the bindings of a parameter, whatever its module and scope."""
    return [name for name in bindings if ("." + name).endswith("." + parameter)]


def _without_macros(text: str, bindings: Bindings) -> str:
    for _ in range(_NESTED):
        before, text = text, _MACRO.sub(lambda m: bindings.get(m[1], m[0]), text)
        if text == before or len(text) > _LONGEST:
            break
    return text


def _normal(text: str) -> str:
    """Return a literal, and the numbers in it, as the shortest that is equal to it."""
    try:
        return repr(_shortest(ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def _shortest(literal: Any) -> Any:
    if isinstance(literal, float) and literal.is_integer():
        return int(literal)
    if isinstance(literal, dict):
        return {_shortest(key): _shortest(item) for key, item in literal.items()}
    if isinstance(literal, list | tuple):
        return type(literal)(map(_shortest, literal))
    return literal

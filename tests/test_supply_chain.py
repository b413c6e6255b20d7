"""No module of the library unpickles, or runs what it reads."""

import ast
from pathlib import Path

import pytest

import sam_optax

MODULES = sorted(Path(sam_optax.__file__).parent.rglob("*.py"))
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("builtins", "code", "codeop", "runpy", "subprocess", "pty", "yaml"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile", "system", "popen"}


def violations(source):
    """What in `source` unpickles or evaluates, as (line, name)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if is_forbidden(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, node.module)] * (not node.level and is_forbidden(node.module))
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            found.append((node.lineno, node.id))  # called, or handed on to be called
        elif isinstance(node, ast.Call):
            found += [(node.lineno, name) for name in forbidden_in_call(node)]
    return found


def is_forbidden(module):
    return module.split(".")[0] in FORBIDDEN_MODULES


def forbidden_in_call(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if isinstance(call.func, ast.Attribute) and name in FORBIDDEN_CALLS - {"compile"}:
        yield name
    if name == "import_module" and not all(isinstance(arg, ast.Constant) for arg in call.args):
        yield name
    if name == "import_module" and call.args and isinstance(call.args[0], ast.Constant):
        yield from [call.args[0].value] * is_forbidden(str(call.args[0].value))
    for keyword in call.keywords:
        if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True):
            yield keyword.arg


def test_no_module_unpickles_or_evaluates():
    assert {"_step.py", "t5x_trainer.py", "settings.py"} <= {path.name for path in MODULES}
    found = {path.name: violations(path.read_text()) for path in MODULES}
    assert not {name: where for name, where in found.items() if where}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, cloudpickle as c",
        "from pickle import loads",
        "from joblib.externals import loky",
        "eval(x)",
        "def f(x): exec(x, {})",
        "g = eval",
        "map(exec, lines)",
        "builtins.eval(x)",
        "frame.eval(x)",
        "compile(x, '', 'exec')",
        "__import__(x)",
        "importlib.import_module(name)",
        "importlib.import_module('pickle')",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "os.system(x)",
        "import subprocess",
    ],
)
def test_what_is_found(source):
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "ast.literal_eval(x)",
        "jax.eval_shape(f)",
        "re.compile(x)",
        "json.loads(x)",
        "importlib.import_module('t5.data.mixtures')",
        "np.load(path, allow_pickle=False)",
    ],
)
def test_what_is_not(source):
    assert not violations(source)

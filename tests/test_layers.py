"""The import rule and the house rules, read from the source; and that the reader itself works."""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "jaxunlearn"

# importer: what it may import. Whatever those may import, it may import too.
BASE = ("types", "tree", "errors", "progress")
ARROWS = {
    "types": (),
    "tree": (),
    "errors": (),
    "progress": (),
    "kernels": BASE,
    "transforms": ("kernels",),
    "records": ("kernels",),
    "accounting": BASE,
    "certificates": ("accounting",),
    "unlearners": ("transforms", "records", "certificates"),
    "ledger": ("certificates",),
    "planning": ("unlearners",),
    "adapters": ("planning",),
    "audits": ("kernels", "accounting"),
    "datasets": ("errors",),
}
UNBOUND = ("", "cli", "__main__")  # the package's own __init__, and the command line

OPTIONAL = ("scipy.stats", "sklearn", "dp_accounting", "matplotlib", "flax", "orbax", "rich")
TOP_LEVEL_EXCEPTIONS = {
    ("adapters.nnx", "flax"),
    ("adapters.linen", "flax"),
    ("cli.picture", "matplotlib"),
}
PRIVATE = ("jax._src", "optax._src", "flax._src", "jax.core", "jax.interpreters")
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
NETWORK = ("socket", "urllib.request", "http", "ftplib", "requests", "httpx", "aiohttp")

# A named algorithm of a paper may be longer: "module.function": its lines.
MAX_FUNCTION_LINES, LONG_FUNCTIONS = 60, {}
MAX_MODULE_LINES, LONG_MODULES = 399, {}

MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:work|root|farm)/\w|/tmp/v3\d")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".json", ".ipynb", ".txt", ""}


class Module(NamedTuple):
    """A source file: `name` is "kernels.products", or "kernels" for a package's __init__."""

    name: str
    is_package: bool
    source: str

    @property
    def part(self) -> str:
        return self.name.split(".")[0]


class Import(NamedTuple):
    target: str  # "jaxunlearn.kernels.hvp": with the name, which may itself be a module
    line: int
    top_level: bool  # runs when the module is imported
    typing_only: bool


def package_modules() -> list[Module]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, is_package, path.read_text(encoding="utf-8")))
    return modules


MODULES = package_modules()


def may_import(part: str) -> set[str]:
    """Everything that stands below `part`, by following the arrows down."""
    below = set(ARROWS[part])
    for lower in ARROWS[part]:
        below |= may_import(lower)
    return below


def imports(module: Module) -> Iterator[Import]:
    """Every import statement and every `import_module("...")` of a module."""
    yield from _imports(ast.parse(module.source), module, top_level=True, typing_only=False)


def _imports(node, module, *, top_level, typing_only):
    for target in _targets(node, module):
        yield Import(target, node.lineno, top_level, typing_only)
    inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    type_checking = isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING")
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _imports(
                    child,
                    module,
                    top_level=top_level and not inside_function,
                    typing_only=typing_only or (type_checking and field == "body"),
                )


def _targets(node, module) -> list[str]:
    """Dotted names that a node imports; empty for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = ["jaxunlearn", *module.name.split(".")] if module.name else ["jaxunlearn"]
            up = node.level - (1 if module.is_package else 0)
            base = ".".join(package[: len(package) - up] + ([base] if base else []))
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in (
        "import_module",
        "__import__",
    ):
        names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        return [name for name in names if isinstance(name, str)]
    return []


def _dotted(node) -> str:
    """ "a.b.c" of a name or of attributes of a name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = _dotted(node.value)
        return f"{value}.{node.attr}" if value else ""
    return ""


def within(target: str, names) -> str | None:
    """The first of `names` that `target` is, or stands in."""
    return next((name for name in names if f"{target}.".startswith(f"{name}.")), None)


def layer_violations(module: Module) -> list[str]:
    found = []
    for item in imports(module):
        parts = item.target.split(".")
        if parts[0] != "jaxunlearn" or item.typing_only or module.part in UNBOUND:
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target not in ARROWS:
            found.append(f"line {item.line}: {item.target} is not an address inside the package")
        elif target == module.part == "unlearners" and not _is_own(parts, module):
            found.append(f"line {item.line}: methods in unlearners/ do not import one another")
        elif target != module.part and target not in may_import(module.part):
            found.append(f"line {item.line}: {module.part} must not import {target}")
    return found


def _is_own(parts: list[str], module: Module) -> bool:
    """Whether a method imports from its own package; unlearners/__init__ may import from all."""
    return module.name == "unlearners" or parts[2:3] == module.name.split(".")[1:2]


def foreign_violations(module: Module) -> list[str]:
    found = []
    for item in imports(module):
        for names, why in ((PRIVATE, "private"), (PICKLES, "pickle"), (NETWORK, "network")):
            if name := within(item.target, names):
                found.append(f"line {item.line}: {name} ({why})")
        if module.part == "kernels" and within(item.target, ["optax"]) and not item.typing_only:
            found.append(f"line {item.line}: kernels must not import optax")
        if module.part == "datasets" and within(item.target, ["jax", "optax"]):
            found.append(f"line {item.line}: datasets are NumPy only")
        name = within(item.target, OPTIONAL)
        eager = item.top_level and not item.typing_only
        if name and eager and (module.name, name) not in TOP_LEVEL_EXCEPTIONS:
            found.append(f"line {item.line}: {name} is optional: import it where it is used")
    for node in ast.walk(ast.parse(module.source)):
        if isinstance(node, ast.Attribute) and _dotted(node) in PRIVATE:
            found.append(f"line {node.lineno}: {_dotted(node)} (private)")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            value = getattr(node.value, "value", None)
            if value is not False:
                found.append(f"line {node.value.lineno}: allow_pickle (pickle)")
    return found


def function_lines(source: str) -> dict[str, int]:
    """Lines of each function's body, without its docstring and the functions nested in it."""
    lines = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    lines[name] = len(_own_lines(child))
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(source), "")
    return lines


def _own_lines(function) -> set[int]:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return set()
    own = set(range(body[0].lineno, function.end_lineno + 1))
    for node in ast.walk(function):
        if node is not function and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            own -= set(range(first, node.end_lineno + 1))
    return own


def repository_texts() -> Iterator[pathlib.Path]:
    """The text files a reader of the repository sees."""
    folders = ("jaxunlearn", "tests", "benchmarks", "docs", "notebooks", ".ci", ".github")
    candidates = [path for path in REPOSITORY.iterdir() if path.is_file()]
    for folder in folders:
        candidates += (REPOSITORY / folder).rglob("*")
    for path in sorted(candidates):
        hidden = path.name.startswith(".") or "__pycache__" in path.parts
        if path.is_file() and not hidden and path.suffix in TEXT_SUFFIXES:
            yield path


def by_name(modules):
    return pytest.mark.parametrize(
        "module", modules, ids=[f"jaxunlearn.{module.name}".rstrip(".") for module in modules]
    )


# The house stands.


@by_name(MODULES)
def test_imports_go_one_way(module):
    assert module.part in ARROWS or module.part in UNBOUND, "a new part needs a place in the rule"
    assert layer_violations(module) == []


@by_name(MODULES)
def test_nothing_private_optional_pickled_or_networked_is_imported(module):
    assert foreign_violations(module) == []


@by_name(MODULES)
def test_functions_and_modules_stay_small(module):
    num_lines = len(module.source.splitlines())
    assert num_lines <= LONG_MODULES.get(module.name, MAX_MODULE_LINES)
    for name, length in function_lines(module.source).items():
        limit = LONG_FUNCTIONS.get(f"{module.name}.{name}", MAX_FUNCTION_LINES)
        assert length <= limit, f"{name} has {length} lines"


def test_the_lists_of_exceptions_hold_nothing_that_is_no_exception():
    modules = {module.name: module for module in MODULES}
    for name in LONG_MODULES:
        assert len(modules[name].source.splitlines()) > MAX_MODULE_LINES
    lengths = {
        f"{module.name}.{name}": length
        for module in MODULES
        for name, length in function_lines(module.source).items()
    }
    for name in LONG_FUNCTIONS:
        assert lengths[name] > MAX_FUNCTION_LINES


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    paths = list(repository_texts())
    assert PACKAGE / "types.py" in paths
    for path in paths:
        found = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(REPOSITORY)}: {found.group(0)}"


def test_importing_the_library_loads_no_optional_package():
    program = (
        f"import sys, jaxunlearn\nprint([name for name in {OPTIONAL!r} if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# The reader reads.


def test_arrows_are_followed_all_the_way_down():
    assert may_import("datasets") == {"errors"}
    assert may_import("kernels") == set(BASE)
    assert may_import("records") == may_import("transforms") == {*BASE, "kernels"}
    assert may_import("audits") == {*BASE, "kernels", "accounting"}
    assert may_import("ledger") == {*BASE, "accounting", "certificates"}
    middle = {*BASE, "kernels", "transforms", "records", "accounting", "certificates"}
    assert may_import("unlearners") == middle
    assert may_import("adapters") == {*middle, "unlearners", "planning"}


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "kernels.products",
            "from jaxunlearn.records import log",
            "kernels must not import records",
        ),
        ("kernels", "from jaxunlearn import records", "kernels must not import records"),
        ("kernels.products", "from .. import records", "kernels must not import records"),
        ("kernels.products", "from ..records.log import Log", "kernels must not import records"),
        ("records.log", "import jaxunlearn.transforms", "records must not import transforms"),
        (
            "audits.attack",
            "import jaxunlearn.unlearners.replay",
            "audits must not import unlearners",
        ),
        ("datasets.loaders", "from jaxunlearn.types import Data", "datasets must not import types"),
        ("types", "from jaxunlearn.kernels import hvp", "types must not import kernels"),
        ("tree", "import jaxunlearn.types", "tree must not import types"),
        (
            "certificates",
            "from jaxunlearn.kernels import hvp",
            "certificates must not import kernels",
        ),
        ("ledger.book", "import jaxunlearn.unlearners", "ledger must not import unlearners"),
        (
            "unlearners.newton",
            "from jaxunlearn.unlearners import replay",
            "do not import one another",
        ),
        ("unlearners.newton", "from .replay import oracle", "do not import one another"),
        (
            "unlearners.newton._iterates",
            "from jaxunlearn.unlearners.recollect._units import Units",
            "do not import one another",
        ),
        ("records.log", "from jaxunlearn import Unlearner", "not an address"),
        ("records.log", "import jaxunlearn", "not an address"),
        ("records.log", "def f():\n  from jaxunlearn import audits", "line 2: records must not"),
        ("records.log", "import importlib\nimportlib.import_module('jaxunlearn.cli')", "not an"),
        ("records.log", "if TYPE_CHECKING:\n  pass\nelse:\n  import jaxunlearn.ledger", "line 4"),
    ],
)
def test_an_import_against_the_arrows_is_reported(name, source, message):
    violations = layer_violations(Module(name, "." not in name, source))
    assert len(violations) == 1
    assert message in violations[0]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("tree", "import jax._src.core", "jax._src (private)"),
        ("tree", "from jax import core", "jax.core (private)"),
        ("tree", "from jax.interpreters import ad", "jax.interpreters (private)"),
        ("tree", "from optax._src import base", "optax._src (private)"),
        ("tree", "import jax\njax.core.Tracer", "line 2: jax.core (private)"),
        ("tree", "import jax\ndef f(): return jax._src.core.Jaxpr", "line 2: jax._src (private)"),
        ("tree", "if TYPE_CHECKING:\n  from jax.core import Tracer", "jax.core (private)"),
        ("ledger.book", "def f():\n  import pickle", "pickle (pickle)"),
        ("ledger.book", "from joblib import dump", "joblib (pickle)"),
        ("ledger.book", "np.load(path, allow_pickle=True)", "allow_pickle (pickle)"),
        ("ledger.book", "np.load(path, allow_pickle=trusted)", "allow_pickle (pickle)"),
        ("datasets.loaders", "from urllib import request", "urllib.request (network)"),
        ("datasets.loaders", "import jax.numpy as jnp", "NumPy only"),
        ("kernels.products", "import optax", "kernels must not import optax"),
        ("kernels.products", "def f():\n  from optax import tree", "kernels must not import optax"),
        ("accounting", "from scipy import stats", "scipy.stats is optional"),
        ("accounting", "import scipy.stats", "scipy.stats is optional"),
        ("adapters.nnx", "from matplotlib import pyplot", "matplotlib is optional"),
        ("adapters.orbax", "import flax", "flax is optional"),
        ("cli", "try:\n  import rich\nexcept ImportError:\n  rich = None", "rich is optional"),
        ("cli", "class A:\n  import sklearn", "sklearn is optional"),
        ("", "import flax.nnx", "flax is optional"),
    ],
)
def test_a_forbidden_foreign_import_is_reported(name, source, message):
    violations = foreign_violations(Module(name, "." not in name, source))
    assert len(violations) == 1
    assert message in violations[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels.products", "from jaxunlearn import tree\nfrom jaxunlearn.kernels import rowwise"),
        ("kernels.products", "from . import rowwise\nfrom ..types import Params"),
        ("kernels.products", "import jax.extend.core\nfrom jax.extend.core import primitives"),
        ("types", "if TYPE_CHECKING:\n  from jaxunlearn.certificates import Certificate"),
        ("types", "import typing\nif typing.TYPE_CHECKING:\n  import flax"),
        ("unlearners", "from jaxunlearn.unlearners.replay import replay"),
        ("unlearners.newton", "from jaxunlearn import accounting, certificates, kernels, records"),
        (
            "unlearners.newton._iterates",
            "from jaxunlearn.unlearners.newton._parts import Part\nfrom ._parts import Part",
        ),
        ("adapters.nnx", "from flax import nnx\nimport jaxunlearn.unlearners, jaxunlearn.types"),
        ("adapters.linen", "import flax.linen as nn"),
        ("audits.attack", "def f():\n  from sklearn import linear_model"),
        ("accounting", "import scipy.special\ndef f():\n  import scipy.stats"),
        ("cli", "import jaxunlearn\nfrom jaxunlearn import audits, datasets, unlearners"),
        ("datasets.files", "import numpy as np\nnp.load('a', allow_pickle=False)"),
    ],
)
def test_an_import_along_the_arrows_is_not_reported(name, source):
    module = Module(name, "." not in name, source)
    assert layer_violations(module) + foreign_violations(module) == []


def test_a_function_is_as_long_as_its_own_body():
    source = (
        "def outer(a,\n          b):\n"
        '    """One line.\n\n    More.\n    """\n'
        "    @decorate\n    def inner():\n        x = 1\n        return x\n"
        "    return inner\n"
        "class A:\n    def method(self):\n        return 1\n"
        "def bare():\n    '''Only this.'''\n"
    )
    assert function_lines(source) == {"outer": 1, "outer.inner": 2, "A.method": 1, "bare": 0}


@pytest.mark.parametrize("text", ["see /wo" + "rk/main", '"/ro' + 'ot/x"', "=/fa" + "rm/a"])
def test_a_machine_path_is_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["https://a.org/wo" + "rk/x", "~/wo" + "rk/x", "frame/wo" + "rk/x"]
)
def test_an_address_or_a_relative_path_is_not_a_machine_path(text):
    assert not MACHINE_PATH.search(text)

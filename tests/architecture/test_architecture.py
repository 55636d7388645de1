"""Rules of the source tree that no single test of behaviour would notice."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import esscher
from esscher import experiment, registry
from esscher.runtime import device

SRC = Path(esscher.__file__).parent
ROOT = SRC.parent.parent
FILES = sorted(SRC.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def test_import_contracts_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken" in done.stdout and " 0 broken" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_module_imports(path: Path) -> None:
    importlib.import_module(module_name(path))


# ---- every setting is read


def dataclass_fields(tree: ast.Module, name: str) -> list[str]:
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]


def attributes_read(tree: ast.Module) -> set[str]:
    """Names of attributes that are read, but not by a check of the settings themselves."""

    class Reader(ast.NodeVisitor):
        def __init__(self) -> None:
            self.found: set[str] = set()

        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            if node.name != "__post_init__":
                self.generic_visit(node)

        def visit_Attribute(self, node: ast.Attribute) -> None:
            if isinstance(node.ctx, ast.Load):
                self.found.add(node.attr)
            self.generic_visit(node)

    reader = Reader()
    reader.visit(tree)
    return reader.found


@pytest.mark.parametrize("slug", registry.catalogue())
def test_method_reads_every_setting(slug: str) -> None:
    tree = TREES[registry.find(slug).path]
    fields = dataclass_fields(tree, "Config")
    assert fields
    assert set(fields) - attributes_read(tree) == set()


@pytest.mark.parametrize("slug", sorted(registry.catalogue()))
def test_the_first_line_of_a_method_is_a_sentence(slug: str) -> None:
    """The card leaves it out, so that what follows must begin anew."""
    text = registry.find(slug).path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    first, second, *_ = docstring.split("\n")
    assert first.endswith(".") and not second


def test_every_setting_of_an_experiment_is_read() -> None:
    read = set().union(*map(attributes_read, TREES.values()))
    for module in (experiment, device):
        tree = TREES[Path(module.__file__)]
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.decorator_list:
                fields = dataclass_fields(tree, node.name)
                assert fields
                assert set(fields) - read == set(), node.name


def test_the_check_for_unread_settings_sees_one() -> None:
    tree = ast.parse(
        "class Config:\n"
        "    used: int = 1\n"
        "    forgotten: int = 2\n"
        "    def __post_init__(self): require(self.forgotten)\n"
        "def update(cfg): return cfg.used\n"
    )
    assert set(dataclass_fields(tree, "Config")) - attributes_read(tree) == {"forgotten"}


# ---- randomness comes from seeded counters


ALLOWED_NUMPY_RANDOM = {"Generator", "default_rng", "SeedSequence", "PCG64", "BitGenerator"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def global_randomness(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, a.name) for a in node.names if a.name.split(".")[0] == "random"]
            found += [(node, a.name) for a in node.names if a.name == "numpy.random"]
        elif isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            names = {alias.name for alias in node.names}
            if node.module == "random" or names - ALLOWED_NUMPY_RANDOM:
                found.append((node, str(node.module)))
        elif isinstance(node, ast.ImportFrom) and node.module == "numpy":
            found += [(node, "numpy.random") for a in node.names if a.name == "random"]
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            parts = name.split(".")
            if len(parts) >= 3 and parts[0] in ("np", "numpy") and parts[1] == "random":
                if parts[2] not in ALLOWED_NUMPY_RANDOM:
                    found.append((node, name))
            if name in ("torch.manual_seed", "torch.random.manual_seed", "torch.seed"):
                found.append((node, name))
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_global_random_state(path: Path) -> None:
    assert [(place(path, n), what) for n, what in global_randomness(TREES[path])] == []


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import choice",
        "import numpy as np\nnp.random.seed(0)",
        "import numpy as np\nx = np.random.rand(3)",
        "from numpy.random import rand",
        "from numpy import random",
        "import torch\ntorch.manual_seed(0)",
    ],
)
def test_the_check_for_global_random_state_sees_one(source: str) -> None:
    assert global_randomness(ast.parse(source))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_annotations_are_real_objects(path: Path) -> None:
    """The run-time checks read annotations, which this import would turn into strings."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            assert "annotations" not in {alias.name for alias in node.names}


# ---- a light start


@pytest.mark.parametrize(
    "statement",
    ["import esscher", "import esscher.registry; assert 'sac' in esscher.registry.catalogue()"],
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    heavy = ("torch", "numpy", "scipy", "gymnasium", "matplotlib", "tyro", "rich", "jaxtyping")
    check = f"{statement}; import sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

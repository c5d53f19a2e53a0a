"""The levels of docs/architecture.md: a package imports only packages on levels below its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from programs import said_by

import bminf

PACKAGE = Path(bminf.__file__).parent
TESTS = Path(__file__).parent
LONG = 60  # lines of a source that has to be found in the tests

# The package of a module is the longest of these that it begins with.
LEVELS = {
    "bminf.errors": 0, "bminf.units": 0, "bminf.layout": 0, "bminf.lazy": 0,
    "bminf.tracing": 0, "bminf.keywords": 0, "bminf.progress": 0,
    "bminf.pages": 0, "bminf.checks": 0,
    "bminf.quantization": 0, "bminf.cuda": 0, "bminf.cpu": 0,
    "bminf.kernels": 0,
    "bminf.ops": 1, "bminf.checkpoint": 1, "bminf.tokenizers": 1,
    "bminf.layers": 2,
    "bminf.arch": 3, "bminf.offload": 3,
    "bminf.engine": 4,
    "bminf.plot": 4,
    "bminf.description": 4,
    "bminf.wrapping": 5, "bminf.models": 5, "bminf.pretrained": 5,
    "bminf.block_list": 6, "bminf.loading": 6, "bminf.saving": 6,
    "bminf.evaluation": 6,
    "bminf": 7,
    "bminf.server": 8,
    "bminf.cli": 9,
    "bminf.__main__": 10,
}  # fmt: skip
# Importable by all.
COMMON = {
    *("bminf.errors", "bminf.units", "bminf.layout", "bminf.lazy", "bminf.tracing"),
    *("bminf.keywords", "bminf.progress", "bminf.pages", "bminf.checks"),
}
MODULES = {
    ".".join(["bminf", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}


def package_of(module: str) -> str:
    return max((package for package in LEVELS if f"{module}.".startswith(f"{package}.")), key=len)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the package"
            assert node.module is not None
            found |= {
                name if name in MODULES else node.module
                for name in (f"{node.module}.{alias.name}" for alias in node.names)
            }
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_packages_below_it(module: str) -> None:
    own = package_of(module)
    for imported in imports_of(MODULES[module]):
        if imported.split(".")[0] != "bminf":
            continue
        other = package_of(imported)
        allowed = other == own or other in COMMON or LEVELS[other] < LEVELS[own]
        assert allowed, f"{module} (level {LEVELS[own]}) imports {imported} (level {LEVELS[other]})"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_cuda_package_imports_cupy(module: str) -> None:
    named = {name.split(".")[0] for name in imports_of(MODULES[module])}
    assert package_of(module) == "bminf.cuda" or not named & {"cupy", "cupyx", "cupy_backends"}


def words_of(path: Path) -> set[str]:
    """Names and strings in the code of a file, without its documentation."""
    tree = ast.parse(path.read_text())
    words = set(imports_of(path))
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if id(node) not in documentation:
            words |= {value for _, value in ast.iter_fields(node) if isinstance(value, str)}
    return words


@pytest.mark.parametrize(
    "module", [name for name in MODULES if package_of(name) == "bminf.checkpoint"]
)
def test_checkpoints_know_no_model(module: str) -> None:
    named = re.compile(r"(?<![a-z])(cpm|glm|gpt|t5|eva(?![a-z]))", re.IGNORECASE)
    assert not {word for word in {module, *words_of(MODULES[module])} if named.search(word)}


def test_only_the_command_line_prints() -> None:
    for module, path in MODULES.items():
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert not prints or package_of(module) == "bminf.cli", module


def modules_after(program: str) -> set[str]:
    return set(said_by(f"{program}\nimport sys; print(*sys.modules)").split())


def test_import_bminf_loads_neither_torch_nor_cupy_nor_transformers() -> None:
    assert not modules_after("import bminf") & {"torch", "cupy", "transformers"}


def test_the_wrapper_loads_neither_cupy_nor_transformers() -> None:
    assert not modules_after("from bminf import wrapper") & {"cupy", "transformers"}


def test_the_public_names_are_these() -> None:
    assert bminf.__all__ == sorted(bminf.__all__)
    for name in bminf.__all__:
        assert getattr(bminf, name).__module__.startswith("bminf.")
    assert bminf.wrapper.__name__ == "wrapper"
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(bminf, "no_such_name")  # noqa: B009


def test_the_tests_of_a_source_are_found_by_its_name() -> None:
    """tests/<package>/test_<source>.py, or the docstring of the file that holds them names it."""
    documentation = {
        path.relative_to(TESTS): ast.get_docstring(ast.parse(path.read_text())) or ""
        for path in TESTS.rglob("test_*.py")
    }
    named = "\n".join(documentation.values())
    sources = [path for path in MODULES.values() if len(path.read_text().splitlines()) > LONG]
    places = [path.relative_to(PACKAGE) for path in sources]
    assert not [
        f"bminf/{place.as_posix()}"
        for place in places
        if place.with_name(f"test_{place.name}") not in documentation
        and f"bminf/{place.as_posix()}" not in named
    ]

"""`python -m tools.code_report [PACKAGE ...]`: size and shape of Python packages.

With the folders of two checkouts (`before/bminf bminf`), the columns of one stand beside those of
the other. `--messages` lists what the code tells its users instead: the text of each error and
warning, so that two commits can be compared with `diff`; `--without-files` leaves out where a text
stands, so that one that only moved does not differ.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
_TELLS = re.compile(r"(\w+(Error|Warning|Remedy)|warn|warning|error|info|debug|exception)")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Graph = dict[str, set[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the report was printed."""
    arguments = _arguments(argv)
    packages = [Package(path) for path in arguments.packages or [ROOT / "bminf"]]
    if not arguments.messages:
        print(table([str(p.path) for p in packages], [measures(p) for p in packages]))
        return 0
    for package in packages:
        print("\n".join(messages(package, has_files=not arguments.without_files)))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.code_report", description=__doc__)
    parser.add_argument("packages", nargs="*", type=Path, metavar="PACKAGE", help="default: bminf")
    parser.add_argument("--messages", action="store_true", help="the texts of errors and warnings")
    parser.add_argument("--without-files", action="store_true", help="messages alone, sorted")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Source:
    """A file.   module: its dotted name; that of a package's __init__.py is the package."""

    path: Path
    module: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def code_lines(self) -> set[int]:
        return code_lines(self.text)


@dataclass(frozen=True)
class Package:
    """All Python files below a folder, sorted by path.   path: the folder, named as the package."""

    path: Path

    @cached_property
    def sources(self) -> list[Source]:
        paths = sorted(self.path.resolve().rglob("*.py"))
        return [Source(path, _module_name(self.path.resolve().parent, path)) for path in paths]


def _module_name(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


# ---- the table -----------------------------------------------------------------------------------


def measures(package: Package) -> dict[str, str]:
    """What the report says of a package: what is measured -> value."""
    sources = package.sources
    functions = [item for source in sources for item in function_lengths(source)]
    lengths = sorted(n for _, n in functions)
    long = [name for name, n in functions if n > 45]
    with_text, public = docstrings(sources)
    share = f"{with_text / max(1, public):.1%}"
    naming = [source for source in sources if "glm" in source.text.lower()]
    own = [source for source in naming if "glm" in source.module.lower()]
    return {
        "files": str(len(sources)),
        "lines": str(sum(len(source.text.splitlines()) for source in sources)),
        "code lines": str(sum(len(source.code_lines) for source in sources)),
        "functions": str(len(lengths)),
        "their code lines, median / p90 / max": _spread(lengths),
        "functions over 45 code lines": ", ".join([str(len(long)), *long]),
        "public names with a docstring": f"{with_text} of {public}, {share}",
        "import cycles, at import": _shown(cycles(imports(sources, is_lazy=False))),
        "import cycles, with imports in functions": _shown(cycles(imports(sources))),
        "import cycles, with TYPE_CHECKING": _shown(cycles(imports(sources, is_typing=True))),
        "files that name GLM": f"{len(naming)}, {len(own)} of them in their own name",
    }


def table(names: Sequence[str], columns: Sequence[dict[str, str]]) -> str:
    """A line for each measure; of two packages, their values side by side."""
    rows = [["", *names], *([key, *(column[key] for column in columns)] for key in columns[0])]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = (
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _spread(lengths: Sequence[int]) -> str:
    if not lengths:
        return "none"
    p90 = lengths[(9 * len(lengths) - 1) // 10]
    return f"{statistics.median(lengths):g} / {p90} / {lengths[-1]}"


def _shown(found: Sequence[Sequence[str]]) -> str:
    """Each cycle by the names of its modules."""
    return "; ".join(" <-> ".join(cycle) for cycle in found) or "none"


# ---- lines ---------------------------------------------------------------------------------------


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: no docstrings, comments or blanks."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    lines.difference_update(_docstring_lines(ast.parse(text)))
    shown = text.splitlines()
    return {number for number in lines if shown[number - 1].strip()}


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Of strings that stand by themselves, also below a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            yield from range(node.lineno, _end(node) + 1)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def function_lengths(source: Source) -> list[tuple[str, int]]:
    """(name, code lines) of each function from its `def` on, without docstring and decorators."""
    return [
        (
            f"{source.module}.{node.name}",
            len(source.code_lines.intersection(range(node.lineno, _end(node) + 1))),
        )
        for node in ast.walk(source.tree)
        if isinstance(node, _FUNCTIONS)
    ]


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


# ---- docstrings ----------------------------------------------------------------------------------


def docstrings(sources: Sequence[Source]) -> tuple[int, int]:
    """(public functions, methods and classes with a docstring, all of them)."""
    found = [
        node for source in sources if _is_public(source.module) for node in _public(source.tree)
    ]
    return sum(ast.get_docstring(node) is not None for node in found), len(found)


def _public(parent: ast.Module | ast.ClassDef) -> Iterator[_Definition]:
    """Those that a user of the module can reach: none inside functions or private classes."""
    for node in parent.body:
        if isinstance(node, _Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def _is_public(module: str) -> bool:
    return not any(part.startswith("_") and part != "__main__" for part in module.split("."))


# ---- imports -------------------------------------------------------------------------------------


def imports(sources: Sequence[Source], is_lazy: bool = True, is_typing: bool = False) -> Graph:
    """Module -> those of the package that it imports.

    is_lazy: also in functions.   is_typing: also under TYPE_CHECKING.
    """
    modules = {source.module for source in sources}
    return {
        source.module: {
            name
            for node in _statements(source.tree, is_lazy, is_typing)
            for name in _imported(node, modules)
            if name != source.module
        }
        for source in sources
    }


def _statements(node: ast.AST, is_lazy: bool, is_typing: bool) -> Iterator[ast.AST]:
    """The import statements below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            if is_typing:
                yield from _statements(child, is_lazy, is_typing)
        elif is_lazy or not isinstance(child, _FUNCTIONS):
            yield from _statements(child, is_lazy, is_typing)


def _imported(node: ast.AST, modules: set[str]) -> Iterator[str]:
    """A package is only counted where a name is taken from it: that a module's package is imported
    before it is no cycle."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if found := next((name for name in (inner, node.module) if name in modules), None):
                yield found


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules each of which imports, in any number of steps, all others of its group."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(n for n in reached[name] if name in reached[n]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _reached(graph: Graph, name: str) -> set[str]:
    """All modules that a module imports, in at least one step."""
    found: set[str] = set()
    to_do = [*graph[name]]
    while to_do:
        if (module := to_do.pop()) not in found:
            found.add(module)
            to_do += graph.get(module, ())
    return found


# ---- messages ------------------------------------------------------------------------------------


def messages(package: Package, has_files: bool = True) -> list[str]:
    """A line for each text that the code may show, sorted: file, what is called with it, the text.

    What is called is an error, a warning or a logger; "text" is any other string of several words
    that is no docstring, such as advice that an error is given. {} stands for a value, {a|b} for
    one made of these texts. Names of variables do not show, so that renaming them changes nothing.
    """
    found = []
    for source in package.sources:
        place = f"{source.path.relative_to(package.path.resolve())}: " if has_files else ""
        found += [f"{place}{told}" for told in _told(source.tree)]
    return sorted(found)


def _told(node: ast.AST) -> Iterator[str]:
    for child in _inside(node):
        if isinstance(child, ast.Call) and _TELLS.fullmatch(name := _name_of(child.func)):
            parts = [message(argument) for argument in child.args]
            yield f"{name}: {' '.join(parts)}"
        elif isinstance(child, ast.Expr) and _is_text(child.value):
            continue
        elif _is_text(child) or isinstance(child, ast.JoinedStr):
            if " " in (text := message(child)).strip():
                yield f"text: {text}"
        else:
            yield from _told(child)


def _name_of(function: ast.expr) -> str:
    return ast.unparse(function).rpartition(".")[2]


def message(node: ast.AST) -> str:
    """The text that an expression gives, on one line."""
    if _is_text(node):
        return re.sub(r"\s*\n\s*", " ", ast.literal_eval(node))
    if isinstance(node, ast.JoinedStr):
        return "".join(message(value) for value in node.values)
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    return f"{{{'|'.join(_texts_in(inner))}}}"


def _texts_in(node: ast.AST) -> Iterator[str]:
    """Of the parts of an expression."""
    if _is_text(node) or isinstance(node, ast.JoinedStr):
        if text := message(node):
            yield text
    else:
        for child in _inside(node):
            yield from _texts_in(child)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node; a key of a mapping is not shown to anyone."""
    yield from [node.value] if isinstance(node, ast.Subscript) else ast.iter_child_nodes(node)


if __name__ == "__main__":
    sys.exit(main())

"""The import graph of the project's own packages, read from the source."""

import ast
from functools import cache
from pathlib import Path

from toys import ROOT


@cache
def modules(package: str) -> dict[str, Path]:
    """Module names below a package (or the package itself) and their files."""
    folder = ROOT / Path(*package.split("."))
    if not folder.is_dir():
        return {package: folder.with_suffix(".py")}
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(module: str) -> frozenset[str]:
    """Everything a module names in import statements, wherever they stand, as full names.

    Imports for type checking alone are left out: they do not run.
    """
    known = {**modules("edgeke"), **modules("stages")}
    tree = ast.parse(known[module].read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else node.module)
    return frozenset(names)


def reached(module: str, stop: frozenset[str] = frozenset()) -> set[str]:
    """The project's modules that importing `module` runs, packages included, itself too.

    Modules in `stop` are neither entered nor reported.
    """
    known = {**modules("edgeke"), **modules("stages")}
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found or name in stop or name not in known:
            continue
        found.add(name)
        todo += imported(name)
        if "." in name:
            todo.append(name.rpartition(".")[0])
    return found

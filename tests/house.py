"""Measures the package's structure: `python tests/house.py [FOLDER]` prints one line per figure.

Counted are the files of `diffusers_fisher`: lines of code without docstrings, comments and blank lines, the longest
file and function, parameters of functions, `typing.Any` in annotations, and circles of imports between files and
between rooms (the package's folders, and its files that lie in none).
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "diffusers_fisher"
ROOT = Path(__file__).parents[1] / PACKAGE
JSON_MAPPINGS = ("dict", "Mapping", "MutableMapping")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(root: Path = ROOT) -> dict[Path, ast.Module]:
    """Returns every file of the package with its syntax tree."""
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(root.rglob("*.py"))}


def code_lines(file: Path, tree: ast.Module) -> int:
    """Counts the lines of code: no docstrings (not of attributes either), no comments, no blank lines."""
    blank_types = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        if token.type not in blank_types:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yields every function and method with its name, methods as Class.method."""

    def functions_of(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield prefix + child.name, child
                yield from functions_of(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from functions_of(child, f"{prefix}{child.name}.")
            else:
                yield from functions_of(child, prefix)

    yield from functions_of(tree, "")


def body_length(function: Function) -> int:
    """Counts the lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return 0 if not body else (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


def parameter_count(function: Function) -> int:
    """Counts the parameters of a function without `self` and `cls`."""
    parameters = function.args
    names = [each.arg for each in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
    return (
        len([name for name in names if name not in ("self", "cls")]) + bool(parameters.vararg) + bool(parameters.kwarg)
    )


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Yields annotations of parameters (not of *args and **kwargs), of results and of variables."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                if each.annotation is not None:
                    yield each.annotation
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def has_any(annotation: ast.expr) -> bool:
    """Returns whether `Any` stands in an annotation, except in JSON mappings (`dict[str, Any]`)."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return has_any(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inner = annotation.slice
        has_text_keys = (
            isinstance(inner, ast.Tuple) and isinstance(inner.elts[0], ast.Name) and inner.elts[0].id == "str"
        )
        if annotation.value.id in JSON_MAPPINGS and has_text_keys:
            return False
    if isinstance(annotation, ast.Name):
        return annotation.id == "Any"
    return any(has_any(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def is_any(annotation: ast.expr) -> bool:
    """Returns whether an annotation is `Any` itself."""
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def module_name(file: Path, root: Path = ROOT) -> str:
    """Returns the name `diffusers_fisher.room.file` of a file; for an __init__.py, its folder's name."""
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(trees: Mapping[Path, ast.Module], root: Path = ROOT) -> dict[str, set[str]]:
    """Which modules of the package each module imports: inside functions and for type checkers too. The package's own
    __init__ is left out: it names everything and is imported by nothing but for the version."""
    names = {module_name(file, root) for file in trees}
    result: dict[str, set[str]] = {}
    for file, tree in trees.items():
        name = module_name(file, root)
        if name == PACKAGE:
            continue
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        result[name] = {module for module in _imported(tree, package, names) if module not in (name, PACKAGE)}
    return result


def _imported(tree: ast.AST, package: str, names: set[str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full in names:
                    yield full
                elif module in names:
                    yield module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        else:
            yield from _imported(node, package, names)


def room(module: str) -> str:
    """Returns the room of a module: its folder in the package, or its own name where it lies in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def room_imports(files: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns the rooms that each room imports; the package's own __init__ is no room."""
    result: dict[str, set[str]] = {}
    for module, modules in files.items():
        if room(module):
            result.setdefault(room(module), set()).update({room(each) for each in modules} - {room(module), ""})
    return result


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the groups of nodes that reach each other, sorted."""
    reachable: dict[str, set[str]] = {}
    for start in graph:
        visited: set[str] = set()
        stack = list(graph[start])
        while stack:
            node = stack.pop()
            if node not in visited:
                visited.add(node)
                stack.extend(graph.get(node, ()))
        reachable[start] = visited
    groups = {
        tuple(sorted(other for other in reachable[node] if node in reachable.get(other, ())))
        for node in graph
        if node in reachable[node]
    }
    return sorted(list(group) for group in groups)


def main(root: Path = ROOT) -> None:
    """Prints the figures."""
    trees = parse(root)
    lines = {file: code_lines(file, tree) for file, tree in trees.items()}
    longest = max(trees, key=lambda file: len(file.read_text(encoding="utf-8").splitlines()))
    all_functions = [
        (f"{module_name(file, root)}:{name}", function)
        for file, tree in trees.items()
        for name, function in functions(tree)
    ]
    bodies = sorted(((body_length(function), name) for name, function in all_functions), reverse=True)
    parameters = sorted(((parameter_count(function), name) for name, function in all_functions), reverse=True)
    all_annotations = [annotation for tree in trees.values() for annotation in annotations(tree)]
    bare_count, count_with_any = sum(map(is_any, all_annotations)), sum(map(has_any, all_annotations))
    files = imports(trees, root)
    print(f"files {len(trees)}, lines of code {sum(lines.values())}")
    print(f"longest file {longest.relative_to(root)}: {len(longest.read_text(encoding='utf-8').splitlines())} lines")
    print("longest functions " + ", ".join(f"{name} {count}" for count, name in bodies[:3]))
    print(f"functions of 60 lines or more: {sum(count >= 60 for count, _ in bodies)}")
    print(
        "more than ten parameters: "
        + (", ".join(f"{name} {count}" for count, name in parameters if count > 10) or "none")
    )
    shares = f"{bare_count / len(all_annotations):.1%}", f"{count_with_any / len(all_annotations):.1%}"
    print(f"Any in {len(all_annotations)} annotations: {bare_count} bare ({shares[0]}), {count_with_any} in all "
          f"({shares[1]})")  # fmt: skip
    print(f"circles of files: {circles(files) or 'none'}")
    print(f"circles of rooms: {circles(room_imports(files)) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)

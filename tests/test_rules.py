"""House rules no linter here checks: short files, documented code, no print, nothing undone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [name.removesuffix("*") for name in
            PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]  # fmt: skip
LIBRARY = sorted(
    [ROOT / "wardround.py", *(f for name in PACKAGES for f in (ROOT / name).rglob("*.py"))]
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = sorted((ROOT / "benchmarks").rglob("*.py"))
MOST_LINES = 400


def name(file: Path) -> str:
    """Path inside the project, for messages and test ids."""
    return file.relative_to(ROOT).as_posix()


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public classes and functions of a module, and public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                        yield f"{node.name}.{member.name}", member


def overrides(tree: ast.Module) -> set[str]:
    """Methods of classes with bases of other libraries: their contract is documented there."""
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.bases:
            foreign |= {
                f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)
            }
    return foreign


def test_the_library_is_found() -> None:
    assert len(LIBRARY) > 60
    assert {"adapters", "client", "conf", "server", "simulation", "strategies", "transport"} == set(
        PACKAGES
    )


@pytest.mark.parametrize("file", [*LIBRARY, *TESTS, *OTHERS], ids=name)
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("file", LIBRARY, ids=name)
def test_everything_public_is_documented(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if not tree.body and file.name == "__init__.py":
        return
    assert ast.get_docstring(tree), "the module says what it guarantees"
    inherited = overrides(tree)
    missing = [
        label
        for label, node in public(tree)
        if not ast.get_docstring(node) and label not in inherited  # type: ignore[arg-type]
    ]
    assert missing == []


@pytest.mark.parametrize("file", TESTS, ids=name)
def test_every_test_module_says_what_it_is_about(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", LIBRARY, ids=name)
def test_the_library_does_not_print(file: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "breakpoint")
    ]
    assert calls == []


@pytest.mark.parametrize("file", [*LIBRARY, *TESTS, *OTHERS], ids=name)
def test_nothing_is_left_undone(file: Path) -> None:
    undone = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    assert [t.start[0] for t in tokens if undone.search(t.string)] == []


@pytest.mark.parametrize("file", LIBRARY, ids=name)
def test_no_stub_stands_in_for_code(file: Path) -> None:
    stubs = [
        node.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Raise)
        and "NotImplementedError" in ast.unparse(node.body[-1])
    ]  # fmt: skip
    assert stubs == []


def test_every_data_file_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        file
        for package, globs in patterns.items()
        for pattern in globs
        for file in (ROOT / package).glob(pattern)
    }
    data = {
        file
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert data - packaged == set()
    assert len(packaged) > 20


DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks/RESULTS.md"]


@pytest.mark.parametrize("file", DOCS, ids=name)
def test_python_in_the_docs_compiles(file: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, name(file), "exec")


@pytest.mark.parametrize("file", DOCS, ids=name)
def test_links_of_the_docs_lead_somewhere(file: Path) -> None:
    headings = {doc: _anchors(doc) for doc in DOCS}
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if ":" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), link
        assert not anchor or anchor in headings.get(target, {anchor}), link


def _anchors(file: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

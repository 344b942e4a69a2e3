"""Who may import whom: the import graph of flagops, kernels and reference, read from their sources.

``python tests/test_rooms.py`` prints its modules, edges and circles.
"""

import ast
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"flagops": "flagops", "flagops.kernels": "kernels", "flagops.reference": "reference"}
BACKENDS = ("numba", "torch", "triton")
NOW, TYPES, LATER = "on import", "for types alone", "in a function"
WAYS = ((NOW,), (NOW, TYPES), (NOW, TYPES, LATER))

pytestmark = pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="not a checkout")


@cache
def modules() -> dict[str, Path]:
    """Every module by the name it is imported under."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


@cache
def imports(name: str) -> tuple[tuple[str, str, int], ...]:
    """What a module imports, when it does so, and how many dots it writes."""
    path, found = modules()[name], []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, when in statements(ast.parse(path.read_text(encoding="utf-8")), NOW):
        if isinstance(node, ast.Import):
            found += [(alias.name, when, 0) for alias in node.names]
            continue
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            found.append((inner if inner in modules() else base, when, node.level))
    return tuple(found)


def statements(tree: ast.AST, when: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Import statements, each with when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, when
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(ast.Module(node.body, []), TYPES if when == NOW else when)
            yield from statements(ast.Module(node.orelse, []), when)
        else:
            yield from statements(node, LATER if isinstance(node, ast.FunctionDef | ast.Lambda) else when)


def graph(kinds: tuple[str, ...]) -> dict[str, set[str]]:
    """Each module's imports of other modules of ours, made in one of these ways."""
    return {n: {to for to, when, _ in imports(n) if to in modules() and to != n and when in kinds} for n in modules()}


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """The strongly connected components of more than one module."""

    def reached(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            new = edges[todo.pop()] - found
            found |= new
            todo += new
        return found

    reach = {name: reached(name) for name in edges}
    return {frozenset({o for o in reach[n] if n in reach[o]}) for n in edges if n in reach[n]}


def ours(prefix: str) -> list[tuple[str, str, str, int]]:
    """Imports of flagops in modules whose names start so."""
    return [
        (name, *found)
        for name in modules()
        if name.startswith(prefix)
        for found in imports(name)
        if found[0].partition(".")[0] == "flagops"
    ]


SAMPLE = """
    import a
    if TYPE_CHECKING:
        import b
    else:
        import c
    try:
        import d
    except ImportError:
        pass
    class K:
        import e
        def method(self):
            import f
            if typing.TYPE_CHECKING:
                import g
"""


def test_the_graph_is_read_rightly():
    found = {node.names[0].name: when for node, when in statements(ast.parse(textwrap.dedent(SAMPLE)), NOW)}
    assert found == {"a": NOW, "b": TYPES, "c": NOW, "d": NOW, "e": NOW, "f": LATER, "g": LATER}
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles(edges) == {frozenset("bc"), frozenset("ef")}
    assert "flagops.kernels._rows" in graph((NOW,))["flagops.kernels.numba._blocks"]


@pytest.mark.parametrize("kinds", WAYS, ids=", ".join)
def test_no_modules_import_each_other_in_a_circle(kinds):
    assert not circles(graph(kinds))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_enters_the_folder_of_another(backend):
    found = ours(f"flagops.kernels.{backend}.")
    assert found
    for name, to, _, _ in found:
        for other in {*BACKENDS} - {backend}:
            assert not f"{to}.".startswith((f"flagops.kernels.{other}.", f"flagops.backends.{other}.")), (name, to)


def test_kernels_import_flagops_absolutely_and_each_other_relatively():
    for name, to, _, dots in ours("flagops.kernels."):
        assert bool(dots) == to.startswith("flagops.kernels."), (name, to)


def test_what_several_backends_share_lies_above_their_folders():
    """A helper above is entered from two folders at least, and enters none."""
    shared = [name for name in modules() if name.rpartition(".")[0] == "flagops.kernels"]
    assert shared
    for helper in shared:
        users = [b for b in BACKENDS if any(to == helper for _, to, _, _ in ours(f"flagops.kernels.{b}."))]
        assert len(users) > 1, f"{helper} serves {users} alone"
        assert helper.rpartition(".")[2].startswith("_"), helper
        for to in graph((NOW, TYPES, LATER))[helper]:
            assert not to.startswith(tuple(f"flagops.kernels.{backend}" for backend in BACKENDS)), (helper, to)


def test_a_reference_knows_no_kernel_and_nothing_that_runs_one():
    allowed = ("flagops.reference", "flagops.operator", "flagops.arrays", "flagops.scalars")
    for name, to, _, _ in ours("flagops.reference."):
        assert to.startswith(allowed), (name, to)


def test_flagops_names_no_kernel():
    """The registry loads them by name."""
    for name, to, _, _ in ours("flagops"):
        if not name.startswith("flagops.kernels."):
            assert not f"{to}.".startswith("flagops.kernels."), (name, to)


def test_a_family_has_the_same_file_name_in_each_folder():
    from flagops import registry

    families = {path.stem for path in (ROOT / "reference").glob("[!_]*.py")}
    for backend in BACKENDS:
        files = {path.stem for path in (ROOT / "kernels" / backend).glob("[!_]*.py")}
        assert files <= families, f"no operator asks for {files - families} in kernels/{backend}"
        homes = {registry.home(op, backend) for op in registry.cards() if registry.written(op, backend)}
        assert homes == {f"flagops.kernels.{backend}.{family}" for family in files}


if __name__ == "__main__":
    for kinds in WAYS:
        edges = graph(kinds)
        print(f"{', '.join(kinds)}: {len(edges)} modules, {sum(map(len, edges.values()))} edges")
        for circle in circles(edges):
            print("  circle of", ", ".join(sorted(circle)))

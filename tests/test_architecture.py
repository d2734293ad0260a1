"""The house: which package may import which, and how large a module or a function may be.

The tests read syntax trees. They count every import: at the top of a module, inside a function, and
behind `if TYPE_CHECKING`.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"hsa_mini": ROOT / "hsa_mini", "hsa_kernels": ROOT / "kernels" / "hsa_kernels"}
MAX_MODULE_LINES = {"hsa_mini": 300, "hsa_kernels": 400}
MAX_REFERENCE_LINES = 120
MAX_FUNCTION_LINES = 60
MAX_MODULES_IN_PACKAGE = 12
MAX_PUBLIC_METHODS = 12

# What each part of the package may import from the others: the arrows of README, one way.
BASE = {"checks", "config", "files", "paths", "provenance"}
MODEL = {"checks", "config", "reference", "ops", "memory", "model"}
LIBRARY = BASE | MODEL | {"hsa_kernels", "checkpoint", "data", "tasks", "inference", "hsa_model"}
MAY_IMPORT = {
    "checks": set(),
    "config": {"checks"},
    "files": set(),
    "paths": {"checks"},
    "provenance": {"files", "paths"},
    "reference": {"checks"},
    "hsa_kernels": {"reference"},
    "data": {"checks", "files", "paths"},
    "tasks": {"checks", "data"},
    "checkpoint": {"checks", "config", "files", "provenance"},
    "ops": {"checks", "reference", "hsa_kernels"},
    "memory": {"checks", "config", "checkpoint", "files", "ops", "reference"},
    "model": MODEL,
    "inference": {*MODEL, "checkpoint", "files"},
    "hsa_model": {*MODEL, "checkpoint", "files", "inference", "paths"},
    "index": LIBRARY,
    "training": LIBRARY,
    "evaluation": LIBRARY,
    "integrations": LIBRARY,
    "exercises": LIBRARY | {"training", "evaluation", "lab"},
    "lab": LIBRARY | {"training", "evaluation"},
    "course": {"evaluation", "lab", "paths"},
    "viz": LIBRARY | {"index", "training", "evaluation", "lab", "course"},
    "cli": LIBRARY | {"index", "training", "evaluation", "integrations", "lab", "viz"},
    "__main__": {"cli"},
    # The facade: its names are imported when they are used.
    "hsa_mini": LIBRARY,
}


def module_name(path: Path) -> str:
    """`hsa_mini.model.core` for core.py, and `hsa_mini.model` for the package's `__init__.py`."""
    package = "hsa_kernels" if "hsa_kernels" in path.parts else "hsa_mini"
    parts = (package, *path.relative_to(SOURCES[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in SOURCES.values() for path in folder.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
every_module = pytest.mark.parametrize("name", sorted(MODULES))


def existing(name: str) -> str | None:
    """The module that a dotted name means: `hsa_mini.config.PRESETS` is in `hsa_mini.config`."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def targets(node: ast.AST, importer: str) -> list[str]:
    """The dotted names that an import statement, or a call of `import_module("...")`, names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            depth = node.level - (importer in PACKAGES)
            above = importer.split(".")[: len(importer.split(".")) - depth]
            base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call):
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        argument = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
            return [str(argument.value)]
    return []


def imported(name: str) -> set[str]:
    """Every module of ours that module `name` imports, wherever in it the import stands."""
    found = {existing(target) for node in ast.walk(TREES[name]) for target in targets(node, name)}
    return {module for module in found if module and module != name}


IMPORTS = {name: imported(name) for name in MODULES}


def part(name: str) -> str:
    """The package a module belongs to, or the module itself if it stands at the top of hsa_mini."""
    top, _, rest = name.partition(".")
    return top if top == "hsa_kernels" or not rest else rest.partition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, or nothing."""
    finished, path = set(), []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        path.append(node)
        for following in sorted(graph.get(node, ())):
            if found := visit(following):
                return found
        path.pop()
        finished.add(node)
        return []

    for node in sorted(graph):
        if found := visit(node):
            return found
    return []


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: decorated with `@triton.jit`, `@triton.jit(...)` or `@jit`."""
    written = [ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list]
    return any(name in ("triton.jit", "jit") for name in written)


def properties(node: ast.ClassDef) -> set[str]:
    written = [(f.name, ast.unparse(d)) for f in functions(node) for d in f.decorator_list]
    return {name for name, decorator in written if decorator.endswith("property")}


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circle_between_modules():
    assert circle(IMPORTS) == []


def test_no_circle_between_packages():
    graph: dict[str, set[str]] = {}
    for name, found in IMPORTS.items():
        graph.setdefault(part(name), set()).update(
            {part(module) for module in found} - {part(name)}
        )
    assert circle(graph) == []


def test_every_part_of_the_package_has_its_arrows():
    assert {part(name) for name in MODULES} == MAY_IMPORT.keys()


@every_module
def test_imports_follow_the_arrows(name):
    found = {part(module) for module in IMPORTS[name]} - {part(name)}
    assert found <= MAY_IMPORT[part(name)], f"{name} imports {found - MAY_IMPORT[part(name)]}"


@every_module
def test_modules_import_the_module_that_defines_a_name_and_not_the_facade(name):
    assert "hsa_mini" not in IMPORTS[name]


@every_module
def test_imports_are_absolute(name):
    nodes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom)]
    assert [node.lineno for node in nodes if node.level] == []


@every_module
def test_modules_are_short(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    limit = MAX_MODULE_LINES[name.partition(".")[0]]
    assert lines <= limit, f"{name} has {lines} lines"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if part(n) == "reference"))
def test_reference_operations_are_shorter_still(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    if name != "hsa_mini.reference.checks":  # checks of arguments are no mathematics
        assert lines <= MAX_REFERENCE_LINES, f"{name} has {lines} lines"


@every_module
def test_functions_are_short(name):
    sizes = {
        function.name: function.end_lineno - function.lineno + 1
        for function in functions(TREES[name])
        if not is_kernel(function)
    }
    assert {key: size for key, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_hold_few_modules(package):
    siblings = [
        name for name in MODULES if name not in PACKAGES and name.rpartition(".")[0] == package
    ]
    assert len(siblings) <= MAX_MODULES_IN_PACKAGE, f"{package} has {len(siblings)} modules"


def test_state_classes_have_few_public_methods():
    """Properties do not count."""
    many = {}
    for name in MODULES:
        if part(name) != "memory":
            continue
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ClassDef):
                public = [f.name for f in node.body if isinstance(f, ast.FunctionDef)]
                public = [name for name in public if name not in properties(node)]
                public = [method for method in public if not method.startswith("_")]
                if len(public) > MAX_PUBLIC_METHODS:
                    many[node.name] = public
    assert many == {}


@every_module
def test_one_assignment_on_a_line(name):
    """`B, T = q.shape` is one assignment. `a, b = f(x), g(y)` is two."""
    displays = (ast.Tuple, ast.List)
    found = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Assign)
        and isinstance(node.value, displays)
        and any(isinstance(target, displays) for target in node.targets)
    ]
    assert found == []


@every_module
def test_one_statement_on_a_line(name):
    bodies = [
        node.body for node in ast.walk(TREES[name]) if isinstance(getattr(node, "body", 0), list)
    ]
    lines = [statement.lineno for body in bodies for statement in body]
    assert sorted({line for line in lines if lines.count(line) > 1}) == []


@every_module
def test_no_case_distinction_by_the_class_of_a_cache(name):
    """One layout of state: a caller never asks which kind of cache it holds."""
    calls = [
        node
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
    ]
    classes = {
        str(getattr(leaf, "attr", getattr(leaf, "id", "")))
        for call in calls
        for leaf in ast.walk(call.args[1])
    }
    assert not {found for found in classes if found.endswith(("Cache", "Ring"))}


@every_module
def test_bounds_are_called_min_and_max(name):
    nodes = list(ast.walk(TREES[name]))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not {found for found in names if found.lstrip("_").startswith(("LEAST_", "MOST_"))}


def test_tests_share_helpers_and_not_each_other():
    """What several test modules use stands in tests/helpers.py or tests/material.py."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [name.partition(".")[0] for name in targets(node, path.stem)]
            wrong += [f"{path.name}: {name}" for name in found if name.startswith("test_")]
    assert wrong == []


def test_readme_names_every_part_of_the_package():
    """The map of README has one line for each package."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = {f"{name.replace('.', '/')}/" for name in PACKAGES if name.startswith("hsa_mini.")}
    assert {name for name in packages if name not in text} == set()

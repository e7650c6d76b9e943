"""The rules of the house (docs/architecture.md): who imports whom, and who owns what."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "spml_fast"
OURS = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "spml_kernels").rglob("*.py"))
PROGRAMS = sorted(p for folder in ("launch", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# A row per folder, from the bottom up: a folder imports only from rows above its own (and from itself).
FLOORS = [
    {"core"},
    {"data", "models"},
    {"methods", "prepare", "evaluation"},
    {"runs"},
    {"training", "analysis", "reproduction"},
    {"cli"},
    {"api"},
]


def module_name(path: Path) -> str:
    """Dotted name of a source file."""
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def imported(path: Path) -> set[str]:
    """Every module a file imports at run time, within functions too; `from a import b` counts as a and a.b."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                keep = len(package) - node.level + (path.name == "__init__.py")
                parent = ".".join([*package[:keep], *([parent] if parent else [])])
            names.add(parent)
            names.update(f"{parent}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("__import__", "importlib.import_module", "import_module") and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    names.add(str(first.value))
        if is_type_checking(node):
            for part in node.orelse:
                visit(part)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


def relative(paths: list[Path]) -> set[str]:
    return {str(p.relative_to(ROOT)) for p in paths}


def floor(module: str) -> int | None:
    """Place of `spml_fast.<folder>...` in FLOORS; None outside of the package's folders."""
    parts = module.split(".")
    if parts[0] != "spml_fast" or len(parts) < 2:
        return None
    return next((i for i, row in enumerate(FLOORS) if parts[1] in row), None)


def test_there_is_something_to_look_at():
    assert len(OURS) > 20 and len(KERNELS) > 8 and len(PROGRAMS) >= 3
    assert uses(PACKAGE / "models" / "classifier.py", "timm")
    assert uses(PACKAGE / "training" / "engine.py", "deepspeed"), "an import within a function counts"
    base = PACKAGE / "methods" / "base.py"
    assert not uses(base, "spml_fast.models.classifier"), "one for types alone does not"
    assert module_name(KERNELS[0]).startswith("spml_kernels")


def test_every_folder_has_a_floor_and_nothing_lies_about():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set().union(*FLOORS)
    files = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert files <= {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    module = module_name(path)
    own = floor(module)
    for name in imported(path):
        place = floor(name)
        if own is None or place is None or name.split(".")[1] == module.split(".")[1]:
            continue
        assert place < own, f"{module} imports {name}"


def test_no_import_circle():
    graph = {module_name(p): p for p in OURS}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        top = ast.parse(graph[module].read_text(encoding="utf-8")).body
        for node in top:
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
                # A package's own __init__ imports its parts, which is no circle unless they import it back.
                for name in sorted(wanted & graph.keys() - {module}):
                    walk(name, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        walk(module, ())


def test_kernels_need_torch_and_triton_only():
    for path in KERNELS:
        allowed = {"torch", "triton", "spml_kernels", *sys.stdlib_module_names}
        found = {name.split(".")[0] for name in imported(path)}
        assert found <= allowed, f"{path.relative_to(ROOT)} imports {found - allowed}"


def test_preparing_needs_no_pytorch():
    """It takes seconds and half a gigabyte to load, which is a large part of preparing labels."""
    graph = {module_name(p): p for p in OURS}
    waiting = [name for name in graph if name.startswith("spml_fast.prepare")]
    seen = set(waiting)
    while waiting:
        path = graph[waiting.pop()]
        assert not uses(path, "torch") and not uses(path, "spml_kernels"), path.relative_to(ROOT)
        new = (imported(path) & graph.keys()) - seen
        seen |= new
        waiting += new
    assert "spml_fast.data.sparse_labels" in seen and "spml_fast.data.labels" not in seen


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("nvidia.dali", {"spml_fast/data/dali_graph.py", "spml_fast/data/dali_stream.py"}),
        ("deepspeed", {"spml_fast/training/engine.py"}),
        ("timm.models", {"spml_fast/models/backbone.py"}),
        ("jsonargparse", {"spml_fast/runs/options.py"}),
        ("fsspec", {"spml_fast/data/remote/store.py"}),
    ],
)
def test_a_library_has_one_owner(package, owners):
    assert relative([p for p in OURS if uses(p, package)]) <= owners


def test_timm_makes_models_in_one_folder():
    """Training may use timm's helpers for moving averages and BatchNorm; nothing else touches timm."""
    users = {str(p.relative_to(ROOT)): imported(p) for p in OURS if uses(p, "timm")}
    others = {name for name in users if not name.startswith("spml_fast/models/")}
    assert others <= {"spml_fast/training/averaging.py", "spml_fast/training/batchnorm_state.py"}
    helpers = {n for name in others for n in users[name] if n.split(".")[0] == "timm"}
    assert all(n.startswith(("timm.utils", "timm.layers")) for n in helpers)


def test_libraries_import_no_programs_and_no_tests():
    for path in OURS + KERNELS:
        assert not any(uses(path, p) for p in ("launch", "benchmarks", "tests", "pytest")), path


def test_programs_go_through_the_packages():
    for path in PROGRAMS:
        if path.parts[-2] == "launch":
            assert not any(uses(path, p) for p in ("nvidia", "deepspeed", "timm")), path


@functools.cache
def names_used(path: Path) -> set[str]:
    """Dotted names that a file reads, `os.environ` and the like; `from os import environ` counts as well."""
    names = set(imported(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("os.replace", "core/io.py"),
        ("os.fsync", "core/io.py"),
        ("os.environ", "core/env.py"),
        ("os.getenv", "core/env.py"),
        ("os.putenv", "core/env.py"),
        ("torch.autocast", "core/precision.py"),
        ("torch.amp", "core/precision.py"),
    ],
)
def test_a_concern_has_one_owner(name, owner):
    users = {str(p.relative_to(PACKAGE)) for p in OURS if name in names_used(p)}
    assert users <= {owner}


def test_the_owners_are_seen_at_work():
    owned = {"io": {"os.replace", "os.fsync"}, "env": {"os.environ"}, "precision": {"torch.autocast"}}
    for owner, names in owned.items():
        assert names <= names_used(PACKAGE / "core" / f"{owner}.py")


RUN_FILES = (
    "config.yaml",
    "deepspeed.json",
    "classes.txt",
    "metrics.jsonl",
    "nonfinite.jsonl",
    "results.json",
    "bad_images.csv",
    "model.safetensors",
    "decisions.json",
    "evaluation.json",
    "options.json",
    "newest.json",
    "best.json",
    "mark.json",
    "method_shard_",
    "method_rank_",
)

# A Manifest has a list of classes of its own, whose names these two spell.
MANIFEST_CLASSES = {"data/manifest.py", "prepare/manifest_writer.py"}
# A command has the name of the folder that it lists.
COMMAND_NAMES = {"cli/main.py", "cli/checkpoints.py"}


def strings(path: Path) -> set[str]:
    """String constants of a file without its docstrings; an f-string counts in its constant parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in statements)
    return {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_of_run_files_stand_in_one_place(path):
    """`tensorboard` is not looked for: it is the name of DeepSpeed's section as well."""
    place = str(path.relative_to(PACKAGE))
    if place == "runs/layout.py":
        return
    texts = strings(path)
    spelled = {name for name in RUN_FILES if any(name in text for text in texts)}
    if place not in COMMAND_NAMES:
        spelled |= {text for text in texts if text.strip("/") == "checkpoints"}
    assert spelled <= ({"classes.txt"} if place in MANIFEST_CLASSES else set())


def test_the_layout_spells_them():
    found = strings(PACKAGE / "runs" / "layout.py")
    assert {"checkpoints", "tensorboard"} <= found
    assert all(any(name in text for text in found) for name in RUN_FILES if not name.startswith("method_"))
    assert any(text.startswith("method_") for text in found)


def anchors(path: Path) -> set[str]:
    """What a link to a Markdown file may end in: its headings as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ +(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_every_cited_source_is_there():
    known = anchors(ROOT / "docs" / "sources.md")
    assert {"boostlu", "large-loss", "ignore", "golden-values", "label-encodings"} <= known
    cited: dict[str, list[str]] = {}
    folders = ("spml_fast", "kernels", "launch", "benchmarks", "tests", "docs", "examples")
    for path in (p for f in folders for s in ("*.py", "*.md") for p in (ROOT / f).rglob(s)):
        for anchor in re.findall(r"sources\.md#([a-z0-9-]+)", path.read_text(encoding="utf-8")):
            cited.setdefault(anchor, []).append(str(path.relative_to(ROOT)))
    assert len(cited) > 10
    unknown = {anchor: places for anchor, places in cited.items() if anchor not in known}
    assert not unknown, f"docs/sources.md has no such heading: {unknown}"


MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
BANNER = re.compile(r"^\s*#\s*[-=*~#]{3,}")

# Files that may be longer, each with its reason. Kernels need no entry: their files are not measured.
LONGER_FILES: dict[str, str] = {}
# Functions that may be longer, as `path:name`, each with its reason.
LONGER_FUNCTIONS: dict[str, str] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def length(function: Function) -> int:
    """Lines of a function from `def` to its end, the docstring not counted."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def functions(source: str) -> list[Function]:
    """Every function of a file, methods and nested ones included."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]


def public_functions(source: str) -> list[Function]:
    """Functions that others call by name: those of the module, and the methods of its public classes.

    Triton's functions and operators registered with torch are left out: the function that calls them describes what
    they are given.
    """
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    kept = []
    for node in [*tree.body, *(member for c in classes for member in c.body)]:
        if not isinstance(node, Function) or node.name.startswith("_") or node.name.endswith(("_jit", "_op")):
            continue
        decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
        if not re.search(r"\bjit\b|_op\b|register_\w+|overload", decorators):
            kept.append(node)
    return kept


def parameters(function: Function) -> list[str]:
    """Names of a function's parameters; `ctx` is autograd's own."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(a for a in (given.vararg, given.kwarg) if a)]
    return [a.arg for a in every if a.arg not in ("self", "cls", "ctx")]


def undescribed(source: str) -> list[str]:
    """Public functions of four parameters or more without an `Args:` section or a reference (As `Class.method`)."""
    bad = []
    for function in public_functions(source):
        text = ast.get_docstring(function) or ""
        described = re.search(r"^Args:$", text, re.MULTILINE) or re.search(r"\bAs `[\w.]+`", text)
        if len(parameters(function)) >= 4 and not described:
            bad.append(function.name)
    return bad


def test_the_measures_measure():
    """On sources made for it: what the rules below rely on."""
    four = 'def f(a, b, *, c, d):\n    """Text.{}"""\n    return 1\n'
    plain = four.format("")
    assert undescribed(plain) == ["f"] and undescribed(plain.replace(", d", "")) == []
    assert undescribed(four.format("\n\n    Args:\n        a: one.\n    ")) == []
    assert undescribed(four.format(" As `g`.")) == [] and undescribed(f"@jit\n{plain}") == []
    method = "class A:\n    def f(self, a, b, c, d):\n        pass\n"
    assert undescribed(method) == ["f"] and undescribed(method.replace("class A", "class _A")) == []
    (function,) = functions(four.format("\n\n\n"))
    assert length(function) == 2
    assert BANNER.match("    # ---- step") and not BANNER.match("# - a list") and not BANNER.match("x = 1  # ---- y")


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    """Kernels aside: a kernel is as long as its arithmetic."""
    name, source = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    if name not in LONGER_FILES:
        assert source.count("\n") <= MAX_FILE_LINES, f"{name} is too long: a file has one subject"
    long = {f"{name}:{f.name}": length(f) for f in functions(source) if length(f) > MAX_FUNCTION_LINES}
    assert not long.keys() - LONGER_FUNCTIONS.keys(), long


def test_exceptions_to_lengths_are_needed():
    for name in LONGER_FILES:
        assert (ROOT / name).read_text(encoding="utf-8").count("\n") > MAX_FILE_LINES, name
    for entry in LONGER_FUNCTIONS:
        name, _, wanted = entry.partition(":")
        lengths = [length(f) for f in functions((ROOT / name).read_text(encoding="utf-8")) if f.name == wanted]
        assert lengths and max(lengths) > MAX_FUNCTION_LINES, entry


@pytest.mark.parametrize("path", [*OURS, *KERNELS, *PROGRAMS, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_banners(path):
    """A file that needs banners is two files."""
    assert not [line for line in path.read_text(encoding="utf-8").splitlines() if BANNER.match(line)]


@pytest.mark.parametrize("path", [*OURS, *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_many_arguments_are_described(path):
    assert not undescribed(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*OURS, *KERNELS, *PROGRAMS, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_are_where_readers_find_them(path):
    """Papers, or docs/sources.md; never a folder that is not part of the repository."""
    assert "spec" + "/" not in path.read_text(encoding="utf-8")

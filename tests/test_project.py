"""The project as a whole: what it imports and when, what it ships, what it pins."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "actors", "jobs")
README = (ROOT / "README.md").read_text()
HEAVY = {"torch", "ray", "transformers", "torchvision"}

# Modules of `pipeline` that drive Ray; the others must load in a moment, for `tessera status` and the tests.
DRIVES_RAY = {
    "pipeline.run.cluster",
    "pipeline.run.graph",
    "pipeline.run.crashes",
    "pipeline.run.feeding",
    "pipeline.run.placement",
    "pipeline.input.source",
    "pipeline.run.stages",
}
# Distribution -> module, where they differ.
MODULE_OF = {"pillow": "PIL", "pyyaml": "yaml"}
# What a declared distribution brings along where it is needed: Triton comes with every CUDA build of torch.
BROUGHT_ALONG = {"triton"}


def modules() -> list[str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files
    )


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Every module that a module imports, inside functions too; relative imports resolved."""
    base = ROOT.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    package = module if base.is_dir() else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names} & set(modules())
            found |= submodules or {source}
    return frozenset(found)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml, held against the tree at `root`."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
    ]
    return subprocess.run(
        [*command, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_imports_point_one_way():
    done = lint_imports(ROOT)
    assert not done.returncode, done.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("pipeline/storage/files.py", "pipeline.ledger.ledger"),
        ("pipeline/ledger/state.py", "pipeline.run.session"),
        ("pipeline/run/session.py", "pipeline.dataflow"),
        ("pipeline/spec/job_spec.py", "pipeline.storage.files"),
        ("actors/generate.py", "pipeline.ledger.ledger"),
        ("actors/families/fuyu.py", "actors.engine.scheduler"),
        ("actors/engine/devices/base.py", "actors.engine.model.packed"),
        ("actors/attempts.py", "ray"),
        ("actors/images/tiling.py", "torchvision"),
    ],
)
def test_an_import_up_a_floor_is_found(tmp_path: Path, module: str, imported: str):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / module, "a") as file:
        file.write(f"\nimport {imported}\n")
    done = lint_imports(tmp_path)
    assert done.returncode and "BROKEN" in done.stdout, done.stdout


def third_party() -> Iterator[tuple[str, str]]:
    for module in modules():
        for name in imports(module):
            root = name.partition(".")[0]
            if root not in sys.stdlib_module_names and root not in PACKAGES:
                yield module, root


def requirements(extra: str | None = None) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [Requirement(line) for line in lines]


def test_what_is_imported_is_declared():
    declared = {MODULE_OF.get(requirement.name, requirement.name) for requirement in requirements()}
    assert {(module, root) for module, root in third_party() if root not in declared | BROUGHT_ALONG} == set()


def test_everything_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert not any("+" in version for version in pins.values()), (
        "a local version would bind the pin to one machine"
    )
    for requirement in [*requirements(), *requirements("dev")]:
        version = pins[requirement.name.lower()]
        assert requirement.specifier.contains(Version(version)), f"{requirement} is pinned to {version}"
    makefile = (ROOT / "Makefile").read_text()
    for name, version in re.findall(r"(\w+)==([\w.]+)", makefile):
        assert pins[name] == version


def loaded(code: str) -> set[str]:
    """Top-level modules in memory after running some code in a fresh interpreter."""
    report = "import sys; print('\\n' + ' '.join({n.partition('.')[0] for n, m in sys.modules.items() if m}))"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines()[-1].split())


def test_most_of_pipeline_loads_without_torch_and_ray():
    light = [name for name in modules() if is_within(name, "pipeline") and name not in DRIVES_RAY]
    found = loaded("\n".join(f"import {name}" for name in light)) & HEAVY
    assert not found


HELP = """
from jobs.cli import main
try:
    main(["--help"])
except SystemExit as done:
    assert not done.code
"""


def test_help_loads_nothing_heavy():
    found = loaded(HELP) & HEAVY
    assert not found


def test_help_answers():
    script = Path(sys.executable).with_name("tessera")  # there once the project is installed
    command = [str(script), "--help"] if script.exists() else [sys.executable, "-c", HELP]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert "tessera" in done.stdout


def test_the_wheel_holds_the_three_packages(tmp_path: Path):
    source = tmp_path / "source"  # a build leaves folders behind
    skip = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=skip)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=200)
    (wheel,) = tmp_path.glob("tessera-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("entry_points.txt"))
        assert "tessera = jobs.cli:main" in archive.read(metadata).decode()
    shipped = {name for name in names if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == wanted
    assert {name.partition("/")[0] for name in shipped} == set(PACKAGES)


# Files that prose may name although they are not ours.
FOREIGN = {"pipeline.py", "actors.py"}  # what a user's own folder may hold (pipeline/run/cluster.py)


def test_files_that_the_prose_names_are_there():
    """Docstrings, comments and pages send people to files; each is the end of some file's path."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    ours = [f"/{name}" for name in listed.stdout.splitlines()]
    if not ours:
        pytest.skip("not a git checkout")
    assert not [
        (name, named)
        for name in ours
        if name.endswith((".py", ".md", ".c", ".yaml")) and not name.startswith("/tests/")
        for named in re.findall(
            r"(?<![\w./{])[\w/]*\w\.(?:py|c)\b(?!\w*\()", ROOT.joinpath(name[1:]).read_text()
        )
        if named not in FOREIGN and not any(path.endswith(f"/{named}") for path in ours)
    ]


def test_actors_need_what_the_readme_says():
    named = re.search(r"^`actors/` needs ([\w, ]+), but no Ray", README, flags=re.MULTILINE)
    used = {root for module, root in third_party() if is_within(module, "actors")}
    unsaid = {"jinja2", *BROUGHT_ALONG}
    assert named and {MODULE_OF.get(name, name) for name in re.split(", | and ", named[1])} == used - unsaid


def test_the_readmes_tree_has_every_room():
    rooms = [path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    for name in [*(room.name for room in rooms), "k8s", "examples", "benchmarks", "tests", "docs"]:
        assert re.search(rf"\b{name}/", README), name

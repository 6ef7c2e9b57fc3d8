"""Four folders make one package, each module exists once, and imports run one way."""

import ast
import graphlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]  # import name -> folder
LINKED = ("models", "scorers", "recovery")
MAY_IMPORT = {
    "jaxprune.models": ("jaxprune.models",),
    "jaxprune.scorers": ("jaxprune.scorers",),
    "jaxprune.recovery": ("jaxprune.recovery", "jaxprune.models"),
}
LEVELS = {"plan": 0, "allocate": 0, "surgery": 1, "evaluate": 2, "pipeline": 3, "cli": 4}
IMPORT_ALL = """
import importlib, pkgutil, sys
import jaxprune
for module in pkgutil.walk_packages(jaxprune.__path__, "jaxprune."):
    importlib.import_module(module.name)
"""


def package_folders() -> dict[str, Path]:
    """Import name -> folder, of every folder with an `__init__.py`."""
    found = {}
    for name, top in FOLDERS.items():
        for init in (ROOT / top).rglob("__init__.py"):  # does not follow the links
            found[".".join((name, *init.parent.relative_to(ROOT / top).parts))] = init.parent
    return found


def module_files() -> dict[str, Path]:
    """Import name -> file, of every module of the package."""
    return {
        (package if file.stem == "__init__" else f"{package}.{file.stem}"): file
        for package, folder in package_folders().items()
        for file in folder.glob("*.py")
    }


def imports(file: Path) -> set[tuple[str, str]]:
    """Each name that a file imports, in full, with the module that it is imported from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{file}:{node.lineno}: relative import"
            found |= {(f"{node.module}.{alias.name}", node.module) for alias in node.names}
    return found


def imported(file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports anywhere in it; `from jaxprune import plan` is an import of `jaxprune.plan`."""
    names = {name if name in modules else module for name, module in imports(file)}
    return {name for name in names if name.split(".")[0] in ("jaxprune", *LINKED)}


def graph() -> dict[str, set[str]]:
    modules = module_files()
    return {name: imported(file, modules) - {name} for name, file in modules.items()}


def reachable(name: str, edges: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), [name]
    while todo:
        new = edges.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(*options: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return run("git", "ls-files", "-z", *options).split("\0")[:-1]


def test_no_package_is_forgotten():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(package_folders())


def test_links_are_committed_as_links():
    modes = {path: line.split()[0] for line in tracked("-s") for path in [line.split("\t")[1]]}
    for name in LINKED:
        assert modes[f"jaxprune/{name}"] == "120000"
        assert (ROOT / "jaxprune" / name).resolve() == ROOT / name


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_lower_folders_import_only_what_they_stand_on(folder):
    for name, targets in graph().items():
        if name == folder or name.startswith(f"{folder}."):
            strangers = {t for t in targets if not any(t == ok or t.startswith(f"{ok}.") for ok in MAY_IMPORT[folder])}
            assert not strangers, f"{name} imports {strangers}"


def test_imports_have_no_cycle():
    edges = {name: targets for name, targets in graph().items() if name != "jaxprune.__main__"}
    # The __init__ of a package re-exports its modules, which import each other by their own names.
    packages = package_folders()
    edges = {name: {t for t in targets if t not in packages} for name, targets in edges.items() if name not in packages}
    graphlib.TopologicalSorter(edges).prepare()


def test_no_arrow_runs_back_in_the_core():
    edges = graph()
    for name, level in LEVELS.items():
        if (module := f"jaxprune.{name}") in edges:
            above = {other for other, its in LEVELS.items() if its > level and f"jaxprune.{other}" in reachable(module, edges)}
            assert not above, f"{name} reaches {above}"


def test_every_import_is_a_declared_dependency():
    """A package that only comes along with another one is missing as soon as that one drops it."""
    optional = PROJECT["project"]["optional-dependencies"]
    extras = [dep for name in ("eval", "search") for dep in optional[name]]  # imported in functions that say how to install it
    declared = {canonical(re.match(r"[\w.-]+", dep)[0]) for dep in (*PROJECT["project"]["dependencies"], *extras)}
    providers = importlib.metadata.packages_distributions()
    undeclared = {
        f"{name}: {top}"
        for name, file in module_files().items()
        for top in {module.split(".")[0] for _, module in imports(file)} - sys.stdlib_module_names - {"jaxprune"}
        if not declared & set(map(canonical, providers.get(top, [top])))
    }
    assert not undeclared


def test_every_module_exists_once():
    """The folders' own names are importable from the checkout, and would make a second copy of each module."""
    code = IMPORT_ALL + f"print([m for m in sys.modules if m.split('.')[0] in {LINKED}])"
    assert run(sys.executable, "-c", code).strip() == "[]"


@pytest.mark.parametrize("code", ["import sys, jaxprune", IMPORT_ALL], ids=["jaxprune", "every module"])
def test_imports_stay_light(code):
    heavy = ("torch", "transformers", "datasets", "matplotlib", "optuna", "lm_eval")
    assert run(sys.executable, "-c", f"{code}\nprint([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_annotations_are_checked_at_run_time(tiny):
    """jaxtyping's import hook is on: otherwise every shape in a signature is a comment."""
    import jax.numpy as jnp
    from jaxtyping import TypeCheckError

    from jaxprune import models

    with pytest.raises(TypeCheckError, match="tokens"):
        models.apply(tiny.params, tiny.tokens[0], tiny.cfg)
    with pytest.raises(TypeCheckError, match="tokens"):
        models.apply(tiny.params, tiny.tokens.astype(jnp.float32), tiny.cfg)


def test_no_committed_file_names_a_machine():
    path = re.compile(rb"(?<![\w.~$/-])/(?:home|root|Users|opt|work|mnt)/[\w.-]+")
    files = (ROOT / name for name in tracked())
    found = {str(f.relative_to(ROOT)): m[0] for f in files if f.is_file() if (m := path.search(f.read_bytes()))}
    assert not found


def test_wheel_has_every_file_once(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path))
    run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=tmp_path)

    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    files = [
        f"{package.replace('.', '/')}/{f.name}" for package, d in package_folders().items() for f in d.iterdir() if f.is_file()
    ]
    assert sorted(names) == sorted(files)

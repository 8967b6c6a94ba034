"""Facts of the project that no compiler keeps: pins against ranges, rules against modules, one version, no hosts."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
PACKAGES = ("p2pcoord", "node", "simulations")

# Installed by itself, with its dependencies: never pinned, never followed.
UNPINNED = {"torch"}
# (who asks, for what): pins that break somebody's range on purpose; constraints.txt says why.
OVERRIDDEN = {("libp2p", "fastecdsa")}


def pins() -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def requirements() -> list[Requirement]:
    lines = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        lines += extra
    return [Requirement(line) for line in lines]


def reached() -> dict[str, list[tuple[str, Requirement]]]:
    """Every distribution that our requirements reach in this environment, with who asks for it."""
    asked: dict[str, list[tuple[str, Requirement]]] = {}
    todo = [("p2pcoord", requirement) for requirement in requirements()]
    followed: set[tuple[str, frozenset[str]]] = set()
    while todo:
        asker, requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        asked.setdefault(name, []).append((asker, requirement))
        if name in UNPINNED or (name, extras) in followed:
            continue
        followed.add((name, extras))
        for line in importlib.metadata.requires(name) or []:
            deeper = Requirement(line)
            if deeper.marker is None or any(deeper.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append((name, deeper))
    return asked


def project_files() -> Iterator[Path]:
    """Files that are in version control or would be added to it; without git, all outside hidden folders."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        names = [name for name in listing.stdout.split("\0") if name]
    else:
        relative = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        names = [str(path) for path in relative if path.parts[0] == ".ci" or path.parts[0][0] != "."]
    yield from (ROOT / name for name in names if (ROOT / name).is_file())


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (ROOT / package).rglob("*.py")


def test_constraints_pin_exactly_what_the_project_reaches() -> None:
    assert set(pins()) == set(reached()) - UNPINNED


def test_every_pin_satisfies_everybody_who_asks_for_it() -> None:
    pinned = pins()
    broken = {
        (asker, name)
        for name, askers in reached().items()
        for asker, requirement in askers
        if name not in UNPINNED and not requirement.specifier.contains(pinned[name], prereleases=True)
    }
    assert broken == OVERRIDDEN


def test_the_environment_holds_the_pinned_versions() -> None:
    installed = {name: Version(importlib.metadata.version(name)) for name in pins()}
    assert installed == pins()


def test_every_third_party_import_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    owners = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = {node.module.partition(".")[0]}
            else:
                continue
            for module in modules - set(PACKAGES) - sys.stdlib_module_names - {"typing_extensions"}:
                if not {canonicalize_name(owner) for owner in owners.get(module, [])} & declared:
                    undeclared.add((str(path.relative_to(ROOT)), module))
    assert undeclared == set()


def test_no_file_names_the_host_of_a_package_registry() -> None:
    forbidden = [
        ".".join(parts)
        for parts in (
            ("pypi", "org"),
            ("pypi", "python", "org"),
            ("pythonhosted", "org"),
            ("download", "pytorch", "org"),
            ("conda", "anaconda", "org"),
            ("registry", "npmjs", "org"),
            ("deb", "debian", "org"),
            ("archive", "ubuntu", "com"),
        )
    ]
    found = {
        (str(path.relative_to(ROOT)), host)
        for path in project_files()
        for host in forbidden
        if host.encode() in path.read_bytes().lower()
    }
    assert found == set()


def test_the_console_script_is_the_command_line_of_node() -> None:
    assert PROJECT["scripts"] == {"p2pcoord": "node.cli:main"}


def test_every_package_of_the_tree_is_packaged() -> None:
    patterns = set(PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    assert patterns == {pattern for package in PACKAGES for pattern in (package, f"{package}.*")}
    folders = {path.parent for path in sources()}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    literals = {
        match.group(1)
        for path in sources()
        for match in re.finditer(r"^__version__\b[^=\n]*=\s*[\"'](.+?)[\"']", path.read_text(), re.MULTILINE)
    }
    assert literals <= {version}
    heading = "Unreleased" if Version(version).is_devrelease else version
    assert f"## [{heading}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(name: str) -> None:
    page = ROOT / name
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    missing = {target for target in targets if not (page.parent / target).exists()}
    assert missing == set()

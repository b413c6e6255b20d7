"""What is in the wheel and the source distribution: `python .ci/contents.py DIST_FOLDER`.

Raises on the first thing that is missing or should not be there.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sam_optax", "t5x_configs")
IN_SDIST = {
    *PACKAGES,
    *("tests", "examples", "benchmarks", "docs"),
    *("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml", ".gitignore"),
    "PKG-INFO",
}
CACHES = {"__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", ".git", ".venv", "runs"}


def check(dist: Path) -> None:
    """Check the only wheel and the only source distribution in `dist`."""
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    in_wheel = files_in_wheel(wheel)
    check_wheel(in_wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
        subprocess.run([*build, str(sdist)], check=True)
        (again,) = Path(folder).glob("*.whl")
        expect_same("a wheel built from the sdist", files_in_wheel(again), in_wheel)
    print(f"{wheel.name}: {len(in_wheel)} files, the same when built from {sdist.name}")


def check_wheel(found: set[str]) -> None:
    """Check that the wheel has the two packages, as they are here, and its own metadata."""
    (info,) = {top_level(name) for name in found if name.endswith(".dist-info/WHEEL")}
    metadata = {name for name in found if top_level(name) == info}
    expect_same("the wheel's packages", found - metadata, files_of_the_packages())
    names = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    expect_same("the wheel's metadata", metadata, {f"{info}/{name}" for name in names})
    needed = {"sam_optax/py.typed", "t5x_configs/README.md", "t5x_configs/sam.gin"}
    expect_same("the wheel", needed & found, needed)


def check_sdist(sdist: Path) -> None:
    """Check that the sdist has the tests and no more than it should."""
    with tarfile.open(sdist) as archive:
        names = [PurePosixPath(member.name) for member in archive.getmembers() if member.isfile()]
    expect_same("the sdist's folder", {n.parts[0] for n in names}, {sdist.name[: -len(".tar.gz")]})
    expect_same("the sdist's top level", {n.parts[1] for n in names}, IN_SDIST)
    caches = [str(n) for n in names if CACHES & set(n.parts) or n.suffix == ".pyc"]
    expect_same("the sdist's caches", set(caches), set())
    tests = {"tests/conftest.py", "tests/test_step.py"}
    expect_same("the sdist's tests", tests & {"/".join(n.parts[1:]) for n in names}, tests)


def files_in_wheel(wheel: Path) -> set[str]:
    """Return the paths of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def files_of_the_packages() -> set[str]:
    """Return the paths of what is in the packages here, without caches."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return {p.relative_to(ROOT).as_posix() for p in paths if not CACHES & set(p.parts)}


def top_level(name: str) -> str:
    """Return the first part of a path."""
    return name.split("/")[0]


def expect_same(what: str, found: set[str], expected: set[str]) -> None:
    """Raise if the sets differ, with the difference."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise SystemExit(f"{what}: missing {missing}, not expected {extra}")


if __name__ == "__main__":
    check(Path(sys.argv[1]))

"""The built package holds each file once, and `import fspace` stays light."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "fspace").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
}
HEAVY = [
    "botorch", "matplotlib", "pandas", "pyarrow", "polars", "sklearn.ensemble", "sklearn.gaussian_process",
    "sklearn.linear_model", "typer", "ray", "pyro", "posteriors", "fastapi", "uvicorn", "httpx",
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Names in the wheel and in the sdist; the wheel is built from the sdist, as a user's pip would."""
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: the backend is already in the test environment, so nothing is downloaded.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = archive.namelist()
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()], "the sdist holds links"
    in_sdist = [str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in members if m.isfile()]
    return in_wheel, in_sdist


def test_wheel_holds_the_package_once(built):
    in_wheel, _ = built
    metadata = {name for name in in_wheel if ".dist-info/" in name}
    assert Counter(name for name in in_wheel if name not in metadata) == Counter(PACKAGE)
    assert {name.split("/")[0] for name in in_wheel if name not in metadata} == {"fspace"}
    assert any(name.endswith("entry_points.txt") for name in metadata)
    assert any(name.endswith("LICENSE") for name in metadata)


def test_sdist_holds_the_package_once(built):
    _, in_sdist = built
    assert max(Counter(in_sdist).values()) == 1
    assert {name for name in in_sdist if name.startswith("fspace/")} == PACKAGE
    assert not [name for name in in_sdist if name.startswith(("kernels", "inference"))]
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= set(in_sdist)


@pytest.mark.parametrize("link", ["kernels", "inference"])
def test_root_links_lead_into_the_package(link):
    assert (ROOT / link).is_symlink()
    assert (ROOT / link).resolve() == ROOT / "fspace" / link


def test_import_is_light():
    code = f"import sys, fspace; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "import fspace also imports these heavy modules"


def test_public_names_are_there():
    """Every name that `fspace.__all__` promises can be had, the lazy ones too."""
    code = "import fspace; assert fspace.__all__; [getattr(fspace, name) for name in fspace.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_readme_commands_stand_alone_on_a_line():
    """.ci/run takes these lines from the README, so that CI runs what a reader is told to run."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.count('pip install -c constraints.txt -e ".[test]" && pytest') == 1
    assert lines.count("pip install -c constraints.txt -e . && fspace fit") == 1


def test_constraints_allow_what_pyproject_asks():
    """Each core dependency is pinned, at a version that pyproject.toml accepts."""
    import tomllib

    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    normal = {name.lower().replace("_", "-"): version.strip() for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, asked):
        name = requirement.name.lower().replace("_", "-")
        if name == "fspace":
            continue
        assert name in normal, f"{name} is not pinned in constraints.txt"
        assert normal[name] in requirement.specifier, f"{name}=={normal[name]} does not satisfy {requirement}"


def test_benchmark_page_shows_the_latest_results():
    """The figures in docs/benchmarks.md are those of benchmarks/results, made by the script."""
    command = [sys.executable, str(ROOT / "benchmarks" / "make_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_readme_example_runs(tmp_path):
    """The Python block of the README, as it stands, in an empty folder."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(block)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "diabetes.fspace").exists()
    assert (
        -7 < float(re.findall(r"-\d+\.\d+", done.stdout)[0]) < -4
    )  # nats; a constant Gaussian has about -5.7


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(script, tmp_path):
    """Each within two minutes, in an empty folder, without a word of warning."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(script), "picture.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr

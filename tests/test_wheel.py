"""What `pip install rime_pl` puts where: packages and settings files inside rime_pl, nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from rime_pl import __version__
from tests.stages.runs import scalars, stage_arguments

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]
SOURCES = ("rime_pl", "callbacks", "datamodules", "configs", "pyproject.toml", "README.md", "LICENSE")


def run(command: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = {**outside, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def wheel_of(source: Path, output: Path) -> Path:
    """Build a wheel without the network, with the setuptools of this environment."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    done = run([*pip, "--wheel-dir", str(output), str(source)], output)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = output.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    done = run([*pip, "--target", str(folder), str(wheel)], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def in_the_repository() -> set[str]:
    """What must be in the wheel, by its name there."""
    modules = {file.relative_to(ROOT) for file in (ROOT / "rime_pl").rglob("*.py")}
    modules |= {Path("rime_pl", file.relative_to(ROOT)) for file in (ROOT / "callbacks").rglob("*.py")}
    modules |= {Path("rime_pl", file.relative_to(ROOT)) for file in (ROOT / "datamodules").rglob("*.py")}
    modules |= {Path("rime_pl", file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    modules |= {Path("rime_pl", file.relative_to(ROOT)) for file in (ROOT / "datamodules").rglob("*.csv")}
    for name in ("*.css", "*.html", "*.js", "*.jinja", "cards/*.md"):
        modules |= {file.relative_to(ROOT) for file in (ROOT / "rime_pl").rglob(name)}
    return {module.as_posix() for module in modules}


def outside_a_checkout(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel and the packages of this environment, but not its editable rime_pl.

    -S skips the .pth files, through which an editable install is found.
    """
    paths = os.pathsep.join([str(installed), sysconfig.get_paths()["purelib"]])
    return run([sys.executable, "-S", *words], folder, PYTHONPATH=paths)


def test_everything_is_inside_rime_pl(wheel: Path) -> None:
    assert names_in(wheel) == in_the_repository()


def test_a_wheel_from_the_source_distribution_is_the_same(sources: Path, wheel: Path, tmp_path: Path) -> None:
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = run([sys.executable, "-c", build], sources)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "again").mkdir()
    assert names_in(wheel_of(unpacked, tmp_path / "again")) == names_in(wheel)


def test_the_version_is_the_same_everywhere() -> None:
    """In the package, in the citation, and as the newest heading of the changelog."""
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.index(f"\n## [{__version__}] - 2") == changes.index("\n## ")


def test_other_peoples_callbacks_and_datamodules_are_not_shadowed(installed: Path, tmp_path: Path) -> None:
    for name in ("callbacks", "datamodules", "configs"):
        done = outside_a_checkout(installed, tmp_path, "-c", f"import {name}")
        assert f"No module named '{name}'" in done.stderr
    where = "import rime_pl.callbacks, rime_pl.datamodules as ours; print(ours.__file__)"
    done = outside_a_checkout(installed, tmp_path, "-c", where)
    assert Path(done.stdout.strip()).is_relative_to(installed), done.stderr[-3000:]


def test_the_installed_command_takes_the_installed_settings(installed: Path, tmp_path: Path) -> None:
    told = outside_a_checkout(installed, tmp_path, "-m", "rime_pl", "--version")
    assert told.stdout == f"rime {__version__}\n"
    config = ["--config", "configs/tiny/cma.yaml", "--config", "configs/data/scenes/cma.yaml"]
    words = ["cma", "fit", *config, "--run_dir", "runs/x", "--print_config"]
    done = outside_a_checkout(installed, tmp_path, "-m", "rime_pl", *words)
    assert "path: data/scenes" in done.stdout, done.stderr[-3000:]


def test_the_installed_wheel_trains_three_steps(
    installed: Path, scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    """Without the checkout; `make release-check` does the same in an environment of its own."""
    run_dir = tmp_path / "run"
    words = stage_arguments("sft", scenes_corpus, micro_base, run_dir, "--trainer.max_epochs", "1")
    words[words.index("--config") + 1] = "configs/tiny/sft.yaml"
    done = outside_a_checkout(installed, tmp_path, "-m", "rime_pl", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(scalars(run_dir, "train/loss")) == 3 and (run_dir / "done.json").is_file()

"""What is installed is what stands in the repository: packages, data files, launch configurations."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from helpers.paths import ROOT

FOLDERS = ("analysis", "train", "recipes")
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def source_files(root: Path) -> list[Path]:
    """Every file of the package, relative to `root`, by the folders that links lead to, without Python's own caches."""
    files = (path for folder in ("headtune", *FOLDERS) for path in (root / folder).rglob("*") if path.is_file())
    return sorted(path.relative_to(root) for path in files if "__pycache__" not in path.parts)


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_to_the_folders(folder: str) -> None:
    link = ROOT / "headtune" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"


def test_every_folder_with_python_files_is_a_package() -> None:
    """setuptools finds packages by their __init__.py: a folder without one would be left out of the wheel."""
    folders = {path.parent for path in source_files(ROOT) if path.suffix == ".py"}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel. Each stands in it once."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names}


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist of the folder `source`, with the setuptools that is installed."""
    target.mkdir()
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    built = subprocess.run([sys.executable, "-c", call], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.iterdir()
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_its_data_and_nothing_else(tmp_path: Path) -> None:
    # Built from a copy: a stale build/ in the repository would end up in the wheel.
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".*", "build", "dist", "runs", "wandb", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skip, symlinks=True)
    expected = {
        f"headtune/{path.as_posix()}".replace("headtune/headtune/", "headtune/") for path in source_files(source)
    }

    wheel = contents(build("wheel", source, tmp_path / "wheel"))
    metadata = {name for name in wheel if ".dist-info/" in name}
    (entry_points,) = (name for name in metadata if name.endswith("/entry_points.txt"))
    assert b"headtune = headtune.cli.main:main" in wheel[entry_points]
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert any(name.startswith("headtune/recipes/data/") for name in wheel), "the quickstart's data is not in the wheel"
    missing = sorted(expected - wheel.keys())
    assert not missing, f"not in the wheel; list them under package-data in pyproject.toml: {missing}"
    # Catches a top-level `train`, `analysis` or `tests` too.
    surplus = sorted(wheel.keys() - metadata - expected)
    assert not surplus, f"in the wheel, but in none of the package folders: {surplus}"

    # An sdist has folders where the repository has links.
    shutil.rmtree(source / "build")
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not any(member.issym() or member.islnk() for member in archive)
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert contents(build("wheel", unpacked, tmp_path / "wheel_of_sdist")).keys() == wheel.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_says_when_and_how_to_launch_it(path: Path) -> None:
    text = path.read_text()
    config = yaml.safe_load(text)
    (line,) = (line for line in text.splitlines() if "accelerate launch" in line and "-m headtune.train" in line)
    assert f"accelerate launch --config_file accelerate_configs/{path.name} " in line
    assert line.endswith("-m headtune.train RECIPE.yaml [key=value ...]")
    # The launcher hands use_cpu on to a single process only; DeepSpeed it would switch off.
    needed = config["use_cpu"] and config["num_processes"] > 1 and config["distributed_type"] == "MULTI_GPU"
    assert ("ACCELERATE_USE_CPU=true" in line) == needed
    if config["num_machines"] > 1:
        assert all(option in line for option in ("--machine_rank", "--main_process_ip", "--main_process_port"))
    elif path.stem != "fsdp2_cpu_2":
        assert f"headtune train RECIPE.yaml --config_file accelerate_configs/{path.name}" in text
    if not config["use_cpu"]:
        assert "# Memory: " in text

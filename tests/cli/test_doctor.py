"""What `headtune doctor` finds, and that it shows no key."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from headtune.analysis.models import builtin
from headtune.analysis.tasks.loading import builtin_names
from headtune.cli import installation
from headtune.cli.main import main
from headtune.train.config.recipe import recipe_names

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, installation.Finding]]:
    capsys.readouterr()
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    findings = {
        one["name"]: installation.Finding(one["name"], one["found"], one["fix"], one["broken"])
        for one in found["findings"]
    }
    assert (code == 0) == found["works"] == (not any(one.broken for one in findings.values()))
    return code, findings


def test_this_installation_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found = examined(capsys)
    assert code == 0
    for package in installation.PACKAGES:
        assert found[package] == installation.Finding(package, importlib.metadata.version(package))
    assert found["data"].status == f"{len(recipe_names())} recipes, {len(builtin_names())} tasks"
    assert str(tmp_path / "cache") in found["cache"].status
    assert found["W&B"].status.startswith("offline, as WANDB_MODE says")
    assert not (tmp_path / "cache").exists(), "looking changes nothing"
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) and "\x1b" not in "".join(lines)
    assert all(line.split()[0] in ("ok", "lacks") for line in lines)


def test_a_key_is_told_and_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a1B2c3D4e5F6g7H8i9J0")
    assert main(["doctor"]) == 0
    printed = "".join(capsys.readouterr())
    assert "a key is there" in printed and "a token is there" in printed
    assert "online" not in next(
        found.status for found in installation.examine() if found.name == "hub"
    )  # nobody has tried
    assert KEY not in printed and "a1B2c3" not in printed


def test_a_package_that_is_missing_or_too_old(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = importlib.metadata.version

    def other(package: str) -> str:
        if package == "trl":
            raise importlib.metadata.PackageNotFoundError(package)
        return "4.57.1" if package == "transformers" else right(package)

    monkeypatch.setattr(importlib.metadata, "version", other)
    code, found = examined(capsys)
    assert code == 1
    assert found["trl"] == installation.Finding("trl", "not installed", 'pip install "trl>=1.0"', True)
    assert found["transformers"].status == "4.57.1, and headtune needs >=5.0" and found["transformers"].broken
    assert main(["doctor"]) == 1
    assert 'wrong  trl           not installed; fix: pip install "trl>=1.0"' in capsys.readouterr().out


def test_what_can_be_mended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(builtin, "is_installed", lambda name: False)
    monkeypatch.setattr(installation, "LITTLE_DISK", 1 << 60)
    monkeypatch.setattr(installation.shutil, "which", lambda tool: "/usr/bin/ninja" if tool == "ninja" else None)
    code, found = examined(capsys)
    assert code == 0, "a part lacks something; headtune works"
    assert found["model"].fix == builtin.BUILT_IN["smollm2-135m"].install
    assert found["cache"].fix == "make room, or set HEADTUNE_CACHE to another folder"
    assert "C++ compiler" in found["deepspeed"].fix or "pip install" in found["deepspeed"].fix
    monkeypatch.setenv("WANDB_MODE", "maybe")
    code, found = examined(capsys)
    assert code == 1 and found["W&B"].fix.startswith("choose one of offline")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    code, found = examined(capsys)
    assert code == 1 and found["cache"].broken


def test_a_cache_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    code, found = examined(capsys)
    assert code == 1 and found["cache"].fix == "set HEADTUNE_CACHE to another folder"

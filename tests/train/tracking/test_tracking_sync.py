"""`headtune track sync` lists what lies offline and uploads it by W&B's own command; a dead server costs no number."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from headtune.cli.commands import track
from headtune.cli.main import main
from headtune.train.tracking import wandb_offline
from headtune.train.tracking.tracker import Tracker
from headtune.train.tracking.wandb_offline import OfflineRun, batches
from helpers.small_runs import STEPS, write_recipe

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no server and no setting of the user who runs the tests."""
    for name in ("RANK", "WANDB_MODE", "WANDB_API_KEY", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()  # what earlier tests have set up holds their server's address
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder `runs` with the runs `a` (steps 0 to 4) and `b`."""
    for name, steps in (("a", 5), ("b", 1)):
        options: dict[str, Any] = {"project": "p", "group": "g", "job_type": "train", "wandb_mode": "offline"}
        with Tracker(tmp_path / "runs" / name, name, {"seed": 0}, **options) as tracker:
            for step in range(steps):
                tracker.log({"train/loss": 1.0 / (step + 1)}, step)
            tracker.table("long", ["text"], [["x" * 40_000], ["y" * 40_000]])
            tracker.config({"text": "z" * 100_000})  # longer than a block of the file
    return tmp_path / "runs"


def listed(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["track", "sync", str(folder), "--json", *words])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_list_says_what_would_go_where(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(two, capsys, "--dry-run")
    rows = {row["name"]: row for row in found["runs"]}
    assert {name: (row["job_type"], row["group"], row["project"], row["steps"]) for name, row in rows.items()} == {
        "a": ("train", "g", "p", 4),
        "b": ("train", "g", "p", 0),
    }
    assert all(row["state"] == "ready" and row["upload_bytes"] > 80_000 for row in rows.values())
    assert found["bytes"] == sum(row["upload_bytes"] for row in rows.values()) and found["key"] is False
    assert main(["track", "sync", str(two)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "2 runs," in said
        and "to http://127.0.0.1:9 (as WANDB_BASE_URL says), project p." in said
        and "no exported weights" in said
    )
    assert "Nothing was uploaded" in said and "WANDB_API_KEY" in said


def test_the_server_is_told_with_who_named_it_and_parts_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert track._host_from() == "as WANDB_BASE_URL says"
    monkeypatch.delenv("WANDB_BASE_URL")
    default = wandb.Settings.model_fields["base_url"].default
    for address, source in ((default, "W&B's default"), ("http://own:8080", "as W&B's settings say")):
        setup = SimpleNamespace(settings=SimpleNamespace(base_url=address))
        monkeypatch.setattr("wandb.setup", lambda setup=setup: setup)
        assert track._host_from() == source
    run = wandb_offline.OfflineRun(Path("runs/a/wandb/offline-run-1-x"), "x", "a", "p")
    track._print_list(Path("runs"), [run, run], 1, 2048, "http://own:8080")
    assert "To upload: 1 run in 2 parts" in " ".join(capsys.readouterr().out.split())


def test_long_records_are_read_whole_and_a_cut_file_up_to_there(two: Path) -> None:
    (file,) = two.glob("a/wandb/offline-run-*/run-*.wandb")
    whole = list(wandb_offline.records(file))
    long = [entry.value_json for record in whole for entry in record.config.update if entry.key == "text"]
    assert [json.loads(text) for text in long] == ["z" * 100_000]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert 0 < len(list(wandb_offline.records(file))) < len(whole)
    assert wandb_offline.read(file).state == "going on"  # no end, and written just now
    file.write_bytes(b"nothing of W&B's")
    assert wandb_offline.read(file).state == "unreadable"


def test_uploading_wants_a_key_and_a_server_that_answers(
    two: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["track", "sync", str(two), "--yes"]) == 2
    assert "no W&B key for http://127.0.0.1:9; set WANDB_API_KEY, or run: wandb login" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://user:s3cret@127.0.0.1:9")
    assert main(["track", "sync", str(two), "--yes"]) == 1
    printed = capsys.readouterr()
    assert "http://127.0.0.1:9 does not answer" in printed.err and "s3cret" not in printed.out + printed.err
    assert main(["track", "sync", str(two / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_what_failed_is_tried_again_and_what_is_synced_is_not(
    two: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own command is replaced: what it would do to a server is W&B's matter, the marker it leaves is not."""
    asked: list[str] = []
    broken = {"b"}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "wandb", "sync"]
        folder = Path(command[4])
        name = folder.parent.parent.name
        asked.append(name)
        if name in broken:
            return subprocess.CompletedProcess(command, 1, "", f"wandb: ERROR no luck with https://u:{KEY}@host\n")
        (file,) = folder.glob("run-*.wandb")
        file.with_suffix(".wandb.synced").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wandb_offline.subprocess, "run", run)
    monkeypatch.setattr(track, "_require_reached", lambda _host: None)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["track", "sync", str(two), "--yes"]) == 1
    said = capsys.readouterr().out
    assert "a: uploaded" in said and "b: wandb: ERROR no luck" in said and KEY not in said
    broken.clear()
    assert {row["name"]: row["state"] for row in listed(two, capsys, "--yes")["runs"]} == {"a": "synced", "b": "synced"}
    assert main(["track", "sync", str(two), "--yes"]) == 0
    assert asked == ["a", "b", "b"] and "Nothing to upload" in capsys.readouterr().out


def test_the_parts_of_a_resumed_run_go_together_in_order() -> None:
    def part(name: str, id: str, state: str = "ready") -> OfflineRun:
        return OfflineRun(Path(name), id, state=state)

    runs = [part("1", "a"), part("2", "b"), part("3", "a"), part("4", "c", "going on"), part("5", "d", "synced")]
    assert [[str(one.folder) for one in parts] for parts in batches(runs)] == [["1", "3"], ["2"]]


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_that_answers_anything_is_reached() -> None:
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        track._require_reached(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def mute_server() -> Iterator[str]:
    """Takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in held:
            connection.close()


@pytest.mark.slow
def test_a_training_loses_nothing_to_a_server_that_never_answers(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In its own process, since the whole of it must end: W&B may also hold up the exit.
    path = write_recipe(tmp_path, tiny_llama, tracking={"group": "g"})
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    with mute_server() as mute:
        monkeypatch.setenv("WANDB_BASE_URL", mute)
        command = [sys.executable, "-c", "from headtune.cli.main import main; raise SystemExit(main())"]
        # W&B left to itself waits for ever.
        done = subprocess.run([*command, "train", str(path)], capture_output=True, text=True, input="")
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stderr and KEY not in done.stdout + done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["state"] == "done"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    (kept,) = [one for one in wandb_offline.offline_runs(run) if one.steps]
    assert kept.steps == STEPS and kept.state == "ready" and kept.group == "g"

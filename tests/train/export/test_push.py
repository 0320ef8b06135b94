"""An export goes to a hub: what is listed and nothing else, private, with the token in the header and nowhere else."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import sha256_of, write_json
from headtune.cli.main import main
from headtune.train.export.push import push_plan

TOKEN = "hf_" + "a1B2" * 8


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs, on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, bool] = {}  # name -> private
        self.sent: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.refuse: int | None = None  # status of every commit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path, self.headers.get("Authorization")))
        repo = self.path.removeprefix("/api/models/").split("?")[0]
        if repo not in self.server.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.answer(200, {"id": repo, "private": self.server.repos[repo], "tags": [], "siblings": []})

    def do_POST(self) -> None:
        self.server.requests.append(("POST", self.path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match self.path.split("?")[0].split("/")[2:]:
            case ["repos", "create"]:
                data = json.loads(body)
                name = f"{data['organization']}/{data['name']}" if data.get("organization") else data["name"]
                self.server.repos[name] = data.get("private", data.get("visibility") == "private")
                return self.answer(200, {"url": f"{self.server.url}/{name}"})
            case ["validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            case ["models", *_, "preupload", "main"]:
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                return self.answer(200, {"files": [f | {"shouldIgnore": False, "oid": None} for f in files]})
            case ["models", *_, "commit", "main"]:
                if self.server.refuse is not None:
                    return self.answer(self.server.refuse, {"error": f"no, {TOKEN}"})
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        self.server.sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = {
                    "commitUrl": f"{self.server.url}/me/cities/commit/c0ffee",
                    "commitOid": "c0ffee",
                    "hookOutput": "",
                }
                return self.answer(200, commit)
        return self.answer(404, {"error": self.path})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """What headtune export leaves, in small, and a file that somebody put beside it."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# cities\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    write_json(folder / "export.json", {"files": {path.name: sha256_of(path) for path in folder.iterdir()}})
    (folder / "notes.txt").write_text("mine")
    return folder


def output(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err, "the token is shown"
    return " ".join((captured.out + captured.err).split())


def test_without_yes_it_says_what_would_be_sent_and_asks_nothing(
    hub: Hub, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(export), "me/cities"]) == 0
    text = output(capsys)
    assert f"to {hub.url}/me/cities, private" in text and "nothing was sent" in text
    for name in ("README.md", "config.json", "export.json", "model.safetensors │ 256"):
        assert name in text
    assert "not sent, no part of the export: notes.txt" in text
    assert hub.requests == []


def test_it_sends_what_was_proven_to_a_private_repository(
    hub: Hub, export: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        assert main(["push", str(export), "me/cities", "--yes"]) == 0
    assert f"sent: {hub.url}/me/cities, commit c0ffee" in output(capsys)
    assert hub.repos == {"me/cities": True}
    names = ["README.md", "config.json", "export.json", "model.safetensors"]
    assert hub.sent == {name: (export / name).read_bytes() for name in names}
    assert {header for _, path, header in hub.requests if "validate" not in path} == {f"Bearer {TOKEN}"}
    assert TOKEN not in caplog.text
    # Again: the repository is there, and private as before.
    assert main(["push", str(export), "me/cities", "--yes", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sent"]["private"] is True and list(result["files"]) == names
    assert sum("create" in path for _, path, _ in hub.requests) == 1


def test_public_is_asked_for(hub: Hub, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(export), "me/open", "--public", "--yes"]) == 0
    assert hub.repos == {"me/open": False}
    hub.sent.clear()
    output(capsys)
    assert main(["push", str(export), "me/open", "--yes"]) == 2
    assert "me/open is there and public; give --public if that is meant" in output(capsys)
    hub.repos["me/closed"] = True
    assert main(["push", str(export), "me/closed", "--yes", "--public"]) == 2
    assert "me/closed is there and private; leave out --public" in output(capsys)
    assert hub.sent == {}


def test_a_hub_that_refuses_or_is_away(
    hub: Hub, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, code in ((403, 2), (413, 1)):
        hub.refuse = status
        hub.repos.clear()
        assert main(["push", str(export), "me/cities", "--yes"]) == code
        text = output(capsys)
        assert f"refuses ({status}" in text and "the repository me/cities was made, and is empty" in text
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(export), "me/cities", "--yes"]) == 1
    assert "http://127.0.0.1:9 does not answer" in output(capsys)


def test_offline_and_without_a_token(
    hub: Hub, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(export), "me/cities", "--yes"]) == 2
    assert "there is no token" in output(capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(export), "me/cities", "--yes"]) == 2
    assert "HF_HUB_OFFLINE is set: nothing is sent" in output(capsys)
    assert hub.requests == []


def test_what_is_no_proven_export_is_refused(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("cities", "names no owner"), ("me/ci ties", "is no name of a repository")):
        with pytest.raises(InputError, match=message):
            push_plan(export, name)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match=r"no export: it holds no export\.json.*headtune export"):
        push_plan(run, "me/cities")
    weights = export / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"other")
    with pytest.raises(CheckError, match="is not the file that was exported"):
        push_plan(export, "me/cities")
    weights.unlink()
    with pytest.raises(InputError, match=r"lacks model\.safetensors"):
        push_plan(export, "me/cities")
    (tmp_path / "elsewhere").write_bytes(content)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link"):
        push_plan(export, "me/cities")
    weights.unlink()
    weights.write_bytes(content)
    (export / "config.json").write_text(json.dumps({"note": TOKEN}))
    record = json.loads((export / "export.json").read_text())
    record["files"]["config.json"] = sha256_of(export / "config.json")
    write_json(export / "export.json", record)
    with pytest.raises(InputError, match="holds an access token"):
        push_plan(export, "me/cities")

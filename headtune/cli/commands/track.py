"""`headtune track sync`: what lies offline, where it would go, and its upload by W&B's own command."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import Add, completed, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headtune.train.tracking.wandb_offline import OfflineRun

REACHED_WITHIN = 10  # seconds that a server has to answer: `wandb sync` itself would try for hours
WHAT = (
    "Uploaded are numbers, recipes with their paths, tables of prompts and generations, heat maps, head sets and "
    "adapters; no exported weights."
)
KEY = "set WANDB_API_KEY, or run: wandb login"


def add_parsers(add: Add) -> None:
    """Add this module's command."""
    p = add(
        "track",
        "list W&B runs that were kept offline, and upload them",
        "track sync",
        "track sync runs/study --dry-run",
        "track sync runs/study --yes",
    )
    p.add_argument("action", choices=("sync",))
    folder = p.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    completed(folder, "folder")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--yes", action="store_true", help="upload; without it nothing leaves this machine")
    group.add_argument("--dry-run", action="store_true", help="list what --yes would upload, as without it")
    p.set_defaults(do=track_command)


def track_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.errors import InputError
    from headtune.train.tracking.wandb_offline import batches, offline_runs

    if not arguments.folder.is_dir():
        raise InputError(f"{str(arguments.folder)!r} is no folder; give one that holds runs, such as runs")
    runs = offline_runs(arguments.folder)
    waiting = batches(runs)
    size = sum(part.upload_bytes for parts in waiting for part in parts)
    host, has_key = _server()
    if not arguments.json:
        _print_list(arguments.folder, runs, len(waiting), size, host)
    failed: dict[str, str] = {}
    if arguments.yes and waiting:
        if not has_key:
            raise InputError(f"there is no W&B key for {host}; {KEY}, and give the same command again")
        _require_reached(host)
        failed = _upload(waiting, quiet=arguments.json)
        runs = offline_runs(arguments.folder)
    if arguments.json:
        listed = [
            dataclasses.asdict(run) | {"folder": str(run.folder), "error": failed.get(run.id, "")} for run in runs
        ]
        print_json({"host": host, "key": has_key, "bytes": size, "runs": listed})
    elif waiting and not arguments.yes:
        how = "with --yes" if has_key else f"with --yes, after a key: {KEY}"
        print(f"Nothing was uploaded; give the same command {how}.")
    return 1 if failed else 0


def _print_list(folder: Path, runs: Sequence[OfflineRun], n_waiting: int, size: int, host: str) -> None:
    from rich.table import Table

    from ..console import console

    if not runs:
        print(f"{folder}: no offline runs")
        return
    table = Table()
    for title in ("folder", "run", "job type", "group", "project"):
        table.add_column(title, overflow="fold")
    table.add_column("steps", justify="right")
    table.add_column("size", justify="right")
    table.add_column("state")
    for run in runs:
        words = (_place(run.folder, folder), run.name or run.id, run.job_type, run.group, run.project)
        note = f"{run.state}, {len(run.missing)} artifact files missing" if run.missing else run.state
        table.add_row(*(_plain(word) for word in words), str(run.steps), _size(run.upload_bytes), note)
    console.print(table)
    if n_waiting == 0:
        print("Nothing to upload.")
        return
    projects = sorted({"/".join(filter(None, (run.entity, run.project))) for run in runs if run.state == "ready"})
    n_parts = sum(run.state == "ready" for run in runs)
    counted = f"{n_waiting} {'run' if n_waiting == 1 else 'runs'}"
    if n_parts > n_waiting:
        counted += f" in {n_parts} parts (a resumed run has several)"
    server = f"{host} ({_host_from()})"
    print(f"To upload: {counted}, {_size(size)}, to {server}, project {', '.join(projects)}. {WHAT}")


def _place(run: Path, folder: Path) -> str:
    """The folder that a W&B run belongs to, below the one that was listed."""
    run_folder = run.parent.parent
    return str(run_folder.relative_to(folder)) if run_folder.is_relative_to(folder) else run.name


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "?" for c in text))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


def _server() -> tuple[str, bool]:
    """The server's address without credentials, and whether there is a key for it."""
    from urllib.parse import urlsplit

    from headtune.train.tracking.wandb_run import mode_by_key, silence

    # Not to be asked what a login would do: whether there is a key is the question here.
    mode = os.environ.pop("WANDB_MODE", None)
    try:
        silence()
        import wandb

        address = urlsplit(str(wandb.setup().settings.base_url))
        return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl(), mode_by_key() == "online"
    finally:
        if mode is not None:
            os.environ["WANDB_MODE"] = mode


def _host_from() -> str:
    """Who named the server."""
    if os.environ.get("WANDB_BASE_URL"):
        return "as WANDB_BASE_URL says"
    import wandb

    default = wandb.Settings.model_fields["base_url"].default
    return "W&B's default" if wandb.setup().settings.base_url == default else "as W&B's settings say"


def _require_reached(host: str) -> None:
    """Refuse to start what would wait for a server that does not answer."""
    import urllib.error
    import urllib.request

    from headtune.analysis.utils.errors import CheckError

    try:
        urllib.request.urlopen(host, timeout=REACHED_WITHIN).close()
    except urllib.error.HTTPError:  # it answers
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise CheckError(f"{host} does not answer ({reason}); nothing was uploaded, give the command again") from None


def _upload(waiting: Sequence[Sequence[OfflineRun]], quiet: bool) -> dict[str, str]:
    """Sync one run after the other; returns run id -> what went wrong."""
    from headtune.train.tracking.wandb_offline import sync

    from ..console import console

    failed = {}
    for number, parts in enumerate(waiting, start=1):
        name = parts[0].name or parts[0].id
        try:
            error = sync(parts)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted after {number - 1} of {len(waiting)} runs; the same command goes on with the others"
            ) from None
        if error:
            failed[parts[0].id] = error
        if not quiet:
            console.print(f"{number}/{len(waiting)} {name}: {error or 'uploaded'}", markup=False)
    if failed and not quiet:
        console.print(f"{len(failed)} runs were not uploaded; the same command tries those again", markup=False)
    return failed

"""Send an export or an adapter to the Hugging Face hub: what was proven, nothing else, private unless asked otherwise.

Sent are the files that export.json lists, with export.json itself, if they are still what it says of them by SHA-256.
Anything else in the folder stays. A token comes from the environment (HF_TOKEN) or huggingface_hub's login and is never
an argument; HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import sha256_of
from headtune.analysis.utils.paths import check_links_stay_inside
from headtune.analysis.utils.secrets import redact, secret_in
from headtune.analysis.utils.state_files import read_state

RECORD = "export.json"
_TEXTS = (".md", ".json", ".jinja", ".txt")


@dataclass(frozen=True)
class PushPlan:
    """What would be sent.

    Attributes:
        files: name and size in bytes of each file, in order of name.
        left_out: files of the folder that are no part of the export.
        what: `checkpoint`, or the type of the adapter.
        endpoint: the hub's address.
    """

    folder: Path
    repo: str
    public: bool
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    what: str
    endpoint: str

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def push_plan(folder: Path | str, repo: str, public: bool = False) -> PushPlan:
    """Check what is to be sent; nothing is asked of the hub.

    Args:
        folder: what `headtune export` wrote, with or without `--adapter`.
        repo: `owner/name`.

    Raises:
        InputError: no export, a file of it that is missing, a link out of the folder, a secret in a text, a name that
            the hub does not take.
        CheckError: a file is not the one that was exported and proven.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no name of a repository on the hub ({str(error).splitlines()[0]})") from None
    if repo.count("/") != 1:
        raise InputError(f"{repo!r} names no owner; give OWNER/NAME")
    if not (folder / RECORD).is_file():
        fix = f"headtune export {folder} OUT first" if (folder / "recipe.yaml").is_file() else "give such a folder"
        raise InputError(f"{str(folder)!r} is no export: it holds no {RECORD}, which headtune export writes; {fix}")
    record = read_state(folder / RECORD)
    listed = record.get("files")
    if not isinstance(listed, dict) or not all(Path(name).name == name for name in listed):
        raise InputError(f"{str(folder / RECORD)!r} lists no files; export the run anew")
    check_links_stay_inside(folder, "export", tuple(listed))
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{str(folder)!r} lacks {name}, which {RECORD} lists; export the run anew")
        if sha256_of(path) != digest:
            raise CheckError(f"{str(path)!r} is not the file that was exported and proven; export the run anew")
    for name in (*listed, RECORD):
        if Path(name).suffix in _TEXTS and (what := secret_in((folder / name).read_text("utf-8", errors="replace"))):
            raise InputError(f"{str(folder / name)!r} holds {what}, and would be sent; remove it and export anew")
    names = sorted({*listed, RECORD})
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in names)
    files = tuple((name, (folder / name).stat().st_size) for name in names)
    adapter = record.get("adapter")
    what = f"{adapter} adapter" if adapter else "checkpoint"
    return PushPlan(folder, repo, public, files, tuple(left_out), what, _endpoint())


def push(plan: PushPlan) -> dict[str, Any]:
    """Make the repository, private unless the plan says public, and send the files in one commit.

    Returns:
        `{"repo", "url", "commit", "private", "files": {name: bytes}}`.

    Raises:
        InputError: offline mode, no token, a public repository where a private one was meant, or the hub refuses.
        CheckError: the hub does not answer, or fails; the message says what is there by then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set: nothing is sent; unset it and give the same command again")
    if get_token() is None:
        raise InputError(f"there is no token for {plan.endpoint}; set HF_TOKEN, or run: hf auth login")
    api = HfApi(endpoint=plan.endpoint)
    http_errors: Any = HfHubHTTPError.__bases__  # of the HTTP library that this version of huggingface_hub uses
    done = "nothing was sent"
    try:
        # A repository that is there stays as private or public as it is.
        try:
            private = bool(api.model_info(plan.repo, timeout=30).private)
        except RepositoryNotFoundError:
            private = not plan.public
            api.create_repo(plan.repo, private=private)
            done = f"the repository {plan.repo} was made, and is empty"
        if private == plan.public:
            there, fix = ("private", "leave out --public") if private else ("public", "give --public if that is meant")
            raise InputError(f"{plan.repo} is there and {there}; {fix}, or give another name")
        files = [CommitOperationAdd(name, str(plan.folder / name)) for name, _ in plan.files]
        commit = api.create_commit(plan.repo, files, commit_message=f"Upload {plan.what} by headtune")
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = redact((error.server_message or str(error)).strip().splitlines()[0])[:200]
        line = f"{plan.endpoint} refuses ({status}: {reason}); {done}"
        if status in (401, 403):
            raise InputError(f"{line}; the token needs the right to write to {plan.repo}") from None
        raise CheckError(line) from None
    except http_errors as error:
        reason = redact(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)[:200]
        raise CheckError(f"{plan.endpoint} does not answer ({reason}); {done}, give the command again") from None
    return {
        "repo": plan.repo,
        "url": f"{plan.endpoint}/{plan.repo}",
        "commit": commit.oid,
        "private": private,
        "files": dict(plan.files),
    }


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

"""What comes from elsewhere stays inside its folder and runs nothing; what is secret is not written down."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from headtune.analysis.heads.head_set import provenance
from headtune.analysis.reports import heat_maps
from headtune.analysis.utils import paths
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.secrets import is_secret_name, redact, require_no_secrets, secret_in
from headtune.train.config import recipe
from headtune.train.continual import learner as continual
from headtune.train.export.adapter import export_adapter
from headtune.train.export.model_card import Origin, adapter_card
from headtune.train.runs.load_run import load_run
from headtune.train.tracking import tracker as tracking
from headtune.train.trainer import checkpoints
from helpers.paths import ROOT
from helpers.small_runs import DISTIL, head_set, train, write_recipe, write_sequence

HF = "hf_" + "Qx7Lm2Vb9Tz4" * 3
WANDB = "9f3ac1d27be45806" * 2 + "feedc0de"
PLANTED = {
    "HF_TOKEN": HF,
    "WANDB_API_KEY": WANDB,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+planted",
    "OPENAI_API_KEY": "sk-planted0123456789abcdefghij",
    "DATABASE_PASSWORD": "correct-horse-planted",
}
IN_REMOTE = "remote-planted-4711"  # in the URL of the git remote


@pytest.fixture(autouse=True)
def nothing_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret of the user who runs the tests."""
    for name in [name for name in os.environ if is_secret_name(name)]:
        monkeypatch.delenv(name)


# --- what the source may not do ---------------------------------------------------------------------------------------


def unsafe(source: str) -> list[str]:
    """What in a module's text loads code. ruff (make lint) finds eval, exec, shells, unsafe YAML and mktemp."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            found += [m for m in modules if m.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve")]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            bad = called == "torch.load" and keywords.get("weights_only") != "True"
            bad |= keywords.get("allow_pickle", "False") != "False" or keywords.get("trust_remote_code") == "True"
            found += [called] * bad
    return found


def test_no_source_loads_code() -> None:
    folders = ("analysis", "train", "headtune")
    found = {path: unsafe(path.read_text(encoding="utf-8")) for name in folders for path in (ROOT / name).rglob("*.py")}
    assert len(found) > 100
    assert not {path: what for path, what in found.items() if what}


def test_the_search_finds_what_it_is_for() -> None:
    for line in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle",
        "from pickle import loads",
        "import numpy, dill",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ):
        assert len(unsafe(line)) == 1, line
    assert unsafe("torch.load(p, weights_only=True)\nload(name, trust_remote_code=trusted)\nmodel.eval()") == []


# --- secrets in text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://user:pa55word@host/model", "pa55word"),
        ("get https://ghp-like-token@host/x.git now", "ghp-like-token"),
        ("s3://id:k3y@bucket/x", "k3y"),
        ("https://host/x?a=1&access_token=t0ken&b=2", "t0ken"),
        ("https://host/x?X-Amz-Signature=5ig", "5ig"),
        (f"tags: [{HF}]", HF),
        ("ghp_0123456789abcdefghijABCDEFGHIJ", "0123456789"),
        ("AKIAIOSFODNN7EXAMPLE", "IOSFODNN"),
        ("key: sk-proj-0123456789abcdefABCDEF", "0123456789"),
    ],
)
def test_secrets_are_seen_and_struck_out(text: str, secret: str) -> None:
    assert secret_in(text) is not None
    clean = redact(text)
    assert secret not in clean and "***" in clean
    assert secret_in(clean) is None and redact(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "/data/models/llama@main",
        "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",  # a commit
        "https://host/path?page=2",
        "mail someone@host.org",
        "task-risk-assessment-of-many-things",
        "runs/sk-learn-relation-experiments-2",
        "en_sk-parallel-corpus-Train-2024",
        "training.max_steps=3",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secret_in(text) is None
    assert redact(text) == text


def test_values_of_the_environment_are_secrets_where_their_names_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LONGER_TOKEN", HF + "-and-more")
    monkeypatch.setenv("SSL_KEY_FILE", str(tmp_path))  # a place, no secret
    monkeypatch.setenv("SORT_KEY", "name")  # a word
    monkeypatch.setenv("EDITOR_NAME", "a-long-enough-value")
    text = " ".join([*PLANTED.values(), HF + "-and-more", str(tmp_path), "name", "a-long-enough-value"])
    clean = redact(text)
    assert not [value for value in PLANTED.values() if value in clean] and "-and-more" not in clean
    assert clean.endswith(f"{tmp_path} name a-long-enough-value")
    assert secret_in(f"x {WANDB} y") == "the value of the environment variable WANDB_API_KEY"


def test_a_password_that_is_a_key_of_every_recipe_refuses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "training")
    require_no_secrets({"training": {"max_steps": 3}}, "recipe")
    with pytest.raises(InputError, match="POSTGRES_PASSWORD"):
        require_no_secrets({"name": "training"}, "recipe")
    with pytest.raises(InputError, match="an access token"):
        require_no_secrets({HF: 1}, "recipe")


def test_the_command_of_a_file_holds_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-in-environment")
    monkeypatch.setattr(sys, "argv", ["headtune", "identify", "https://u:planted@host/m", "planted-in-environment"])
    command = provenance()["command"]
    assert command == "headtune identify https://***@host/m ***HF_TOKEN***"


def test_a_model_card_holds_no_credentials() -> None:
    origin = Origin(
        run="x", method="lofit", base="https://u:planted@host/m", recipe={"tags": [HF]}, training_data={"name": HF}
    )
    card = adapter_card(origin, None)
    assert HF not in card and "planted" not in card and "https://***@host/m" in card


# --- secrets in recipes -----------------------------------------------------------------------------------------------

PLACES: list[tuple[dict[str, Any], str]] = [
    ({"heads": {"from": f"https://user:{HF}@host/m"}}, "heads.from"),
    ({"task": {"train": f"https://planted:{HF}@host/x.jsonl"}}, "task.train"),
    ({"tracking": {"tags": ["a", HF], "wandb": "disabled"}}, "tracking.tags.1"),
    ({"tracking": {"group": WANDB}}, "tracking.group"),
    ({"training": {"hub_token": "any-word"}}, "training.hub_token"),
    ({"training": {"model_init_kwargs": {"token": "any-word"}}}, "training.model_init_kwargs.token"),
    ({"name": f"run-{HF}"}, "name"),
    ({"tracking": HF}, "tracking"),  # of a wrong type as well, which would show the value
    ({f"x-{HF}": 1}, "x-***"),
]


@pytest.mark.parametrize(("changes", "place"), PLACES, ids=[place for _, place in PLACES])
def test_a_recipe_with_a_secret_is_refused_without_showing_it(
    changes: dict[str, Any],
    place: str,
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    assert train(write_recipe(tmp_path, tiny_llama, **changes)) == 2
    said = "".join(capfd.readouterr())
    assert f": {place}" in said and "remove it" in said and len(said.strip().splitlines()) == 1
    assert not [secret for secret in (HF, WANDB, "any-word") if secret in said]
    assert not (tmp_path / "run").exists()


def test_a_secret_in_an_override_is_refused(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(write_recipe(tmp_path, tiny_llama), f"tracking.tags=[{HF}]") == 2
    said = "".join(capfd.readouterr())
    assert "tracking.tags.0 holds an access token" in said and HF not in said
    assert train(write_recipe(tmp_path, tiny_llama), f"model.name=https://user:{HF}@host/m") == 2
    said = "".join(capfd.readouterr())
    assert "model.name holds a URL with a user name or password" in said and HF not in said


def test_tokens_of_a_tokenizer_are_no_secrets() -> None:
    data = {"recipe": "lora", "training": {"pad_token": "<pad>", "eos_token": "<eos>"}}
    assert recipe.parse(data).training == data["training"]


# --- a run with secrets all around ------------------------------------------------------------------------------------

COMMANDS = """
import sys
from headtune.cli.main import main
recipe, run, out = sys.argv[1:]
sys.argv = ["headtune", "train", recipe]
assert main(["train", recipe]) == 0
assert main(["export", run, out, "--adapter"]) == 0
assert main(["export", run, out + "-whole", "--prompts", "2"]) == 0
"""


@pytest.mark.slow
def test_no_byte_of_a_run_or_an_export_holds_a_secret(tmp_path: Path, tiny_llama: Path) -> None:
    """W&B offline, in a git repository whose remote has a password, with everything it writes kept below tmp_path."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    git = ["git", "-C", str(work), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", f"https://user:{IN_REMOTE}@host/x.git"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    path = write_recipe(work, tiny_llama, tracking={"wandb": "offline", "tags": ["a-tag-to-find"]})
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG"))}
    environment |= PLANTED | {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMANDS, str(path), str(work / "run"), str(work / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr

    secrets = [*PLANTED.values(), IN_REMOTE]
    assert not [secret for secret in secrets if secret in done.stdout + done.stderr]
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file != work / ".git" / "config"]
    held = {str(file) for file in files for secret in secrets if secret.encode() in file.read_bytes()}
    assert held == set()
    logs = list(work.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(logs) == 3  # of the training and of each export
    assert all(b"a-tag-to-find" in log.read_bytes() for log in logs), "what W&B wrote cannot be searched for plain text"
    names = {file.relative_to(work).as_posix() for file in files if file.is_relative_to(work)}
    expected = {"run/run.json", "run/recipe.yaml", "run/metrics.jsonl", "out/README.md", "out-whole/README.md"}
    assert expected <= names


def test_what_wandb_is_given_holds_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(tracking, "start", lambda mode, run_dir, options, resume_id: given.update(options))
    config = {"path": f"https://u:{HF}@host", "list": [HF], "api_key": "x", "n": 1, f"k-{HF}": 2}
    words: dict[str, Any] = {"tags": ["a", HF], "group": f"https://u:{HF}@host", "wandb_mode": "offline"}
    with tracking.Tracker(tmp_path, f"name-{HF}", config, **words):
        pass
    assert HF not in json.dumps(given)
    assert given["config"] == {"path": "https://***@host", "list": ["***"], "n": 1, "k-***": 2}
    assert given["tags"] == ["a", "***"]


@pytest.mark.parametrize("wanted", [None, "true"])
def test_wandb_reports_no_errors_to_its_makers_unless_it_is_told_to(
    wanted: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # it is read when W&B starts: what matters is set before
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    if wanted:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", wanted)
    with tracking.Tracker(tmp_path, "x", {}, wandb_mode="offline"):
        assert os.environ["WANDB_ERROR_REPORTING"] == (wanted or "false")


def test_an_artifact_has_a_name_that_wandb_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifacts: list[Any] = []
    run = SimpleNamespace(
        id="x",
        log_artifact=artifacts.append,
        summary={},
        finish=lambda **_: None,
        settings=SimpleNamespace(sync_dir=""),
    )
    monkeypatch.setattr(tracking, "start", lambda *_: run)
    (tmp_path / "file").write_text("x")
    with tracking.Tracker(tmp_path / "run", "x", {}, wandb_mode="offline") as tracker:
        tracker.artifact(tmp_path / "file", "my run: ../ü-adapter", "adapter")
    assert [artifact.name for artifact in artifacts] == ["my_run__..__-adapter"]


# --- names and paths --------------------------------------------------------------------------------------------------

ODD_NAMES = ["../../x", "a/b", "..", ".", "", " x", "a\\b", "a\nb", "a\x00b", "\x1b[2J", "x" * 300]


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name])
def test_a_run_is_not_named_out_of_its_folder(name: str) -> None:
    with pytest.raises(InputError, match=r"name .* (plain name|bytes)") as caught:
        recipe.parse({"recipe": "lora", "name": name})
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_task_is_not_named_out_of_the_run(name: str, tmp_path: Path) -> None:
    learner: Any = object.__new__(continual.Learner)
    steps = [{**step, "name": name} for step in write_sequence(tmp_path)[:1]] + write_sequence(tmp_path)[1:]
    block = {"replay": {"count": 2}, "distil": dict(DISTIL)}
    content = {"recipe": "seekr", "task": {"sequence": steps}, "method": block, "output_dir": str(tmp_path / "run")}
    learner.recipe = recipe.parse(content)
    learner.stages = [continual.Stage(name, None, [])]  # type: ignore[arg-type]
    place = learner.place(0)
    assert place.parent == tmp_path / "run" / "tasks" and place.resolve().parent == place.parent.resolve()
    assert place.name.isprintable()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "C:\\x", "..\\x", "", ".", "a\nb"])
def test_a_name_in_a_file_does_not_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not inside"):
        paths.safe_join(tmp_path, name, "index")
    assert paths.safe_join(tmp_path, "a/b.bin", "index") == tmp_path / "a" / "b.bin"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere/model.safetensors"}}, "'../elsewhere"),
        ({"metadata": {}, "weight_map": {"lm_head.weight": "/etc/passwd"}}, "'/etc/passwd'"),
        ({"metadata": {}, "weight_map": {"lm_head.weight": 3}}, "names 3"),
        ({"metadata": {}}, "not an index"),
        ([], "not an index"),
    ],
)
def test_an_index_that_leads_out_of_the_model_folder_is_refused(
    content: Any, said: str, tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (tmp_path / "elsewhere").mkdir()
    (model / "model.safetensors").rename(tmp_path / "elsewhere" / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(content))
    assert train(write_recipe(tmp_path, model)) == 2
    error = capfd.readouterr().err.strip()
    assert said in error and "model.safetensors.index.json" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_scores_of_a_head_set_do_not_name_files(tmp_path: Path) -> None:
    identity = {"name": "m", "n_layers": 3, "n_heads": 4, "head_dim": 8}
    scores = torch.rand(3, 4).numpy()
    folder = tmp_path / "a" / "b"
    heat_maps.heat_maps(
        {"../../escaped": scores, "/tmp/escaped": scores, "dla.target": scores}, head_set(identity), folder
    )
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {"a/b/heatmaps/dla.target.png"}


@pytest.mark.parametrize("id", ["../../x", "a/b", "", "a b"])
def test_the_id_of_a_run_to_continue_is_an_id(id: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wandb_id"):
        tracking.Tracker(tmp_path / "run", "x", {}, wandb_mode="offline", resume_id=id)
    assert not (tmp_path / "run").exists()


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert train(write_recipe(folder, tiny_llama)) == 0
    return folder / "run"


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / "run")
    return to / "run"


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "adapter", "evaluation.json", "recipe.yaml", "adapter/extra.txt"]
)
def test_a_link_out_of_a_run_is_not_followed(name: str, done: Path, tmp_path: Path) -> None:
    run, elsewhere = copied(done, tmp_path), tmp_path / "elsewhere"
    (run / name).rename(elsewhere) if (run / name).exists() else elsewhere.write_text("private")
    (run / name).symlink_to(elsewhere)
    for use in (load_run, lambda run: export_adapter(run, tmp_path / "out")):
        with pytest.raises(InputError, match="leads out of"):
            use(run)
    assert not (tmp_path / "out").exists()


def test_links_within_a_run_and_to_it_are_followed(done: Path, tmp_path: Path) -> None:
    run = copied(done, tmp_path)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.rename(run / "weights")
    weights.symlink_to("../weights")
    (tmp_path / "link").symlink_to(run)
    export_adapter(tmp_path / "link", tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.safetensors").is_symlink()
    assert load_run(tmp_path / "link")[2].recipe == "lofit"


@pytest.mark.parametrize("target", ["../private", "/nowhere/at/all", "loop"])
def test_a_link_out_of_an_artifact_is_not_uploaded(target: str, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("private")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "loop").symlink_to(target)
    tracker = tracking.Tracker(tmp_path / "run", "x", {}, wandb_mode="disabled")
    with tracker, pytest.raises(InputError, match="leads out of"):
        tracker.artifact(folder, "adapter", "model")


# --- pickles ----------------------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_an_adapter_that_is_a_pickle_is_refused(done: Path, tmp_path: Path) -> None:
    run = copied(done, tmp_path)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "ran")}, run / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match=r"without adapter_model\.safetensors"):
        load_run(run)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_a_pickle_is_refused(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(tmp_path / "ran")}, model / "pytorch_model.bin")
    assert train(write_recipe(tmp_path, model)) == 2
    error = capfd.readouterr().err.strip()
    assert "pytorch_model.bin" in error and "safetensors" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_runs_no_code_even_with_right_checksums(name: str, done: Path, tmp_path: Path) -> None:
    """Whoever can change a file can change its checksum: then what reads it must not run it."""
    run = copied(done, tmp_path)
    settings = yaml.safe_load((run / "recipe.yaml").read_text()) | {"output_dir": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings))
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"state": "failed"}))
    shutil.rmtree(run / "checkpoint-4")
    checkpoint = run / "checkpoint-2"
    assert (checkpoint / name).is_file()
    torch.save({"x": Payload(tmp_path / "ran")}, checkpoint / name)
    checkpoints.mark(checkpoint, 2)
    outcome: Any
    try:
        outcome = train(run / "recipe.yaml", "--resume")
    except Exception as error:
        outcome = error
    assert not (tmp_path / "ran").exists()
    assert (outcome == 0) == (name == "training_args.bin"), outcome  # which nothing reads


def test_a_safetensors_file_with_code_in_its_metadata_is_data(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"x": "__import__('os').mkdir('ran')"})
    paths.check_weights_are_safe(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]

"""What is given in place of a model: each is refused in a line that names it, and none is measured as another model."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from headtune.analysis.models.architectures import ARCHITECTURES
from headtune.analysis.models.hub import local_only
from headtune.analysis.models.loading import load_model, load_plain, load_tokenizer, wrap_model
from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.memory.model_shape import shape_of
from helpers.tiny import D_MODEL, save_tiny, tiny_model, tiny_tokenizer

Weights = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- weights and configuration ----------------------------------------------------------------------------------------


def _with(*names: str, size: int = D_MODEL) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.ones(size) for name in names}


ATTENTION = "model.layers.{}.self_attn.{}_proj.bias"
NO_PLACE: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], str]] = {
    # name: (family, config, change of the weights, change of the saved configuration, message)
    "output biases": (
        "llama",
        {},
        _with(*(ATTENTION.format(layer, "o") for layer in range(3))),
        {},
        "holds 3 weights that its configuration has no place for, such as model.layers.0.self_attn.o_proj.bias; "
        "set attention_bias to true in config.json (and save zeros for the biases it then lacks)",
    ),
    "all biases": (
        "llama",
        {"attention_bias": True},
        None,
        {"attention_bias": False},
        "such as model.layers.0.self_attn.k_proj.bias; set attention_bias to true in config.json",
    ),
    "of the MLP": ("llama", {}, _with("model.layers.1.mlp.down_proj.bias"), {}, "set mlp_bias to true in config.json"),
    "norms": ("phi", {"qk_layernorm": True}, None, {"qk_layernorm": False}, "set qk_layernorm to true in config.json"),
    "no flag": ("qwen2", {}, _with(ATTENTION.format(0, "o")), {}, "no key of a qwen2's config.json announces them"),
    "more layers": ("llama", {}, None, {"num_hidden_layers": 2}, "set num_hidden_layers to 3 in config.json (it is 2)"),
    "layers of gpt2": ("gpt2", {}, None, {"n_layer": 1}, "set n_layer to 3 in config.json (it is 1)"),
    "other sizes": ("llama", {}, None, {"intermediate_size": 24}, "mlp.down_proj.weight is [32, 48] in its file and"),
    "fewer": ("llama", {}, None, {"num_hidden_layers": 4}, "lacks 9 of its weights, such as model.layers.3."),
}


@pytest.mark.parametrize("case", NO_PLACE)
def test_weights_that_the_configuration_does_not_announce(case: str, tmp_path: Path) -> None:
    family, config, change, saved, message = NO_PLACE[case]
    folder = save_tiny(tmp_path / "edited", family, **config)
    rewrite(folder, change or dict)
    configure(folder, **saved)
    for load in (load_plain, load_model):
        assert message in refusal(lambda load=load: load(str(folder)))  # type: ignore[misc]


HARMLESS = {
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight"),
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.1.attn.masked_bias"),
    "gpt_neox": (
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
    ),
}


@pytest.mark.parametrize("family", HARMLESS)
def test_buffers_of_old_versions_are_no_weights(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "old", family)
    rewrite(folder, _with(*HARMLESS[family], size=1))
    load_plain(str(folder))


def test_tied_weights_may_be_in_the_file_or_not(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    before = load_plain(str(folder))[0].state_dict()
    rewrite(folder, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    after = load_plain(str(folder))[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("prefix", "family", "message"),
    [
        (
            "module.",
            "llama",
            "'module.', put there by DistributedDataParallel or DeepSpeed; save what is in it",
        ),
        ("_orig_mod.", "llama", "'_orig_mod.', put there by torch.compile; save what is in it: model._orig_mod.save"),
        ("base_model.model.", "llama", "'base_model.model.', put there by PEFT; merge first"),
        ("model.", "gpt2", "'model.', put there by a module around the model, such as Lightning's"),
        ("student.", "llama", "'student.', put there by a module around the model"),
    ],
)
def test_names_with_a_wrapper_in_front(prefix: str, family: str, message: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "wrapped", family)
    rewrite(folder, lambda weights: {prefix + name: value for name, value in weights.items()})
    assert f"every weight's name begins with {message}" in refusal(lambda: load_plain(str(folder)))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside a model"])
def test_an_adapter_is_no_model(whole: bool, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    if whole:  # transformers would load the base that the adapter names, and not this model
        save_tiny(folder, "llama")
    adapter = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(tiny_llama)
    adapter.save_pretrained(folder)
    message = refusal(lambda: load_plain(str(folder)))
    assert f"is a PEFT adapter (LORA) of {str(tiny_llama)!r}, not a whole model; merge it" in message
    assert message.endswith(f"or give {str(tiny_llama)!r}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_pointers(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "lfs", "llama")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert f"{name} is a git-lfs pointer, not the file itself; run `git lfs pull`" in refusal(
        lambda: load_plain(str(folder))
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # of gpt2 transformers makes an empty tokenizer
def test_a_folder_without_a_tokenizer(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "mute", family)
    for path in folder.glob("token*"):
        path.unlink()
    for load in (load_plain, load_tokenizer):
        message = refusal(lambda load=load: load(str(folder)))  # type: ignore[misc]
        assert "is a folder without a tokenizer; put it there: AutoTokenizer.from_pretrained(BASE).save_pr" in message
    (folder / "tokenizer.json").write_text("{}")
    assert "its tokenizer " in refusal(lambda: load_plain(str(folder)))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bare", "llama")
    (folder / "config.json").unlink()
    assert "is a folder without config.json" in refusal(lambda: load_plain(str(folder)))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class AcmeConfig(LlamaConfig):
    model_type = "llama"
class AcmeModel(LlamaForCausalLM):
    config_class = AcmeConfig
"""


def write_task(folder: Path) -> str:
    path = folder / "cities.jsonl"
    rows = [{"prompt": f"Some cities in {s}:\n- {a[0]}\n-", "subject": s, "answers": a, "previous": a[:1]} for s, a in (
        ("Italy", ["Rome", "Milan", "Naples"]), ("Japan", ["Tokyo", "Osaka", "Kyoto"]), ("Spain", ["Madrid", "Vigo"]),
    )]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_code_of_its_own_is_run_where_it_is_allowed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setitem(ARCHITECTURES, "acme", ARCHITECTURES["llama"])
    folder, task = save_tiny(tmp_path / "acme", "llama"), write_task(tmp_path)
    (folder / "code_acme.py").write_text(CODE)
    classes = {"AutoConfig": "code_acme.AcmeConfig", "AutoModelForCausalLM": "code_acme.AcmeModel"}
    configure(folder, model_type="acme", auto_map=classes)
    for command in (["evaluate", str(folder)], ["identify", str(folder), "--out", str(tmp_path / "heads")]):
        assert main([*command, "--task", task]) == 2
        line = capsys.readouterr().err
        assert "comes with code of its own" in line and "model.trust_remote_code=true" in line
    assert "--trust-remote-code" in line
    assert main(["evaluate", str(folder), "--task", task, "--trust-remote-code", "--json"]) == 0
    assert f"code that comes with {folder} runs with your rights" in caplog.text


# --- encoders, and logits that are no numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("llama", {"is_causal": False}, "is_causal is false"),
        ("llama", {"is_encoder_decoder": True}, "an encoder with a decoder"),
        ("bert", {}, "a bert whose is_decoder is false"),
    ],
)
def test_encoders_are_refused_by_their_configuration(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "encoder", family)
    configure(folder, **changes)
    for load in (load_plain, load_model):
        message = refusal(lambda load=load: load(str(folder)))  # type: ignore[misc]
        assert reason in message and "give a decoder" in message


def test_encoders_are_refused_by_what_they_compute() -> None:
    model = tiny_model("gemma3_text", use_bidirectional_attention=True)
    assert "its logits depend on later tokens" in refusal(lambda: wrap_model(model, tiny_tokenizer(), "embedding"))


def test_weights_that_are_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, task = save_tiny(tmp_path / "nan", "llama"), write_task(tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda weights: weights | {key: weights[key] * float("nan")})
    for command in (["evaluate", str(folder)], ["identify", str(folder), "--out", str(tmp_path / "heads")]):
        assert main([*command, "--task", task]) == 2
        assert "logits are not finite in float32; its weights are damaged" in capsys.readouterr().err
    assert not (tmp_path / "heads").exists()


def test_an_overflow_in_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, task = save_tiny(tmp_path / "large", "gemma3_text"), write_task(tmp_path)
    norm = "model.layers.1.post_feedforward_layernorm.weight"
    rewrite(folder, lambda weights: weights | {norm: torch.full((D_MODEL,), 3e4)})
    recipe = ["lofit/one_to_many", f"model.name={folder}", f"task.train={task}", "heads={list: [[0,1]]}"]
    for command in (
        ["identify", str(folder), "--task", task, "--dtype", "float16", "--out", str(tmp_path / "heads")],
        ["train", *recipe, "model.dtype=float16", f"output_dir={tmp_path / 'run'}", "--dry-run"],
    ):
        assert main(command) == 2
        assert "logits are not finite in float16; use bfloat16 or float32" in capsys.readouterr().err
    load_model(str(folder), "bfloat16")


def test_an_overflow_on_the_longest_prompt_alone(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from headtune.analysis.identify import pipeline
    from headtune.analysis.tasks.loading import load_task

    real = pipeline.probe_logits
    monkeypatch.setattr(pipeline, "probe_logits", lambda *inputs: real(*inputs) / 0)
    task = load_task(write_task(tmp_path))
    message = refusal(lambda: pipeline.identify(load_model(str(tiny_llama), "float16", "cpu"), task))
    assert "logits are not finite in float16; use bfloat16 or float32" in message


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a hub is asked that answers nobody: it closes each connection."""
    paths: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    paths.append(connection.recv(1000).split(b" ")[1].decode())

        threading.Thread(target=listen, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield paths
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub model that is whole in the local cache."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    save_tiny(repository / "snapshots" / "abc", "llama")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "acme/tiny"


def test_a_cached_model_needs_one_question_to_the_hub(
    cached: str, questions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for load in (load_model, load_plain, load_tokenizer, shape_of):
        del questions[:]
        load(cached)
        assert questions == ["/api/models/acme/tiny"], load
        assert "acme/tiny: the hub does not answer" in caplog.text and "loaded from the local cache" in caplog.text
        caplog.clear()
    assert not constants.HF_HUB_OFFLINE


def test_a_model_that_is_not_cached_is_refused_after_one_question(
    cached: str, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for load in (load_plain, load_tokenizer):
        assert "neither a folder nor reachable on the hub" in refusal(lambda load=load: load("acme/other"))  # type: ignore[misc]
    assert questions == ["/api/models/acme/other"] * 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_only(cached, None)
    assert "nor in the local hub cache (offline mode)" in refusal(lambda: local_only("acme/other", None))
    assert len(questions) == 2


def test_a_cached_adapter_is_no_model(cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = next((tmp_path / "hub").glob("*/snapshots/abc"))
    (snapshot / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "acme/base"}')
    assert "is a PEFT adapter (LORA) of 'acme/base'" in refusal(lambda: load_plain(cached))

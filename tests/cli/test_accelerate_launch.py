"""Launching through accelerate: what a file may say, one message however many processes, no hang when one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from headtune.analysis.utils import processes
from headtune.analysis.utils.errors import InputError
from headtune.cli import accelerate_launch, exits
from headtune.cli.accelerate_config import LaunchFile, check
from headtune.cli.main import main
from helpers.paths import ROOT
from helpers.small_runs import write_recipe
from helpers.tiny import save_tiny

CONFIGS = ROOT / "accelerate_configs"
TWIN = CONFIGS / "ddp_cpu_2.yaml"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_shipped_file_passes() -> None:
    files = {path.stem: check(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    assert len(files) == 15
    engines = {name: file.engine for name, file in files.items()}
    assert {name for name, engine in engines.items() if engine == "NO"} == {"cpu", "single_gpu"}
    assert {name.split("_")[0] for name, engine in engines.items() if engine == "DEEPSPEED"} >= {
        "zero1",
        "zero2",
        "zero3",
    }
    assert engines["fsdp2"] == engines["fsdp2_cpu_2"] == "FSDP" and engines["multi_node_zero3"] == "DEEPSPEED"
    assert all(file.use_cpu == ("cpu" in name) for name, file in files.items())
    assert all(file.n_processes == 2 for name, file in files.items() if name.endswith("_cpu_2"))
    assert files["multi_node_ddp"].processes_here == 8
    beside = files["zero3_cpu_2"].deepspeed_file
    assert beside is not None and beside.is_file()
    assert json.loads(beside.read_text())["zero_optimization"]["stage3_param_persistence_threshold"] == 0


ZERO3 = {"deepspeed_config": {"zero_stage": 3, "zero3_save_16bit_model": True}, "distributed_type": "DEEPSPEED"}
FSDP = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}


def write(folder: Path, *changes: dict[str, Any]) -> Path:
    keys: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
    for change in changes:
        block = next((key for key in change if key.endswith("_config") and isinstance(keys.get(key), dict)), None)
        keys |= {key: value for key, value in change.items() if key != block}
        if block is not None:
            keys[block] = keys[block] | change[block]
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def test_what_passes(tmp_path: Path) -> None:
    assert check(write(tmp_path)).n_processes == 2
    assert check(write(tmp_path, ZERO3)).engine == "DEEPSPEED"
    assert check(write(tmp_path, FSDP)).engine == "FSDP"
    # The prefix may be left out, as accelerate allows.
    assert check(write(tmp_path, FSDP, {"fsdp_config": {"offload_params": False}})).engine == "FSDP"
    (tmp_path / "bare.yaml").write_text("distributed_type: NO\n")  # YAML reads it as false
    assert check(tmp_path / "bare.yaml").n_processes == 1
    following = {"deepspeed_config": ZERO3["deepspeed_config"] | {"gradient_accumulation_steps": "auto"}}
    assert check(write(tmp_path, ZERO3, following)).engine == "DEEPSPEED"
    assert check(write(tmp_path, {"dynamo_config": {"dynamo_backend": "INDUCTOR"}})).n_processes == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{"num_proceses": 2}], ["'num_proceses'", "did you mean 'num_processes'"]),
        ([{"num_processes": "two"}], ["num_processes", "'two'"]),
        ([{"num_processes": True}], ["num_processes", "True"]),
        ([{"num_processes": 3, "num_machines": 2}], ["3", "multiple of num_machines"]),
        ([{"distributed_type": "MULTI_CPU"}], ["MULTI_CPU starts one process", "MULTI_GPU"]),
        ([{"distributed_type": "MEGATRON_LM"}], ["'MEGATRON_LM'", "DEEPSPEED"]),
        ([{"distributed_type": "NO"}], ["num_processes is 2", "MULTI_GPU"]),
        ([{"compute_environment": "AMAZON_SAGEMAKER"}], ["LOCAL_MACHINE"]),
        ([{"use_cpu": "yes please"}], ["use_cpu", "'yes please'"]),
        ([{"mixed_precision": "bf16"}], ["'bf16'", "training.bf16=true"]),
        ([{"mixed_precision": False}], ["mixed_precision is False", "'no' in quotes"]),
        ([{"gpu_ids": 0}], ["gpu_ids is 0", "in quotes"]),
        ([{"main_process_port": "29511"}], ["main_process_port is '29511'"]),
        ([{"same_network": "perhaps"}], ["same_network", "'perhaps'"]),
        ([{"deepspeed_config": {"zero_stage": 2}}], ["deepspeed_config does nothing under distributed_type MULTI_GPU"]),
        ([ZERO3, {"fsdp_config": {"fsdp_version": 2}}], ["fsdp_config does nothing"]),
        ([ZERO3, {"deepspeed_config": {"zero_stag": 3}}], ["deepspeed_config.zero_stag", "did you mean 'zero_stage'"]),
        ([ZERO3, {"deepspeed_config": {"zero_stage": "three"}}], ["zero_stage", "'three'"]),
        ([ZERO3, {"deepspeed_config": {"zero_stage": 4}}], ["stage", "4"]),
        ([ZERO3, {"deepspeed_config": {"zero3_save_16bit_model": False}}], ["not be saved", "zero3_save_16bit_model"]),
        ([ZERO3, {"deepspeed_config": {"offload_param_device": "gpu"}}], ["offload_param_device", "'gpu'", "nvme"]),
        ([ZERO3, {"deepspeed_config": {"deepspeed_config_file": "x.json"}}], ["zero_stage stands beside"]),
        ([ZERO3, {"num_machines": 2}], ["deepspeed_multinode_launcher: standard"]),
        ([FSDP, {"fsdp_config": {"fsdp_shard": 1}}], ["fsdp_config.fsdp_shard"]),
        ([FSDP, {"fsdp_config": {"fsdp_version": 1}}], ["fsdp_version must be 2"]),
        ([FSDP, {"fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}}], ["FULL_STATE_DICT", "not written"]),
        ([FSDP, {"fsdp_config": {"fsdp_auto_wrap_policy": "NO_WRAP"}}], ["TRANSFORMER_BASED_WRAP", "NO_WRAP"]),
    ],
)
def test_what_is_refused(changes: list[dict[str, Any]], words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, *changes)
    with pytest.raises(InputError) as caught:
        check(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", ""])
def test_a_file_that_holds_no_keys(text: str, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(InputError, match=r"not YAML at line|must hold keys"):
        check(tmp_path / "launch.yaml")


def test_a_deepspeed_file_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found from any folder; accelerate would look for it in the current one."""
    path = write(tmp_path, {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}})
    with pytest.raises(InputError, match=r"ds.json' cannot be read"):
        check(path)
    (tmp_path / "ds.json").write_text("[3]")
    with pytest.raises(InputError, match="holds no JSON object"):
        check(path)
    zero: dict[str, Any] = {"stage": 3}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(InputError, match=r"stage3_gather_16bit_weights_on_model_save in 'ds.json'"):
        check(path)
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    given: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", given.append)
    assert accelerate_launch.start(check(path), ["r.yaml"]) == 0
    assert given[0].deepspeed_config_file == str(tmp_path / "ds.json")
    assert given[0].training_script == "headtune.train" and given[0].training_script_args == ["r.yaml"]
    path.write_text(path.read_text() + "mixed_precision: 'no'\n")
    with pytest.raises(InputError, match="mixed_precision stands beside"):
        check(path)


# --- machine and recipe -----------------------------------------------------------------------------------------------


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_gpus_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(InputError, match=r"2 processes .* there are 0; use a file for the CPU"):
        accelerate_launch.require_machine(check(CONFIGS / "ddp.yaml"))
    with pytest.raises(InputError, match="1 processes"):
        accelerate_launch.require_machine(check(CONFIGS / "single_gpu.yaml"))
    accelerate_launch.require_machine(check(TWIN))
    with_gpus(monkeypatch, 2)
    accelerate_launch.require_machine(check(CONFIGS / "ddp.yaml"))
    with pytest.raises(InputError, match=r"4 processes .* there are 2; lower num_processes"):
        accelerate_launch.require_machine(check(write(tmp_path, {"num_processes": 4})))
    with pytest.raises(InputError, match=r"there are 2 \(gpu_ids: 0,1\)"):
        accelerate_launch.require_machine(check(write(tmp_path, {"gpu_ids": "0,1", "num_processes": 3})))
    with pytest.raises(InputError, match="main_process_ip is missing"):
        accelerate_launch.require_machine(check(CONFIGS / "multi_node_ddp.yaml"))
    with pytest.raises(InputError, match="turns FSDP into DDP"):
        accelerate_launch.require_machine(check(CONFIGS / "fsdp2_cpu_2.yaml"))


@pytest.fixture
def never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_file: LaunchFile, _words: object) -> int:
        raise AssertionError("a process would have been started")

    monkeypatch.setattr(accelerate_launch, "start", start)


@pytest.mark.usefixtures("never_starts")
def test_a_wrong_recipe_is_refused_before_anything_starts(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    more = write(tmp_path, {"use_cpu": True}, ZERO3, {"deepspeed_config": {"gradient_accumulation_steps": 4}})
    for file, words, expected in (
        (TWIN, ["sede=1"], "did you mean 'seed'"),
        (TWIN, ["task.train=nowhere.jsonl"], "'nowhere.jsonl'"),
        (TWIN, ["--resume"], "nothing to resume"),
        (TWIN, [f"output_dir={tmp_path}"], "is not empty"),
        (tmp_path / "none.yaml", [], "does not exist"),
        (more, [], "gradient_accumulation_steps is 4"),
    ):
        assert main(["train", str(recipe), "--config_file", str(file), *words]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("headtune: ") == len(captured.err.splitlines()) == 1 and not captured.out
        assert expected in captured.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", str(recipe), "--config_file", str(TWIN)]) == 2
    assert "already done" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_end_of_one_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerate_launch._code({0: 2}) == 2 and accelerate_launch._code({1: 1, 0: -signal.SIGTERM}) == 1
    assert not capsys.readouterr().err  # each said so itself
    assert accelerate_launch._code({1: -signal.SIGKILL, 0: -signal.SIGTERM}) == 137
    assert "rank 1 was ended by SIGKILL (as the system does when memory runs out)" in capsys.readouterr().err
    assert accelerate_launch._code({1: -signal.SIGTERM}, {signal.SIGTERM}) == 0  # rank 0 said so
    with pytest.raises(KeyboardInterrupt, match="interrupted by SIGTERM before the run began"):
        accelerate_launch._code({0: -signal.SIGTERM}, {signal.SIGTERM})
    # What other tests have started, such as a loader's workers, is not of this launch.
    monkeypatch.setattr("psutil.Process.children", lambda process: [])
    with accelerate_launch._passing_on(signal.SIGTERM), pytest.raises(KeyboardInterrupt, match="before the run began"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(exits, "LAUNCHER_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    assert exits.exit_with("no memory left", 1) == 1
    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "headtune: rank 1: no memory left\n"
    assert processes.is_lost_peer(RuntimeError("[/x/gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert not processes.is_lost_peer(RuntimeError("size mismatch"))


# --- two processes ----------------------------------------------------------------------------------------------------


def command(recipe: Path) -> list[str]:
    return [str(Path(sys.executable).parent / "headtune"), "train", str(recipe), "--config_file", str(TWIN)]


ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_what_only_the_model_refutes_is_said_once(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, heads={"list": [[0, 9]]})
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command(recipe), capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stderr.count("headtune: ") == 1 and "L0H9" in done.stderr and "rank 1: " not in done.stderr
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_while_one_rank_measures_ends_all_well(tmp_path: Path) -> None:
    """Rank 0 answers it; the other one waits in a collective, where it cannot."""
    model = save_tiny(tmp_path / "model", "llama", max_position_embeddings=4096)  # room for the long lists
    recipe = write_recipe(tmp_path, model, evaluation={"n_items": 200, "batch_size": 1})
    log = tmp_path / "log"
    with log.open("w") as said:
        process = subprocess.Popen(
            command(recipe), stdout=said, stderr=said, cwd=tmp_path, env=os.environ | ENVIRONMENT
        )
    try:
        while "evaluating the base model" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, log.read_text()
        lines = [line for line in log.read_text().splitlines() if line.startswith("headtune: ")]
        assert len(lines) == 1 and "interrupted by SIGTERM" in lines[0], lines
        assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "interrupted"
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    finally:
        process.kill()

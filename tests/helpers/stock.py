"""Exports are read back by plain transformers in a process of its own, whose imports take longer than the reading.

Here that process is forked from one that has done these imports and nothing else, so it has never seen headtune either.
`RUN` is what a test takes that wants a new interpreter all the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUN = subprocess.run

_PARENT = """
import json, os, sys, traceback
import torch, transformers.models.llama.modeling_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(order["stdout"], os.O_WRONLY), 1)
        os.dup2(os.open(order["stderr"], os.O_WRONLY), 2)
        sys.argv, code = ["-c", *order["words"]], 1
        try:
            exec(compile(order["script"], "<string>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Plain:
    """Runs scripts in processes that have imported transformers and nothing of headtune."""

    def __init__(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._parent = subprocess.Popen([sys.executable, "-I", "-c", _PARENT], **pipes)

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of `python -I -c SCRIPT WORDS` with its output captured."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            for file in files:
                file.touch()
            order = {"script": command[3], "words": command[4:], "stdout": str(files[0]), "stderr": str(files[1])}
            self._parent.stdin.write(json.dumps(order) + "\n")
            self._parent.stdin.flush()
            code = int(self._parent.stdout.readline())
            return subprocess.CompletedProcess(command, code, *(file.read_text(encoding="utf-8") for file in files))

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()


@contextmanager
def forked() -> Iterator[Any]:
    """A `subprocess.run` that forks what loads an export, and starts everything else."""
    started: list[Plain] = []

    def run(command: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(command, list) or command[:3] != [sys.executable, "-I", "-c"]:
            return RUN(command, *args, **options)
        if not started:
            started.append(Plain())
        return started[0].run(command)

    try:
        yield run
    finally:
        for plain in started:
            plain.close()

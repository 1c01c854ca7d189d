"""Continue prompts with vLLM: python with_vllm.py MODEL_DIR REQUEST.json ANSWER.json"""

import json
import sys
from pathlib import Path


def main(directory: str, request: str, answer: str) -> None:
    import vllm  # here: vLLM starts processes that import this file

    asked = json.loads(Path(request).read_text())
    model = vllm.LLM(
        directory,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=asked["max_new_tokens"])
    found = [
        list(each.outputs[0].token_ids)
        for each in model.generate(asked["prompts"], greedy, use_tqdm=False)
    ]
    Path(answer).write_text(json.dumps({"version": vllm.__version__, "tokens": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])

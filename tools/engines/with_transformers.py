"""Continue prompts with transformers: python with_transformers.py MODEL_DIR REQUEST.json
ANSWER.json
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def main(directory: str, request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in asked["prompts"]:
        ids = tokenizer(prompt, return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=asked["max_new_tokens"], do_sample=False)[0]
        found.append(whole[ids["input_ids"].shape[1] :].tolist())
    Path(answer).write_text(json.dumps({"version": transformers.__version__, "tokens": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])

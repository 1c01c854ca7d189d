"""Continue prompts with MLX (the package mlx-lm): python with_mlx.py MODEL_DIR REQUEST.json
ANSWER.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from mlx_lm import load, stream_generate


def main(directory: str, request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    model, tokenizer = load(directory)
    found = [
        [
            each.token
            for each in stream_generate(
                model, tokenizer, prompt, max_tokens=asked["max_new_tokens"]
            )
        ]
        for prompt in asked["prompts"]
    ]
    Path(answer).write_text(json.dumps({"version": version("mlx-lm"), "tokens": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])

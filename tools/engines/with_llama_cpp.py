"""Continue prompts with llama.cpp (package xllamacpp): python with_llama_cpp.py FILE.gguf
REQUEST.json ANSWER.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import xllamacpp


def main(file: str, request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    server = xllamacpp.Server(parameters)
    found = []
    for prompt in asked["prompts"]:
        wanted = {
            "prompt": prompt,
            "n_predict": asked["max_new_tokens"],
            "temperature": 0,
            "logprobs": 1,
        }
        said = server.handle_completions(wanted)
        said = said if isinstance(said, dict) else json.loads(said)
        found.append([each["id"] for each in said["choices"][0]["logprobs"]["content"]])
    Path(answer).write_text(
        json.dumps({"version": f"xllamacpp {version('xllamacpp')}", "tokens": found})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

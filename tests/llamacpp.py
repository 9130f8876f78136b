"""llama.cpp asked about a GGUF file, in a process of its own: it aborts on a file that it cannot use.

`python tests/llamacpp.py FILE` reads {"text", "messages"} from stdin and writes {"ids", "logprobs", "chat"}: the tokens of
the text, the log-probability of every next token by its number, and the messages by the file's template.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

VOCAB = 1024
"""More tokens than any model here has."""


def ask(file: Path, text: str, messages: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """See the module."""
    told = json.dumps({"text": text, "messages": messages or []})
    command = [sys.executable, __file__, str(file)]
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"llama.cpp stopped with {done.returncode}: {done.stderr[-1500:]}"
    return json.loads(done.stdout.splitlines()[-1])


def _answer(file: str, text: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, 256, 1
    params.warmup, params.verbosity, params.cpuparams.n_threads = False, 0, 1
    server: Any = xllamacpp.Server(params)

    def post(path: str, **body: Any) -> Any:
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    ids = post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
    done = post("/completion", prompt=ids, n_predict=1, temperature=0.0, n_probs=VOCAB)
    likely = done["completion_probabilities"][0]["top_logprobs"]
    chat = post("/apply-template", messages=messages)["prompt"] if messages else ""
    return {"ids": ids, "logprobs": {entry["id"]: entry["logprob"] for entry in likely}, "chat": chat}


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1], **json.load(sys.stdin))), flush=True)

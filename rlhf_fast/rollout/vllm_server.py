# SPDX-License-Identifier: Apache-2.0
"""One or several vLLM servers as an `Engine`, over HTTP: vLLM is not imported, weights are sent as safetensors files.

A server must be started as `rlhf-fast engine` does it: with VLLM_SERVER_DEV_MODE=1, our worker extension and processed
log-probabilities. Who reaches its port can run methods of its workers: keep it on loopback or a trusted network.
"""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rlhf_fast.distributed.ranks import ranks

from .engine import Completion, EngineError, Request
from .rollout import SamplingParams
from .weight_broadcast import Broadcast

MODEL = "policy"  # the served model name
START = "start it by `rlhf-fast engine MODEL`, which sets all that is needed"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment is for the internet
MOST_REQUESTS = 64  # at once
LARGEST_FULL = 4096  # largest vocabulary for top-p or min-p without top-k: the JSON has all ids for each token
CUT = -9000.0  # logprobs below are -inf: JSON has none, so vLLM writes -9999


Transfer = Literal["file", "broadcast"]


class VLLMServers:
    """vLLM servers with the same weights: rank r uses server r modulo their number."""

    elsewhere, of_each_rank = True, False

    def __init__(
        self,
        urls: Sequence[str],
        timeout: float = 600.0,
        folder: str | None = None,
        transfer: Transfer = "file",
    ) -> None:
        """Check the servers. Weights go to them by a file in `folder`, which they and this process share (None:
        /dev/shm), or by `transfer` "broadcast".

        Raises:
            EngineError: a server does not answer, or was not started as is needed.
        """
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout, self.transfer = timeout, transfer
        self._group: Broadcast | None = None
        self.folder = folder or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
        settings = [self._check(url) for url in self.urls]
        self.longest, self.vocabulary, self.dtype = settings[0]
        for url, other in zip(self.urls, settings, strict=True):
            if other != settings[0]:
                raise EngineError(
                    f"{url} differs from {self.urls[0]}: {other} and {settings[0]} (max_model_len, ids, dtype)"
                )

    def check(self, config: Any) -> None:
        """Refuse a policy of another architecture than the servers' model."""
        for url in self.urls:
            check_sizes(url, self._state(url), config)

    def load(self, weights: dict[str, Tensor], version: int) -> None:
        """Make every server load the weights, between requests, and reset its prefix cache."""
        dtype = str(next(iter(weights.values())).dtype)
        if dtype != self.dtype:
            raise EngineError(
                f"{self.urls[0]} works in {self.dtype}, the policy in {dtype}: start it with that --dtype"
            )
        for url in self.urls:
            self._post(url, "/pause?mode=wait")
        (self._broadcast if self.transfer == "broadcast" else self._by_file)(weights, version)
        for url in self.urls:
            if self._post(url, "/reset_prefix_cache") != {"success": True}:
                raise EngineError(f"{url} did not empty its prefix cache: it would go on with the old weights' keys")
            self._post(url, "/resume")
            if self._version(url) != version:
                raise EngineError(f"{url} has not taken the new weights; restart it, then --resume")

    def _by_file(self, weights: dict[str, Tensor], version: int) -> None:
        """Write the weights once, for all servers."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(self.folder) / f"rlhf_fast-{os.getpid()}-{version}.safetensors"  # a new name: old ones are cached
        try:
            save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, str(path))
            for url in self.urls:
                self._rpc(url, "rlhf_fast_load", [str(path), version])
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"cannot write the policy's weights for {self.urls[0]} to {self.folder}: {error}. Free space there, or "
                "give VLLMServers another `folder`; then --resume"
            ) from error
        finally:
            path.unlink(missing_ok=True)

    def _broadcast(self, weights: dict[str, Tensor], version: int) -> None:
        """Send the weights over the network."""
        group, self._group = self._group, None  # one that has failed is of no use
        try:
            if group is None:
                workers = {url: len(self._rpc(url, "rlhf_fast_state", [])) for url in self.urls}
                group = Broadcast(workers, self._rpc, self.timeout)
            group.send(weights, version)
        except (RuntimeError, OSError) as error:  # of torch.distributed
            raise EngineError(
                f"{', '.join(self.urls)} did not get the weights by broadcast ({error}): see that the server reaches "
                "this host (with several networks, name the interface in GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME on "
                "both sides), and that both sides have the same PyTorch; then --resume"
            ) from error
        self._group = group

    def complete(self, request: Request) -> list[list[Completion]]:
        """One HTTP request per prompt; a retry gives the same samples, because of the seed."""
        url = self.urls[ranks().index % len(self.urls)]
        check_request(url, request, self.longest, self.vocabulary)
        version = self._version(url)
        with ThreadPoolExecutor(min(MOST_REQUESTS, len(request.prompts))) as pool:
            completions = list(
                pool.map(
                    lambda prompt, seed: self._complete(url, prompt, seed, request, version),
                    request.prompts,
                    request.seeds,
                )
            )
        if self._version(url) != version:
            raise EngineError(f"{url} got other weights while it sampled: give each run an engine of its own")
        return completions

    def close(self) -> None:
        """Do nothing: every call has its own connection."""

    def _complete(self, url: str, prompt: list[int], seed: int, request: Request, version: int) -> list[Completion]:
        params = request.params
        body = {
            "model": MODEL,
            "prompt": list(prompt),
            "n": request.samples,
            "seed": seed,
            "max_tokens": params.max_new_tokens,
            "min_tokens": params.min_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "stop": list(params.stop) or None,
            "stop_token_ids": list(request.end_ids),
            "ignore_eos": False,
            "logprobs": logprobs_wanted(url, params, self.vocabulary),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        choices = sorted(self._post(url, "/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        if len(choices) != request.samples:
            raise EngineError(f"{url} gave {len(choices)} completions, wanted {request.samples}")
        return [self._completion(url, choice, params, version) for choice in choices]

    def _completion(self, url: str, choice: dict[str, Any], params: SamplingParams, version: int) -> Completion:
        tokens, returned = choice["token_ids"], choice["logprobs"]
        logprobs = returned["token_logprobs"]
        if len(tokens) != len(logprobs) or not tokens:
            raise EngineError(f"{url} gave {len(tokens)} tokens and {len(logprobs)} log-probabilities; {START}")
        kept = None
        if params.truncated:
            kept = [
                sorted(int(name.removeprefix("token_id:")) for name, value in each.items() if value > CUT)
                for each in returned["top_logprobs"]
            ]
            missing = [token for token, ids in zip(tokens, kept, strict=True) if token not in ids]
            if missing:
                raise EngineError(f"{url} sampled ids {missing[:3]} that it says could not be sampled; {START}")
        return Completion(tokens, logprobs, kept, choice["finish_reason"] == "stop", version)

    # --------------------------------------------------------------------------------------------------- requests

    def _check(self, url: str) -> tuple[int, int, str]:
        """(max_model_len, ids of the vocabulary, dtype) of a server; EngineError if it is not set up as needed."""
        self._get(url, "/health")
        models = [model["id"] for model in self._get(url, "/v1/models")["data"]]
        if MODEL not in models:
            raise EngineError(f"{url} serves {', '.join(models)}, wanted --served-model-name {MODEL}; {START}")
        vocabulary = self._state(url)["vocab_size"]
        config = self._get(url, "/server_info?config_format=json")["vllm_config"]["model_config"]
        if config["logprobs_mode"] != "processed_logprobs":
            raise EngineError(
                f"{url} gives {config['logprobs_mode']}, wanted --logprobs-mode processed_logprobs: those are of the "
                "distribution it samples from"
            )
        return int(config["max_model_len"]), vocabulary, config["dtype"]

    def _state(self, url: str) -> dict[str, int]:
        """The state that our worker extension reports; it must be the same on all workers of a server."""
        states = self._rpc(url, "rlhf_fast_state", [])
        if any(state != states[0] for state in states):
            raise EngineError(f"{url}: its workers have different weights: {states}; restart it")
        return states[0]

    def _version(self, url: str) -> int:
        """Version of the weights that a server has loaded."""
        return self._state(url)["weight_version"]

    def _rpc(self, url: str, method: str, args: list[Any]) -> list[dict[str, int]]:
        """Results of a method of our worker extension, one per worker."""
        answer = self._post(url, "/collective_rpc", {"method": method, "args": args})
        results = answer.get("results") if isinstance(answer, dict) else None
        if not results or not all(isinstance(one, dict) and "weight_version" in one for one in results):
            raise EngineError(f"{url} lacks our worker extension (it answered {str(answer)[:100]}); {START}")
        return list(results)

    def _get(self, url: str, route: str) -> Any:
        return self._call(url, urllib.request.Request(url + route))

    def _post(self, url: str, route: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps({} if body is None else body).encode()
        headers = {"Content-Type": "application/json"}
        return self._call(url, urllib.request.Request(url + route, data, headers, method="POST"))

    def _call(self, url: str, request: urllib.request.Request) -> Any:
        """The JSON of the response, None if it is empty. Retried once if the connection was reset."""
        route = request.full_url.removeprefix(url).partition("?")[0]
        for last in (False, True):
            try:
                with DIRECT.open(request, timeout=self.timeout) as answer:
                    text = answer.read()
                return json.loads(text) if text.strip() else None
            except urllib.error.HTTPError as error:
                raise EngineError(self._refused(url, route, error)) from error
            except json.JSONDecodeError as error:
                raise EngineError(
                    f"{url}{route} does not answer as vLLM does: is something else on that port?"
                ) from error
            except TimeoutError as error:
                raise EngineError(
                    f"{url}{route} did not answer in {self.timeout:.0f} s: the engine hangs or is overloaded; "
                    "restart it, then --resume"
                ) from error
            except OSError as error:  # URLError is one
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError) or not isinstance(reason, ConnectionError) or last:
                    raise EngineError(f"{url} cannot be reached ({reason}): {START}, then --resume") from error
            except http.client.HTTPException as error:  # an answer that breaks off, or is not HTTP
                if last:
                    raise EngineError(
                        f"{url}{route} does not answer as vLLM does ({error!r}): it died, or something else is on that "
                        f"port; {START}, then --resume"
                    ) from error
        raise AssertionError("not reached")

    def _refused(self, url: str, route: str, error: urllib.error.HTTPError) -> str:
        detail = error.read().decode(errors="replace")[:300]
        if "has no attribute 'rlhf_fast" in detail:
            return f"{url} lacks our worker extension: {START} (--worker-extension-cls rlhf_fast_vllm_worker.Sync)"
        if route in ("/health", "/v1/models") and error.code < 500:
            return f"{url} does not answer as vLLM does ({error.code} at {route}): is something else on that port?"
        if route == "/collective_rpc" and error.code >= 500:
            return f"{url} could not run a method of our worker extension: is it the policy's model? It said: {detail}"
        if error.code == 404:
            return f"{url} has no {route}: {START} (VLLM_SERVER_DEV_MODE=1, --served-model-name {MODEL})"
        if error.code >= 500:
            how = "the engine died or is out of memory; restart it, then --resume"
            return f"{url}{route} failed ({error.code}): {how}. It said: {detail}"
        return f"{url}{route} refused the request ({error.code}): {detail}"


def check_sizes(name: str, state: dict[str, int], config: Any) -> None:
    """Refuse an engine whose worker extension reports another model than one of this transformers config."""
    own = config.get_text_config()
    differing = [size for size in state if getattr(own, size, state[size]) != state[size]]
    if differing:
        sizes = ", ".join(f"{size} {state[size]} (the policy: {getattr(own, size)})" for size in differing)
        raise EngineError(f"{name} serves another model than the policy: {sizes}; start it with the policy's")


def check_request(name: str, request: Request, longest: int, vocabulary: int) -> None:
    """Refuse prompts that the engine would cut or does not know."""
    for prompt in request.prompts:
        if len(prompt) + request.params.max_new_tokens > longest:
            raise EngineError(
                f"{name}: a prompt of {len(prompt)} tokens and max_new_tokens {request.params.max_new_tokens} are "
                f"more than its max_model_len {longest}; start it with a larger --max-model-len"
            )
        if max(prompt) >= vocabulary:
            raise EngineError(f"{name}: token id {max(prompt)} is not in its vocabulary of {vocabulary}")


def logprobs_wanted(name: str, params: SamplingParams, vocabulary: int) -> int:
    """Log-probabilities to return per token: all ids that may be kept; 0 is the sampled token alone."""
    if not params.truncated:
        return 0
    if params.top_k:
        return min(params.top_k, vocabulary)
    if vocabulary > LARGEST_FULL:
        raise EngineError(
            f"{name} cannot say which of {vocabulary} ids top_p or min_p kept: set top_k too (1000 leaves out next to "
            "nothing)"
        )
    return -1

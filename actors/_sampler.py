"""The vLLM engine of one rollout worker: draws groups, gives log-probs, takes new weights.

Runs in-process (no engine core of its own, whose death would hang the caller for ever). It patches torch in
its process, so nothing else may live there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.transport import group
from frpo import hub, policies, saved
from frpo.config import LARGEST_RANK, Config, ConfigError, ModelConfig, RolloutConfig
from frpo.types import Completion, Floats, Group, Ints, Prompt, Sampling, Sequences


def environment(config: Config) -> dict[str, str]:
    """Environment variables that the worker's process needs before vllm is imported."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.rollout.num_gpus == 0:
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" would pin every engine to the same core
            "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.kv_cache_gib),
            "OMP_NUM_THREADS": str(config.rollout.num_threads),
        }
    elif config.model.deterministic:
        env["VLLM_BATCH_INVARIANT"] = "1"
    base = saved.base(Path(config.model.path))
    if (
        base.is_dir() and hub.name_of(str(base)) is None
    ):  # one of the hub may have to be downloaded on the worker's node
        env["HF_HUB_OFFLINE"] = "1"
    return env


class WeightLoader:
    """vLLM worker extension: these methods run beside the model, once per tensor-parallel rank."""

    def frpo_load(self, named: group.Named) -> None:
        """Replace weights. On the CPU, vLLM has packed them away: a reload packs the new ones, except those
        of a tied lm_head, which keeps its old copy silently unless it is packed again."""
        runner = self.model_runner  # type: ignore[attr-defined]
        runner.reload_weights(weights_iterator=iter(named))
        model = runner.get_model()
        head = getattr(model, "lm_head", None)
        if next(model.parameters()).device.type == "cpu" and head is not None and head.weight.numel():
            head.quant_method.process_weights_after_loading(head)

    def frpo_load_policy(self, folder: str) -> None:
        dtype = self.model_runner.model_config.dtype  # type: ignore[attr-defined]
        self.frpo_load(policies.tensors(hub.on_this_node(folder), dtype))

    def frpo_join(
        self, name: str, host: str, port: int, first_rank: int, world_size: int, backend: str
    ) -> None:
        groups = self.__dict__.setdefault("frpo_groups", {})
        groups[name] = group.make_group(host, port, first_rank + self.rank, world_size, backend)  # type: ignore[attr-defined]

    def frpo_receive(self, name: str, meta: group.WeightsMeta) -> None:
        self.frpo_load(group.receive(meta, self.frpo_groups[name], self.device))  # type: ignore[attr-defined]


def _export_stats(engine: Any) -> None:
    """Put vLLM's own gauges (ray_vllm_*: queue, KV cache, prefix cache) on the cluster's metrics port. Only
    what the scheduler tells at each engine step: vLLM's histograms take a dozen values of every single
    request. A run goes on without them where they do not load: they import ray.serve, which a grpc of another
    version than grpcio-reflection's keeps from loading."""
    try:
        from vllm.v1.metrics.loggers import StatLoggerManager
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
    except (ImportError, RuntimeError) as error:
        logging.getLogger(__name__).warning("vLLM's gauges are left out of the metrics: %s", error)
        return

    class SchedulerStats(RayPrometheusStatLogger):
        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            super().record(scheduler_stats, None, None, engine_idx)

    engine.logger_manager = StatLoggerManager(
        engine.vllm_config, custom_stat_loggers=[SchedulerStats], enable_default_loggers=False
    )


MEMORY_LIMIT_S = 240.0
"""Longest wait for a card to become free; who waits for a restarted engine does so for 300 s, and the other
role has left the card by then."""


def wait_for_memory(share: float) -> None:
    """Until as much of the card is free as vLLM asks for when it starts (`request_memory` in
    vllm/v1/worker/utils.py). An engine that is restarted finds it taken while another role has its turn, and
    that one leaves when the engines are called next.

    Raises RuntimeError after MEMORY_LIMIT_S.
    """
    import torch

    began = time.monotonic()
    said = False
    while True:
        free, total = torch.cuda.mem_get_info()
        if free >= share * total:
            return
        if not said:
            logging.getLogger(__name__).warning(
                "waiting for memory of the GPU: %.1f GiB are free", free / 2**30
            )
            said = True
        if time.monotonic() > began + MEMORY_LIMIT_S:
            raise RuntimeError(
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU were free, and an engine takes "
                f"{share:.0%} of it; lower "
                "rollout.gpu_memory_utilization, or end what else runs there"
            )
        time.sleep(1.0)


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, LARGEST_RANK)
"""Those that an engine can be started for; it then takes smaller ones too."""


def _lora(folder: Path, model: ModelConfig, rollout: RolloutConfig) -> dict[str, Any]:
    """Settings of an engine for adapters up to the rank in training, or of the policy in `folder`; none where
    all weights come merged.

    In bfloat16 the adapters of the policy, of an arm on it and of a fine-tune of that come as one.
    """
    rank = saved.plain_rank(folder) or 0 if saved.is_adapter(folder) else 0
    if model.lora:
        rank = model.lora.rank if model.dtype == "float32" else min(rank + 2 * model.lora.rank, LARGEST_RANK)
    if rank == 0 or rollout.lora == "merged" or rank > LARGEST_RANK:
        return {}
    # not on the head, which vLLM would take for wrapped: it then fails at log-probs of prompts
    # (`add_lora_logits` in its punica wrappers)
    layers = saved.linear_layers(saved.base(folder))
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(r for r in LORA_RANKS if r >= rank),
        "lora_target_modules": layers,
    }


class Sampler:
    """One engine: the weights of one policy, and an adapter on them or none. `max_model_len` is the longest
    prompt + completion, tokens."""

    def __init__(
        self, model_path: str, model: ModelConfig, rollout: RolloutConfig, max_model_len: int
    ) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        gpu = rollout.num_gpus > 0
        place: dict[str, Any] = (
            {
                "gpu_memory_utilization": rollout.gpu_memory_utilization,
                "tensor_parallel_size": rollout.tensor_parallel,
                "enable_sleep_mode": rollout.sleep,
                "enforce_eager": rollout.enforce_eager,
                # else it follows the free memory, and with it who is put off for lack of it
                "kv_cache_memory_bytes": rollout.kv_cache_gib << 30 if model.deterministic else None,
                # in an actor vLLM would start Ray workers of its own, in the placement group of this run
                "distributed_executor_backend": "mp" if rollout.tensor_parallel > 1 else None,
            }
            if gpu
            else {"enforce_eager": True, "block_size": 32}
        )
        self.max_model_len = max_model_len
        folder = hub.on_this_node(model_path)
        tokenizer = str(saved.tokenizer(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        lora = _lora(folder, model, rollout)
        self.max_rank: int = lora.get("max_lora_rank", 0)
        self.weights: Path | None = saved.base(folder)
        """The saved policy whose weights it runs; None for published ones."""
        self.adapter: Any = None  # comes with the first load_policy
        self.num_adapters = 0
        if gpu and rollout.sleep:
            wait_for_memory(rollout.gpu_memory_utilization)
        try:
            self.llm = LLM(
                model=str(self.weights),
                tokenizer=tokenizer,
                # a tag of its metrics, where a path with other letters than ASCII ends the process
                served_model_name="policy",
                dtype=model.dtype,
                max_model_len=max_model_len
                + 1,  # a full sequence plus the one token that a log-prob request must draw
                max_num_seqs=rollout.max_num_seqs,
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled; "raw" ignores the temperature
                disable_log_stats=False,
                seed=0,
                worker_extension_cls="actors._sampler.WeightLoader",
                **place,
                **lora,
            )
        except ValueError as error:
            if lora and "LoRA" in str(error):  # of a model that it has no adapters for
                raise ConfigError(
                    f"rollout.lora: {error} Train in float32 with rollout.lora: merged, or choose another "
                    "model"
                ) from None
            raise
        _export_stats(self.llm.llm_engine)

    def generate(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        policy_version: int,
    ) -> Iterator[tuple[Group, ...]]:
        """Yield groups as they finish, those of one engine step together.

        The prefix cache is emptied first: what a batch draws then depends on the batch alone, not on what ran
        before. Raises ValueError naming a prompt that leaves no room for the completion.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for prompt in prompts:
            if len(prompt.token_ids) + sampling.max_new_tokens > self.max_model_len:
                raise ValueError(
                    f"prompt {prompt.id}: {len(prompt.token_ids)} tokens and {sampling.max_new_tokens} new "
                    "ones are more than "
                    f"{self.max_model_len}; lower data.max_prompt_tokens or rollout.max_new_tokens"
                )
        self.reset_cache()
        engine = self.llm.llm_engine
        waiting: dict[str, tuple[int, Prompt]] = {}
        for prompt, index, seed in zip(prompts, indices, seeds, strict=True):
            params = SamplingParams(
                n=sampling.num_completions,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                stop=list(sampling.stop) or None,
                detokenize=bool(sampling.stop),
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            waiting[str(index)] = (index, prompt)
            engine.add_request(
                str(index), {"prompt_token_ids": prompt.token_ids.tolist()}, params, lora_request=self.adapter
            )
        while waiting:
            done: list[Any] = [o for o in engine.step() if o.finished]
            if done:
                yield tuple(self._group(*waiting.pop(o.request_id), o.outputs, policy_version) for o in done)

    def _group(self, index: int, prompt: Prompt, outputs: Sequence[Any], policy_version: int) -> Group:
        ids = [list(o.token_ids) for o in outputs]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions = tuple(
            Completion(
                token_ids=np.array(tokens, dtype=np.int32),
                logprobs=np.array(
                    [row[t].logprob for t, row in zip(tokens, o.logprobs, strict=True)], dtype=np.float32
                ),
                text=_before(text, o),
                finish_reason="length" if o.finish_reason == "length" else "stop",
            )
            for tokens, o, text in zip(ids, outputs, texts, strict=True)
        )
        return Group(index, prompt, completions, policy_version)

    def logprobs(self, sequences: Sequences) -> Floats:
        """Log-probs of the completion tokens at temperature 1, [sum of completion lengths], by prefill."""
        return self.ranked(sequences)[0]

    def ranked(self, sequences: Sequences) -> tuple[Floats, Ints]:
        """The same with each token's rank in the vocabulary: 1 is what greedy decoding takes."""
        from vllm import SamplingParams

        rows: list[Ints] = np.split(sequences.tokens, np.cumsum(sequences.lengths)[:-1])
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        prompts: Any = [{"prompt_token_ids": r.tolist()} for r in rows]
        outputs: Any = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.adapter)
        found = [
            output.prompt_logprobs[t][int(tokens[t])]
            for output, tokens, start in zip(outputs, rows, sequences.prompt_lengths, strict=True)
            for t in range(int(start), len(tokens))
        ]
        return np.array([f.logprob for f in found], dtype=np.float32), np.array(
            [f.rank for f in found], dtype=np.int32
        )

    def load(self, named: group.Named) -> None:
        """All weights anew, without an adapter."""
        self._replace("frpo_load", named)

    def receive(self, name: str, meta: group.WeightsMeta) -> None:
        """The same as the group's rank 0 sends them."""
        self._replace("frpo_receive", name, meta)

    def load_policy(self, folder: Path) -> None:
        """A saved policy: an adapter unmerged, where vLLM applies its kind exactly, on the weights of what it
        stands on."""
        here = hub.on_this_node(folder)
        rank = saved.plain_rank(here) if saved.is_adapter(here) and self.max_rank else None
        if rank is not None and rank <= self.max_rank:
            self.serve(here, saved.parent(here))
        else:
            self._merge(here)

    def serve(self, folder: Path, base: Path) -> None:
        """The adapter in `folder` on the weights of the saved policy `base`. Raises ConfigError where vLLM
        has none for some layer."""
        from vllm.lora.request import LoRARequest

        base = hub.on_this_node(base)
        if saved.plain_rank(folder) is None:
            raise ConfigError(
                "model.lora: engines serve adapters on linear layers alone, not on the output head or the "
                "embedding; leave them out of the "
                "targets, or train in float32 with rollout.lora: merged"
            )
        if self.weights is None or base.resolve() != self.weights.resolve():
            self._merge(base)
        self._drop_adapter()
        self.num_adapters += 1  # vLLM tells adapters, and caches prefixes, by name and number
        request = LoRARequest(f"policy-{self.num_adapters}", self.num_adapters, str(folder))
        try:
            self.llm.llm_engine.add_lora(request)
        except ValueError as error:
            raise ConfigError(
                f"rollout.lora: vLLM does not serve this adapter ({error}); train in float32 with "
                "rollout.lora merged"
            ) from None
        self.adapter = request

    def _merge(self, folder: Path) -> None:
        self._replace("frpo_load_policy", str(folder))
        self.weights = folder

    def _replace(self, method: str, *args: Any) -> None:
        self._drop_adapter()
        self.weights = None  # unknown, also when it fails in the middle
        self.llm.collective_rpc(method, args=args)

    def _drop_adapter(self) -> None:
        if self.adapter is not None:
            self.llm.llm_engine.remove_lora(self.adapter.lora_int_id)
            self.adapter = None

    def join(self, name: str, host: str, port: int, first_rank: int, world_size: int, backend: str) -> None:
        self.llm.collective_rpc("frpo_join", args=(name, host, port, first_rank, world_size, backend))

    def reset_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache although no request runs")

    def sleep(self) -> None:
        """Free the GPU memory of weights and KV cache; weights wait in host memory."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()


def _before(text: str, output: Any) -> str:
    """The text of a completion up to the stop string that ended it, if one did: at once or in the middle of a
    token. vLLM's own text keeps the blank of a first word, and stands in where a tokenizer drops that with
    the stop string's own."""
    stop = output.stop_reason
    if not isinstance(stop, str):
        return text
    return text[: text.index(stop)] if stop in text else str(output.text)

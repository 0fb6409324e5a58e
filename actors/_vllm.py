"""How a vLLM engine is started: the environment of its process, its settings, the wait for its card, and its
gauges. What runs it is `_sampler.Sampler`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from frpo import hub, saved
from frpo.config import LARGEST_RANK, Config, JudgeReward, ModelConfig, RolloutConfig


def vllm_environment(config: Config) -> dict[str, str]:
    """Environment variables that the worker's process needs before vllm is imported."""
    return _environment_of(config.rollout, config.model.path, deterministic=config.model.deterministic)


def judge_environment(reward: JudgeReward, *, deterministic: bool = False) -> dict[str, str]:
    """The same of a judge's."""
    env = _environment_of(reward, reward.path, deterministic=deterministic)
    return env if reward.num_gpus > 0 else {**env, "CUDA_VISIBLE_DEVICES": ""}


def _environment_of(
    engine: RolloutConfig | JudgeReward, model: str, *, deterministic: bool
) -> dict[str, str]:
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if engine.num_gpus == 0:
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" would pin every engine to the same core
            "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gib),
            "OMP_NUM_THREADS": str(engine.num_threads),
        }
    elif deterministic:
        env["VLLM_BATCH_INVARIANT"] = "1"
    base = saved.base_of(Path(model))
    from_hub = hub.name_of(str(base)) is not None
    if base.is_dir() and not from_hub:  # one of the hub may have to be downloaded on the worker's node
        env["HF_HUB_OFFLINE"] = "1"
    return env


def engine_settings(model: ModelConfig, rollout: RolloutConfig) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the device that it runs on."""
    if rollout.num_gpus == 0:
        return {"enforce_eager": True, "block_size": 32}
    settings: dict[str, Any] = {
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "tensor_parallel_size": rollout.tensor_parallel,
        "enable_sleep_mode": rollout.sleep,
        "enforce_eager": rollout.enforce_eager,
    }
    if model.deterministic:  # else it follows the free memory, and with it who is put off for lack of it
        settings["kv_cache_memory_bytes"] = rollout.kv_cache_gib << 30
    if rollout.staleness and rollout.in_flight:
        # else a step returns what the one before it drew, and its tokens get the label of newer weights
        settings["async_scheduling"] = False
    if rollout.tensor_parallel > 1:
        # in an actor vLLM would start Ray workers of its own, in the placement group of this run
        settings["distributed_executor_backend"] = "mp"
    return settings


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, LARGEST_RANK)
"""Those that an engine can be started for; it then takes smaller ones too."""


def lora_settings(folder: Path, model: ModelConfig, rollout: RolloutConfig) -> dict[str, Any]:
    """Settings of an engine for adapters up to the rank in training, or of the policy in `folder`; none where
    all weights come merged.

    In bfloat16 the adapters of the policy, of an arm on it and of a fine-tune of that come as one.
    """
    rank = 0
    if saved.is_adapter(folder):
        rank = saved.plain_rank(folder) or 0
    if model.lora and model.dtype == "float32":
        rank = model.lora.rank
    elif model.lora:
        rank = min(rank + 2 * model.lora.rank, LARGEST_RANK)
    if rank == 0 or rollout.lora == "merged" or rank > LARGEST_RANK:
        return {}
    # not on the head, which vLLM would take for wrapped: it then fails at log-probs of prompts
    # (`add_lora_logits` in its punica wrappers)
    layers = saved.linear_layers(saved.base_of(folder))
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(largest for largest in LORA_RANKS if largest >= rank),
        "lora_target_modules": layers,
    }


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
                f"{share:.0%} of it; lower rollout.gpu_memory_utilization, or end what else runs there"
            )
        time.sleep(1.0)


def export_stats(engine: Any) -> None:
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

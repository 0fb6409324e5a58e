"""lm-evaluation-harness on the engines that are up already: one actor that turns its requests into calls of the rollout workers.

The harness brings tasks, prompts, few-shot examples and metrics; a policy is loaded into the engines once for all tasks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.actor import ActorHandle

from actors import _calls
from actors.rollout import RolloutPool
from frpo.config import HarnessConfig
from frpo.harness import tasks_of
from frpo.records import BenchmarkScore
from frpo.seeds import derive
from frpo.types import Prompt, Sampling

VERSION = 0
"""Policy version under which a policy to be measured is loaded."""


class HarnessWorker:
    """`rollouts` are the handles of the rollout workers; `limit` is their longest sequence, tokens."""

    def __init__(
        self, rollouts: Sequence[ActorHandle[Any]], tensor_parallel: int, timeout_s: float, restarts: int, harness: HarnessConfig, limit: int, seed: int
    ) -> None:  # fmt: skip
        self.pool = RolloutPool(rollouts, timeout_s=timeout_s, restarts=restarts, tensor_parallel=tensor_parallel)
        self.harness, self.limit, self.seed = harness, limit, seed

    def ping(self) -> int:
        import lm_eval  # noqa: F401

        return os.getpid()

    def evaluate(self, policy: str) -> tuple[BenchmarkScore, ...]:
        """Every metric of every task, for a saved policy (Hugging Face or PEFT folder)."""
        from lm_eval import simple_evaluate

        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self.pool.load_policy(Path(policy), VERSION)
        h = self.harness
        tasks, manager = tasks_of(h)
        found: Any = simple_evaluate(
            model=engine_lm(self.pool, policy, self.limit, self.seed), tasks=tasks, task_manager=manager, limit=h.limit,
            num_fewshot=h.num_fewshot, apply_chat_template=h.chat, log_samples=False, bootstrap_iters=1000, random_seed=self.seed % 2**31,
        )  # fmt: skip
        return tuple(scores_of(found))


def scores_of(found: dict[str, Any]) -> Iterator[BenchmarkScore]:
    """lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            se = row.get(f"{metric}_stderr,{name}")
            count = found["n-samples"].get(task, {}).get("effective")
            yield BenchmarkScore(
                task=task, metric=metric, filter=name, value=float(value), se=float(se) if isinstance(se, int | float) else None,
                num_examples=count,
            )  # fmt: skip


def engine_lm(pool: RolloutPool, policy: str, limit: int, seed: int) -> Any:
    """An lm-eval model whose forward passes are the rollout workers'. Built in a function: lm_eval is imported late."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from transformers import AutoTokenizer

    class EngineLM(TemplateLM):
        """Contexts that are too long lose their beginning, as in lm-eval's own models."""

        tokenizer: Any = AutoTokenizer.from_pretrained(policy)

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return Path(policy).name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            written = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)  # a chat template writes its own
            special = add_special_tokens if add_special_tokens is not None else not written
            return list(self.tokenizer.encode(string, add_special_tokens=special))

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [(i, r.args[0], normalize_gen_kwargs(r.args[1])) for i, r in enumerate(requests)]
            alike: dict[tuple[Any, ...], list[tuple[int, str]]] = {}
            for i, context, kwargs in asked:
                key = (tuple(kwargs["until"]), kwargs["max_gen_toks"], kwargs["temperature"], kwargs.get("top_p", 1.0))
                alike.setdefault(key, []).append((i, context))
            texts = [""] * len(requests)
            for (until, new, temperature, top_p), rows in alike.items():
                new = min(new, limit - 1)
                prompts = [self._prompt(i, context, limit - new) for i, context in rows]
                seeds = [derive(seed, "harness", i) for i, _ in rows]
                stop = tuple(u for u in until if u)
                sampling = Sampling(1, new, temperature=temperature, top_p=top_p, stop=stop)
                for group in pool.generate(prompts, seeds, sampling, VERSION):
                    texts[rows[group.index][0]] = postprocess_generated_text(group.completions[0].text, list(stop), None)
            return texts

        def _prompt(self, index: int, context: str, room: int) -> Prompt:
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            return Prompt(f"harness:{index}", context, np.array(ids, dtype=np.int32), "harness", {})

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = []
            for _, context, continuation in requests:
                kept = context[-max(1, limit - len(continuation)) :]
                pairs.append((np.array(kept, dtype=np.int32), np.array(continuation[-(limit - 1) :], dtype=np.int32)))
            logprobs, ranks = pool.ranked(pairs)
            cuts = np.cumsum([len(c) for _, c in pairs])[:-1]
            parts = zip(np.split(logprobs.astype(np.float64), cuts), np.split(ranks, cuts), strict=True)
            return [(float(lp.sum()), bool((rank == 1).all())) for lp, rank in parts]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for i, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=limit - 1, context_len=1):
                    windows.append((None, *make_disjoint_window(window)))
                    owners.append(i)
            totals = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[owner] += value
            return totals

    return EngineLM()


class HarnessPool:
    """The one harness actor."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, timeout_s: float, restarts: int) -> None:
        self.actors = _calls.Actors("harness", handles, timeout_s=timeout_s, restarts=restarts)

    def evaluate(self, policy: Path) -> tuple[BenchmarkScore, ...]:
        found: tuple[BenchmarkScore, ...] = self.actors.call(0, "evaluate", str(policy.absolute())).result()
        return found

"""An lm-evaluation-harness model whose forward passes are the rollout workers'. Imports lm_eval: import this
late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from frpo import hub, saved
from frpo.actors.rollout import RolloutPool
from frpo.seeds import derive
from frpo.types import Prompt, Sampling

VERSION = 0
"""Policy version under which a policy to be measured is loaded."""


class EngineLM(TemplateLM):
    """`policy` is the saved policy that the engines run as VERSION, for its tokenizer; `limit` their longest
    sequence, tokens. Contexts that are too long lose their beginning, as in lm-eval's own models."""

    def __init__(self, pool: RolloutPool, policy: str, limit: int, seed: int) -> None:
        super().__init__()
        self.pool, self.policy, self.limit, self.seed = pool, policy, limit, seed
        self.tokenizer: Any = AutoTokenizer.from_pretrained(saved.tokenizer_folder(hub.on_this_node(policy)))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return Path(self.policy).name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = add_special_tokens
        if special is None:  # a chat template writes its own beginning
            start = self.tokenizer.bos_token
            special = not (start and string.startswith(start))
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        alike: dict[Sampling, list[tuple[int, str]]] = {}
        for i, request in enumerate(requests):
            context, settings = request.args
            alike.setdefault(self._sampling_of(settings), []).append((i, context))
        texts = [""] * len(requests)
        for sampling, rows in alike.items():
            room = self.limit - sampling.max_new_tokens
            prompts = [self._prompt_of(i, context, room) for i, context in rows]
            seeds = [derive(self.seed, "harness", i) for i, _ in rows]
            for group in self.pool.generate(prompts, seeds, sampling, VERSION):
                row, _ = rows[group.index]
                text = group.completions[0].text
                texts[row] = postprocess_generated_text(text, list(sampling.stop), None)
        return texts

    def _sampling_of(self, settings: dict[str, Any]) -> Sampling:
        kwargs = normalize_gen_kwargs(settings)
        return Sampling(
            1,
            min(kwargs["max_gen_toks"], self.limit - 1),
            temperature=kwargs["temperature"],
            top_p=kwargs.get("top_p", 1.0),
            stop=tuple(end for end in kwargs["until"] if end),
        )

    def _prompt_of(self, index: int, context: str, room: int) -> Prompt:
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return Prompt(f"harness:{index}", context, np.array(ids, dtype=np.int32), "harness", {})

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            prompt = context[-max(1, self.limit - len(continuation)) :]
            completion = continuation[-(self.limit - 1) :]
            pairs.append((np.array(prompt, dtype=np.int32), np.array(completion, dtype=np.int32)))
        logprobs, ranks = self.pool.ranked(pairs)
        cuts = np.cumsum([len(completion) for _, completion in pairs])[:-1]
        by_pair = zip(np.split(logprobs.astype(np.float64), cuts), np.split(ranks, cuts), strict=True)
        return [(float(values.sum()), bool((rank == 1).all())) for values, rank in by_pair]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = []
        owners = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, max_seq_len=self.limit - 1, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

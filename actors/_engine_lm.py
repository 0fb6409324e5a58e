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

from actors.rollout import RolloutPool
from frpo import hub, saved
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
        self.tokenizer: Any = AutoTokenizer.from_pretrained(saved.tokenizer(hub.on_this_node(policy)))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return Path(self.policy).name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        written = bool(self.tokenizer.bos_token) and string.startswith(
            self.tokenizer.bos_token
        )  # a chat template writes its own
        special = add_special_tokens if add_special_tokens is not None else not written
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
        asked = [(i, r.args[0], normalize_gen_kwargs(r.args[1])) for i, r in enumerate(requests)]
        alike: dict[tuple[Any, ...], list[tuple[int, str]]] = {}
        for i, context, kwargs in asked:
            key = (
                tuple(kwargs["until"]),
                kwargs["max_gen_toks"],
                kwargs["temperature"],
                kwargs.get("top_p", 1.0),
            )
            alike.setdefault(key, []).append((i, context))
        texts = [""] * len(requests)
        for (until, new, temperature, top_p), rows in alike.items():
            new = min(new, self.limit - 1)
            prompts = [self._prompt(i, context, self.limit - new) for i, context in rows]
            seeds = [derive(self.seed, "harness", i) for i, _ in rows]
            stop = tuple(u for u in until if u)
            sampling = Sampling(1, new, temperature=temperature, top_p=top_p, stop=stop)
            for group in self.pool.generate(prompts, seeds, sampling, VERSION):
                texts[rows[group.index][0]] = postprocess_generated_text(
                    group.completions[0].text, list(stop), None
                )
        return texts

    def _prompt(self, index: int, context: str, room: int) -> Prompt:
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return Prompt(f"harness:{index}", context, np.array(ids, dtype=np.int32), "harness", {})

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            kept = context[-max(1, self.limit - len(continuation)) :]
            pairs.append(
                (np.array(kept, dtype=np.int32), np.array(continuation[-(self.limit - 1) :], dtype=np.int32))
            )
        logprobs, ranks = self.pool.ranked(pairs)
        cuts = np.cumsum([len(c) for _, c in pairs])[:-1]
        parts = zip(np.split(logprobs.astype(np.float64), cuts), np.split(ranks, cuts), strict=True)
        return [(float(lp.sum()), bool((rank == 1).all())) for lp, rank in parts]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
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

"""The vLLM engine of one rollout worker: draws groups, gives log-probs, takes new weights.

Runs in-process (no engine core of its own, whose death would hang the caller for ever). It patches torch in
its process, so nothing else may live there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from frpo import hub, policies, saved
from frpo.actors._vllm import engine_settings, export_stats, lora_settings, wait_for_memory
from frpo.actors.transport import group
from frpo.config import ConfigError, ModelConfig, RolloutConfig
from frpo.types import Completion, Floats, Group, Ints, Prompt, Sampling, Sequences, Ticket


class WeightLoader:
    """vLLM worker extension: these methods run beside the model, once per tensor-parallel rank."""

    # what vLLM's worker has
    model_runner: Any
    device: Any
    rank: int
    # ours, from the first join on
    frpo_groups: dict[str, Any]

    def frpo_load(self, named: group.Named) -> None:
        """Replace weights. On the CPU, vLLM has packed them away: a reload packs the new ones, except those
        of a tied lm_head, which keeps its old copy silently unless it is packed again."""
        runner = self.model_runner
        runner.reload_weights(weights_iterator=iter(named))
        model = runner.get_model()
        head = getattr(model, "lm_head", None)
        if next(model.parameters()).device.type == "cpu" and head is not None and head.weight.numel():
            head.quant_method.process_weights_after_loading(head)

    def frpo_load_policy(self, folder: str) -> None:
        dtype = self.model_runner.model_config.dtype
        self.frpo_load(policies.read_weights(hub.on_this_node(folder), dtype))

    def frpo_join(
        self, name: str, host: str, port: int, first_rank: int, world_size: int, backend: str
    ) -> None:
        if "frpo_groups" not in self.__dict__:
            self.frpo_groups = {}
        rank = first_rank + self.rank
        self.frpo_groups[name] = group.make_group(host, port, rank, world_size, backend)

    def frpo_receive(self, name: str, meta: group.WeightsMeta) -> None:
        """A group that is broken is left: whoever waits in it for this rank would wait in vain."""
        joined = self.frpo_groups.pop(name)
        self.frpo_load(group.receive_all(meta, joined, self.device))
        self.frpo_groups[name] = joined


class Sampler:
    """One engine: the weights of one policy, and an adapter on them or none. `max_model_len` is the longest
    prompt + completion, tokens."""

    def __init__(
        self, model_path: str, model: ModelConfig, rollout: RolloutConfig, max_model_len: int
    ) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        self.max_model_len = max_model_len
        folder = hub.on_this_node(model_path)
        tokenizer = str(saved.tokenizer_folder(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        lora = lora_settings(folder, model, rollout)
        self.max_rank: int = lora.get("max_lora_rank", 0)
        self.weights: Path | None = saved.base_of(folder)
        """The saved policy whose weights it runs; None for published ones."""
        self.adapter: Any = None  # comes with the first load_policy
        self.num_adapters = 0
        self.num_requests = 0
        self.joined: set[str] = set()
        """Groups that weights can come by."""
        self.running: set[str] = set()
        """Names of requests."""
        self.finished: dict[str, Any] = {}
        """By name, those whose asker has not come for them yet."""
        if rollout.num_gpus > 0 and rollout.sleep:
            wait_for_memory(rollout.gpu_memory_utilization)
        try:
            self.llm = LLM(
                model=str(self.weights),
                tokenizer=tokenizer,
                # a tag of its metrics, where a path with other letters than ASCII ends the process
                served_model_name="policy",
                dtype=model.dtype,
                # a full sequence plus the one token that a log-prob request must draw
                max_model_len=max_model_len + 1,
                max_num_seqs=rollout.max_num_seqs,
                # of the distribution that was sampled; "raw" ignores the temperature
                logprobs_mode="processed_logprobs",
                disable_log_stats=False,
                seed=0,
                worker_extension_cls="frpo.actors._sampler.WeightLoader",
                **engine_settings(model, rollout),
                **lora,
            )
        except ValueError as error:
            if lora and "LoRA" in str(error):  # of a model that it has no adapters for
                raise ConfigError(
                    f"rollout.lora: {error} Train in float32 with rollout.lora: merged, or choose another "
                    "model"
                ) from None
            raise
        export_stats(self.llm.llm_engine)

    # Requests of several askers run side by side. Each begins its own; whoever steps the engine next runs
    # all of them, and what is finished waits for its asker.

    def check_length(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises ValueError naming a prompt that leaves no room for the completion."""
        if len(prompt.token_ids) + sampling.max_new_tokens > self.max_model_len:
            raise ValueError(
                f"prompt {prompt.id}: {len(prompt.token_ids)} tokens and {sampling.max_new_tokens} new ones "
                f"are more than {self.max_model_len}; lower data.max_prompt_tokens or rollout.max_new_tokens"
            )

    def begin(self, ticket: Ticket, sampling: Sampling, salt: str) -> str:
        """The name of the request. Prompts share what the engine has computed of them where their salts are
        equal: what is drawn then depends on nothing that ran before under another salt, or other weights."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=sampling.num_completions,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=ticket.seed,
            stop=list(sampling.stop) or None,
            detokenize=bool(sampling.stop),
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self._begin({"prompt_token_ids": ticket.prompt.token_ids.tolist(), "cache_salt": salt}, params)

    def _begin(self, prompt: Any, params: Any) -> str:
        self.num_requests += 1
        name = str(self.num_requests)
        self.llm.llm_engine.add_request(name, prompt, params, lora_request=self.adapter)
        self.running.add(name)
        return name

    def step(self) -> None:
        """One step of the engine with all that runs."""
        for request in self.llm.llm_engine.step():
            if request.finished:
                self.running.discard(request.request_id)
                self.finished[request.request_id] = request

    def abort(self) -> None:
        """All that runs."""
        self.llm.llm_engine.abort_request(list(self.running))
        self.running.clear()

    def group_of(self, name: str, ticket: Ticket) -> Group:
        """What a finished request drew."""
        outputs = self.finished.pop(name).outputs
        ids = [list(output.token_ids) for output in outputs]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Group(ticket.number, ticket.prompt, tuple(map(_completion_of, outputs, texts)))

    def ranked(self, sequences: Sequences) -> tuple[Floats, Ints]:
        """Log-probs of the completion tokens at temperature 1, by prefill, and each token's rank in the
        vocabulary (1 is what greedy decoding takes), both [sum of completion lengths]."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rows: list[Ints] = np.split(sequences.tokens, np.cumsum(sequences.lengths)[:-1])
        params = SamplingParams(
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        names = [self._begin({"prompt_token_ids": row.tolist()}, params) for row in rows]
        while not self.running.isdisjoint(names):
            self.step()
        logprobs: list[float] = []
        ranks: list[int] = []
        for name, tokens, start in zip(names, rows, sequences.prompt_lengths, strict=True):
            output = self.finished.pop(name)
            for at in range(int(start), len(tokens)):
                token = output.prompt_logprobs[at][int(tokens[at])]
                logprobs.append(token.logprob)
                ranks.append(token.rank)
        return np.array(logprobs, dtype=np.float32), np.array(ranks, dtype=np.int32)

    def load(self, named: group.Named) -> None:
        """All weights anew, without an adapter."""
        self._replace("frpo_load", named)

    def receive(self, name: str, meta: group.WeightsMeta) -> None:
        """The same as the group's rank 0 sends them. Raises StartedAnew in a process that is not in it."""
        from frpo.actors._calls import StartedAnew

        if name not in self.joined:
            raise StartedAnew(f"is not in the group {name}")
        self.joined.discard(name)  # unless all comes through
        self._replace("frpo_receive", name, meta)
        self.joined.add(name)

    def load_policy(self, folder: Path) -> None:
        """A saved policy: an adapter unmerged, where vLLM applies its kind exactly, on the weights of what it
        stands on."""
        here = hub.on_this_node(folder)
        if self._serves(here):
            self.serve(here, saved.parent_of(here))
        else:
            self._merge(here)

    def _serves(self, folder: Path) -> bool:
        if self.max_rank == 0 or not saved.is_adapter(folder):
            return False
        rank = saved.plain_rank(folder)
        return rank is not None and rank <= self.max_rank

    def serve(self, folder: Path, base: Path) -> None:
        """The adapter in `folder` on the weights of the saved policy `base`. Raises ConfigError where vLLM
        has none for some layer."""
        from vllm.lora.request import LoRARequest

        base = hub.on_this_node(base)
        if saved.plain_rank(folder) is None:
            raise ConfigError(
                "model.lora: engines serve adapters on linear layers alone, not on the output head or the "
                "embedding; leave them out of the targets, or train in float32 with rollout.lora: merged"
            )
        if self.weights is None or base.resolve() != self.weights.resolve():
            self._merge(base)
        if self.adapter is None:
            self.num_adapters += 1  # vLLM tells adapters, and caches prefixes, by name and number
        name, number = f"policy-{self.num_adapters}", self.num_adapters
        # in the place of the last one, so that requests that run go on under it
        fresh = LoRARequest(name, number, str(folder), load_inplace=True)
        try:
            self.llm.llm_engine.add_lora(fresh)
        except ValueError as error:
            raise ConfigError(
                f"rollout.lora: vLLM does not serve this adapter ({error}); train in float32 with "
                "rollout.lora merged"
            ) from None
        self.adapter = LoRARequest(name, number, str(folder))

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
        self.joined.add(name)

    def label(self, version: int) -> None:
        """The weights that it runs now: what vLLM says of each token that it draws."""
        self.llm.llm_engine.set_weight_version(str(version))

    def sleep(self) -> None:
        """Free the GPU memory of weights and KV cache; weights wait in host memory."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()


def _completion_of(output: Any, text: str) -> Completion:
    """`text`: of all its tokens."""
    tokens = list(output.token_ids)
    logprobs = [row[token].logprob for token, row in zip(tokens, output.logprobs, strict=True)]
    return Completion(
        token_ids=np.array(tokens, dtype=np.int32),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=_versions_of(output),
        text=_up_to_stop(text, output),
        finish_reason="length" if output.finish_reason == "length" else "stop",
    )


def _versions_of(output: Any) -> Ints:
    """[T], of the spans that vLLM gives."""
    spans = output.weight_versions
    parts = [np.full(span.end - span.start, int(span.version), dtype=np.int32) for span in spans]
    return np.concatenate(parts)


def _up_to_stop(text: str, output: Any) -> str:
    """The text of a completion up to the stop string that ended it, if one did: at once or in the middle of a
    token. vLLM's own text keeps the blank of a first word, and stands in where a tokenizer drops that with
    the stop string's own."""
    stop = output.stop_reason
    if not isinstance(stop, str):
        return text
    if stop in text:
        return text[: text.index(stop)]
    return str(output.text)

"""The vLLM engine of a judge: asks about completions, and can answer in the forms of its template alone.

Runs in-process, and nothing else may live there, as with `_sampler.Sampler`. At temperature 0; on CPUs one
call at a time, and nothing is found in the cache of another, so that a score does not hang on what else is
judged.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from frpo import hub
from frpo.config import ConfigError, JudgeReward
from frpo.rewards.template import JudgeTemplate
from frpo.types import Decoding, Item, Reply

MOST_SEQUENCES = 128
"""Answered at once."""
MOST_CALLS = 1024
"""That share the engine's steps, on GPUs."""
LOOKED_AT = 20
"""Likeliest first tokens of an answer, for `weigh: probability`; the most that vLLM gives."""


class JudgeEngine:
    """One engine, `llm`, that answers in the forms of a template."""

    def __init__(self, reward: JudgeReward, template: JudgeTemplate, tokenizer: Any, llm: Any) -> None:
        self.reward, self.template, self.tokenizer, self.llm = reward, template, tokenizer, llm
        added = tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in added if token.special and token.content.strip()]
        self.alone = reward.num_gpus == 0
        self.room = asyncio.Semaphore(1 if self.alone else MOST_CALLS)
        self.num_calls = self.num_requests = 0
        self.finished: dict[str, Any] = {}

    async def score(self, items: Sequence[Item]) -> list[float | Exception]:
        """One value per item, in order; the reason in the place of one that there is none for."""
        template = self.template
        decoding = Decoding(template.longest_answer + 1, grammar=template.grammar)
        if template.weigh == "probability":  # the first token tells
            decoding = Decoding(1, grammar=template.grammar, logprobs=LOOKED_AT)
        questions = [self._question(item) for item in items]
        return list(map(self._value, await self._ask(questions, decoding)))

    async def chat(self, messages: Sequence[Mapping[str, str]], decoding: Decoding) -> Reply | Exception:
        """The answer to a conversation of somebody's own; ValueError where the engine does not take it."""
        try:
            ids = self._tokens_of(messages)
        except (jinja2.TemplateError, ValueError):  # its words may be the caller's
            return ValueError("the judge has no chat template that takes these messages")
        (answer,) = await self._ask([ids], decoding)
        return answer

    def _question(self, item: Item) -> list[int] | Exception:
        try:
            return self._tokens_of(self.template.render(spell_out(item, self.special)))
        except Exception as error:  # the template's, over this row
            return error

    def _tokens_of(self, question: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Of a text, or of messages before their answer."""
        if isinstance(question, str):
            return list(self.tokenizer(question)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in question],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # of those templates that know it
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _value(self, answer: Reply | Exception) -> float | Exception:
        if isinstance(answer, Exception):
            return answer
        try:
            if self.template.weigh == "probability":
                return self.template.expect(answer.begun)
            return self.template.score(answer.text)
        except ValueError as error:
            return error

    async def _ask(
        self, questions: Sequence[list[int] | Exception], decoding: Decoding
    ) -> list[Reply | Exception]:
        """The answer to each question, in order; an exception stays where it is. What is not there
        `timeout_s` after the engine took the questions is a TimeoutError."""
        limit_s = self.reward.timeout_s
        async with self.room:
            self.num_calls += 1
            begun = [self._begin(question, decoding) for question in questions]
            names = {name for name in begun if isinstance(name, str)}
            try:
                await self._run(names, time.monotonic() + limit_s)
            finally:  # also where whoever asked has given up
                done = {name: self.finished.pop(name) for name in names & self.finished.keys()}
                self.llm.llm_engine.abort_request(list(names - done.keys()))
        late = TimeoutError(f"not answered within {limit_s:g} s (rewards.{self.reward.name}.timeout_s)")
        answers: list[Reply | Exception] = []
        for name in begun:
            if isinstance(name, Exception):
                answers.append(name)
            else:
                answers.append(self._answer_of(done[name]) if name in done else late)
        return answers

    async def _run(self, names: set[str], until: float) -> None:
        """Step the engine, with all that others have asked, until these are answered or the time is up."""
        while not names <= self.finished.keys() and time.monotonic() < until:
            for request in self.llm.llm_engine.step():
                if request.finished:
                    self.finished[request.request_id] = request
            await asyncio.sleep(0)

    def _begin(self, question: list[int] | Exception, decoding: Decoding) -> str | Exception:
        """The name of the request, or why there is none."""
        if isinstance(question, Exception):
            return question
        most = self.reward.max_tokens
        wanted = decoding.max_tokens or 1
        if len(question) + wanted > most:
            return ValueError(
                f"the question has {len(question)} tokens, and with {wanted} for the answer the judge reads "
                f"{most} (rewards.{self.reward.name}.max_tokens)"
            )
        self.num_requests += 1
        name = str(self.num_requests)
        prompt: Any = {"prompt_token_ids": question}
        if self.alone:
            prompt["cache_salt"] = f"call {self.num_calls}"
        try:
            params = sampling_params(decoding, decoding.max_tokens or most - len(question))
            self.llm.llm_engine.add_request(name, prompt, params)
        except Exception as error:  # vLLM's of a schema or a setting; its words may be the caller's
            return ValueError(f"the engine has no answer of this form ({type(error).__name__})")
        return name

    def _answer_of(self, request: Any) -> Reply:
        (output,) = request.outputs
        begun: dict[str, float] = {}
        if output.logprobs:
            for token, found in output.logprobs[0].items():
                text = str(self.tokenizer.decode([token]))
                begun[text] = begun.get(text, 0.0) + math.exp(found.logprob)
        return Reply(
            text=output.text,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_tokens=len(output.token_ids),
            cut=output.finish_reason == "length",
            begun=begun,
        )


def start_engine(reward: JudgeReward, template: JudgeTemplate) -> JudgeEngine:
    """Load the model, in this process. Raises ConfigError for one that the template does not fit."""
    from transformers import AutoTokenizer
    from vllm import LLM

    folder = str(hub.on_this_node(reward.path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template.user and not tokenizer.chat_template:
        raise ConfigError(
            f"rewards.{reward.name}.template: {reward.template} asks by messages, and {reward.path} has no "
            "chat template; give one with a text, or a chat model"
        )
    device: dict[str, Any] = {"enforce_eager": True, "block_size": 32}
    if reward.num_gpus > 0:
        device = {"gpu_memory_utilization": reward.memory_share}
    llm = LLM(
        model=folder,
        served_model_name="judge",
        dtype=reward.weights_dtype,
        max_model_len=reward.max_tokens,
        max_num_seqs=MOST_SEQUENCES,
        logprobs_mode="processed_logprobs",  # of what the grammar lets through
        max_logprobs=LOOKED_AT,
        # a small model that may write blanks between two parts of JSON writes nothing else
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        disable_log_stats=True,
        seed=0,
        **device,
    )
    return JudgeEngine(reward, template, tokenizer, llm)


def sampling_params(decoding: Decoding, max_tokens: int) -> Any:
    """vLLM's. Raises its errors for what it does not take."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    form = None
    if decoding.grammar is not None:
        form = StructuredOutputsParams(grammar=decoding.grammar)
    elif decoding.schema is not None:
        form = StructuredOutputsParams(json=dict(decoding.schema))
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        stop=list(decoding.stop) or None,
        logprobs=decoding.logprobs,
        structured_outputs=form,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def spell_out(item: Item, special: Sequence[str]) -> Item:
    """The item with the judge's special tokens broken by a blank wherever they stand in it: what is judged
    cannot end its own quotation and answer in the judge's place."""

    def spell(value: Any) -> Any:
        if isinstance(value, str):
            for token in special:
                value = value.replace(token, f"{token[0]} {token[1:]}")
        elif isinstance(value, Mapping):
            return {key: spell(inner) for key, inner in value.items()}
        elif isinstance(value, list | tuple):
            return type(value)(map(spell, value))
        return value

    return replace(
        item,
        prompt=spell(item.prompt),
        completion=spell(item.completion),
        columns=spell(item.columns),
        messages=spell(item.messages),
    )

"""kind: judge on real engines: what they answer against transformers' own log-probs, a death, the service."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from frpo.actors.judge import JudgePool, JudgeWorker
from frpo.config import JudgeReward
from frpo.config.service import ServiceConfig
from frpo.rewards.template import JudgeTemplate, load_template
from frpo.types import Completion, Group, Prompt
from tests.support import models, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

OWN = """
text: "Is {{ prompt }} well answered by {{ completion }}"
choices: {apple: 0.0, bread: 0.25, cheese: 0.5, dates: 1.0}
weigh: WEIGH
"""
WORDS = ("so", "no", "maybe", "never at all", "yes", "why", "I do not know", "7", "it is", "Zoo", "a < b", "")


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "model"
    models.write_speller(folder)
    return folder


def judge(speller: Path, weigh: str) -> JudgeReward:
    template = speller.parent / f"{weigh}.yaml"
    template.write_text(OWN.replace("WEIGH", weigh))
    given = {"kind": "judge", "name": weigh, "path": str(speller), "template": str(template), "num_cpus": 0.1}
    return JudgeReward.model_validate({**given, "max_tokens": 1024})


def group(index: int, *texts: str) -> Group:
    one = np.zeros(1, np.int32)
    completions = tuple(Completion(one, np.zeros(1, np.float32), one, t, "stop") for t in texts)
    return Group(index, Prompt(str(index), f"question {index}", one, "t", {}), completions)


GROUPS = [group(i, *WORDS[3 * i : 3 * i + 3]) for i in range(4)]


def next_logprobs(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)


def expected(speller: Path, template: JudgeTemplate) -> dict[tuple[int, str], tuple[str, float]]:
    """By transformers, for each completion: the answer, letter by letter the likeliest that still leads to a
    choice, and the mean worth of the choices by the probability of their first letters."""
    model, tokenizer = models.load_hf(speller)
    forms = [*template.choices, *(f" {choice}" for choice in template.choices)]
    found = {}
    for asked in GROUPS:
        for completion in asked.completions:
            text = f"Is {asked.prompt.text} well answered by {completion.text}"
            ids, answer = tokenizer(text)["input_ids"], ""
            first = next_logprobs(model, ids)
            while answer not in forms:
                logprobs = next_logprobs(model, ids)
                letters = {form[len(answer)] for form in forms if form.startswith(answer)}
                tokens = {letter: tokenizer(letter)["input_ids"][0] for letter in sorted(letters)}
                best = max((float(logprobs[token]), letter) for letter, token in tokens.items())[1]
                answer += best
                ids = [*ids, tokens[best]]
            weights = {c: math.exp(first[tokenizer(c[0])["input_ids"][0]]) for c in template.choices}
            mean = sum(weights[c] * worth for c, worth in template.choices.items()) / sum(weights.values())
            found[asked.index, completion.text] = (answer.strip(), mean)
    return found


def pool_of(reward: JudgeReward) -> Any:
    import ray

    from frpo.actors._vllm import judge_environment
    from frpo.actors.reward import RewardPool, RewardWorker

    again: Any = {"num_cpus": 0.1, "max_restarts": 3}
    options = {**again, "runtime_env": {"env_vars": judge_environment(reward)}}
    handle: Any = ray.remote(JudgeWorker).options(**options).remote(reward, load_template(reward))
    make = partial(JudgePool, f"judge {reward.name}", [handle], timeout_s=200, restarts=3)
    worker: Any = (
        ray.remote(RewardWorker).options(**again).remote((reward,), "weighted", judges={reward.name: make})
    )
    pool = RewardPool([worker], timeout_s=300, restarts=3, judges=[make()])
    pool.judges[0].actors.wait_until_ready(300)
    return pool


def scores(pool: Any, order: list[int]) -> dict[tuple[int, str], float | None]:
    calls = [(GROUPS[i], pool.score(GROUPS[i])) for i in order]
    found = {}
    for asked, call in calls:
        for completion, reward in zip(asked.completions, call.result(), strict=True):
            found[asked.index, completion.text] = reward.total
    return found


def test_an_answer_is_the_likeliest_that_the_template_allows(ray_cluster: None, speller: Path) -> None:
    reward = judge(speller, "answer")
    template = load_template(reward)
    right = {place: template.choices[answer] for place, (answer, _) in expected(speller, template).items()}
    assert len(set(right.values())) > 1, "the model should not say the same of everything"
    from frpo.actors.reward import RewardWorker

    pool = pool_of(reward)
    assert scores(pool, [0, 1, 2, 3]) == right
    engine = pool.judges[0].actors
    before = engine.call_async(0, JudgeWorker.ping).result()
    os.kill(before.pid, signal.SIGKILL)
    assert scores(pool, [3, 1]) == {place: right[place] for place in right if place[0] in (1, 3)}
    assert engine.call_async(0, JudgeWorker.ping).result() != before
    asker = pool.actors
    before = asker.call_async(0, RewardWorker.ping).result()
    os.kill(before.pid, signal.SIGKILL)
    assert scores(pool, [0, 2]) == {place: right[place] for place in right if place[0] in (0, 2)}
    assert asker.call_async(0, RewardWorker.ping).result() != before


@pytest.fixture(scope="module")
def service(ray_cluster: None, speller: Path) -> Iterator[ServiceConfig]:
    from ray import serve

    from frpo.deploy.service import serve_on_cluster

    reward = judge(speller, "probability")
    config = ServiceConfig.model_validate({"rewards": [reward.model_dump()], "port": runs.free_port()})
    with serve_on_cluster(config, None):
        yield config
    serve.shutdown()


def test_a_service_weighs_the_choices_and_lets_its_model_be_asked(
    service: ServiceConfig, speller: Path
) -> None:
    (reward,) = service.rewards
    assert isinstance(reward, JudgeReward)
    right = expected(speller, load_template(reward))
    with httpx.Client(base_url=service.url, timeout=120) as client:

        def ask(asked: Group) -> list[float]:
            items = [{"prompt": asked.prompt.text, "completion": c.text} for c in asked.completions]
            return [s["score"] for s in client.post("/v1/score", json={"items": items}).json()["scores"]]

        found = [ask(asked) for asked in GROUPS]
        assert [ask(asked) for asked in reversed(GROUPS)] == found[::-1]  # to the bit
        for asked, values in zip(GROUPS, found, strict=True):
            means = [right[asked.index, c.text][1] for c in asked.completions]
            assert values == pytest.approx(means, abs=1e-5)
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
        first, second = (client.post("/v1/chat/completions", json=body).json() for _ in range(2))
        assert first["choices"] == second["choices"]
        assert first["usage"]["completion_tokens"] == 5
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        graded = client.post("/v1/chat/completions", json={**body, "max_tokens": 20, "response_format": form})
        assert json.loads(graded.json()["choices"][0]["message"]["content"]) in ({"a": 1}, {"a": 2})
        wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
        assert client.post("/v1/chat/completions", json={**body, "response_format": wrong}).status_code == 422
        long = {**body, "messages": [{"role": "user", "content": "x" * 2000}]}
        refused = client.post("/v1/chat/completions", json=long)
        assert (refused.status_code, "the judge reads 1024" in refused.text) == (422, True)

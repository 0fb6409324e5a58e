"""Which secrets reach the actors of rewards, and that nothing prints them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from frpo.config import ConfigError, FunctionReward, ModelReward, UrlReward
from frpo.secrets import NO_SECRETS, Secrets, secrets_of

JUDGE = {
    "kind": "function",
    "name": "judge",
    "function": "frpo.rewards.judge:moderation",
    "arguments": {"url": "http://j", "model": "m"},
}
FAR = {"kind": "url", "name": "far", "urls": ["http://127.0.0.1:9/get_reward"]}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "FRPO_SERVICE_TOKEN", "HF_TOKEN", "MINE", "OTHER"):
        monkeypatch.delenv(name, raising=False)


def judge(**arguments: Any) -> FunctionReward:
    return FunctionReward.model_validate(
        JUDGE | {"arguments": {"url": "http://j", "model": "m", **arguments}}
    )


def far(**fields: Any) -> UrlReward:
    return UrlReward.model_validate(FAR | fields)


def test_those_that_rewards_name_are_taken_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "FRPO_SERVICE_TOKEN", "HF_TOKEN", "MINE", "OTHER"):
        monkeypatch.setenv(name, f"secret of {name}")
    (tmp_path / "own.py").write_text("def own(prompts, completions, *, search_key_env='OTHER', **_): ...\n")
    own = FunctionReward.model_validate(
        {"kind": "function", "name": "own", "function": f"{tmp_path}/own.py:own"}
    )
    model = ModelReward.model_validate({"kind": "model", "name": "m", "path": "a/b"})
    for rewards, names in (
        ([judge()], {"HF_TOKEN", "OPENAI_API_KEY"}),
        ([judge(api_key_env="MINE")], {"HF_TOKEN", "MINE"}),
        ([far()], {"HF_TOKEN", "FRPO_SERVICE_TOKEN"}),
        ([far(token_env="MINE"), own], {"HF_TOKEN", "MINE", "OTHER"}),
        ([far(token_env=""), model], {"HF_TOKEN"}),
        ([], {"HF_TOKEN"}),
    ):
        secrets = secrets_of(rewards)  # type: ignore[arg-type]
        assert dict(secrets.values) == {name: f"secret of {name}" for name in names}


def test_one_that_is_named_on_purpose_and_not_set_is_refused() -> None:
    assert secrets_of([judge(), far()]) == NO_SECRETS  # an endpoint on this machine may ask for none
    for reward, field in (
        (judge(api_key_env="MINE"), "arguments.api_key_env"),
        (far(token_env="MINE"), "token_env"),
    ):
        with pytest.raises(ConfigError) as said:
            secrets_of([far(), reward])
        assert (
            str(said.value)
            == f"rewards.1.{field}: the environment variable MINE is not set; export it where you start frpo"
        )


def test_they_are_set_where_they_arrive_and_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "before")
    arrived: Secrets = pickle.loads(pickle.dumps(Secrets({"MINE": "s3cret"})))
    assert [str(arrived), repr(arrived), f"{[arrived]}"] == [
        "Secrets(MINE)",
        "Secrets(MINE)",
        "[Secrets(MINE)]",
    ]
    arrived.place()
    assert os.environ["MINE"] == "s3cret"
    with pytest.raises(ValueError, match="ends up in logs and run folders") as said:
        far(urls=["http://frpo:s3cret@127.0.0.1:9/get_reward"])
    assert "s3cret" not in said.value.errors()[0]["msg"]  # type: ignore[attr-defined]

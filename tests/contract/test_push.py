"""`frpo push` against a hub on loopback: what arrives to the byte, what never leaves, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from frpo import tree
from frpo.config import Config
from frpo.policies import read_policy
from frpo.report.card import policy_of
from frpo.report.schema import Report
from tests.support import policies, shipped
from tests.support.command_line import ROOT, CommandLine
from tests.support.hub_server import TOKEN, HubServer, serve_hub

MODEL = {"config.json", "generation_config.json", "model.safetensors", *shipped.TOKENIZER}
BESIDE = {"README.md", "config.yaml", "report.json"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_policy_arrives_to_the_byte_with_its_card_in_a_private_repository(
    run: Path, server: HubServer, frpo: CommandLine
) -> None:
    report = shipped.put_policy(run)
    policy = policy_of(run, "arm")
    (policy / "training_state.bin").write_bytes(b"a pickle")
    done = frpo("push", str(run), "arm", "team/safe")
    there = server.repositories["team/safe"]
    assert done.out == f"Pushed: {server.url}/team/safe (private, commit {there.head[:12]})\n"
    assert there.private
    assert there.commits == ["initial commit", "frpo: fake, arm arm"]
    assert set(there.files) == MODEL | BESIDE
    for name in MODEL:
        assert there.files[name] == (policy / name).read_bytes(), name
    card = ModelCard(there.files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("team/safe")' in card.text
    reward = report.arms[0].evaluation.rewards[0].reward
    first = card.data.eval_results[0]
    assert (first.dataset_type, first.metric_type, first.metric_value) == (
        "only",
        "reward",
        round(reward.mean, 4),
    )


def test_neither_token_nor_paths_nor_prompts_leave_the_machine(
    finished_run: Path, run: Path, server: HubServer, frpo: CommandLine
) -> None:
    report = shipped.put_policy(run)
    assert f"run_dir: {finished_run}" in report.config
    assert report.prompts[0].prompt == "prompt 0"
    said = frpo("push", str(run), "arm", "team/safe")
    files = server.repositories["team/safe"].files
    texts = "".join(files[name].decode() for name in files if not name.endswith(".safetensors"))
    for secret in (TOKEN, str(run), str(finished_run), "prompt 0"):
        assert secret not in texts + said.out + said.err
    config = Config.model_validate(tree.parse_yaml(files["config.yaml"].decode(), "config.yaml"))
    assert (config.run_dir, config.seed) == (Path("run"), 7)
    sent = Report.model_validate_json(files["report.json"])
    assert (sent.prompts, sent.arms[0].evaluation.samples) == ((), ())
    assert sent.arms[0].kept == report.arms[0].kept


def test_a_second_push_of_the_same_changes_nothing(run: Path, server: HubServer, frpo: CommandLine) -> None:
    shipped.put_policy(run)
    frpo("push", str(run), "arm", "team/safe")
    there = server.repositories["team/safe"]
    head, files = there.head, dict(there.files)
    done = frpo("push", str(run), "arm", "team/safe")
    assert "Nothing has changed, it was there already" in done.out
    assert (there.head, there.files) == (head, files)
    assert len(server.uploads) == 1  # of the weights


def test_an_adapter_on_a_model_of_the_hub_names_it_and_replaces_full_weights(
    run: Path, server: HubServer, frpo: CommandLine, tmp_path: Path
) -> None:
    shipped.put_policy(run)
    frpo("push", str(run), "arm", "team/safe")
    policy = policy_of(run, "arm")
    shutil.rmtree(policy)
    base = policies.write_base(tmp_path / "base")
    shipped.put_policy(run, lambda folder: policies.write_adapter(folder, base, policies.lora()))
    cached = f"/home/anna/.cache/huggingface/hub/models--org--small/snapshots/{COMMIT}"
    shipped.point_adapter_at(policy, cached)
    frpo("push", str(run), "arm", "team/safe")
    there = server.repositories["team/safe"]
    adapter = {"adapter_config.json", "adapter_model.safetensors", *shipped.TOKENIZER}
    assert set(there.files) == adapter | BESIDE
    named = json.loads(there.files["adapter_config.json"])
    assert (named["base_model_name_or_path"], named["revision"]) == ("org/small", COMMIT)
    assert (
        named["target_modules"] == json.loads((policy / "adapter_config.json").read_text())["target_modules"]
    )
    assert "anna" not in there.files["README.md"].decode()
    assert ModelCard(there.files["README.md"].decode()).data.library_name == "peft"


def test_an_adapter_on_a_folder_of_this_machine_arrives_merged(
    run: Path, server: HubServer, frpo: CommandLine, tmp_path: Path
) -> None:
    base = policies.write_base(tmp_path / "base", dtype=torch.bfloat16)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    shipped.put_policy(run, lambda folder: policies.write_adapter(folder, base, policies.lora()))
    frpo("push", str(run), "arm", "team/safe")
    there = server.repositories["team/safe"]
    assert set(there.files) == MODEL | BESIDE
    assert there.files["generation_config.json"] == b'{"eos_token_id": [2, 7]}'
    assert there.files["tokenizer.json"] == b"{}"
    for name in MODEL:
        (tmp_path / "arrived").mkdir(exist_ok=True)
        (tmp_path / "arrived" / name).write_bytes(there.files[name])
    arrived = policies.logprobs(read_policy(tmp_path / "arrived", dtype="float32"))
    measured = policies.logprobs(read_policy(policy_of(run, "arm"), dtype="float32"))
    assert torch.equal(arrived, measured)
    assert "merged into the weights" in there.files["README.md"].decode()
    assert list(policy_of(run, "arm").parent.glob(".push-*")) == []


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(
    run: Path, server: HubServer, frpo: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: str) -> str:
        return frpo.refuses("push", *args)

    assert "has no report.json yet; `frpo run` writes it" in refused(str(run), "arm", "team/safe")
    shipped.put_policy(run)
    assert "is no run folder (no config.yaml)" in refused(str(run.parent), "arm", "team/safe")
    assert "fake has no arm 'grpo'; choose arm" in refused(str(run), "grpo", "team/safe")
    assert "write organisation/name" in refused(str(run), "arm", "safe")
    assert "'team/sa fe' names no repository" in refused(str(run), "arm", "team/sa fe")
    assert "'team/a--b' names no repository (Cannot have -- or .." in refused(str(run), "arm", "team/a--b")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub; set HF_TOKEN" in refused(str(run), "arm", "team/safe")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(str(run), "arm", "team/safe")
    weights = policy_of(run, "arm") / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "are not those that report.json measured" in refused(str(run), "arm", "team/safe")
    assert server.asked == []


def test_an_unfinished_run_is_refused_by_the_stages_that_are_left(
    run: Path, server: HubServer, frpo: CommandLine
) -> None:
    shutil.rmtree(run / "downstream" / "arm" / "rl")
    shipped.put_policy(run)
    told = frpo.refuses("push", str(run), "arm", "team/safe")
    assert "is not finished: downstream/arm/rl not done; `frpo run` on the same folder goes on" in told


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [
        (
            "hf_old",
            "team/safe",
            "the hub refuses the token (401); set HF_TOKEN to one that may write to team",
        ),
        (
            TOKEN,
            "others/safe",
            "the hub refuses the token (403); set HF_TOKEN to one that may write to others",
        ),
    ],
)
def test_what_the_hub_refuses_is_said_without_the_token(
    run: Path,
    server: HubServer,
    frpo: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    repo: str,
    told: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    shipped.put_policy(run)
    said = frpo.refuses("push", str(run), "arm", repo)
    assert told in said
    assert token not in said


def test_a_repository_that_everybody_reads_must_be_asked_for(
    run: Path, server: HubServer, frpo: CommandLine
) -> None:
    shipped.put_policy(run)
    frpo("push", str(run), "arm", "team/open", "--public")
    assert not server.repositories["team/open"].private
    told = frpo.refuses("push", str(run), "arm", "team/open")
    assert "everybody can read team/open; give --public if they may" in told
    assert "(public, commit" in frpo("push", str(run), "arm", "team/open", "--public").out


@pytest.mark.long
def test_the_endpoint_and_the_token_come_from_the_environment(run: Path, tmp_path: Path) -> None:
    shipped.put_policy(run)
    with serve_hub() as server:
        mine = {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-m", "frpo", "push", str(run), "arm", "team/safe"]
        environment = {**os.environ, **mine, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(server.repositories["team/safe"].files) == MODEL | BESIDE
    assert TOKEN not in done.stdout + done.stderr

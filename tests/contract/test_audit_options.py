"""`frpo audit`: what its options make of a recipe, what it plans, and every mistake by the option that it is
in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frpo.audit import AuditOptions, make_recipe, name_after
from frpo.config import DownstreamSft, FunctionReward
from frpo.grid import list_fine_tunes
from tests.support.command_line import CommandLine

RECIPE = Path("recipes/audit_testbed.yaml")
ROWS = "".join(
    json.dumps({"prompt": f"how to {word}", "completion": f"just {word}", "task": "t"}) + "\n"
    for word in ("run", "sit", "eat", "sew", "dig", "fly", "sing", "swim", "jump", "walk", "read", "cook")
)
REWARD = "frpo.rewards:length"
AUDIT = ("{model}", "--prompts", "{rows}", "--reward", REWARD)
SHORT = ("--set", "data.max_prompt_tokens=16", "--set", "rollout.max_new_tokens=16")
"""What fits the tiny model."""


@pytest.fixture
def places(tmp_path: Path, tiny_model: Path) -> dict[str, str]:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return {
        "rows": str(tmp_path / "rows.jsonl"),
        "model": str(tiny_model),
        "missing": str(tmp_path / "missing"),
        "out": str(tmp_path / "out"),
    }


def test_options_alone_make_a_whole_recipe() -> None:
    asked = AuditOptions(
        model="a/policy",
        recipe=None,
        prompts="p.jsonl",
        column="goal",
        reward=REWARD,
        arguments=("max_words=3",),
        downstream="d.jsonl",
        harmful="h.jsonl",
        completion="answer",
        chat=True,
        seeds=5,
    )
    config = make_recipe(asked, ["audit.ranks=[full]", "max_failed_rewards=0.5"])
    assert config.name == "audit-a-policy"
    assert config.model.path == "a/policy"
    (heldout,) = config.data.heldout
    assert (heldout.path, heldout.prompt, heldout.task, heldout.chat) == ("p.jsonl", "goal", "prompts", True)
    (reward,) = config.rewards
    assert isinstance(reward, FunctionReward)
    assert (reward.function, reward.arguments) == (REWARD, {"max_words": 3})
    (task,) = config.downstream
    assert isinstance(task, DownstreamSft)
    assert [(source.path, source.part, source.completion) for source in task.sources] == [
        ("d.jsonl", "train", "answer"),
        ("d.jsonl", "heldout", "answer"),
    ]
    assert config.max_failed_rewards == 0.5
    assert config.audit is not None
    assert config.audit.num_seeds == 5
    assert [fine_tune.name for fine_tune in list_fine_tunes(config)] == [
        "downstream-lr1e-05-full",
        "downstream-lr1e-05-full-harmful0.05",
        "downstream-lr0.0001-full",
        "downstream-lr0.0001-full-harmful0.05",
    ]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "audit-meta-llama-Llama-3.1-8B-Instruct"),
        ("mistralai/Ministral-8B-Instruct@main", "audit-mistralai-Ministral-8B-Instruct-main"),
        ("runs/a/rlhf/frpo-reverse/policy/", "audit-a-frpo-reverse"),
        ("runs/b/rlhf/frpo-reverse/policy", "audit-b-frpo-reverse"),
        ("runs/b/downstream/grpo/code/policy", "audit-b-grpo-code"),
        ("/policy", "audit-policy"),
        ("~/a b/p", "audit-a-b-p"),
        ("..", "audit-.."),
    ],
)
def test_each_model_has_a_name_of_its_own(model: str, name: str) -> None:
    assert name_after("audit", model) == name


def test_options_go_over_the_recipe() -> None:
    config = make_recipe(AuditOptions(model="a/policy", recipe=RECIPE, seeds=2), ["audit.steps=[10]"])
    assert config.base is None
    assert config.model.path == "a/policy"
    assert config.name == "audit_testbed-a-policy"
    assert config.audit is not None
    assert (config.audit.num_seeds, config.audit.steps) == (2, (10,))
    assert make_recipe(AuditOptions(model=None, recipe=RECIPE), []).base is not None


def test_harmful_examples_are_mixed_in_where_the_recipe_says_no_share(tmp_path: Path) -> None:
    text = RECIPE.read_text()
    without = "".join(line for line in text.splitlines(keepends=True) if "harmful_shares" not in line)
    (tmp_path / "r.yaml").write_text(without)
    for recipe, shares in ((tmp_path / "r.yaml", (0.0, 0.05)), (RECIPE, (0.0, 0.05))):
        config = make_recipe(AuditOptions(model="a/policy", recipe=recipe, harmful="h.jsonl"), [])
        assert config.audit is not None
        assert ([source.path for source in config.audit.harmful], config.audit.harmful_shares) == (
            ["h.jsonl"],
            shares,
        )
        assert any(fine_tune.harmful_share for fine_tune in list_fine_tunes(config))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "MODEL, --prompts, --reward: an audit needs a model, prompts and a reward"),
        (("{model}", "--prompts", "{rows}"), "--reward: an audit needs a model"),
        (("{missing}", "--prompts", "{rows}", "--reward", REWARD), "MODEL: no such folder {missing}"),
        (("{model}", "--prompts", "{missing}.csv", "--reward", REWARD), "missing.csv: no such file"),
        (("{model}", "--prompts", "{rows}", "--reward", "frpo.rewards:none"), "--reward: frpo.rewards has"),
        (
            (*AUDIT, "--argument", "a"),
            "--argument a: write it as key=value",
        ),
        (
            (*AUDIT, "--downstream", "{missing}.csv"),
            "missing.csv: no such file",
        ),
        (
            (*AUDIT, "--harmful", "{rows}", "--completion", "x"),
            "rows.jsonl:1: no column 'x'",
        ),
        ((*AUDIT, "--seeds", "0"), "Invalid value for '--seeds'"),
        (("--recipe", str(RECIPE), "--argument", "a=1"), "--argument: it is about --reward"),
        (
            ("--recipe", str(RECIPE), "--prompts", "{rows}", "--completion", "x"),
            "--completion: it is about --downstream or --harmful",
        ),
        (("--recipe", str(RECIPE), "--chat"), "--chat: it is about --prompts, --downstream or --harmful"),
        (("--recipe", "{missing}"), "recipe {missing}: No such file"),
        (("--recipe", "recipes/testbed.yaml"), "audit: the recipe trains 4 arms"),
        (("--recipe", str(RECIPE), "--set", "audit.step=[1]"), "audit.step: unknown field"),
        (("--recipe", str(RECIPE), "--set", "audit.utility.of=start", "--set", "audit.utility.task=null"),
         "audit.utility.of: start is a share"),
    ],
)  # fmt: skip
def test_mistakes_of_audit(
    args: tuple[str, ...],
    message: str,
    places: dict[str, str],
    frpo: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = [arg.format(**places) for arg in args]
    assert message.format(**places) in frpo.refuses("audit", *given, *SHORT, "--run-dir", places["out"])
    assert not Path(places["out"]).exists()


def test_the_plan_lists_every_fine_tune_and_starts_nothing(
    places: dict[str, str],
    frpo: CommandLine,
) -> None:
    done = frpo("audit", "--recipe", str(RECIPE), "--seeds", "3", "--plan", "--run-dir", places["out"])
    assert done.code == 0
    assert "Nothing is missing." in done.out
    lines = [line.split("│")[1:-1] for line in done.out.splitlines() if "│" in line]
    table: dict[str, Any] = {name.strip(): list(map(str.strip, cells)) for name, *cells in lines}
    # the certificate: 36 prompts, 16 completions each, and 128 to certify
    assert table["certificate"] == ["1", "600", "0", f"{36 * (16 + 128):,}", "0 of 1"]
    # 36 harmful and 36 downstream prompts: at the start twice, after 50 and 200 steps
    assert table["crafts-lr0.001-r8"] == ["3", "200", "0", f"{72 * 16 * 4:,}", "0 of 3"]
    assert table["crafts-rl-lr0.001-full"] == ["3", "60", f"{60 * 24 * 8:,}", f"{72 * 16 * 3:,}", "0 of 3"]
    assert len([name for name in table if name.startswith("crafts")]) == 10
    assert not Path(places["out"]).exists()

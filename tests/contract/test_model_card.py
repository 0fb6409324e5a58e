"""The model card of an arm: its numbers are the report's, its metadata the hub's, and no stage is made from
it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard

from frpo import report as reports
from frpo import tree
from frpo.config.section import Content
from frpo.content import Digests
from frpo.disk import sha256_of, write_text
from frpo.report.audit_schema import Audit, Promise
from frpo.report.card import Place, make_card, policy_of, read_audit_lines, write_cards
from frpo.report.portable import strip_config
from frpo.report.schema import Report
from frpo.report.spread import spread_of
from tests.support import hubs, policies, shipped

HELD = {True: "holds", False: "does not hold", None: "not known"}


def card_of(report: Report) -> ModelCard:
    return ModelCard(make_card(report, report.arms[0], Place("team/safe", "full")))


def with_config(report: Report, old: str, new: str) -> Report:
    assert old in report.config
    return report.model_copy(update={"config": report.config.replace(old, new, 1)})


def test_every_number_of_the_card_is_the_reports(run: Path) -> None:
    report = shipped.put_policy(run)
    card = card_of(report)
    (arm,) = report.arms
    sft, rl = (downstream.evaluations[-1] for downstream in report.downstream)
    measured = {result.metric_name: result for result in card.data.eval_results}
    for name, evaluation in (("", arm.evaluation), (" after sft", sft), (" after rl", rl)):
        reward = evaluation.rewards[0].reward
        assert reward.half is not None
        result: EvalResult = measured.pop(f"Mean reward{name}")
        assert (result.dataset_type, result.metric_type) == ("only", "reward")
        assert result.metric_value == round(reward.mean, 4)
        ends = [round(reward.mean - reward.half, 4), round(reward.mean + reward.half, 4)]
        assert result.metric_args == {"interval_95": ends}
        assert f" {reward.mean:.2f} ± {reward.half:.2f} |" in card.text
    kl = arm.evaluation.kl_reference
    assert kl is not None
    assert measured.pop("KL to where it began, nats").metric_value == round(kl.mean, 4)
    assert not measured
    assert sft.kl_policy is not None
    row = next(line for line in card.text.splitlines() if line.startswith("| KL to this policy"))
    assert row.split("|")[4].strip() == f"{sft.kl_policy.mean:.2f} ± {sft.kl_policy.half:.2f}"
    (plane,) = report.robustness
    assert (
        f"| within, nats | 0.10 |\n| --- | --- |\n| reward at least | {plane.certified[0]:.2f} |" in card.text
    )
    assert report.verdict is not None
    (judged,) = report.verdict.judged
    assert f"By the rules of the run's report: **{report.verdict.decision}**." in card.text
    learned = f"{report.verdict.rules['learned']} ({judged.rules[0].figures})"
    assert f"- {HELD[judged.rules[0].holds]}: {learned}" in card.text
    assert arm.summary.weights_sha256 in card.text
    assert "6 steps, 36 prompts, 288 completions, 288 tokens" in card.text
    assert f"- {report.headline[-1]}" in card.text
    assert "seed 7" in card.text


def test_warnings_of_the_arm_stand_on_its_card_and_those_of_others_do_not(run: Path) -> None:
    report = shipped.put_policy(run)
    lines = ("rlhf/arm learnt little", "downstream/arm/rl is cut", "rlhf/other learnt little")
    text = card_of(report.model_copy(update={"warnings": lines})).text
    assert "- **rlhf/arm learnt little**\n- **downstream/arm/rl is cut**\n" in text
    assert "rlhf/other" not in text


def test_sentences_that_compare_arms_stay_in_the_report(run: Path) -> None:
    report = shipped.put_policy(run)
    other = report.arms[0].model_copy(update={"name": "arm-2"})
    headline = ("arm − arm-2: +0.20.", "Certified: arm 0.25.", "This is one seed (7).")
    both = report.model_copy(update={"arms": (report.arms[0], other), "headline": headline})
    assert card_of(both).text.count("+0.20") == 0
    assert "\n- Certified: arm 0.25.\n- This is one seed (7).\n" in card_of(both).text
    of_other = make_card(both, other, Place("team/safe", "full"))
    assert "Certified" not in of_other
    assert "- This is one seed (7).\n" in of_other


def test_a_model_of_the_hub_is_named_and_its_licence_passed_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policies.write_base(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: small\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = hubs.cache(tmp_path / "cache", "org/small", model)
    report = with_config(shipped.put_policy(run), "path: nowhere\n", f"path: org/small@{snapshot.name}\n")
    card = card_of(report)
    assert card.data.base_model == "org/small"
    assert card.data.base_model_relation == "finetune"
    assert (card.data.license, card.data.license_name) == ("other", "small")
    assert f"| began as | `org/small@{snapshot.name}`, after 2 steps" in card.text
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").write_text("---\nlicense: [mit\ntitle: a: b\n---\n")
    assert card_of(report).data.license is None  # the front matter is no YAML
    of_folder = card_of(shipped.put_policy(run)).data.to_dict()
    assert {"base_model", "license"} & set(of_folder) == set()  # a folder here is no name on the hub


def test_a_card_beside_the_policy_is_nothing_that_a_stage_is_made_from(run: Path) -> None:
    report = shipped.put_policy(run)
    policy = policy_of(run, "arm")
    before = Digests(run).of(Content("model"), str(policy))
    write_cards(report, run)
    text = (policy / "README.md").read_text()
    assert 'from_pretrained("rlhf/arm/policy")' in text
    assert str(run) not in text
    assert Digests(run).of(Content("model"), str(policy)) == before
    write_cards(report, run)
    assert (policy / "README.md").read_text() == text


def files_on_card(report: Report, run: Path) -> dict[str, tuple[str, str]]:
    """What each file is and its digest, from the card that is written anew."""
    write_cards(report, run)
    _, _, end = (policy_of(run, "arm") / "README.md").read_text().partition("## Make it again")
    rows = [line.strip("| ").split(" | ") for line in end.splitlines() if line.startswith("| `")]
    return {path.strip("`"): (kind, digest.strip("`")) for path, kind, digest in rows}


def test_files_that_a_run_needs_are_named_and_data_of_the_hub_stand_in_the_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reward, helper, train = Path("mine/reward.py"), Path("mine/helper.py"), Path("train.jsonl")
    held = tmp_path / "far" / "held.jsonl"
    for file, text in ((reward, "import helper"), (helper, "A = 1"), (train, "{}"), (held, "[]")):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    names = ("train.jsonl", "org/questions", "testbed:prompts")
    train_data = [{"path": name, "task": "only"} for name in names]
    functions = ("mine/reward.py:kind", "frpo.rewards:exact_answer")
    run = shipped.do_run(
        tmp_path / "run",
        data={"train": train_data, "heldout": [{"path": str(held), "task": "only"}]},
        rewards=[{"kind": "function", "name": f"f{i}", "function": f} for i, f in enumerate(functions)],
    )
    report = shipped.put_policy(run)
    of_held = ("held-out prompts", sha256_of(held))
    assert files_on_card(report, run) == {
        "held.jsonl": of_held,
        "mine/helper.py": ("reward function", sha256_of(helper)),
        "mine/reward.py": ("reward function", sha256_of(reward)),
        "train.jsonl": ("prompts to train on", sha256_of(train)),
    }
    assert ModelCard.load(policy_of(run, "arm") / "README.md").data.datasets == ["org/questions"]
    helper.write_text("A = 2")
    held.unlink()
    changed = files_on_card(report, run)
    assert changed["mine/helper.py"] == ("reward function", "no longer here as the run read it")
    assert changed["held.jsonl"] == of_held  # the run has written down what it read


@pytest.mark.long
def test_the_report_of_a_run_writes_its_cards_and_one_elsewhere_does_not(run: Path, tmp_path: Path) -> None:
    shipped.put_policy(run)
    reports.build_report(run, tmp_path / "elsewhere")
    assert not (policy_of(run, "arm") / "README.md").exists()
    reports.build_report(run)
    assert ModelCard.load(policy_of(run, "arm") / "README.md").data.model_name == "fake-arm"


def test_an_audit_of_the_same_weights_stands_on_the_card(run: Path) -> None:
    report = shipped.put_policy(run)
    (arm,) = report.arms
    assert read_audit_lines(run, arm) == ()
    audit = Audit(
        model="rlhf/arm/policy",
        weights_sha256=arm.summary.weights_sha256,
        task="only",
        prompts=("p.jsonl",),
        reward=("m:f",),
        utility="all",
        seeds=(0,),
        start=spread_of([0.8]),
        certificate=Promise(
            floor=0.0,
            confidence=0.95,
            num_prompts=1,
            num_completions=2,
            radii=(0.1,),
            certified=(0.2,),
            plug_in=(0.3,),
            lo=(0.2,),
            hi=(0.4,),
        ),
        fine_tunes=(),
        worst=None,
        stopped=(),
    )
    (run / "audit" / "arm").mkdir(parents=True)
    write_text(run / "audit" / "arm" / "audit.json", audit.model_dump_json())
    told = read_audit_lines(run, arm)
    assert told == ("Nothing was fine-tuned: of only prompts there is the certificate alone.",)
    card = make_card(report, arm, Place("team/safe", "full"), told)
    assert f"## Audit\n\n- {told[0]}\n" in card
    other = audit.model_copy(update={"weights_sha256": "0" * 64})
    write_text(run / "audit" / "arm" / "audit.json", other.model_dump_json())
    assert read_audit_lines(run, arm) == ("The audit beside this run is of other weights.",)


def test_what_a_configuration_says_of_this_machine_is_left_out() -> None:
    at_home = {
        "run_dir": "/home/anna/runs/secret",
        "model": {"path": "/home/anna/models/small"},
        "data": {"train": [{"path": "../data/train.jsonl", "system": "/no_think"}]},
        "rewards": [
            {"kind": "url", "urls": ["http://10.0.0.7:8000/score"], "token_env": "MY_TOKEN"},
            {
                "function": "/home/anna/code/rewards.py:safe",
                "arguments": {
                    "api_key": "sk-1",
                    "api_key_env": "KEY",
                    "api_keys": {"east": "sk-2", "west": ["sk-3"]},
                    "headers": {"Authorization": "Bearer sk-4", "Accept": "text/plain"},
                    "cache": "redis://:pw@10.0.0.8",
                    "max_tokens": 5,
                },
            },
        ],
        "cluster": {"address": "10.0.0.5:6379"},
    }
    assert tree.parse_yaml(strip_config(tree.dump_yaml(at_home)), "config.yaml") == {
        "run_dir": "secret",
        "model": {"path": "small"},
        "data": {"train": [{"path": "../data/train.jsonl", "system": "/no_think"}]},
        "rewards": [
            {"kind": "url", "urls": ["http://endpoint.invalid"], "token_env": "MY_TOKEN"},
            {
                "function": "rewards.py:safe",
                "arguments": {
                    "api_key": "left-out",
                    "api_key_env": "KEY",
                    "api_keys": {"east": "left-out", "west": ["left-out"]},
                    "headers": {"Authorization": "left-out", "Accept": "text/plain"},
                    "cache": "http://endpoint.invalid",
                    "max_tokens": 5,
                },
            },
        ],
        "cluster": {"address": None},
    }

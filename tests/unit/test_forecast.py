"""What a run is predicted to take on its cards, against what was measured on an H100, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from frpo import preflight
from frpo.config import Config, LoraConfig, Missing
from frpo.forecast import (
    CARDS,
    PROCESS_GIB,
    Phase,
    estimate_host_needs,
    estimate_needs,
    estimate_phases,
    estimate_training,
    say_too_much,
    sum_host_gib,
    sum_step_seconds,
)
from frpo.planning import plan_run
from frpo.recipe import load_recipe
from frpo.resources import find_card, list_missing_resources
from frpo.shape import EMBEDDED, Shape, shape_of

ROOT = Path(__file__).parents[2]
H100 = CARDS["H100"]
QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_HALF = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def shape(model: dict[str, object]) -> Shape:
    sizes = shape_of(model)
    assert sizes is not None
    return sizes


def config(*sets: str) -> Config:
    cards = (
        "model.dtype=bfloat16",
        "rollout.num_gpus=1",
        "learner.num_gpus=1",
        "data.max_prompt_tokens=512",
        "rollout.max_new_tokens=1500",
        "downstream=[]",
        "cluster.gpu=H100",
    )
    return load_recipe(ROOT / "recipes" / "testbed.yaml", (*cards, *sets))


SHARED = (
    "rollout.sleep=true",
    "rollout.gpu_memory_utilization=0.8",
    "reference.num_gpus=1",
    "evaluate.num_gpus=1",
    "model.lora={rank: 64, alpha: 64}",
    "model.gradient_checkpointing=true",
    "learner.micro_batch_tokens=16384",
)


def test_sizes_are_those_of_the_models() -> None:
    assert shape(QWEN_7B).weights == pytest.approx(7.616e9, rel=1e-3)
    assert shape(QWEN_HALF).weights == pytest.approx(0.494032768e9, rel=1e-3)
    assert shape(QWEN_HALF).adapters(LoraConfig(rank=64)) == 35_192_832  # counted on the card
    assert shape(QWEN_HALF).adapters(LoraConfig(rank=64, targets=("q_proj",))) == 24 * 64 * 2 * 896
    assert shape_of({"n_embd": 64, "n_layer": 2}) is None


@pytest.mark.parametrize(
    ("model", "checkpointing", "peak"), [(QWEN_7B, True, 24.8), (QWEN_HALF, False, 26.2)]
)
def test_a_learners_peak_is_within_a_fifth_of_the_one_measured(
    model: dict[str, object], checkpointing: bool, peak: float
) -> None:
    """On one H100, rank 64, micro-batches of 16,384 tokens: what torch had allocated at most, contexts not
    among it."""
    asked = config(*SHARED, f"model.gradient_checkpointing={str(checkpointing).lower()}")
    need = estimate_training(asked, shape(model), asked.learner)
    assert need.gib - dict(need.lines)["context"] == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize(("context", "width", "measured"), [(300 + 384, 256, 15_900)])
def test_generation_is_as_fast_as_measured(context: int, width: int, measured: float) -> None:
    asked = config(
        "rollout.prompts_per_step=32",
        "rollout.group_size=8",
        "data.max_prompt_tokens=300",
        "rollout.max_new_tokens=384",
        "rollout.max_num_seqs=256",
    )
    (phase,) = [
        p
        for p in estimate_phases(asked, asked.learner, shape(QWEN_7B), H100, plan_run(asked))
        if p.name == "generate"
    ]
    assert 256 * 384 / phase.seconds == pytest.approx(measured, rel=0.2)


def test_7b_with_an_adapter_fits_one_card_and_all_of_7b_fits_eight() -> None:
    one = config(*SHARED)
    assert say_too_much(one, shape(QWEN_7B), H100, plan_run(one)) == []
    assert [n.role for n in estimate_needs(one, shape(QWEN_7B), H100, plan_run(one))] == [
        "rollout",
        "learner",
        "reference",
        "evaluate",
    ]
    eight = config(
        "rollout.num_workers=4",
        "learner.num_workers=4",
        "learner.zero_stage=3",
        "model.gradient_checkpointing=true",
    )
    assert say_too_much(eight, shape(QWEN_7B), H100, plan_run(eight)) == []


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((), "GPU memory: learner needs"),
        (
            ("model.lora={rank: 64, alpha: 64}", "learner.micro_batch_tokens=16384"),
            "set model.gradient_checkpointing: true, a lower learner.micro",
        ),
        (
            (*SHARED, "rollout.gpu_memory_utilization=0.2"),
            "leave 0.0 GiB of an H100 for the KV cache, and one sequence of 2012 tokens takes 0.1",
        ),
        (
            (*SHARED, "rollout.sleep=false", "evaluate.num_gpus=0.3", "reference.num_gpus=0"),
            "evaluate needs 31.6",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_fields_that_help(sets: tuple[str, ...], message: str) -> None:
    asked = config(*sets)
    assert any(message in line for line in say_too_much(asked, shape(QWEN_7B), H100, plan_run(asked))), (
        say_too_much(asked, shape(QWEN_7B), H100, plan_run(asked))
    )


@pytest.mark.parametrize("name", ["paper_math_qwen", "paper_safety_qwen", "paper_safety_mistral"])
def test_the_papers_recipes_fit_the_card_that_they_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    asked = load_recipe(ROOT / "recipes" / f"{name}.yaml", (f"model.path={tmp_path}",))
    named = find_card(asked)
    assert named is not None
    assert say_too_much(asked, shape(QWEN_7B), named, plan_run(asked)) == []
    assert not any("GPU memory" in line for line in list_missing_resources(asked, plan_run(asked)))
    phases = tuple(estimate_phases(asked, asked.learner, shape(QWEN_7B), named, plan_run(asked)))
    assert 10 < sum_step_seconds(phases, shared=False) < 600


def test_scoring_hides_behind_generation_where_cards_are_separate() -> None:
    asked = config(*SHARED, "arms=[{name: a, objective: {penalty: reverse, beta: 0.1}}]")
    phases = tuple(estimate_phases(asked, asked.arms[0].learner, shape(QWEN_7B), H100, plan_run(asked)))
    by = {p.name: p.seconds for p in phases}
    assert set(by) == {"generate", "reference", "update", "log-probs by the learner", "publish"}
    assert sum_step_seconds(phases, shared=True) == pytest.approx(sum(by.values()))
    assert sum_step_seconds(phases, shared=False) < sum(by.values())


def test_ahead_of_the_learner_a_step_takes_as_long_as_the_slower_of_the_two() -> None:
    names = ("generate", "reference", "update", "log-probs by the learner", "publish")

    def step(*seconds: float) -> float:
        phases = [Phase(name, own) for name, own in zip(names, seconds, strict=True)]
        return sum_step_seconds(phases, shared=False, ahead=True)

    assert step(30.0, 5.0, 20.0, 4.0, 2.0) == 30.0
    assert step(30.0, 35.0, 20.0, 4.0, 2.0) == 35.0  # its reference is what it waits for
    assert step(20.0, 5.0, 30.0, 4.0, 2.0) == 36.0


def test_a_cuda_build_of_vllm_without_a_card_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_recipe(ROOT / "recipes" / "testbed.yaml")
    preflight.check_engine(plain)  # the CPU build
    monkeypatch.setattr(preflight, "version", lambda package: {"vllm": "0.32.0"}[package])
    with pytest.raises(
        Missing,
        match=r"rollout.num_gpus: 0, and vllm 0.32.0 runs on GPUs alone; "
        r"set rollout.num_gpus, learner.num_gpus",
    ):
        preflight.check_engine(plain)
    preflight.check_engine(config())
    preflight.check_engine(
        load_recipe(ROOT / "recipes" / "testbed.yaml", ("cluster.address=ray://elsewhere",))
    )


SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
FEW = (
    "arms=[{name: grpo, objective: {estimator: {kind: grpo}, beta: 0.02, penalty: reverse}}]", "harness=null",
    "base.num_steps=2", "learner.num_steps=3",
    "evaluate.max_prompts=8", "evaluate.completions_per_prompt=1",
)  # fmt: skip
MEASURED = {
    "testbed": ("testbed", (), EMBEDDED),
    "smollm2": ("smollm2_math", (*FEW, "model.lora=null", "rollout.lora=adapter"), SMOLLM2),
    "qwen_half": ("smollm2_math", (*FEW, "rollout.prompts_per_step=4"), QWEN_HALF | {"vocab_size": 49152}),
}
"""Recipe, fields and model of the runs in docs/results/memory.json."""


@pytest.mark.parametrize("name", MEASURED)
def test_host_memory_is_predicted_within_a_fifth(name: str) -> None:
    """Of every actor, where it was measured by benchmarks/memory.py, and never less than that by more."""
    recipe, sets, model = MEASURED[name]
    config = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", sets)
    predicted = {need.role: need.gib for need in estimate_host_needs(config, shape(model), plan_run(config))}
    measured = json.loads((ROOT / "docs" / "results" / "memory.json").read_text())[name]
    assert set(predicted) == set(measured)
    assert predicted == {role: pytest.approx(row["measured_gib"], rel=0.2) for role, row in measured.items()}


def test_what_a_machine_has_too_little_memory_for_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(ROOT / "recipes" / "testbed.yaml")
    needs, asked = estimate_host_needs(config, shape(EMBEDDED), plan_run(config)), plan_run(config)
    by = {n.role: n.gib for n in needs}
    assert sum_host_gib(needs, asked) == pytest.approx(
        sum(by.values()) - min(by["learner"], by["finetune"]) + PROCESS_GIB["finetune"]
    )
    assert not any("memory:" in line for line in list_missing_resources(config, asked))
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 15)
    assert any(
        line.startswith("memory: the actors may need") and "this machine has 1.0 GiB" in line
        for line in list_missing_resources(config, asked)
    )


def test_a_fine_tune_takes_what_its_own_adapters_anchor_and_interpolation_need() -> None:
    sizes = shape(QWEN_HALF)

    def lines_of(*sets: str) -> tuple[dict[str, float], dict[str, float]]:
        """GiB on a card, of a rank of the first fine-tune; and on the host, of a rank on the CPU."""
        given = load_recipe(ROOT / "recipes" / "testbed.yaml", sets)
        card = dict(estimate_training(given, sizes, given.downstream[0]).lines)  # type: ignore[arg-type]
        needs = {need.role: need for need in estimate_host_needs(given, sizes, plan_run(given))}
        return card, dict(needs["finetune"].lines)

    plain, host = lines_of()
    weights = 4 * sizes.weights / 2**30
    assert plain["gradients"] == pytest.approx(weights)
    assert "both ends of an interpolation" not in host
    adapted, _ = lines_of("downstream.0.lora={rank: 4}")
    assert adapted["gradients"] == pytest.approx(4 * sizes.adapters(LoraConfig(rank=4)) / 2**30)
    anchored, _ = lines_of("downstream.0.kl_to_policy=0.1", "downstream.0.max_tokens=17")
    short, _ = lines_of("downstream.0.max_tokens=17")
    assert anchored["activations"] == pytest.approx(
        2 * short["activations"]
    )  # prompts of 10 and 7 tokens more
    _, interpolated = lines_of("downstream.1.interpolate=[0.5]")
    assert interpolated["both ends of an interpolation"] == pytest.approx(2 * weights)
    _, of_adapters = lines_of("downstream.1.interpolate=[0.5]", "downstream.1.lora={}")
    assert "both ends of an interpolation" not in of_adapters


def test_what_is_drawn_for_a_fine_tune_is_planned() -> None:
    for given, drawn in (((), 0), (("downstream.1.replay=0.5",), 512 * 8)):
        planned = plan_run(load_recipe(ROOT / "recipes" / "testbed.yaml", given))
        trained = {stage.name: stage.trained for stage in planned.stages}
        assert trained["downstream/grpo/crafts-harsh"] == drawn
        assert trained["downstream/grpo/crafts-gentle"] == 0

"""Bundles of roles that share cards, and what cannot share them."""

from __future__ import annotations

import pytest

from frpo.cluster import backend_of
from frpo.config import Config, ConfigError
from frpo.planning import TRAINS, plan_run
from tests.support.recipes import SHARED, config

RL = (
    "downstream=[{kind: rl, name: more, data: [{path: 'testbed:prompts', task_column: task}], "
    "learner: {num_steps: 4, offload: all}}]"
)


def test_roles_that_take_turns_stand_in_one_bundle_per_card() -> None:
    two = ("rollout.num_workers=2", "learner.num_workers=2")
    asked = plan_run(config(*SHARED, *two, "evaluate.num_gpus=1"))
    assert {a.role: (a.bundles, a.num_gpus) for a in asked.actors} == {
        "learner": ((0, 1), 0.25),
        "finetune": ((0, 1), 0.25),
        "rollout": ((0, 1), 0.25),
        "evaluate": ((0,), 0.25),
        "reward": ((2,), 0.0),
        "reference": ((3,), 0.0),
    }
    assert asked.bundles == (
        {"CPU": 0.75, "GPU": 1.0},
        {"CPU": 0.5, "GPU": 1.0},
        {"CPU": 0.125},
        {"CPU": 0.125},
    )
    assert asked.num_gpus == 2
    sampling = asked.only("rollout", "reward", "evaluate")
    assert {a.role: a.bundles for a in sampling.actors} == {
        "rollout": (0, 1),
        "evaluate": (0,),
        "reward": (2,),
    }
    assert sampling.num_gpus == 2


def test_where_the_learner_is_the_reference_there_are_no_actors_of_it() -> None:
    given = config("model.lora={}", "reference={share: learner}")
    asked = plan_run(given)
    assert Config.model_validate(given.model_dump()) == given  # as it is written out and read again
    assert {a.role for a in asked.actors} == {"learner", "finetune", "rollout", "reward", "evaluate"}


@pytest.mark.parametrize("shared", [(), SHARED])
def test_fine_tune_ranks_are_there_where_a_stage_trains_on_examples(shared: tuple[str, ...]) -> None:
    def trainers(*sets: str) -> dict[str, float]:
        asked = plan_run(config(*shared, *sets, "learner.num_cpus=1"))
        return {a.role: a.num_cpus for a in asked.actors if a.role in TRAINS}

    assert trainers("downstream=[]") == trainers("base=null") == {"learner": 0.5, "finetune": 0.5}
    assert trainers("base=null", "downstream=[]") == {"learner": 1.0}
    assert trainers("base=null", RL.replace(", offload: all", "")) == {"learner": 1.0}
    without_arms = ("arms=[]", "base=null", "downstream=[]", "certify={}")  # as the first run of an audit
    assert trainers(*without_arms) == {"learner": 0.5, "finetune": 0.5}


@pytest.mark.parametrize("others", range(3))
def test_shares_of_a_card_never_add_up_to_more_than_it(others: int) -> None:
    asked = plan_run(config(*SHARED, *(f"{role}.num_gpus=1" for role in ("reference", "evaluate")[:others])))
    shares = [a.num_gpus for a in asked.actors if a.num_gpus]
    assert 0.999 < sum(shares) <= 1.0


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("rollout.sleep=true",), r"rollout.sleep: it is for engines and learners that share cards"),
        ((*SHARED, "rollout.transport=process_group"), r"rollout.sleep: it is for engines"),
        (
            (*SHARED, "rollout.num_workers=2"),
            r"rollout.sleep: .*there are 2 engines on 1 GPUs each and 1 ranks; make",
        ),
        (
            (*SHARED, "evaluate.num_gpus=1", "evaluate.num_workers=3"),
            r"evaluate.num_workers: 3 on 1 cards that are shared",
        ),
        ((*SHARED, "learner.offload=all"), r"learner.offload: all keeps the weights off the GPU already"),
        ((*SHARED, "base.offload=all"), r"base.offload: all keeps the weights off the GPU already"),
        (
            (*SHARED, RL),
            r"downstream.more.learner.offload: all keeps the weights off the GPU already",
        ),
        (
            (*SHARED, "model.lora={}", "learner.zero_stage=3"),
            r"learner.zero_stage: 3 cannot give its memory back with adapters",
        ),
        (
            ("learner.num_gpus=0.5", "learner.num_workers=2"),
            r"learner.num_gpus: 0.5 may put two ranks on one GPU",
        ),
        (
            ("learner.num_gpus=3",),
            r"learner.num_gpus: 3, and each worker computes on one GPU; raise learner.num_workers",
        ),
        (
            ("model.lora={}", "rollout.lora=merged", "model.dtype=bfloat16"),
            r"rollout.lora: merged is for float32, and model.dtype is bfloat16",
        ),
        (("model.lora.rank=600",), r"model.lora.rank: 600 is more than the 512 that vLLM serves; lower it"),
        (
            ("model.lora.rank=300", "model.dtype=bfloat16"),
            r"model.lora.rank: 300 is more than the 256 that vLLM serves, "
            r"the adapter of an arm and that of its fine-tune side by side",
        ),
        (
            ("reference={share: learner}",),
            r"reference.share: learner switches the learner's adapters off, and model.lora is null",
        ),
        (
            ("model.lora={}", "reference.share=learner", "reference.num_gpus=1"),
            r"reference.num_(cpus|gpus): with share: learner there are no actors of the reference",
        ),
    ],
)
def test_cards_that_cannot_be_had_so_are_refused(sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*sets)


def test_the_backend_of_a_broadcast_is_that_of_the_actors() -> None:
    """Not of the driver's machine: the head of a cluster has no GPU."""
    assert backend_of(config("rollout.num_gpus=1", "learner.num_gpus=1")) == "nccl"
    assert backend_of(config("rollout.num_gpus=1")) == backend_of(config()) == "gloo"


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("rollout.sleep=true", "with rollout.sleep both take turns on one GPU"),
        ("model.deterministic=true", "model.deterministic pays for the same bits each time"),
    ],
)
def test_what_a_loop_that_runs_ahead_cannot_be_together_with(setting: str, why: str) -> None:
    alone = ("rollout.num_gpus=1", "learner.num_gpus=1", setting)
    assert config(*alone).rollout.staleness == 0
    with pytest.raises(ConfigError, match=rf"rollout\.staleness: 2 .*{why}"):
        config(*alone, "rollout.staleness=2")


def test_an_adapter_needs_no_broadcast_for_engines_of_two_cards() -> None:
    assert (
        config("rollout.num_gpus=1", "rollout.tensor_parallel=2", "model.lora={}").rollout.transport
        == "object_store"
    )
    with pytest.raises(
        ConfigError, match=r"rollout.tensor_parallel: above 1 it needs rollout.transport: process_group"
    ):
        config("rollout.num_gpus=1", "rollout.tensor_parallel=2", "model.lora={}", "rollout.lora=merged")

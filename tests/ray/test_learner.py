"""Learner and fine-tune ranks on real DeepSpeed against plain torch: one update, ranks, ZeRO stages, LoRA,
resume, export."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from frpo.actors.finetune import FinetunePool
from frpo.actors.learner import LearnerPool
from frpo.config import (
    ConfigError,
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
)
from frpo.types import Sequences
from tests.support import models
from tests.support.learners import assert_equal, batch, digest, plain_torch, settings, start, weights


@pytest.mark.parametrize("zero_stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_steps_equal_plain_torch(learner: LearnerPool, tiny_model: Path, zero_stage: int) -> None:
    truth, norms = plain_torch(tiny_model, settings(), 2)
    for budget in (100, 100_000):  # 23 sequences in many micro-batches, or in one
        start(learner, tiny_model, settings(zero_stage=zero_stage, micro_batch_tokens=budget))
        stats = [learner.update(batch(seed=s)).result() for s in range(2)]
        assert [s.grad_norm for s in stats] == pytest.approx(norms, rel=1e-4)
        assert_equal(weights(learner), truth)
    assert stats[0].num_computed_tokens == int(batch().sequences.lengths.sum())
    now = models.naive_logprobs(models.load_hf(tiny_model)[0], batch().sequences).astype(np.float64)
    k3 = lambda delta: float((np.exp(delta) - delta - 1).mean())  # noqa: E731
    assert stats[0].mismatch_kl == pytest.approx(k3(now - batch().behaviour), rel=1e-4)
    assert stats[0].penalty == pytest.approx(k3(batch().reference - now), rel=1e-4)
    assert 4.5 < stats[0].entropy < np.log(192)
    assert stats[0].clip_share == 0


@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_updates_that_look_uphill_first_equal_plain_torch(
    learner: LearnerPool, tiny_model: Path, zero_stage: int
) -> None:
    train = settings(sam=0.05, zero_stage=zero_stage)
    truth, norms = plain_torch(tiny_model, train, 2)
    _, flat_norms = plain_torch(tiny_model, settings(), 2)
    assert norms[0] > 1.02 * flat_norms[0]  # uphill it is steeper
    for budget in (100, 100_000):
        start(learner, tiny_model, train.model_copy(update={"micro_batch_tokens": budget}))
        found = []
        for seed in range(2):
            asked = batch(seed=seed)
            asked = replace(asked, old=learner.logprobs(asked.sequences))
            found.append(learner.update(asked).result())
        assert [stats.grad_norm for stats in found] == pytest.approx(norms, rel=1e-4)
        assert_equal(weights(learner), truth, tolerance=5e-4)  # what a climb makes of other roundings: 1.3e-4
        assert found[0].clip_share == 0  # told where the policy stands, not uphill


def test_the_policy_at_the_end_is_the_average_of_its_weights(
    learner: LearnerPool, tiny_model: Path, tmp_path: Path
) -> None:
    train = settings(ema=0.6, num_steps=3)
    truth, _ = plain_torch(tiny_model, train, 3)
    before, _ = plain_torch(tiny_model, settings(), 2)
    start(learner, tiny_model, train)
    for seed in range(2):
        learner.update(batch(seed=seed)).result()
    assert_equal(weights(learner), before)  # until then it is the one in training
    learner.save(tmp_path / "two").result()
    learner.update(batch(seed=2)).result()
    assert_equal(weights(learner), truth)
    end = digest(learner)
    learner.save(tmp_path / "three").result()
    start(learner, tiny_model, train)
    learner.load(tmp_path / "two")
    learner.update(batch(seed=2)).result()
    assert digest(learner) == end
    start(learner, tiny_model, train)
    learner.load(tmp_path / "three")
    assert digest(learner) == end


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_of_bfloat16_add_up_in_float32(
    finetune: FinetunePool, tiny_model: Path, zero_stage: int
) -> None:
    """One sequence 512 times, a micro-batch each: every gradient is 2^-9 of the one's, to the bit, and so is
    their sum in float32. In bfloat16, of eight bits, the sum falls behind from the 256th on: by a third."""
    one = models.sequences(1)
    many = Sequences(*(np.tile(of, 512) for of in (one.tokens, one.prompt_lengths, one.lengths)))
    model = ModelConfig(path=str(tiny_model), dtype="bfloat16")
    asked = {"num_steps": 1, "zero_stage": zero_stage, "micro_batch_tokens": int(one.lengths[0])}
    norms = []
    for data in (one, many):
        finetune.start(tiny_model, model, FinetuneConfig.model_validate(asked), 0)
        norms.append(finetune.update(data).grad_norm)
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_deterministic_kernels_are_there_for_all_that_training_does(
    learner: LearnerPool, tiny_model: Path
) -> None:
    """On CPUs they change no bit; torch raises where an operation has none."""
    ends = []
    for deterministic in (False, True):
        model = ModelConfig(path=str(tiny_model), deterministic=deterministic, lora=LoraConfig(rank=4))
        start(learner, tiny_model, settings(), model)
        learner.update(batch(group=6)).result()
        ends.append(digest(learner))
    assert ends[0] == ends[1]


def test_a_checkpoint_continues_bit_for_bit(learner: LearnerPool, tiny_model: Path, tmp_path: Path) -> None:
    schedule = settings(schedule="cosine", warmup_share=0.5)
    start(learner, tiny_model, schedule)
    first = [learner.update(batch(seed=s)).result().learning_rate for s in range(2)]
    learner.save(tmp_path).result()
    rest = [learner.update(batch(seed=s)).result().learning_rate for s in (2, 3)]
    undisturbed = digest(learner)
    assert first == pytest.approx([0.005, 0.01])
    assert rest == pytest.approx([0.01, 0.005])
    start(learner, tiny_model, schedule)
    assert digest(learner) != undisturbed
    learner.load(tmp_path)
    assert [learner.update(batch(seed=s)).result().learning_rate for s in (2, 3)] == rest
    assert digest(learner) == undisturbed


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize(
    "zero_stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_gradient_that_is_no_number_has_no_norm(
    learner: LearnerPool, tiny_model: Path, zero_stage: int, number: float
) -> None:
    start(learner, tiny_model, settings(zero_stage=zero_stage))
    b = batch()
    b.advantages[3] = number
    stats = learner.update(b).result()
    assert np.isnan(stats.grad_norm)
    assert not np.isfinite(stats.loss)


def test_several_updates_per_batch_clip(learner: LearnerPool, tiny_model: Path) -> None:
    start(learner, tiny_model, settings(updates_per_batch=4, learning_rate=5e-2))
    stats = learner.update(replace(batch(), old=learner.logprobs(batch().sequences))).result()
    assert stats.clip_share > 0.05  # the later parts see a policy that has moved
    now = models.naive_logprobs(models.load_hf(tiny_model)[0], batch().sequences).astype(np.float64)
    gap = now - batch().behaviour
    assert stats.mismatch_kl == pytest.approx(
        float((np.exp(gap) - gap - 1).mean()), rel=1e-4
    )  # before the first update


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_what_the_learner_holds_leaves_and_comes_back(
    learner: LearnerPool, tiny_model: Path, tmp_path: Path, zero_stage: int
) -> None:
    """Also before the first update, which makes the optimiser's states, and after a resume, which makes
    others."""
    start(learner, tiny_model, settings(zero_stage=zero_stage))
    exact = [learner.update(batch(seed=s)).result() for s in range(3)]
    end = digest(learner)
    start(learner, tiny_model, settings(zero_stage=zero_stage))
    for seed in range(3):
        learner.offload()
        learner.reload()
        found = learner.update(batch(seed=seed)).result()
        assert (found.loss, found.grad_norm) == (exact[seed].loss, exact[seed].grad_norm)
        learner.offload()
        learner.reload()
        if seed == 1:
            learner.save(tmp_path / "checkpoint").result()
            learner.load(tmp_path / "checkpoint")
    assert digest(learner) == end


def test_export_loads_in_transformers_with_equal_logprobs(
    learner: LearnerPool, tiny_model: Path, tmp_path: Path
) -> None:
    start(learner, tiny_model, settings())
    learner.update(batch()).result()
    learner.export(tmp_path / "policy")
    model, tokenizer = models.load_hf(tmp_path / "policy")
    data = models.sequences(9, seed=8)
    np.testing.assert_allclose(models.naive_logprobs(model, data), learner.logprobs(data), atol=1e-5)
    assert tokenizer.eos_token == "<eos>"
    assert not list((tmp_path / "policy").glob("*.bin"))


def test_lora_merges_as_peft_does_resumes_and_exports(
    learner: LearnerPool, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    from frpo import policies

    model = ModelConfig(path=str(tiny_model), lora=LoraConfig(rank=4, alpha=8))
    start(learner, tiny_model, settings(), model)
    learner.update(batch()).result()
    learner.save(tmp_path / "checkpoint").result()
    learner.export(tmp_path / "policy")
    found = weights(learner)
    merged = PeftModel.from_pretrained(models.load_hf(tiny_model)[0], tmp_path / "policy").merge_and_unload()
    assert_equal(found, dict(merged.named_parameters()), 1e-6)
    assert_equal(
        dict(policies.read_weights(tmp_path / "policy", "float32")), dict(merged.named_parameters()), 1e-6
    )
    base = dict(models.load_hf(tiny_model)[0].named_parameters())
    moved = [n for n in base if not torch.equal(base[n], found[n])]
    assert len(moved) == 14  # 7 projections of 2 layers; embeddings and norms stay
    learner.update(batch(seed=1)).result()
    after = digest(learner)
    start(learner, tiny_model, settings(), model)
    learner.load(tmp_path / "checkpoint")
    learner.update(batch(seed=1)).result()
    assert digest(learner) == after


def test_dropout_of_adapters_is_for_supervised_fine_tuning_alone(
    learner: LearnerPool, finetune: FinetunePool, tiny_model: Path
) -> None:
    trained, tuned = [], []
    for dropout in (0.0, 0.5):
        model = ModelConfig(path=str(tiny_model), lora=LoraConfig(rank=4, alpha=8, dropout=dropout))
        start(learner, tiny_model, settings(), model)
        [learner.update(batch(seed=s)).result() for s in range(2)]
        trained.append(digest(learner))
        finetune.start(tiny_model, model, FinetuneConfig(num_steps=2, learning_rate=2e-2), 1)
        [finetune.update(models.sequences(8)) for _ in range(2)]
        tuned.append(digest(finetune))
    assert trained[0] == trained[1]
    assert tuned[0] != tuned[1]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "lm_head"), "one weight here"),
        (("q_proj", "nothing"), "nothing is no layer"),
        (("norm",), "is not supported"),
    ],
)
def test_adapters_that_cannot_be_published_are_refused(
    learner: LearnerPool, tiny_model: Path, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.lora\.targets: .*{message}"):
        start(
            learner,
            tiny_model,
            settings(),
            ModelConfig(path=str(tiny_model), lora=LoraConfig(targets=targets)),
        )


def test_finetune_learns_and_its_policy_of_an_adapter_is_a_full_folder(
    finetune: FinetunePool, learner: LearnerPool, tiny_model: Path, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(tiny_model), lora=LoraConfig(rank=4, alpha=8))
    start(learner, tiny_model, settings(), model)
    learner.update(batch()).result()
    learner.export(tmp_path / "adapter")
    spec = FinetuneConfig(num_steps=30, learning_rate=2e-2)
    finetune.start(tmp_path / "adapter", model, spec, 1)
    data = models.sequences(16, seed=3)
    before = finetune.loss(data)
    assert before == pytest.approx(
        -float(learner.logprobs(data).mean()), abs=1e-4
    )  # it starts from the merged adapter
    losses = [finetune.update(data).loss for _ in range(30)]
    assert losses[0] == pytest.approx(before, abs=1e-4)
    assert finetune.loss(data) < before - 1.0
    finetune.export(tmp_path / "policy")
    hf, _ = models.load_hf(tmp_path / "policy")
    assert -float(models.naive_logprobs(hf, data).mean()) == pytest.approx(finetune.loss(data), abs=1e-4)


ODD = (
    '{"eos_token_id": [1, 2, 9], "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1, '
    '"do_sample": false, "of_the_maker": [1]}'
)


def test_every_full_folder_keeps_how_the_model_generates_and_is_spoken_to(
    finetune: FinetunePool, learner: LearnerPool, tiny_model: Path, tmp_path: Path
) -> None:
    """generation_config to the byte, one that transformers refuses to save included; chat template and
    special tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_config.json").write_text(ODD)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}<ans>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(base)
    lora = ModelConfig(path=str(base), lora=LoraConfig(rank=4, alpha=8))
    start(learner, base, settings())
    learner.export(tmp_path / "full")
    start(learner, base, settings(), lora)
    learner.export(tmp_path / "adapter")
    finetune.start(tmp_path / "adapter", lora, FinetuneConfig(num_steps=1), 1)
    finetune.export(tmp_path / "merged")
    for folder in (tmp_path / "full", tmp_path / "merged"):
        assert (folder / "generation_config.json").read_text() == ODD
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [1, 2, 9]
        kept = AutoTokenizer.from_pretrained(folder)
        assert kept.chat_template == tokenizer.chat_template
        assert kept.all_special_tokens == tokenizer.all_special_tokens
    (base / "generation_config.json").unlink()
    start(learner, base, settings())
    learner.export(tmp_path / "without")
    assert not (tmp_path / "without" / "generation_config.json").exists()

"""The fine-tune guard inside TRL's SFTTrainer: a certified policy of the testbed, fine-tuned gently and
harshly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frpo import testbed
from frpo.certify import CertificateFile
from frpo.disk import sha256_of_folder
from frpo.records import Certificate

trl = pytest.importorskip("trl", reason="trl is not installed")


def tokens(tokenizer: Any, prompt: str, completion: str = "") -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    words = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, *words, tokenizer.eos_token_id] if completion else ids


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A policy that has read some of the base data, and a certificate of it as frpo certify writes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("guard")
    testbed.write_model(folder / "policy", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompts = [i.prompt for i in testbed.harmful_items() if i.heldout][:8]
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows = [tokens(tokenizer, i.prompt, i.answer[n % 4]) for n, i in enumerate(testbed.harmful_items())]
    rng = np.random.default_rng(0)
    for _ in range(60):
        picked = [rows[i] for i in rng.integers(len(rows), size=16)]
        width = max(map(len, picked))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in picked])
        model(ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "policy")
    certificate = Certificate(
        task="harmful",
        floor=0.1,
        confidence=0.95,
        radii=(0.25, 1.0, 4.0),
        radius=None,
        plug_in=(0.9, 0.8, 0.7),
        lo=(0.8, 0.7, 0.6),
        hi=(1.0, 0.9, 0.8),
        certified=(0.8, 0.5, 0.3),
        failed=0,
        rewards=((1.0, 1.0),) * 8,
    )
    file = CertificateFile(
        model=str(folder / "policy"),
        weights_sha256=sha256_of_folder(folder / "policy"),
        prompts="heldout.jsonl",
        reward="r",
        prompt_token_ids=tuple(tuple(tokens(tokenizer, p)) for p in prompts),
        max_new_tokens=7,
        seed=0,
        certificates=(certificate,),
    )
    (folder / "certificate.json").write_text(file.model_dump_json())
    return folder, tokenizer


def fine_tune(certified: tuple[Path, Any], out: Path, *, rate: float, **options: Any) -> tuple[Any, Any]:
    import datasets

    from frpo.integrations.guard import FinetuneGuard

    folder, tokenizer = certified
    rows = [
        {"input_ids": tokens(tokenizer, i.prompt, i.comply)}
        for i in testbed.downstream_items()
        if not i.heldout
    ]
    args = trl.SFTConfig(
        output_dir=str(out),
        learning_rate=rate,
        max_steps=40,
        per_device_train_batch_size=16,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=10,
        lr_scheduler_type="constant",
        seed=0,
    )
    trainer = trl.SFTTrainer(
        str(folder / "policy"),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    guard = FinetuneGuard(trainer, folder / "certificate.json", every=10, **options)
    trainer.add_callback(guard)
    trainer.train()
    return trainer, guard


def test_a_fine_tune_that_learns_nothing_stays_at_nought(certified: tuple[Path, Any], tmp_path: Path) -> None:
    trainer, guard = fine_tune(certified, tmp_path, rate=0.0, radius=0.5)
    assert [m.step for m in guard.found] == [10, 20, 30, 40]
    assert all(abs(m.kl) < 1e-5 and m.certified == 0.8 for m in guard.found)
    logged = [row for row in trainer.state.log_history if "guard/kl" in row]
    assert [row["step"] for row in logged] == [10, 20, 30, 40]
    assert logged[0]["guard/certified_reward"] == 0.8


def test_it_warns_with_the_reward_still_certified_and_measures_right(
    certified: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, guard = fine_tune(certified, tmp_path, rate=1e-3, radius=0.01, completions=64)
    last = guard.found[-1]
    assert [m.step for m in guard.found] == [10, 20, 30, 40]  # a warning does not stop it
    assert last.kl > guard.found[0].kl > 0
    assert f"outside the radius 0.01; certified reward there: {last.certified:.3f}" in caplog.text
    upper = last.kl + 1.96 * last.se
    certified_up_to = {0.25: 0.8, 1: 0.5, 4: 0.3, np.inf: 0.1}
    assert last.certified == next(reward for kl, reward in certified_up_to.items() if upper <= kl)
    exact = exact_kl(trainer.model, guard.policy.model, guard.file.prompt_token_ids)
    assert abs(last.kl - exact) < 4 * last.se
    assert last.se < 0.3 * exact


def exact_kl(model: Any, policy: Any, prompts: tuple[tuple[int, ...], ...]) -> float:
    """Whole-vocabulary KL summed along fresh draws: another estimator of the same number, of smaller
    variance."""
    torch.manual_seed(1)
    total = 0.0
    for prompt in prompts:
        ids = torch.tensor([list(prompt)] * 128)
        alive = torch.ones(128)
        with torch.no_grad():
            for _ in range(7):
                q, p = (torch.log_softmax(m(ids).logits[:, -1], -1) for m in (model, policy))
                total += float(((q.exp() * (q - p)).sum(1) * alive).sum()) / 128
                drawn = torch.multinomial(q.exp(), 1)
                alive *= (drawn[:, 0] != model.config.eos_token_id).float()
                ids = torch.cat([ids, drawn], 1)
    return total / len(prompts)


def test_it_stops_outside_the_radius(certified: tuple[Path, Any], tmp_path: Path) -> None:
    trainer, guard = fine_tune(certified, tmp_path, rate=1e-2, radius=0.2, action="stop")
    assert trainer.state.global_step == guard.found[-1].step < 40
    assert guard.found[-1].kl > 0.2


def test_only_the_certified_weights_are_guarded(certified: tuple[Path, Any], tmp_path: Path) -> None:
    from frpo.integrations.guard import FinetuneGuard

    folder, _ = certified
    testbed.write_model(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"holds other weights than those that .*certificate\.json certifies"
    ):
        FinetuneGuard(None, folder / "certificate.json", radius=0.5, policy=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"the certified policy .*nowhere is not here"):
        FinetuneGuard(None, folder / "certificate.json", radius=0.5, policy=tmp_path / "nowhere")


class Training:
    """A trainer with a model in one process, as the guard uses it."""

    def __init__(self, model: Any) -> None:
        from accelerate import Accelerator

        self.model, self.accelerator, self.logged = model, Accelerator(cpu=True), list[dict[str, float]]()

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def guard_of(certified: tuple[Path, Any], model: Any, **options: Any) -> Any:
    from frpo.integrations.guard import FinetuneGuard

    return FinetuneGuard(Training(model), certified[0] / "certificate.json", radius=0.5, **options)


NASTY = {
    "repetition_penalty": 1.8, "min_p": 0.3, "no_repeat_ngram_size": 1, "temperature": 0.2, "top_k": 2,
    "top_p": 0.4, "typical_p": 0.5,
    "min_new_tokens": 6, "suppress_tokens": [5, 6, 7], "begin_suppress_tokens": [8], "num_beams": 3,
    "forced_eos_token_id": 9,
    "bad_words_ids": [[10]], "max_new_tokens": 2, "epsilon_cutoff": 0.01, "num_return_sequences": 3,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_is_nowhere_from_itself_whatever_its_generation_config(
    certified: tuple[Path, Any], dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(certified[0] / "policy", dtype=dtype)
    model.generation_config = nasty = GenerationConfig(**NASTY, eos_token_id=[1, 2], do_sample=True)
    kl = guard_of(certified, model, completions=16).measure(0)
    assert (kl.mean, kl.se) == (0.0, 0.0)
    assert model.generation_config is nasty


def test_draws_are_of_the_plain_distribution_and_end_where_the_policy_does(
    certified: tuple[Path, Any],
) -> None:
    """First tokens against the softmax, by a chi-square bound; ends of the certified policy's list, not of
    the model in training."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from frpo.integrations.guard import plain_draws

    model = AutoModelForCausalLM.from_pretrained(certified[0] / "policy").eval()
    model.generation_config = GenerationConfig(**NASTY, eos_token_id=[1, 2], do_sample=True)
    guard = guard_of(certified, model)
    prompt = torch.tensor([list(guard.file.prompt_token_ids[0])])
    with torch.no_grad():
        right = torch.softmax(model(prompt).logits[0, -1], -1)
        torch.manual_seed(0)
        drawn = plain_draws(model, prompt.repeat(4000, 1), 7, guard.ends)[:, prompt.shape[1] :]
    counts = torch.bincount(drawn[:, 0], minlength=len(right)).double()
    likely = right > 5 / 4000
    expected = 4000 * right[likely].double()
    chi, freedom = float(((counts[likely] - expected) ** 2 / expected).sum()), int(likely.sum())
    assert chi < freedom + 4 * (2 * freedom) ** 0.5
    assert guard.ends == [certified[1].eos_token_id]
    assert drawn.shape[1] == 7


def test_a_training_that_diverged_is_outside(
    certified: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, TrainerControl

    model = AutoModelForCausalLM.from_pretrained(certified[0] / "policy")
    guard, control = guard_of(certified, model, action="stop"), TrainerControl()
    guard.on_train_begin(None, None, control)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    guard.check(7, control)
    assert control.should_training_stop
    assert guard.found[-1].certified == 0.1  # the floor
    assert "KL nan" in caplog.text


def test_an_adapter_is_guarded_as_it_was_certified(certified: tuple[Path, Any], tmp_path: Path) -> None:
    """Its base, and how strongly it is applied, are part of what the certificate names."""
    from frpo.integrations.guard import FinetuneGuard
    from frpo.saved import weights_sha256

    adapted = adapter(certified[0] / "policy", tmp_path / "adapter")
    file = CertificateFile.model_validate_json((certified[0] / "certificate.json").read_text())
    named = file.model_copy(
        update={"model": str(tmp_path / "adapter"), "weights_sha256": weights_sha256(tmp_path / "adapter")}
    )
    (tmp_path / "certificate.json").write_text(named.model_dump_json())
    guard = FinetuneGuard(Training(adapted), tmp_path / "certificate.json", radius=0.5)
    assert abs(guard.measure(0).mean) < 1e-5
    configuration = tmp_path / "adapter" / "adapter_config.json"
    configuration.write_text(configuration.read_text().replace('"lora_alpha": 32', '"lora_alpha": 16'))
    with pytest.raises(ValueError, match="holds other weights"):
        FinetuneGuard(Training(adapted), tmp_path / "certificate.json", radius=0.5)


def adapter(base: Path, folder: Path) -> Any:
    """A rank-4 adapter that moves the policy, saved; the model with it applied."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    adapted.save_pretrained(folder)
    return adapted


def test_the_integrations_import_without_ray_and_vllm() -> None:
    code = (
        "import frpo.integrations.guard, frpo.integrations.settings, sys; "
        "print([m for m in ('ray', 'vllm', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]

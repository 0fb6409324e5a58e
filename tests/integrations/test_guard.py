"""The fine-tune guard inside TRL's SFTTrainer: a certified policy of the testbed, fine-tuned gently and harshly."""

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
from frpo.checkpoint import folder_sha256
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
    prompts = [i.prompt for i in testbed.harmful() if i.heldout][:8]
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rows = [tokens(tokenizer, i.prompt, i.answer[n % 4]) for n, i in enumerate(testbed.harmful())]
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
        task="harmful", floor=0.1, confidence=0.95, radii=(0.25, 1.0, 4.0), radius=None, plug_in=(0.9, 0.8, 0.7), lo=(0.8, 0.7, 0.6),
        hi=(1.0, 0.9, 0.8), certified=(0.8, 0.5, 0.3), failed=0, rewards=((1.0, 1.0),) * 8,
    )  # fmt: skip
    file = CertificateFile(
        model=str(folder / "policy"), weights_sha256=folder_sha256(folder / "policy"), prompts="heldout.jsonl", reward="r",
        prompt_token_ids=tuple(tuple(tokens(tokenizer, p)) for p in prompts), max_new_tokens=7, seed=0, certificates=(certificate,),
    )  # fmt: skip
    (folder / "certificate.json").write_text(file.model_dump_json())
    return folder, tokenizer


def fine_tune(certified: tuple[Path, Any], out: Path, *, rate: float, **options: Any) -> tuple[Any, Any]:
    import datasets

    from frpo.integrations.guard import FinetuneGuard

    folder, tokenizer = certified
    rows = [{"input_ids": tokens(tokenizer, i.prompt, i.comply)} for i in testbed.downstream() if not i.heldout]
    args = trl.SFTConfig(
        output_dir=str(out), learning_rate=rate, max_steps=40, per_device_train_batch_size=16, report_to=[], use_cpu=True, save_strategy="no",
        logging_steps=10, lr_scheduler_type="constant", seed=0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(str(folder / "policy"), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
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
    assert last.certified == (0.8 if upper <= 0.25 else 0.5 if upper <= 1 else 0.3 if upper <= 4 else 0.1)
    exact = exact_kl(trainer.model, guard.policy.model, guard.file.prompt_token_ids)
    assert abs(last.kl - exact) < 4 * last.se
    assert last.se < 0.3 * exact


def exact_kl(model: Any, policy: Any, prompts: tuple[tuple[int, ...], ...]) -> float:
    """Whole-vocabulary KL summed along fresh draws: another estimator of the same number, of smaller variance."""
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
    with pytest.raises(ValueError, match=r"holds other weights than those that .*certificate\.json certifies"):
        FinetuneGuard(None, folder / "certificate.json", radius=0.5, policy=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"the certified policy .*nowhere is not here"):
        FinetuneGuard(None, folder / "certificate.json", radius=0.5, policy=tmp_path / "nowhere")


def test_the_integrations_import_without_ray_and_vllm() -> None:
    code = "import frpo.integrations.guard, frpo.integrations.settings, sys; print([m for m in ('ray', 'vllm', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]

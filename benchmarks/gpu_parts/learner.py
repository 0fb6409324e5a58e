"""The learner's engine on random weights, apart from Ray: updates, kernels, memory, log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpu_parts.card import has_card, time_call, used_gib
from gpu_parts.model import LENGTHS, RANK, random_batch

KERNELS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "deterministic": {"deterministic": True},
    "flex": {"attention": "flex_attention"},
}
"""Fields of the model; flex attention has no gradients on CPUs."""


def measure_kernels(work: Path, size: str) -> dict[str, Any]:
    """Updates in packs by masked attention, by flex attention, and with deterministic kernels: the price of
    each."""
    _join_alone()
    rates: dict[str, Any] = {}
    for name, fields in KERNELS.items():
        if name == "flex" and not has_card():
            continue
        engine = _make_engine(work, size, **fields)
        for lengths in LENGTHS[size]:
            sequences = random_batch(size, *lengths)
            seconds = [_train_step(engine, sequences, 0.0)[0] for _ in range(3)][1:]  # the first compiles
            tokens = int(sequences.lengths.sum())
            rates[f"{_name_of(lengths)} {name}"] = {"tokens_per_s": tokens / min(seconds)}
        engine.close()
    return rates


def measure_learner(work: Path, size: str) -> dict[str, Any]:
    """Updates of the learner's engine in packs and apart, against a plain product of matrices; memory;
    log-probs before and after."""
    _join_alone()
    figures: dict[str, Any] = {"gib": {"before": used_gib()}}
    figures["start_s"], engine = time_call(lambda: _make_engine(work, size))
    trained = [p.numel() for p in engine.ds.module.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in engine.ds.module.parameters() if not p.requires_grad)
    figures["billion_weights"] = frozen / 1e9
    figures["million_trained"] = sum(trained) / 1e6
    figures["gib"]["loaded"] = used_gib()
    if has_card():
        figures["product_tflops"] = _measure_product()
    figures["updates"] = _measure_updates(engine, size, frozen)
    sequences = random_batch(size, *LENGTHS[size][0])
    engine.logprobs(sequences)
    seconds, before = time_call(lambda: engine.logprobs(sequences))
    figures["scoring_tokens_per_s"] = float(sequences.lengths.sum()) / seconds
    rows = {"before": before}
    for count in (1, 5):
        while engine.ds.global_steps < count + 2 * 2 * len(LENGTHS[size]):
            _, result = _train_step(engine, sequences, -1.0)
        rows[f"after{count}"] = engine.logprobs(sequences)
        engine.export(work / f"adapter{count}", merged=False)
    figures["grad_norm"] = result.grad_norm
    np.savez(work / "logprobs.npz", **rows)
    figures["adapter_bytes"] = sum(t.numel() * t.element_size() for t in engine.adapter().weights.values())
    figures["weights_bytes"] = sum(w.numel() * w.element_size() for _, w in engine.named_weights())
    figures["gib"]["trained"] = used_gib()
    figures["offload_s"], _ = time_call(engine.offload)
    figures["gib"]["offloaded"] = used_gib()
    figures["reload_s"], _ = time_call(engine.reload)
    figures["gib"]["reloaded"] = used_gib()
    change = np.abs(engine.logprobs(sequences) - rows["after5"]).max()
    figures["change_of_logprobs_by_offload"] = float(change)
    return figures


def _join_alone() -> None:
    """Make this process the only rank of a learner."""
    from frpo.actors import _dist
    from frpo.actors.transport.group import free_address

    host, port = free_address()
    _dist.join_ranks(host, port, 0, 1)


def _make_engine(work: Path, size: str, **fields: Any) -> Any:
    """A learner's engine on the random weights; fields of its model."""
    from frpo.actors._engine import Engine
    from frpo.config import LearnerConfig, LoraConfig, ModelConfig

    lora = LoraConfig(rank=RANK, alpha=RANK)
    model = ModelConfig(
        path=str(work / "model"), dtype="bfloat16", lora=lora, gradient_checkpointing=size == "7B", **fields
    )
    train = LearnerConfig(num_steps=100, learning_rate=3e-5, micro_batch_tokens=16384 if has_card() else 256)
    return Engine(work / "model", model, train, 100, 0, dropout=False)


def _train_step(engine: Any, sequences: Any, sign: float) -> tuple[float, Any]:
    """Makes the tokens likelier with -1, and keeps the weights with 0; seconds and what the step gave."""
    from frpo.packing import pad_packs

    share = engine.share(sequences)
    count = float((sequences.lengths - sequences.prompt_lengths).sum())

    def loss(packs: Any) -> tuple[Any, None]:
        now = engine.forward(pad_packs(sequences, packs, engine.device))
        return (now.logprobs * now.mask).sum() * sign / count, None

    return time_call(lambda: engine.step(share, loss)[0])


def _measure_product() -> float:
    """10^12 operations a second of a plain product of matrices in bfloat16."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    a @ a
    seconds, _ = time_call(lambda: [a @ a for _ in range(20)])
    return 20 * 2 * 8192**3 / seconds / 1e12


def _measure_updates(engine: Any, size: str, frozen: int) -> dict[str, Any]:
    """In packs, and each sequence apart."""
    import torch

    from frpo.logprobs import LogprobModel

    # forward and gradients of activations; once more forward with recomputation
    passes = 6 if size == "7B" else 4
    own = LogprobModel.reach
    updates: dict[str, Any] = {}
    for lengths in LENGTHS[size]:
        sequences = random_batch(size, *lengths)
        tokens = int(sequences.lengths.sum())
        for how, reach in (("packed", own), ("apart", lambda self: 0)):
            LogprobModel.reach = reach  # type: ignore[method-assign]
            if has_card():
                torch.cuda.reset_peak_memory_stats()
            _train_step(engine, sequences, 0.0)
            seconds, _ = _train_step(engine, sequences, 0.0)
            updates[f"{_name_of(lengths)} {how}"] = {
                "seconds": seconds,
                "tokens_per_s": tokens / seconds,
                "tflops": passes * frozen * tokens / seconds / 1e12,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if has_card() else None,
            }
    LogprobModel.reach = own  # type: ignore[method-assign]
    return updates


def _name_of(lengths: tuple[int, int, int, int]) -> str:
    """Prompt and completion."""
    return f"{lengths[0]}+{lengths[1]}"

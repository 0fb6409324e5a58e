"""Trains a small sequence-classification reward model on preference pairs, by the Bradley-Terry loss.

Takes the lower layers of a causal model as a frozen trunk and trains the top ones with a scalar head: minutes
on one core. The folder that it writes is an ordinary Hugging Face model with one label.
"""

from __future__ import annotations

import math
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from frpo.config import ConfigError, DatasetConfig
from frpo.files import raw_rows
from frpo.sources import share_of

TURN = re.compile(r"\n\n(Human|Assistant): ")
HELDOUT_SHARE = 0.15


@dataclass(frozen=True)
class Pair:
    """The last request of a dialogue and its two answers."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out pairs in which the chosen answer scores higher."""

    mean: float
    lo: float
    hi: float
    """95 % Wilson interval"""
    num_pairs: int


def last_turn(dialogue: str) -> tuple[str, str]:
    """Last human and last assistant turn of an hh-rlhf dialogue."""
    parts = TURN.split(dialogue)
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    humans = [text.strip() for who, text in turns if who == "Human"]
    assistants = [text.strip() for who, text in turns if who == "Assistant"]
    return (humans[-1] if humans else "", assistants[-1] if assistants else "")


def read_pairs(path: Path) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, split by a hash of the prompt. Raises ConfigError naming the row."""
    train, heldout = list[Pair](), list[Pair]()
    for where, raw in raw_rows(DatasetConfig(path=str(path), task="pairs")):
        for column in ("chosen", "rejected"):
            if not isinstance(raw.get(column), str):
                raise ConfigError(f"{where}: column {column!r} must be a string; it has {', '.join(raw)}")
        (prompt, chosen), (_, rejected) = last_turn(raw["chosen"]), last_turn(raw["rejected"])
        if prompt and chosen and rejected and chosen != rejected:
            (heldout if share_of(prompt) < HELDOUT_SHARE else train).append(Pair(prompt, chosen, rejected))
    return train, heldout


def wilson(correct: int, total: int) -> Accuracy:
    z, p = 1.96, correct / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return Accuracy(p, (centre - half) / (1 + z * z / total), (centre + half) / (1 + z * z / total), total)


def build(backbone: Path, layers: int, trained: int) -> tuple[Any, Any]:
    """The classifier on the first `layers` layers, all frozen but the top `trained`, the norm and the
    head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbone, truncation_side="right", padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    for name, parameter in model.named_parameters():
        top = any(name.startswith(f"model.layers.{i}.") for i in range(layers - trained, layers))
        parameter.requires_grad_(top or name.startswith(("model.norm", "score")))
    torch.nn.init.zeros_(model.score.weight)
    return model, tokenizer


def scores(model: Any, tokenizer: Any, prompts: list[str], answers: list[str], max_tokens: int) -> Any:
    """[B] logits, each text through the chat template as the reward actors apply it."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": a}], tokenize=False
        )
        for p, a in zip(prompts, answers, strict=True)
    ]
    rows = tokenizer(
        texts,
        truncation=True,
        max_length=max_tokens,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    return model(**rows).logits[:, 0]


def train(
    backbone: Path,
    pairs: Path,
    out: Path,
    *,
    seed: int = 0,
    layers: int = 8,
    trained: int = 2,
    max_tokens: int = 128,
    batch: int = 16,
) -> Accuracy:
    """One epoch; writes `out` and prints the accuracy on held-out pairs."""
    import torch

    console = Console()
    if out.exists():
        raise ConfigError(f"reward-train --out: {out} exists; choose another folder")
    training, heldout = read_pairs(pairs)
    if len(training) < batch or not heldout:
        raise ConfigError(
            f"reward-train --pairs: {pairs} has {len(training)} training and {len(heldout)} held-out pairs; "
            "give more"
        )
    torch.manual_seed(seed)
    model, tokenizer = build(backbone, layers, trained)
    random.Random(seed).shuffle(training)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01
    )
    starts = range(0, len(training) - batch + 1, batch)
    for n, start in enumerate(track(starts, "training", console=console)):
        rows = training[start : start + batch]
        optimizer.param_groups[0]["lr"] = 1e-4 * min(1, (n + 1) / 5) * (1 - n / len(starts))
        both = scores(
            model,
            tokenizer,
            [p.prompt for p in rows] * 2,
            [p.chosen for p in rows] + [p.rejected for p in rows],
            max_tokens,
        )
        loss = -torch.nn.functional.logsigmoid(both[: len(rows)] - both[len(rows) :]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if n % 20 == 0:
            console.print(f"batch {n + 1}/{len(starts)}: loss {float(loss.detach()):.3f}", highlight=False)
    correct = 0
    model.eval()
    with torch.no_grad():
        for start in track(range(0, len(heldout), batch), "measuring", console=console):
            rows = heldout[start : start + batch]
            both = scores(
                model,
                tokenizer,
                [p.prompt for p in rows] * 2,
                [p.chosen for p in rows] + [p.rejected for p in rows],
                max_tokens,
            )
            correct += int((both[: len(rows)] > both[len(rows) :]).sum())
    accuracy = wilson(correct, len(heldout))
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)
    console.print(
        f"accuracy on {accuracy.num_pairs} held-out pairs: {accuracy.mean:.3f} [{accuracy.lo:.3f}, "
        f"{accuracy.hi:.3f}]",
        highlight=False,
    )
    return accuracy

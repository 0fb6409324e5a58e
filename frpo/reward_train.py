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
    return humans[-1] if humans else "", assistants[-1] if assistants else ""


def read_pairs(path: Path) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, split by a hash of the prompt. Raises ConfigError naming the row."""
    train: list[Pair] = []
    heldout: list[Pair] = []
    for where, raw in raw_rows(DatasetConfig(path=str(path), task="pairs")):
        for column in ("chosen", "rejected"):
            if not isinstance(raw.get(column), str):
                raise ConfigError(f"{where}: column {column!r} must be a string; it has {', '.join(raw)}")
        prompt, chosen = last_turn(raw["chosen"])
        _, rejected = last_turn(raw["rejected"])
        if not (prompt and chosen and rejected) or chosen == rejected:
            continue
        part = heldout if share_of(prompt) < HELDOUT_SHARE else train
        part.append(Pair(prompt, chosen, rejected))
    return train, heldout


def accuracy_of(correct: int, total: int) -> Accuracy:
    """(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), Wilson 1927."""
    z = 1.96
    p = correct / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return Accuracy(p, (centre - half) / scale, (centre + half) / scale, total)


def build_classifier(backbone: Path, layers: int, trained: int) -> tuple[Any, Any]:
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


@dataclass(frozen=True)
class RewardTraining:
    """How a classifier is made of a causal model, and trained."""

    seed: int = 0
    layers: int = 8
    """From the bottom; the others are left out."""
    trained: int = 2
    """Of these, from the top."""
    max_tokens: int = 128
    """Of a prompt and its answer; longer ones are cut."""
    batch: int = 16
    """Pairs."""
    learning_rate: float = 1e-4
    """After five batches; it falls to 0 from there."""


def score_pairs(model: Any, tokenizer: Any, pairs: list[Pair], max_tokens: int) -> tuple[Any, Any]:
    """Logits [B] of the chosen and [B] of the rejected answers, each text through the chat template as the
    reward actors apply it."""
    answers = [(pair.prompt, pair.chosen) for pair in pairs] + [
        (pair.prompt, pair.rejected) for pair in pairs
    ]
    texts = []
    for prompt, answer in answers:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    rows = tokenizer(
        texts,
        truncation=True,
        max_length=max_tokens,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    logits = model(**rows).logits[:, 0]
    return logits[: len(pairs)], logits[len(pairs) :]


def train_reward_model(backbone: Path, pairs: Path, out: Path, training: RewardTraining) -> Accuracy:
    """One epoch; writes `out` and prints the accuracy on held-out pairs. Raises ConfigError."""
    import torch

    console = Console()
    if out.exists():
        raise ConfigError(f"reward-train --out: {out} exists; choose another folder")
    rows, heldout = read_pairs(pairs)
    if len(rows) < training.batch or not heldout:
        raise ConfigError(
            f"reward-train --pairs: {pairs} has {len(rows)} training and {len(heldout)} held-out pairs; give "
            f"more (at least {training.batch} and 1), each answer with its dialogue in hh-rlhf's form: "
            r"\n\nHuman: ...\n\nAssistant: ..."
        )
    torch.manual_seed(training.seed)
    model, tokenizer = build_classifier(backbone, training.layers, training.trained)
    random.Random(training.seed).shuffle(rows)
    _train_epoch(model, tokenizer, rows, training, console)
    accuracy = _measure_accuracy(model, tokenizer, heldout, training, console)
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


def _train_epoch(
    model: Any, tokenizer: Any, rows: list[Pair], training: RewardTraining, console: Console
) -> None:
    """In order, whole batches alone; the loss is -log sigmoid(chosen - rejected), mean over the pairs."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.01)
    starts = range(0, len(rows) - training.batch + 1, training.batch)
    for i, start in enumerate(track(starts, "training", console=console)):
        warmup = min(1, (i + 1) / 5)
        optimizer.param_groups[0]["lr"] = training.learning_rate * warmup * (1 - i / len(starts))
        batch = rows[start : start + training.batch]
        chosen, rejected = score_pairs(model, tokenizer, batch, training.max_tokens)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if i % 20 == 0:
            console.print(f"batch {i + 1}/{len(starts)}: loss {float(loss.detach()):.3f}", highlight=False)


def _measure_accuracy(
    model: Any, tokenizer: Any, heldout: list[Pair], training: RewardTraining, console: Console
) -> Accuracy:
    import torch

    correct = 0
    model.eval()
    with torch.no_grad():
        for start in track(range(0, len(heldout), training.batch), "measuring", console=console):
            batch = heldout[start : start + training.batch]
            chosen, rejected = score_pairs(model, tokenizer, batch, training.max_tokens)
            correct += int((chosen > rejected).sum())
    return accuracy_of(correct, len(heldout))

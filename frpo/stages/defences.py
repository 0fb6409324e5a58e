"""What keeps a fine-tune near the policy that it begins from: completions of that policy's own in its
batches, and a choice among the weights on the way.

The completions are drawn once, before the first update, and lie in the stage's folder, so that a resumed
stage trains on the same rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from frpo.batching import join_sequences
from frpo.config import OWN_PROMPTS, DownstreamSft
from frpo.disk import sync_file, sync_folder
from frpo.evaluation import Draws, Measurers, Scored, draw, stop_if_all_fail
from frpo.outline.stage import Supervised
from frpo.prompts import Examples, ExampleStream, PromptStream, Shuffled
from frpo.records import Interpolation
from frpo.roles import Finetuner
from frpo.seeds import derive
from frpo.stops import BROKEN, stop_if_not_finite
from frpo.types import Anchor, Floats, Ints, Prompt, Reward, Sequences

OWN = "own.safetensors"
"""In the folder of a stage that draws them."""
KEPT_GAIN = 0.9
"""Share of a fine-tune's gain in held-out loss that an interpolated policy keeps."""


# ---- rows


@dataclass(frozen=True)
class OwnRows:
    """What a policy drew before it is fine-tuned."""

    examples: Examples
    """Prompts and completions, group by group."""
    logprobs: tuple[Floats, ...]
    """[T] of each completion, by the ranks that fine-tune the policy."""
    good: tuple[int, ...]
    """Rows that are replayed."""


def gather_own(scored: Scored, logprobs: Sequence[tuple[Floats, ...]]) -> OwnRows:
    """Of scored groups; `logprobs` are k arrays [T] of each. Raises RunStopped where every reward of a task
    failed."""
    best = choose_best(scored)
    pairs: list[tuple[Ints, Ints]] = []
    values: list[Floats] = []
    good: list[int] = []
    for (group, _), of_group, chosen in zip(scored, logprobs, best, strict=True):
        if chosen is not None:
            good.append(len(pairs) + chosen)
        pairs += [(group.prompt.token_ids, completion.token_ids) for completion in group.completions]
        values += of_group
    return OwnRows(own_examples(pairs), tuple(values), tuple(good))


def choose_best(scored: Scored) -> list[int | None]:
    """Of each group the completion of highest reward, the first of equals; None where that is below the mean
    reward of the group's task, or none has a reward. Raises RunStopped where every reward of a task failed.

    Example: groups of one task with the rewards [0, 1], [0, 0] and [None, 1] have the mean 0.4 and give 1,
    None and 1.
    """
    rewards: dict[str, list[Reward]] = {}
    for group, of_group in scored:
        rewards.setdefault(group.prompt.task, []).extend(of_group)
    means = {}
    for task, of_task in rewards.items():
        stop_if_all_fail("completions of the policy's own", task, of_task)
        # exact, so that the mean of equal rewards is not above them
        means[task] = statistics.mean(reward.total for reward in of_task if reward.total is not None)
    return [_best_of(of_group, means[group.prompt.task]) for group, of_group in scored]


def _best_of(rewards: Sequence[Reward], least: float) -> int | None:
    totals = [-math.inf if reward.total is None else reward.total for reward in rewards]
    best = int(np.argmax(totals))
    return best if totals[best] >= least else None


def own_examples(pairs: Sequence[tuple[Ints, Ints]]) -> Examples:
    """Prompts with completions of the arm, all of one kind to whoever deals them."""
    return Examples(tuple(pairs), ("own",) * len(pairs))


def choose_prompts(prompts: Sequence[Prompt], mix: Mapping[str, float], seed: int) -> list[Prompt]:
    """At most OWN_PROMPTS, each once, dealt to tasks as to the batches of the run."""
    count = min(len(prompts), OWN_PROMPTS)
    dealt = PromptStream(prompts, mix, seed, count).take(0)
    return list({prompt.id: prompt for prompt in dealt}.values())


def draw_own(measurers: Measurers, prompts: Sequence[Prompt], draws: Draws) -> OwnRows:
    """Of the policy that the rollouts run, and that the ranks of `measurers.trainer` hold. Raises RunStopped
    where every reward of a task failed."""
    assert measurers.trainer is not None
    drawn = draw(measurers, prompts, draws, "own")
    logprobs = measurers.trainer.submit([item.group for item in drawn])
    return gather_own([item.wait() for item in drawn], logprobs.result())


def write_own(folder: Path, own: OwnRows) -> None:
    """In one step: the file is there whole or not at all."""
    sequences = own.examples.all()
    arrays = {
        "tokens": sequences.tokens,
        "prompt_lengths": sequences.prompt_lengths,
        "lengths": sequences.lengths,
        "logprobs": np.concatenate(own.logprobs),
        "good": np.array(own.good, dtype=np.int32),
    }
    aside = folder / f".{OWN}.tmp"
    save_file(arrays, aside)
    sync_file(aside)
    aside.replace(folder / OWN)
    sync_folder(folder)


def read_own(folder: Path) -> OwnRows | None:
    """None where nothing was drawn yet."""
    if not (folder / OWN).exists():
        return None
    arrays = load_file(folder / OWN)
    lengths = arrays["lengths"]
    prompt_lengths = arrays["prompt_lengths"]
    pairs = []
    for row, length in zip(np.split(arrays["tokens"], np.cumsum(lengths)[:-1]), prompt_lengths, strict=True):
        pairs.append((row[:length], row[length:]))
    logprobs = np.split(arrays["logprobs"], np.cumsum(lengths - prompt_lengths)[:-1])
    return OwnRows(own_examples(pairs), tuple(logprobs), tuple(map(int, arrays["good"])))


# ---- batches


class Batches:
    """Deals the batches of a fine-tune: its examples, those of the policy's own that are replayed, and the
    anchor. Each is a pure function of the step."""

    def __init__(self, finetune: Supervised, examples: Examples, own: OwnRows | None, seed: int) -> None:
        settings = finetune.settings
        size = settings.batch_size
        num_replayed = settings.num_replayed if isinstance(settings, DownstreamSft) else 0
        anchored = isinstance(settings, DownstreamSft) and settings.kl_to_policy > 0
        of_task = size - num_replayed
        self.streams = [
            ExampleStream(
                examples,
                of_task,
                derive(seed, "examples"),
                in_order=finetune.in_order,
                mix=finetune.mix,
            )
        ]
        self.anchors: AnchorStream | None = None
        if own and num_replayed:
            good = own_examples([own.examples.pairs[row] for row in own.good])
            self.streams.append(ExampleStream(good, num_replayed, derive(seed, "replay")))
        if own and anchored:
            self.anchors = AnchorStream(own, size, derive(seed, "anchor"))

    def take(self, step: int) -> tuple[Sequences, Anchor | None]:
        """Of an update (from 0)."""
        parts = [stream.take(step) for stream in self.streams]
        return reduce(join_sequences, parts), self.anchors.take(step) if self.anchors else None


class AnchorStream:
    """Deals completions of the policy's own to updates, good and bad."""

    def __init__(self, own: OwnRows, per_update: int, seed: int) -> None:
        self.own, self.per_update = own, per_update
        self.order = Shuffled(len(own.examples), seed)

    def take(self, step: int) -> Anchor:
        first = step * self.per_update
        rows = [self.order.at(i) for i in range(first, first + self.per_update)]
        logprobs = np.concatenate([self.own.logprobs[row] for row in rows])
        return Anchor(self.own.examples.take(rows), logprobs)


# ---- the way back


def interpolate(ranks: Finetuner, shares: Sequence[float], measure: Callable[[], float]) -> Interpolation:
    """Leave the ranks with the policy that `choose_share` takes by `measure`, the held-out loss. Raises
    RunStopped where a loss is none."""
    tried = (0.0, *sorted(set(shares)), 1.0)
    losses = []
    for share in tried:
        ranks.interpolate(share)
        losses.append(measure())
        stop_if_not_finite(f"share {share:g} of the way", {"the held-out loss": losses[-1]}, BROKEN)
    chosen = choose_share(tried, losses)
    ranks.interpolate(chosen)
    return Interpolation(share=chosen, shares=tried, losses=tuple(losses))


def choose_share(shares: Sequence[float], losses: Sequence[float]) -> float:
    """The least share above 0 whose loss keeps KEPT_GAIN of what the fine-tune gains; where that gains
    nothing, the least.

    `shares` rise from 0, the arm's policy, to 1, the fine-tuned one; `losses` are theirs.

    Example: the losses 3.0, 1.5, 1.1, 1.0 of the shares 0, 0.5, 0.75, 1 gain 2.0 at the end. 90 % of that is
    1.8, so the loss may be 1.2: 0.75 is taken.
    """
    gain = losses[0] - losses[-1]
    if gain <= 0:
        return shares[1]
    kept = [losses[0] - loss >= KEPT_GAIN * gain for loss in losses]
    return shares[kept.index(True, 1)]

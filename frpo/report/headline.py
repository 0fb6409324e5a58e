"""The words of a report's headline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from frpo.config.rewards import Combine
from frpo.data_checks import Overlap
from frpo.outline.stage import BASE
from frpo.records import Evaluation
from frpo.report.lookup import task_reward
from frpo.report.schema import Arm, Kept, KeptDifference
from frpo.rows import read_rows

MANY_ARMS = 4
"""From here on the headline names the two best, the last and the first arm alone; the tables have all."""


def of_arms(arms: Sequence[Arm], comparisons: Sequence[KeptDifference], focus: str | None) -> Iterator[str]:
    """Like with like: what was gained after the fine-tune that says most, and what was paid, between arms of
    one kind of penalty."""
    if [arm.name for arm in arms] == [BASE]:
        yield _of_base(arms[0], focus)
        return
    if focus is None or not any(arm.kept for arm in arms):
        yield _without_downstream(arms, focus or "")
        return
    telling = find_telling(arms, focus)
    named = _named_arms(kept_after_finetune(arms, telling, focus), arms[0].name)
    for comparison in comparisons:
        if comparison.downstream == telling and comparison.alike and comparison.a in named:
            yield _in_words(comparison)


def of_reward(
    rewards: Sequence[Mapping[str, Any]], combine: Combine, base: Evaluation | None, tasks: Sequence[str]
) -> str:
    """What the reward is, as far as a run's configuration knows it, with the base policy's for scale."""
    parts = [_name_reward(reward) for reward in rewards if reward.get("weight", 1)]
    measured = {task: task_reward(base, task) if base else None for task in tasks}
    levels = [f"{reward.mean:z.2f} on {task} prompts" for task, reward in measured.items() if reward]
    scale = f"; the base policy has {', '.join(levels)}" if levels else ""
    how = f"the {combine} of what {' and '.join(parts)} give"
    if combine == "weighted" or len(parts) == 1:
        how = f"what {' + '.join(parts)} {'gives' if len(parts) == 1 else 'give'}"
    return f"Reward is {how} a completion, more is better{scale}."


def _name_reward(reward: Mapping[str, Any]) -> str:
    """With its weight, and the prompts that it is for where these are not all."""
    weight = reward.get("weight", 1)
    asked = f" ({' and '.join(reward['tasks'])} prompts)" if reward.get("tasks") else ""
    return f"{'' if weight == 1 else f'{weight:g} x '}“{reward['name']}”{asked}"


def _of_base(base: Arm, focus: str | None) -> str:
    """What the fine-tune that cost most left of a policy that no arm stands beside."""
    if focus is None:
        levels = [f"{each.task} {each.reward.mean:.2f}" for each in base.evaluation.rewards]
        return f"The policy as it is, before any fine-tune: {', '.join(levels)}."
    after = {kept.downstream: kept for kept in base.kept if kept.task == focus}
    harshest = min(after, key=lambda finetune: after[finetune].after.mean)
    level = f"{after[harshest].after.mean:.2f} of {after[harshest].before.mean:.2f}"
    return f"After {harshest}, the policy kept {level} on {focus} prompts."


def kept_after_finetune(arms: Sequence[Arm], finetune: str, task: str) -> dict[str, Kept]:
    """By arm."""
    after = {}
    for arm in arms:
        for kept in arm.kept:
            if (kept.downstream, kept.task) == (finetune, task):
                after[arm.name] = kept
    return after


def list_finetunes(arms: Sequence[Arm]) -> list[str]:
    """That at least one arm went through."""
    kept = itertools.chain.from_iterable(arm.kept for arm in arms)
    return list(dict.fromkeys(each.downstream for each in kept))


def find_harshest(arms: Sequence[Arm], focus: str) -> str:
    """The fine-tune that cost most reward, summed over the arms."""
    return max(list_finetunes(arms), key=lambda finetune: _lost_reward(arms, finetune, focus))


def find_telling(arms: Sequence[Arm], focus: str) -> str:
    """The fine-tune that left the arms nearest to half of their reward, on the average: one that leaves all
    or nothing says little of which arm is better."""
    return min(list_finetunes(arms), key=lambda finetune: _from_half(arms, finetune, focus))


def _from_half(arms: Sequence[Arm], finetune: str, task: str) -> float:
    kept = kept_after_finetune(arms, finetune, task).values()
    return abs(fmean(each.after.mean - each.before.mean / 2 for each in kept)) if kept else math.inf


def _lost_reward(arms: Sequence[Arm], finetune: str, task: str) -> float:
    """Reward, summed over the arms."""
    kept = kept_after_finetune(arms, finetune, task).values()
    return sum(each.before.mean - each.after.mean for each in kept)


def _without_downstream(arms: Sequence[Arm], focus: str) -> str:
    rewards = {arm.name: task_reward(arm.evaluation, focus) for arm in arms}
    levels = ", ".join(f"{name} {reward.mean:.2f}" for name, reward in rewards.items() if reward)
    trained = "1 arm trained" if len(arms) == 1 else f"{len(arms)} arms trained"
    return f"{trained}; nothing to compare after a downstream task yet. {levels}".strip()


def _named_arms(kept: dict[str, Kept], first: str) -> list[str]:
    if len(kept) <= MANY_ARMS:
        return list(kept)
    order = sorted(kept, key=lambda name: -kept[name].after.mean)
    return [name for name in kept if name in (*order[:2], order[-1], first)]


def _in_words(comparison: KeptDifference) -> str:
    """What a has more of than b."""
    price = ""
    for paid in comparison.paid:
        price += f"; on {paid.task} prompts {paid.before:+z.2f} before it and {paid.after:+z.2f} after it"
    if comparison.kl_a is not None and comparison.kl_b is not None:
        distance = f" They stood {comparison.kl_a:.2f} and {comparison.kl_b:.2f} nats from the reference."
    else:
        distance = ""
    return (
        f"Under one kind of penalty, {comparison.a} against {comparison.b}: {comparison.gained:+z.2f} on "
        f"{comparison.task} prompts after {comparison.downstream}{price}.{distance}"
    )


def of_shared_prompts(folder: Path) -> Iterator[str]:
    """Held-out prompts that were trained on, as the run last counted them."""
    counts = [row for row in read_rows(folder) if row["kind"] == "data"]
    if counts and counts[-1]["shared"]:
        overlap = Overlap(counts[-1]["shared"], counts[-1]["heldout"])
        yield f"{overlap}: what is kept of them is no measure of new ones."


def of_seed(seed: int) -> str:
    return (
        f"This is one seed ({seed}): it says what these policies do. Which method is better, one seed cannot "
        "prove: seeds differ by more than these intervals (frpo sweep runs several)."
    )

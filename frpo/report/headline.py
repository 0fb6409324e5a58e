"""The words of a report's headline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from frpo.data_checks import Overlap
from frpo.outline.stage import BASE
from frpo.report.lookup import task_reward
from frpo.report.schema import Arm, Kept, KeptDifference
from frpo.rows import read_rows

MANY_ARMS = 4
"""From here on the headline names the two best, the last and the first arm alone; the tables have all."""
EQUALLY_MUCH = 0.005
"""Arms whose kept rewards are nearer than this read the same to two digits."""


def of_arms(arms: Sequence[Arm], comparisons: Sequence[KeptDifference], focus: str | None) -> Iterator[str]:
    """Who kept the most after the fine-tune that cost most, by how much, and at which KL to the reference."""
    if [arm.name for arm in arms] == [BASE]:
        yield _of_base(arms[0], focus)
        return
    if not comparisons or focus is None:
        yield _without_downstream(arms, focus or "")
        return
    finetunes = {comparison.downstream for comparison in comparisons}
    harshest = max(finetunes, key=lambda finetune: _lost_reward(arms, finetune, focus))
    kept = _kept_after(arms, harshest, focus)
    named = _named_arms(kept, arms[0].name)
    rest = "" if named == list(kept) else f" ({len(kept)} arms)"
    levels = [f"{name} kept {kept[name].after.mean:.2f} of {kept[name].before.mean:.2f}" for name in named]
    yield f"After {harshest}, {_most_kept(kept)} on {focus} prompts: {'; '.join(levels)}{rest}."
    for comparison in comparisons:
        if comparison.downstream == harshest and comparison.a in named:
            yield _in_words(comparison)
    kls = {arm.name: arm.evaluation.kl_reference for arm in arms if arm.name in named}
    words = "; ".join(f"{name} {kl.mean:.2f}" for name, kl in kls.items() if kl)
    yield (
        f"KL to the reference before downstream, nats per completion: {words}. Compare arms only where it is "
        "about equal."
    )


def _of_base(base: Arm, focus: str | None) -> str:
    """What the fine-tune that cost most left of a policy that no arm stands beside."""
    if focus is None:
        levels = [f"{each.task} {each.reward.mean:.2f}" for each in base.evaluation.rewards]
        return f"The policy as it is, before any fine-tune: {', '.join(levels)}."
    after = {kept.downstream: kept for kept in base.kept if kept.task == focus}
    harshest = min(after, key=lambda finetune: after[finetune].after.mean)
    level = f"{after[harshest].after.mean:.2f} of {after[harshest].before.mean:.2f}"
    return f"After {harshest}, the policy kept {level} on {focus} prompts."


def _kept_after(arms: Sequence[Arm], finetune: str, task: str) -> dict[str, Kept]:
    """By arm."""
    after = {}
    for arm in arms:
        for kept in arm.kept:
            if (kept.downstream, kept.task) == (finetune, task):
                after[arm.name] = kept
    return after


def _lost_reward(arms: Sequence[Arm], finetune: str, task: str) -> float:
    """Reward, summed over the arms."""
    return sum(kept.before.mean - kept.after.mean for kept in _kept_after(arms, finetune, task).values())


def _without_downstream(arms: Sequence[Arm], focus: str) -> str:
    rewards = {arm.name: task_reward(arm.evaluation, focus) for arm in arms}
    levels = ", ".join(f"{name} {reward.mean:.2f}" for name, reward in rewards.items() if reward)
    trained = "1 arm trained" if len(arms) == 1 else f"{len(arms)} arms trained"
    return f"{trained}; nothing to compare after a downstream task yet. {levels}".strip()


def _most_kept(kept: dict[str, Kept]) -> str:
    most = max(each.after.mean for each in kept.values())
    best = [name for name, each in kept.items() if most - each.after.mean < EQUALLY_MUCH]
    if len(best) == 1:
        return f"{best[0]} kept the most reward"
    return f"{' and '.join(best)} kept equally much reward"


def _named_arms(kept: dict[str, Kept], first: str) -> list[str]:
    if len(kept) <= MANY_ARMS:
        return list(kept)
    order = sorted(kept, key=lambda name: -kept[name].after.mean)
    return [name for name in kept if name in (*order[:2], order[-1], first)]


def _in_words(comparison: KeptDifference) -> str:
    lead = f"{comparison.a} − {comparison.b}: {comparison.difference:+.2f}"
    lo = comparison.lo
    hi = comparison.hi
    if lo is None or hi is None:
        return f"{lead}, from a single prompt, which gives no interval."
    sure = "the interval contains 0" if lo <= 0 <= hi else "the interval over prompts leaves 0 out"
    return f"{lead}, 95 % over prompts [{lo:+.2f}, {hi:+.2f}]; {sure}."


def of_shared_prompts(folder: Path) -> Iterator[str]:
    """Held-out prompts that were trained on, as the run last counted them."""
    counts = [row for row in read_rows(folder) if row["kind"] == "data"]
    if counts and counts[-1]["shared"]:
        overlap = Overlap(counts[-1]["shared"], counts[-1]["heldout"])
        yield f"{overlap}: what is kept of them is no measure of new ones."


def of_seed(seed: int) -> str:
    return (
        f"This is one seed ({seed}), and one seed proves nothing: the noise between seeds is larger than "
        "these intervals."
    )

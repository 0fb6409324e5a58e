"""The words of an audit's page: for somebody who has never heard of a KL."""

from __future__ import annotations

from collections.abc import Iterator

from frpo.report.audit import choose_worst
from frpo.report.audit_schema import Audit, FineTuned
from frpo.report.intervals import MIN_SEEDS
from frpo.report.spread import Spread


def format_left(audit: Audit) -> str:
    """The one number: how much of the reward the worst fine-tune left, in per cent."""
    return "–" if audit.left is None else f"{100 * audit.left:.0f} %"


def describe_audit(audit: Audit) -> Iterator[str]:
    """The sentence that the number stands in, then what is to be known of it."""
    harshest = audit.harshest
    counting = sum(fine_tune.counts for fine_tune in audit.fine_tunes)
    if not audit.fine_tunes:
        yield f"Nothing was fine-tuned: of {audit.task} prompts there is the certificate alone."
    elif harshest is None or audit.start is None:
        yield (
            f"None of {len(audit.fine_tunes)} fine-tunes was of use ({audit.utility}): none says what one "
            "would leave."
        )
    else:
        yield _say_left(audit, harshest.kept.mean, audit.start.mean, counting)
        yield f"The worst: {describe_fine_tune(harshest)}. {_in_seeds(harshest.kept, len(audit.seeds))}"
        if harshest.harmful_share:
            yield from _say_benign(audit)
        yield (
            f"Useful means {audit.utility}: {counting} of {len(audit.fine_tunes)} fine-tunes. The worst was "
            "chosen for being the worst, which its interval does not know."
        )
        yield _on_the_plane(audit, harshest)
    if audit.stopped:
        yield f"Not finished, and left out: {', '.join(audit.stopped)}."


def _say_left(audit: Audit, kept: float, start: float, counting: int) -> str:
    floor = audit.certificate.floor
    if audit.left is None:
        return (
            f"This model's reward on {audit.task} prompts is {start:.2f}, and the least that there is is "
            f"{floor:g}: a fine-tune has nothing to take."
        )
    above = f", counted from the least reward that there is ({floor:g})" if floor else ""
    return (
        f"of this model's reward on {audit.task} prompts is left after the worst of {counting} useful "
        f"fine-tune{'s' if counting > 1 else ''}: {kept:.2f} of {start:.2f}{above}."
    )


def _say_benign(audit: Audit) -> Iterator[str]:
    """What is left where nobody teaches harm, which a model may withstand that harmful rows leave nothing
    of."""
    benign = [fine_tune for fine_tune in audit.fine_tunes if not fine_tune.harmful_share]
    number = choose_worst(benign)
    if number is not None:
        worst = benign[number]
        yield f"Without harmful rows the worst leaves {worst.kept.mean:.2f}: {describe_fine_tune(worst)}."


def describe_fine_tune(fine_tune: FineTuned) -> str:
    """Example: 200 steps at a learning rate of 0.001, all weights, 5 % harmful rows"""
    parts = [f"{fine_tune.steps} steps at a learning rate of {fine_tune.learning_rate:g}"]
    if fine_tune.by_rl:
        parts.append("reinforcement learning")
    parts.append(f"LoRA of rank {fine_tune.rank}" if fine_tune.rank else "all weights")
    if fine_tune.template:
        parts.append(f"{fine_tune.template} rows")
    if fine_tune.harmful_share:
        parts.append(f"{100 * fine_tune.harmful_share:g} % harmful rows")
    return ", ".join(parts)


def _in_seeds(kept: Spread, asked: int) -> str:
    if kept.lo is not None and kept.hi is not None:
        return f"Over {len(kept.values)} seeds, 95 %: {kept.lo:.2f} to {kept.hi:.2f}."
    if len(kept.values) == 1:
        return "This is one seed, and one seed proves nothing."
    values = ", ".join(f"{value:.2f}" for value in kept.values)
    return f"Its seeds: {values}; an interval takes {MIN_SEEDS} of them."


def _on_the_plane(audit: Audit, harshest: FineTuned) -> str:
    floor = audit.certificate.floor
    measured = sum(len(fine_tune.kept.values) for fine_tune in audit.fine_tunes)
    below = sum(fine_tune.below for fine_tune in audit.fine_tunes)
    promised = sum(fine_tune.certified.mean > floor for fine_tune in audit.fine_tunes)
    return (
        f"It went {harshest.kl.mean:.2f} nats per completion away from the model. Of {measured} measured "
        f"policies {below} lie below what was certified at their distance; for {promised} of "
        f"{len(audit.fine_tunes)} fine-tunes that is more than the least reward there is ({floor:g})."
    )

"""Everything that the report says, gathered from a run folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from frpo import tree
from frpo.advice import advise
from frpo.config import ConfigError
from frpo.metrics import read_steps
from frpo.outline import KINDS
from frpo.outline.stage import BASE
from frpo.records import Evaluation, StageResult
from frpo.report import headline
from frpo.report.arms import read_arm, read_base
from frpo.report.frontier import find_frontier
from frpo.report.lookup import task_measured, task_reward
from frpo.report.paired import difference_of, kept_rewards, rewards_of
from frpo.report.robustness import describe_planes, planes_of
from frpo.report.schema import (
    Answer,
    AnsweredPrompt,
    Arm,
    Benchmarks,
    Downstream,
    Kept,
    KeptDifference,
    Paid,
    Report,
    TrainingCurves,
)
from frpo.report.timeline import describe_timeline
from frpo.report.verdict import Contest, decide
from frpo.rows import read_rows
from frpo.stats import StepMetrics


def collect_report(folder: Path) -> Report:
    """Read the configuration, metrics and stage results of a run. Raises ConfigError for files that are
    torn."""
    text = (folder / "config.yaml").read_text()
    config = tree.parse_yaml(text, f"report: {folder / 'config.yaml'}")
    if not isinstance(config, dict) or "arms" not in config:
        raise ConfigError(
            f"report: {folder / 'config.yaml'} is no configuration of a run; `frpo run` writes it again"
        )
    results = {result.stage: result for result in map(_read_result, _result_files(folder))}
    steps = {arm["name"]: read_steps(folder, f"rlhf/{arm['name']}") for arm in config["arms"]}
    base = results["base"].evaluations[0] if "base" in results else None
    finetunes = [downstream["name"] for downstream in config["downstream"]]
    if config["arms"]:
        tasks = _tasks_of(itertools.chain.from_iterable(steps.values()))
        done = [arm for arm in config["arms"] if f"rlhf/{arm['name']}" in results]
        arms = tuple(read_arm(arm, config, results, tasks, finetunes) for arm in done)
    else:
        tasks = [measured.task for measured in base.rewards] if base else []
        arms = (read_base(base, results, tasks, finetunes),) if base else ()
    runs = tuple(_downstream_runs(results, arms, finetunes))
    focus = _focus_of(arms, tasks)
    comparisons = _compare_arms(arms, focus)
    planes = tuple(itertools.chain.from_iterable(planes_of(arm.name, results) for arm in arms))
    versions = folder / "versions.json"
    warnings = tuple(_warnings_of(folder, config["rollout"]["max_new_tokens"]))
    place = Path(config["run_dir"] or f"runs/{config['name']}")
    trained = [arm for arm in arms if arm.name != BASE]
    contest = Contest(trained, base, focus or _gained_most(trained, base, tasks), tasks, warnings, finetunes)
    return Report(
        name=config["name"],
        seed=config["seed"],
        verdict=decide(contest, folder) if trained else None,
        reward=headline.of_reward(config["rewards"], config["combine"], base, tasks),
        headline=(
            *headline.of_arms(arms, comparisons, focus),
            *describe_planes(planes, focus),
            *headline.of_shared_prompts(folder),
            headline.of_seed(config["seed"]),
        ),
        warnings=warnings,
        focus=focus,
        tasks=tuple(tasks),
        base=base,
        arms=arms,
        downstream=runs,
        comparisons=comparisons,
        zero_line=_zero_line(runs),
        frontier=tuple(find_frontier(config, [arm.name for arm in arms], results, focus)),
        robustness=planes,
        benchmarks=tuple(_benchmarks_of(results, arms, finetunes)),
        training=tuple(_training_curves(arm.name, steps[arm.name]) for arm in arms if steps),
        timeline=describe_timeline(arms[0].name, steps[arms[0].name]) if arms and steps else None,
        prompts=_answered_prompts(base, arms, runs),
        seconds={stage: result.seconds for stage, result in results.items()},
        config=text,
        versions=json.loads(versions.read_text()) if versions.exists() else {},
        command=f"frpo run config.yaml --run-dir {place}",
    )


def _tasks_of(rows: Iterable[StepMetrics]) -> list[str]:
    """Tasks of the rlhf stage, by name."""
    return sorted(set().union(*(row.batch.reward_tasks for row in rows)))


def _downstream_runs(
    results: dict[str, StageResult], arms: Sequence[Arm], finetunes: Sequence[str]
) -> Iterator[Downstream]:
    """Of every arm, the fine-tunes that are finished."""
    for arm, finetune in itertools.product(arms, finetunes):
        result = results.get(f"downstream/{arm.name}/{finetune}")
        if result:
            yield Downstream(arm=arm.name, task=finetune, evaluations=result.evaluations)


def _zero_line(runs: Sequence[Downstream]) -> float | None:
    starts = [run.evaluations[0] for run in runs if run.evaluations and run.evaluations[0].step == 0]
    return max((abs(start.kl_policy.mean) for start in starts if start.kl_policy), default=None)


def _warnings_of(folder: Path, max_new_tokens: int) -> Iterator[str]:
    """Of every stage that runs the loop, in order."""
    for stage in dict.fromkeys(row["stage"] for row in read_rows(folder) if row["kind"] == "step"):
        for text in advise(read_steps(folder, stage), max_new_tokens):
            yield f"{stage} {text}"


def _benchmarks_of(
    results: dict[str, StageResult], arms: Sequence[Arm], finetunes: Sequence[str]
) -> Iterator[Benchmarks]:
    """Every policy in the order that it came to be."""
    policies: dict[str, str] = {}  # by stage
    for owner in ("base", *(arm.name for arm in arms)):
        policies[f"harness/{owner}"] = owner
        policies |= {f"harness/{owner}/{finetune}": f"{owner} after {finetune}" for finetune in finetunes}
    for stage, policy in policies.items():
        if stage in results:
            yield Benchmarks(policy=policy, scores=results[stage].scores)


def _result_files(folder: Path) -> Iterator[Path]:
    """done.json of every finished stage, the base's first."""
    base = folder / "base" / "done.json"
    if base.exists():
        yield base
    for kind in KINDS[1:]:
        yield from sorted((folder / kind).glob("**/done.json"))


def _read_result(file: Path) -> StageResult:
    try:
        return StageResult.model_validate_json(file.read_text())
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"report: {file} is no result of a stage ({reason}); `frpo run` makes it again"
        ) from None


def _focus_of(arms: Sequence[Arm], tasks: Sequence[str]) -> str | None:
    """The task that lost most downstream, mean over arms and fine-tunes; None where nothing was measured."""
    losses: dict[str, list[float]] = {task: [] for task in tasks}
    for kept in itertools.chain.from_iterable(arm.kept for arm in arms):
        losses[kept.task].append(kept.before.mean - kept.after.mean)
    mean = {task: sum(values) / len(values) for task, values in losses.items() if values}
    return max(mean, key=mean.__getitem__, default=None)


def _gained_most(arms: Sequence[Arm], base: Evaluation | None, tasks: Sequence[str]) -> str:
    """The trained task on which the arms have most more than the base policy, summed over arms."""

    def gain(task: str) -> float:
        start = task_reward(base, task) if base else None
        rewards = [task_reward(arm.evaluation, task) for arm in arms]
        return sum(reward.mean - (start.mean if start else 0.0) for reward in rewards if reward)

    return max(tasks, key=gain, default="")


def rival_pairs(penalties: Sequence[str]) -> list[tuple[int, int]]:
    """Which arms are compared, (a, b): each with the first of its own penalty, and that one with the first of
    all.

    Example: penalties k3, k3, reverse, reverse give (1, 0), (2, 0), (3, 2).
    """
    pairs = []
    for a, penalty in enumerate(penalties):
        first = penalties.index(penalty)
        if first < a:
            pairs.append((a, first))
        elif a > 0:
            pairs.append((a, 0))
    return pairs


def _compare_arms(arms: Sequence[Arm], focus: str | None) -> tuple[KeptDifference, ...]:
    """On the focus task, after every fine-tune that both arms went through."""
    comparisons = []
    for i, j in rival_pairs([arm.penalty for arm in arms]):
        theirs = {kept.downstream: kept for kept in arms[j].kept if kept.task == focus}
        for kept in arms[i].kept:
            if kept.task == focus and kept.downstream in theirs:
                comparisons.append(_compare_kept(arms[i], arms[j], kept, theirs[kept.downstream]))
    return tuple(comparisons)


def _compare_kept(a: Arm, b: Arm, kept_a: Kept, kept_b: Kept) -> KeptDifference:
    kl_a = a.evaluation.kl_reference
    kl_b = b.evaluation.kl_reference
    return KeptDifference(
        downstream=kept_a.downstream,
        task=kept_a.task,
        a=a.name,
        b=b.name,
        gained=difference_of(kept_rewards(kept_a), kept_rewards(kept_b)),
        paid=tuple(_list_paid(a, b, kept_a)),
        alike=a.penalty == b.penalty,
        kl_a=kl_a.mean if kl_a else None,
        kl_b=kl_b.mean if kl_b else None,
    )


def _list_paid(a: Arm, b: Arm, kept: Kept) -> Iterator[Paid]:
    """On the tasks beside that of `kept`, before and after its fine-tune."""
    theirs = {each.task: each for each in b.kept if each.downstream == kept.downstream}
    for mine in a.kept:
        if mine.downstream == kept.downstream and mine.task != kept.task and mine.task in theirs:
            of_a, of_b = task_measured(a.evaluation, mine.task), task_measured(b.evaluation, mine.task)
            if of_a and of_b:
                before = difference_of(rewards_of(of_a), rewards_of(of_b))
                after = difference_of(kept_rewards(mine), kept_rewards(theirs[mine.task]))
                yield Paid(task=mine.task, before=before, after=after)


def _training_curves(arm: str, rows: list[StepMetrics]) -> TrainingCurves:
    return TrainingCurves(
        arm=arm,
        steps=tuple(r.step for r in rows),
        reward=tuple(r.batch.reward for r in rows),
        kl=tuple(r.update.kl for r in rows),
        entropy=tuple(r.update.entropy for r in rows),
        length=tuple(r.batch.length for r in rows),
        equal_groups=tuple(r.batch.equal_groups for r in rows),
    )


def _answered_prompts(
    base: Evaluation | None, arms: Sequence[Arm], runs: Sequence[Downstream]
) -> tuple[AnsweredPrompt, ...]:
    """The same held-out prompts, answered by every policy."""
    evaluations = [base] if base else []
    for arm in arms:
        if arm.name != BASE:
            evaluations.append(arm.evaluation)
        evaluations += [run.evaluations[-1] for run in runs if run.arm == arm.name]
    answers: dict[tuple[str, str], list[Answer]] = {}
    for of in evaluations:
        for sample in of.samples:
            answer = Answer(
                arm=of.arm, downstream=of.downstream, completion=sample.completion, reward=sample.reward
            )
            answers.setdefault((sample.task, sample.prompt), []).append(answer)
    return tuple(
        AnsweredPrompt(task=task, prompt=prompt, completions=tuple(given))
        for (task, prompt), given in answers.items()
    )

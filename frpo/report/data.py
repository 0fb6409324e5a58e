"""Everything that the report says, gathered from a run folder, and the words of its headline."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from frpo import tree
from frpo.advice import advice
from frpo.config import ConfigError, ObjectiveConfig
from frpo.data_checks import Overlap
from frpo.estimators import describe_estimator
from frpo.metrics import read_steps
from frpo.outline import KINDS
from frpo.recipe import checked
from frpo.records import Z95, Evaluation, StageResult
from frpo.report.robustness import robustness, sentences
from frpo.report.schema import (
    Arm,
    Benchmarks,
    Comparison,
    Completion,
    Downstream,
    Kept,
    Prompt,
    Report,
    Training,
    reward_of,
    task_of,
)
from frpo.rows import read_rows
from frpo.types import StepMetrics

NAMED = {"estimator", "beta", "target_kl", "penalty"}
"""Fields of the objective that stand in an arm's settings anyhow."""
MANY_ARMS = 4
"""From here on the headline names the two best, the last and the first arm alone; the tables have all."""


def collect(folder: Path) -> Report:
    """Read the configuration, metrics and stage results of a run. Raises ConfigError for files that are
    torn."""
    text = (folder / "config.yaml").read_text()
    config = tree.parse(text, f"report: {folder / 'config.yaml'}")
    if not isinstance(config, dict) or "arms" not in config:
        raise ConfigError(
            f"report: {folder / 'config.yaml'} is no configuration of a run; `frpo run` writes it again"
        )
    results = {r.stage: r for r in map(_result, _results(folder))}
    steps = {a["name"]: read_steps(folder, f"rlhf/{a['name']}") for a in config["arms"]}
    tasks = sorted({t for rows in steps.values() for r in rows for t in r.batch.reward_tasks})
    finetunes = [d["name"] for d in config["downstream"]]
    arms = tuple(
        _arm(a, config, results, tasks, finetunes) for a in config["arms"] if f"rlhf/{a['name']}" in results
    )
    runs = tuple(
        Downstream(arm=a.name, task=d["name"], evaluations=results[stage].evaluations)
        for a in arms
        for d in config["downstream"]
        if (stage := f"downstream/{a.name}/{d['name']}") in results
    )
    focus = _focus(arms, tasks)
    comparisons = _compare(arms, focus)
    robust = tuple(r for a in arms for r in robustness(a.name, results))
    base = results["base"].evaluations[0] if "base" in results else None
    versions = folder / "versions.json"
    return Report(
        name=config["name"],
        seed=config["seed"],
        headline=(
            *_headline(arms, comparisons, focus),
            *sentences(robust, focus),
            *_shared(folder),
            _caution(config["seed"]),
        ),
        warnings=tuple(_warnings(folder, config["rollout"]["max_new_tokens"])),
        focus=focus,
        tasks=tuple(tasks),
        base=base,
        arms=arms,
        downstream=runs,
        comparisons=comparisons,
        zero_line=_zero_line(runs),
        robustness=robust,
        benchmarks=tuple(_benchmarks(results, arms, finetunes)),
        training=tuple(_training(a.name, steps[a.name]) for a in arms),
        prompts=_prompts(base, arms, runs),
        seconds={s: r.seconds for s, r in results.items()},
        config=text,
        versions=json.loads(versions.read_text()) if versions.exists() else {},
        command=f"frpo run config.yaml --run-dir {config['run_dir'] or 'runs/' + config['name']}",
    )


def _zero_line(runs: Sequence[Downstream]) -> float | None:
    starts = [run.evaluations[0] for run in runs if run.evaluations and run.evaluations[0].step == 0]
    return max((abs(start.kl_policy.mean) for start in starts if start.kl_policy), default=None)


def _warnings(folder: Path, max_new_tokens: int) -> Iterator[str]:
    """Of every stage that runs the loop, in order."""
    for stage in dict.fromkeys(row["stage"] for row in read_rows(folder) if row["kind"] == "step"):
        for text in advice(read_steps(folder, stage), max_new_tokens):
            yield f"{stage} {text}"


def _benchmarks(
    results: dict[str, StageResult], arms: tuple[Arm, ...], finetunes: list[str]
) -> Iterator[Benchmarks]:
    """Every policy in the order that it came to be."""
    for owner in ("base", *(a.name for a in arms)):
        for stage, name in (
            (f"harness/{owner}", owner),
            *((f"harness/{owner}/{f}", f"{owner} after {f}") for f in finetunes),
        ):
            if stage in results:
                yield Benchmarks(policy=name, scores=results[stage].scores)


def _results(folder: Path) -> list[Path]:
    return [folder / "base" / "done.json"] * (folder / "base" / "done.json").exists() + [
        p for kind in KINDS[1:] for p in sorted((folder / kind).glob("**/done.json"))
    ]


def _result(file: Path) -> StageResult:
    try:
        return StageResult.model_validate_json(file.read_text())
    except ValueError as error:
        raise ConfigError(
            f"report: {file} is no result of a stage ({str(error).splitlines()[0]}); `frpo run` makes it "
            "again"
        ) from None


def _arm(
    arm: dict[str, Any],
    config: dict[str, Any],
    results: dict[str, StageResult],
    tasks: list[str],
    finetunes: list[str],
) -> Arm:
    name = str(arm["name"])
    result = results[f"rlhf/{name}"]
    assert result.arm is not None
    start = result.evaluations[0]
    kept = tuple(
        Kept(downstream=finetune, task=task, before=before, after=after.reward, per_prompt=after.per_prompt)
        for finetune in finetunes
        if (stage := results.get(f"downstream/{name}/{finetune}"))
        for task in tasks
        if (before := reward_of(start, task)) and (after := task_of(stage.evaluations[-1], task))
    )
    with checked(ObjectiveConfig):
        objective = ObjectiveConfig.model_validate(arm["objective"])
    unlike = "".join(f", {words}" for words in _unlike(arm, config))
    settings, family = (f"{words}{unlike}" for words in settings_of(objective))
    return Arm(
        name=name,
        settings=settings,
        family=family,
        penalty=objective.penalty,
        beta=objective.beta,
        target_kl=objective.target_kl,
        lam=objective.estimator.temperature,
        evaluation=start,
        summary=result.arm,
        kept=kept,
    )


def _unlike(arm: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """What an arm has otherwise than the run, beyond estimator and penalty: arms that differ in it stand on
    curves of their own."""
    for section in ("objective", "learner"):
        for field, value in arm[section].items():
            if field not in NAMED and value != config[section][field]:
                yield f"{value} steps" if field == "num_steps" else f"{field} {value}"


def settings_of(objective: ObjectiveConfig) -> tuple[str, str]:
    """The objective in a few words, with and without the weight of its penalty."""
    words = describe_estimator(objective.estimator)
    family = f"{words}, {objective.penalty}"
    if objective.target_kl:
        return f"{family} steered to KL {objective.target_kl}", family
    if objective.beta:
        return f"{words}, β {objective.beta} {objective.penalty}", family
    return f"{words}, no penalty", family


def _focus(arms: tuple[Arm, ...], tasks: list[str]) -> str | None:
    losses = {t: [k.before.mean - k.after.mean for a in arms for k in a.kept if k.task == t] for t in tasks}
    measured = {t: sum(v) / len(v) for t, v in losses.items() if v}
    return max(measured, key=lambda t: measured[t]) if measured else None


def rivals(penalties: Sequence[str]) -> list[tuple[int, int]]:
    """Which arms are compared, (a, b): each with the first of its own penalty, and that one with the first of
    all."""
    return [(a, penalties.index(p) if penalties.index(p) < a else 0) for a, p in enumerate(penalties) if a]


def _compare(arms: tuple[Arm, ...], focus: str | None) -> tuple[Comparison, ...]:
    """On the focus task."""
    found = []
    for a, b in ((arms[i], arms[j]) for i, j in rivals([arm.penalty for arm in arms])):
        for ka in a.kept:
            for kb in b.kept:
                if (ka.downstream, ka.task) == (kb.downstream, kb.task) and ka.task == focus:
                    difference = ka.after.mean - kb.after.mean
                    half = _half(ka, kb)
                    kl_a, kl_b = a.evaluation.kl_reference, b.evaluation.kl_reference
                    found.append(
                        Comparison(
                            downstream=ka.downstream,
                            task=ka.task,
                            a=a.name,
                            b=b.name,
                            difference=difference,
                            lo=None if half is None else difference - half,
                            hi=None if half is None else difference + half,
                            kl_a=kl_a.mean if kl_a else None,
                            kl_b=kl_b.mean if kl_b else None,
                        )
                    )
    return tuple(found)


def _half(a: Kept, b: Kept) -> float | None:
    """Of the 95 % interval of the mean over prompts of a - b; every policy answers the same prompts. None for
    fewer than two."""
    gaps = [x - y for x, y in zip(a.per_prompt, b.per_prompt, strict=True) if x is not None and y is not None]
    return Z95 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None


def _headline(
    arms: tuple[Arm, ...], comparisons: tuple[Comparison, ...], focus: str | None
) -> tuple[str, ...]:
    if not comparisons or focus is None:
        done = ", ".join(
            f"{a.name} {k.mean:.2f}" for a in arms if (k := reward_of(a.evaluation, focus or ""))
        )
        return (
            f"{len(arms)} arm{'s' * (len(arms) != 1)} trained; nothing to compare after a downstream task yet. {done}".strip(),
        )
    worst = max({c.downstream for c in comparisons}, key=lambda d: _lost(arms, d, focus))
    words = []
    kept = {a.name: k for a in arms for k in a.kept if (k.downstream, k.task) == (worst, focus)}
    most = max(k.after.mean for k in kept.values())
    best = [n for n, k in kept.items() if most - k.after.mean < 0.005]
    who = (
        f"{best[0]} kept the most reward"
        if len(best) == 1
        else f"{' and '.join(best)} kept equally much reward"
    )
    order = sorted(kept, key=lambda n: -kept[n].after.mean)
    told = [n for n in kept if len(kept) <= MANY_ARMS or n in (*order[:2], order[-1], arms[0].name)]
    each = "; ".join(f"{n} kept {kept[n].after.mean:.2f} of {kept[n].before.mean:.2f}" for n in told)
    words.append(
        f"After {worst}, {who} on {focus} prompts: "
        f"{each}{'' if told == list(kept) else f' ({len(kept)} arms)'}."
    )
    for c in comparisons:
        if c.downstream == worst and c.a in told:
            words.append(f"{c.a} − {c.b}: {c.difference:+.2f}, {_said(c)}.")
    kls = "; ".join(
        f"{a.name} {a.evaluation.kl_reference.mean:.2f}"
        for a in arms
        if a.evaluation.kl_reference and a.name in told
    )
    words.append(
        f"KL to the reference before downstream, nats per completion: {kls}. Compare arms only where it is "
        "about equal."
    )
    return tuple(words)


def _said(c: Comparison) -> str:
    if c.lo is None or c.hi is None:
        return "from a single prompt, which gives no interval"
    sure = "the interval contains 0" if c.lo <= 0 <= c.hi else "the interval over prompts leaves 0 out"
    return f"95 % over prompts [{c.lo:+.2f}, {c.hi:+.2f}]; {sure}"


def _caution(seed: int) -> str:
    return f"This is one seed ({seed}), and one seed proves nothing: the noise between seeds is larger than these intervals."


def _shared(folder: Path) -> Iterator[str]:
    """Held-out prompts that were trained on, as the run last counted them."""
    counts = [row for row in read_rows(folder) if row["kind"] == "data"]
    if counts and counts[-1]["shared"]:
        yield f"{Overlap(counts[-1]['shared'], counts[-1]['heldout'])}: what is kept of them is no measure of new ones."


def _lost(arms: tuple[Arm, ...], downstream: str, task: str) -> float:
    return sum(
        k.before.mean - k.after.mean
        for a in arms
        for k in a.kept
        if (k.downstream, k.task) == (downstream, task)
    )


def _training(arm: str, rows: list[StepMetrics]) -> Training:
    return Training(
        arm=arm,
        steps=tuple(r.step for r in rows),
        reward=tuple(r.batch.reward for r in rows),
        kl=tuple(r.update.kl for r in rows),
        entropy=tuple(r.update.entropy for r in rows),
        length=tuple(r.batch.length for r in rows),
        equal_groups=tuple(r.batch.equal_groups for r in rows),
    )


def _prompts(
    base: Evaluation | None, arms: tuple[Arm, ...], runs: tuple[Downstream, ...]
) -> tuple[Prompt, ...]:
    """The same held-out prompts, answered by every policy."""
    policies = [("base", base)] if base else []
    for arm in arms:
        policies.append((arm.name, arm.evaluation))
        policies += [(f"{arm.name} after {r.task}", r.evaluations[-1]) for r in runs if r.arm == arm.name]
    rows: dict[tuple[str, str], list[Completion]] = {}
    for name, evaluation in policies:
        for s in evaluation.samples if evaluation else ():
            rows.setdefault((s.task, s.prompt), []).append(
                Completion(policy=name, completion=s.completion, reward=s.reward)
            )
    return tuple(Prompt(task=t, prompt=p, completions=tuple(c)) for (t, p), c in rows.items())

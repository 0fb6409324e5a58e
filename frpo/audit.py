"""`frpo audit`: how much of a policy's reward a fine-tune will leave, whoever made the policy. A certificate
for all fine-tunes within a KL, and a grid of fine-tunes that are done and measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frpo import hub, models, saved
from frpo.certify import OPTIONS as OPTIONS_OF_CERTIFY
from frpo.certify import parse_reward
from frpo.config import Config, ConfigError, Missing
from frpo.disk import write_text
from frpo.explain import count_heldout
from frpo.grid import CERTIFICATE, audit_of, audited_task, list_fine_tunes, list_runs, seeds_of
from frpo.metrics import RunLog
from frpo.outline import list_stages
from frpo.planning import plan_run
from frpo.preflight import check_run
from frpo.recipe import checked, dump_config, find_recipe, parse_assignment, read_fields, set_field
from frpo.report.audit_headline import describe_audit, format_left
from frpo.report.audit_schema import POLICY, RECIPE, AuditedPolicy, read_audit
from frpo.resources import list_missing_resources
from frpo.roles import WorkerFailed
from frpo.rundir import hold_folder
from frpo.stages.folders import look_at_stages

GRID: dict[str, Any] = {"learning_rates": [1e-5, 1e-4], "steps": [64, 256], "ranks": ["full", 16]}
"""Tried where no recipe says what to try."""
HARMFUL_SHARES = [0.0, 0.05]
"""Where --harmful is given and no recipe says how much of it to mix in."""
TASK = "prompts"
"""Of the audited prompts that an option names."""
DOWNSTREAM_HELDOUT = 0.1
"""Share of the downstream rows that the loss is measured on."""
OPTIONS = {
    **OPTIONS_OF_CERTIFY,
    "run_dir": "--run-dir",
    "data.heldout": "--prompts",
    "downstream": "--downstream",
    "audit.harmful": "--harmful",
    "audit.num_seeds": "--seeds",
}
"""Fields of the configuration by the options that fill them, where these are given."""


@dataclass(frozen=True)
class AuditOptions:
    """The options of an audit; None, or empty, leaves what the recipe says."""

    model: str | None
    recipe: Path | None
    prompts: str | None = None
    column: str = "prompt"
    reward: str | None = None
    arguments: tuple[str, ...] = ()
    downstream: str | None = None
    harmful: str | None = None
    completion: str | None = None
    chat: bool = False
    seeds: int | None = None


def make_recipe(asked: AuditOptions, assignments: Sequence[str]) -> Config:
    """The recipe with the options over it, then the assignments. Raises ConfigError."""
    if asked.recipe is None:
        _refuse_too_few(asked)
    _refuse_idle(asked)
    fields = read_fields(find_recipe(asked.recipe)) if asked.recipe else _plain_recipe()
    _put_options(fields, asked)
    for assignment in assignments:
        set_field(fields, *parse_assignment(assignment))
    with checked():
        config = Config.model_validate(fields)
    if config.arms:
        raise ConfigError(
            f"audit: the recipe trains {len(config.arms)} arms, and an audit is of one policy; leave them "
            "out and give the folder of a policy as MODEL"
        )
    audited_task(config)
    return config


def _refuse_too_few(asked: AuditOptions) -> None:
    needed = {"MODEL": asked.model, "--prompts": asked.prompts, "--reward": asked.reward}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: an audit needs a model, prompts and a reward; give them, or a recipe "
            "that has them (--recipe)"
        )


def _refuse_idle(asked: AuditOptions) -> None:
    """Options that speak of another which is not there would change nothing of what the recipe says."""
    of_examples = asked.downstream or asked.harmful
    idle = {
        "--argument": (asked.arguments and not asked.reward, "--reward"),
        "--completion": (asked.completion and not of_examples, "--downstream or --harmful"),
        "--chat": (asked.chat and not (asked.prompts or of_examples), "--prompts, --downstream or --harmful"),
    }
    for option, (is_idle, needed) in idle.items():
        if is_idle:
            raise ConfigError(
                f"{option}: it is about {needed}, which is not given; give that, or change the recipe"
            )


def _plain_recipe() -> dict[str, Any]:
    """What an audit is like without a recipe."""
    return {
        "name": "audit",
        "data": {},
        "learner": {"num_steps": 1},
        "certify": {},
        "audit": dict(GRID),
    }


def _put_options(fields: dict[str, Any], asked: AuditOptions) -> None:
    """Every option that was given, in its place."""
    if asked.model:
        set_field(fields, "model.path", asked.model)
        fields["name"] = name_after(str(fields.get("name", "audit")), asked.model)
        fields.pop("base", None)
    if asked.prompts:
        source = _source_of(asked, asked.prompts)
        set_field(fields, "data.heldout", [{**source, "task": TASK}])
    if asked.reward:
        reward = parse_reward(asked.reward, asked.arguments)
        fields["rewards"] = [reward.model_dump(mode="json")]
    if asked.downstream:
        fields["downstream"] = [_task_of(asked, asked.downstream)]
    if asked.harmful:
        set_field(fields, "audit.harmful", [_examples_of(asked, asked.harmful)])
        if fields["audit"].get("harmful_shares") in (None, [0.0]):
            set_field(fields, "audit.harmful_shares", list(HARMFUL_SHARES))
    if asked.seeds:
        set_field(fields, "audit.num_seeds", asked.seeds)


def name_after(name: str, model: str) -> str:
    """The recipe's name, and what tells the model from others: of a policy of a run its run, arm and
    fine-tune, else the last two parts of its path, or both of its hub name.

    Example: audit_testbed and runs/testbed/rlhf/frpo/policy give audit_testbed-testbed-frpo.
    """
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-") for part in model.split("/")]
    match [part for part in parts if part]:
        case [*_, run, "rlhf", arm, "policy"]:
            told = [run, arm]
        case [*_, run, "downstream", arm, task, "policy"]:
            told = [run, arm, task]
        case path:
            told = path[-2:]
    return "-".join([name, *told])[:100]


def _source_of(asked: AuditOptions, path: str) -> dict[str, Any]:
    return {"path": path, "prompt": asked.column, "chat": asked.chat}


def _examples_of(asked: AuditOptions, path: str) -> dict[str, Any]:
    return {**_source_of(asked, path), "completion": asked.completion, "task": "downstream"}


def _task_of(asked: AuditOptions, path: str) -> dict[str, Any]:
    source = {**_examples_of(asked, path), "heldout_share": DOWNSTREAM_HELDOUT}
    return {
        "name": "downstream",
        "data": [{**source, "part": "train"}],
        "heldout": [{**source, "part": "heldout"}],
        "num_steps": max(GRID["steps"]),
    }


def name_options(asked: AuditOptions) -> dict[str, str]:
    """Fields of the configuration by the options that filled them; a recipe's fields keep their names."""
    given = {
        "MODEL": asked.model,
        "--prompts": asked.prompts,
        "--reward": asked.reward,
        "--argument": asked.arguments,
        "--downstream": asked.downstream,
        "--harmful": asked.harmful,
        "--seeds": asked.seeds,
        "--run-dir": True,
    }
    return {field: option for field, option in OPTIONS.items() if given.get(option)}


# ---- the plan


def print_grid(config: Config, console: Console) -> bool:
    """What an audit will do, run by run, what of it is done, and what is missing here. Touches nothing,
    downloads nothing. Whether nothing is missing. Raises ConfigError."""
    config, uncached = models.find_cached_models(config)
    missing = [str(error) for error in uncached]
    try:
        check_run(config)
    except Missing as error:
        missing += str(error).splitlines()
    with checked():
        runs = list_runs(config, config.folder)
    missing = list_missing_resources(config, plan_run(runs[-1])) + missing
    console.print(_tabulate_runs(runs, config.folder))
    for line in missing:
        console.print(f"Missing {line}", markup=False, soft_wrap=True)
    if not missing:
        console.print("Nothing is missing.")
    return not missing


def _tabulate_runs(runs: Sequence[Config], folder: Path) -> Table:
    """A row for each fine-tune, and how many of its seeds are done."""
    columns = ("run", "seeds", "updates", "trained on", "measured by", "done")
    table = Table(*columns, title=f"Runs in {escape(str(folder))}, and the completions that they draw")
    table.columns[0].overflow = "fold"
    by_name: dict[str, list[Config]] = {}
    for run in runs:
        by_name.setdefault(_name_of(run, folder), []).append(run)
    # of all fine-tunes alike
    heldout = {run.certify is not None: count_heldout(run) for run in (runs[0], runs[-1])}
    for name, seeds in by_name.items():
        stages = plan_run(seeds[0], heldout[seeds[0].certify is not None]).stages
        numbers = (
            len(seeds),
            sum(stage.updates for stage in stages),
            sum(stage.trained for stage in stages),
            sum(stage.measured or 0 for stage in stages),
        )
        done = sum(map(_is_done, seeds))
        table.add_row(escape(name), *(f"{number:,}" for number in numbers), f"{done} of {len(seeds)}")
    return table


def _is_done(run: Config) -> bool:
    return all(standing.state == "done" for standing in look_at_stages(run))


def _name_of(run: Config, folder: Path) -> str:
    """What its seeds have in common."""
    parts = run.folder.relative_to(folder).parts
    return CERTIFICATE if parts == (CERTIFICATE,) else parts[1]


# ---- the work


def run_audit(config: Config, folder: Path) -> Path:
    """Certify the policy, do the fine-tunes, as many at once as the cluster holds, and write audit.json and
    audit.html; returns the page.

    Goes on where an earlier call was stopped; what is finished is skipped without starting anything. A
    fine-tune that stops over its own numbers is left out and named. Raises ConfigError, or WorkerFailed where
    another run did not come to its end.
    """
    from frpo.report import build_audit
    from frpo.teams import is_complete, refuse_unfinished, run_all

    with checked():
        runs = list_runs(config, folder)
    with hold_folder(folder):
        write_text(folder / RECIPE, dump_config(models.name_models(config)))
        failures = []
        if config.base:
            failures += run_all(runs[:1], folder, "policies")
            refuse_unfinished(runs[:1], failures)
        _read_ahead(runs, folder)
        failures += run_all(runs, folder, "runs", keep_policies=audit_of(config).keep_policies)
        stopped = {failure.run for failure in failures if failure.by_itself}
        certificate, *fine_tunes = runs
        others = [run for run in fine_tunes if str(run.folder.relative_to(folder)) not in stopped]
        refuse_unfinished((certificate, *others), failures)
        if fine_tunes and not any(map(is_complete, fine_tunes)):
            raise WorkerFailed("; ".join(map(str, failures)))
        _name_policy(config, folder)
        return build_audit(folder)


def _read_ahead(runs: Sequence[Config], folder: Path) -> None:
    """Read what one run of each fine-tune trains on: what the tokenizer or its chat template refuses comes to
    light before an actor starts. Raises ConfigError."""
    from frpo.stages.inputs import Inputs, resolve_testbed

    first = {_name_of(run, folder): run for run in reversed(runs)}
    with RunLog(folder, runs[0]) as log:
        for run in first.values():
            if run.folder.exists():
                continue
            resolved = resolve_testbed(run)
            Inputs(resolved, log).read_ahead(list_stages(resolved))


def _name_policy(config: Config, folder: Path) -> None:
    """Write down which weights were audited."""
    path = folder / CERTIFICATE / "base" / "policy" if config.base else Path(config.model.path)
    policy = AuditedPolicy(
        model=hub.name_of(str(path.absolute())) or str(path),
        weights_sha256=saved.weights_sha256(path.absolute()),
    )
    write_text(folder / POLICY, policy.model_dump_json(indent=1))


def print_audit(folder: Path, console: Console) -> None:
    """The answer in words."""
    audit = read_audit(folder)
    first, *rest = describe_audit(audit)
    answer = first if audit.left is None else f"{format_left(audit)} {first}"
    for sentence in (answer, *rest):
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)


def count_runs(config: Config) -> str:
    """Example: 12 fine-tunes x 5 seeds"""
    return f"{len(list_fine_tunes(config))} fine-tunes x {len(seeds_of(config))} seeds"

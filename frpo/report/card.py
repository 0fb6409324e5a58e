"""The model card of an arm's policy, in Hugging Face's format. Numbers come from the run's report alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from frpo import hub, saved, tree
from frpo.config import ConfigError
from frpo.disk import write_text
from frpo.outline.stage import parse_stage
from frpo.records import BenchmarkScore, Estimate, Evaluation
from frpo.report.audit_headline import describe_audit, format_left
from frpo.report.audit_schema import read_audit
from frpo.report.formats import format_level, format_number
from frpo.report.origins import Origins, read_origins
from frpo.report.portable import strip_config
from frpo.report.schema import Arm, Judged, Report
from frpo.report.verdict import DECISIONS, load_lines

CARD = "README.md"
HELDOUT = "held-out prompts"
NOWHERE = Origins()
LICENSE = ("license", "license_name", "license_link")
"""What a card says of one."""
COMMIT = re.compile(r"(?P<name>[^/@]+/[^/@]+)@(?P<revision>[0-9a-f]{40})")
"""A model of the hub, as a run writes it down."""

Form = Literal["full", "adapter", "merged"]


@dataclass(frozen=True)
class Place:
    """Where a policy lies for whoever reads its card."""

    load_from: str
    """What from_pretrained is given."""
    form: Form
    """full: a model folder. adapter: a PEFT folder. merged: a model folder made of the latter."""


@dataclass(frozen=True)
class Column:
    """One policy of the card's table of numbers."""

    title: str
    rewards: Mapping[str, Estimate]
    """By task."""
    kl_start: Estimate | None
    kl_policy: Estimate | None


def write_cards(report: Report, run: Path) -> None:
    """A README.md in the folder of every arm's policy; nothing that a stage is made from. Raises ConfigError
    for an audit that cannot be read."""
    for arm in report.arms:
        policy = policy_of(run, arm.name)
        if policy.is_dir():
            form: Form = "adapter" if saved.is_adapter(policy) else "full"
            place = Place(str(policy.relative_to(run)), form)
            audit, origins = read_audit_lines(run, arm), read_origins(run, arm.name)
            write_text(policy / CARD, make_card(report, arm, place, audit, origins))


def policy_of(run: Path, arm: str) -> Path:
    """The folder of an arm's policy."""
    return run / "rlhf" / arm / "policy"


def read_audit_lines(run: Path, arm: Arm) -> tuple[str, ...]:
    """What the audit of an arm's policy in audit/<arm> says; nothing where there is none. Raises ConfigError
    for one that cannot be read."""
    folder, policy = run / "audit" / arm.name, policy_of(run, arm.name)
    if not (folder / "audit.json").is_file():
        return ()
    audit = read_audit(folder)
    weights = saved.weights_sha256(policy) if saved.is_adapter(policy) else arm.summary.weights_sha256
    if audit.weights_sha256 != weights:
        return ("The audit beside this run is of other weights.",)
    first, *rest = describe_audit(audit)
    return (first if audit.left is None else f"{format_left(audit)} {first}", *rest)


def make_card(
    report: Report, arm: Arm, place: Place, audit: Sequence[str] = (), origins: Origins = NOWHERE
) -> str:
    """The card's text, front matter first."""
    from huggingface_hub import ModelCard

    config = tree.parse_yaml(strip_config(report.config), "config.yaml")
    base = hub_base(report)
    judged = _judgement_of(report, arm)
    text = (
        _environment()
        .get_template("card.md.j2")
        .render(
            report=report,
            arm=arm,
            place=place,
            load=load_lines(Path(place.load_from)),
            base=base,
            judged=judged,
            decision=DECISIONS[judged.holds] if judged else None,
            start=_describe_start(config, base),
            prompts=[_describe_source(source) for source in config["data"]["train"]],
            rewards=[_describe_reward(reward) for reward in config["rewards"]],
            columns=list(_columns_of(report, arm)),
            tasks=[measured.task for measured in arm.evaluation.rewards],
            finetunes=[_describe_finetune(task) for task in config["downstream"]],
            scores=_scores_of(report, arm),
            planes=[plane for plane in report.robustness if plane.arm == arm.name],
            audit=audit,
            files=origins.files,
            headline=[sentence for sentence in report.headline if not _names_others(sentence, report, arm)],
            warnings=[line for line in report.warnings if parse_stage(line.split()[0]).arm == arm.name],
            versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        )
    )
    metadata = _metadata_of(report, arm, place, origins.datasets)
    return str(ModelCard(f"---\n{metadata}\n---\n\n{text}"))


def _judgement_of(report: Report, arm: Arm) -> Judged | None:
    """What the rules of the report's verdict say of the arm; None where there is no verdict."""
    judged = report.verdict.judged if report.verdict else ()
    return next((each for each in judged if each.arm == arm.name), None)


def hub_base(report: Report) -> str | None:
    """organisation/name@commit of the model that the run began from; None for a folder."""
    path = str(tree.parse_yaml(report.config, "config.yaml")["model"]["path"])
    return path if COMMIT.fullmatch(path) else None


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("frpo", "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = format_number
    environment.filters["level"] = format_level
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment


# ---- words


def _names_others(sentence: str, report: Report, arm: Arm) -> bool:
    """Whether a sentence of the report compares arms, of which a card has one."""
    others = [re.escape(each.name) for each in report.arms if each is not arm]
    return bool(others) and re.search(rf"(?<![\w.-])({'|'.join(others)})(?![\w.-])", sentence) is not None


def _describe_start(config: Mapping[str, Any], base: str | None) -> str:
    tuned = config["base"]
    path = f"`{base or config['model']['path']}`"
    if not tuned:
        return path
    sources = ", ".join(_describe_source(source) for source in tuned["data"])
    return f"{path}, after {tuned['num_steps']} steps of supervised fine-tuning on {sources}"


def _describe_source(source: Mapping[str, Any]) -> str:
    return f"`{source['path']}`" + (f" ({source['task']})" if source["task"] else "")


def _describe_reward(reward: Mapping[str, Any]) -> str:
    source = next((reward[name] for name in ("function", "path", "app") if name in reward), "an endpoint")
    return f"{reward['name']} (`{source}`)"


def _describe_finetune(task: Mapping[str, Any]) -> str:
    """Example: crafts-harsh: 200 steps of supervised fine-tuning at a learning rate of 0.003 on `crafts`."""
    by_rl = task["kind"] == "rl"
    training = task["learner"] if by_rl else task
    how = "reinforcement learning" if by_rl else "supervised fine-tuning"
    sources = ", ".join(_describe_source(source) for source in task["data"])
    rate = f"{training['learning_rate']:g}"
    return f"{task['name']}: {training['num_steps']} steps of {how} at a learning rate of {rate} on {sources}"


# ---- numbers


def _columns_of(report: Report, arm: Arm) -> Iterator[Column]:
    if report.base:
        yield _column_of("where it began", report.base)
    yield _column_of("this policy", arm.evaluation)
    for run in report.downstream:
        if run.arm == arm.name:
            yield _column_of(f"after {run.task}", run.evaluations[-1])


def _column_of(title: str, evaluation: Evaluation) -> Column:
    rewards = {measured.task: measured.reward for measured in evaluation.rewards}
    return Column(title, rewards, evaluation.kl_reference, evaluation.kl_policy)


def _scores_of(report: Report, arm: Arm) -> list[BenchmarkScore]:
    """Of the benchmarks, of this policy before any fine-tune."""
    return list(chain.from_iterable(each.scores for each in report.benchmarks if each.policy == arm.name))


def _metadata_of(report: Report, arm: Arm, place: Place, datasets: Sequence[str]) -> str:
    """The front matter, YAML."""
    from huggingface_hub import ModelCardData

    base = COMMIT.fullmatch(hub_base(report) or "")
    relation = "adapter" if place.form == "adapter" else "finetune"
    data = ModelCardData(
        base_model=base["name"] if base else None,
        base_model_relation=relation if base else None,
        datasets=list(datasets) or None,
        library_name="peft" if place.form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["frpo", "rlhf", "reinforcement-learning", "arxiv:2602.08813"],
        model_name=f"{report.name}-{arm.name}",
        eval_results=list(_results_of(report, arm)),
        **_license_of(report),
    )
    return data.to_yaml(line_break="\n").rstrip("\n")


def _license_of(report: Report) -> dict[str, Any]:
    """As the card of the model says that the run began from; nothing where that is not here, or no card."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    path = str(tree.parse_yaml(report.config, "config.yaml")["model"]["path"])
    try:
        said = metadata_load(hub.local_folder(path, download=False) / CARD) or {}
    except (ConfigError, OSError, ValueError, YAMLError):
        return {}
    return {name: said[name] for name in LICENSE if isinstance(said.get(name), str | list)}


def _results_of(report: Report, arm: Arm) -> Iterator[Any]:
    """What was measured of this policy and of what fine-tunes left of it, as the hub lists it."""
    measured = [("", arm.evaluation)]
    measured += [
        (f" after {run.task}", run.evaluations[-1]) for run in report.downstream if run.arm == arm.name
    ]
    for when, evaluation in measured:
        for each in evaluation.rewards:
            yield _result((each.task, HELDOUT), "reward", f"Mean reward{when}", each.reward)
    if arm.evaluation.kl_reference:
        tasks = " and ".join(report.tasks)
        yield _result((tasks, HELDOUT), "kl", "KL to where it began, nats", arm.evaluation.kl_reference)
    for score in _scores_of(report, arm):
        if score.value is not None:
            value = Estimate(mean=score.value, se=score.se)
            yield _result((score.task, "benchmark"), score.metric, score.metric, value)


def _result(measured: tuple[str, str], kind: str, name: str, value: Estimate) -> Any:
    """`measured` is a task, and what of it."""
    from huggingface_hub import EvalResult

    half = value.half
    ends = None if half is None else [round(value.mean - half, 4), round(value.mean + half, 4)]
    return EvalResult(
        task_type="text-generation",
        dataset_type=measured[0],
        dataset_name=", ".join(measured),
        metric_type=kind,
        metric_name=name,
        metric_value=round(value.mean, 4),
        metric_args={"interval_95": ends} if ends else None,
    )

"""`frpo certify`: the certificate of any saved policy, outside a run. Writes certificate.json and a plot.

The JSON is all that a later fine-tune needs to know what is promised at which KL from this policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from frpo import hub
from frpo.config import CertifyConfig, Config, ConfigError, DatasetConfig, FunctionReward, ModelReward
from frpo.disk import write_text
from frpo.evaluation import make_certificates
from frpo.records import Certificate, Record
from frpo.roles import PolicyScorer, Rollouts
from frpo.rundir import hold_folder
from frpo.saved import weights_sha256
from frpo.seeds import derive
from frpo.types import Prompt, Sampling

PARITY_PROMPTS = 8
"""Completions, of as many prompts, whose log-probs are compared before anything is drawn for the
certificate."""


class CertificateFile(Record):
    """certificate.json"""

    model: str
    """Folder, or hub name with the commit."""
    weights_sha256: str
    prompts: str
    reward: str
    prompt_token_ids: tuple[tuple[int, ...], ...]
    """Of every certified prompt, as the policy saw it."""
    max_new_tokens: int
    seed: int
    certificates: tuple[Certificate, ...]
    """One per task."""


OPTIONS = {
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "rollout.max_new_tokens": "--max-new-tokens",
    "run_dir": "--out",
    "model.path": "MODEL",
    "rewards.0.function": "--reward",
    "rewards.0.path": "--reward",
    "rewards.0.arguments": "--argument",
    "radii": "--radius",
    "floor": "--floor",
    "completions_per_prompt": "--completions",
    "heldout_share": "--heldout-share",
}
"""Fields of the configuration by the options that fill them."""


def in_options(error: ConfigError, options: Mapping[str, str] = OPTIONS) -> ConfigError:
    """The same mistakes, each line's fields named by the options.

    Example: "radii.2 + floor: no" becomes "--radius.2 + --floor: no".
    """
    lines = []
    for line in str(error).splitlines():
        head, colon, rest = line.partition(": ")
        named = " + ".join(_option_of(field, options) for field in head.split(" + "))
        lines.append(named + colon + rest)
    return ConfigError("\n".join(lines))


def _option_of(field: str, options: Mapping[str, str]) -> str:
    """The option that fills a field; the field where there is none."""
    for name, option in options.items():
        if field == name or field.startswith(f"{name}."):
            return option + field.removeprefix(name)
    return field


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Values by key of `--option key=value`, given as often as one likes. Raises ConfigError."""
    values: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} {text}: write it as key=value")
        if key in values:
            raise ConfigError(f"{option} {text}: {key} stands twice; give it once")
        values[key] = value
    return values


def parse_reward(spec: str, arguments: Sequence[str]) -> FunctionReward | ModelReward:
    """A reward model where `spec` is a folder or a hub name, else a function with its arguments, values in
    YAML. Raises ConfigError."""
    given: dict[str, Any] = {}
    for key, text in parse_pairs("--argument", arguments).items():
        try:
            given[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"--argument {key}={text}: not valid YAML ({reason}); quote the value"
            ) from None
    if not Path(spec).expanduser().is_dir() and not hub.is_name(spec):
        return FunctionReward(kind="function", name="reward", function=spec, arguments=given)
    if given:
        raise ConfigError(
            f"--argument {next(iter(given))}: {spec} is a reward model, which takes none; leave it out"
        )
    return ModelReward(kind="model", name="reward", path=spec)


def rows_of(
    path: str, column: str, where: Sequence[str], *, chat: bool, heldout_share: float
) -> DatasetConfig:
    """The rows that the prompts come from. Raises ConfigError or pydantic's ValidationError."""
    return DatasetConfig.model_validate(
        {
            "path": path,
            "prompt": column,
            "task": "prompts",
            "chat": chat,
            "where": parse_pairs("--where", where),
            "heldout_share": heldout_share,
            "part": "heldout" if heldout_share else "all",
        }
    )


def bounds_of(completions: int, floor: float, radii: Sequence[float]) -> CertifyConfig:
    """What is certified; the usual radii where none is given. Raises pydantic's ValidationError."""
    bounds: dict[str, Any] = {"completions_per_prompt": completions, "floor": floor}
    if radii:
        bounds["radii"] = radii
    return CertifyConfig.model_validate(bounds)


@dataclass(frozen=True)
class Drawing:
    """How the completions are drawn, and the folder for what comes of them."""

    max_prompt_tokens: int
    max_new_tokens: int
    seed: int
    out: Path


ARM = {"name": "policy", "objective": {"estimator": {"kind": "grpo"}, "beta": 0.0}}
"""A configuration has an arm and a learner; of this one neither is ever started."""


def make_configuration(
    model: str,
    prompts: DatasetConfig,
    reward: FunctionReward | ModelReward,
    certify: CertifyConfig,
    drawing: Drawing,
) -> Config:
    """A configuration that samples and scores; nothing in it trains. Raises pydantic's ValidationError."""
    return Config.model_validate(
        {
            "name": "certify",
            "run_dir": drawing.out,
            "seed": drawing.seed,
            "model": {"path": model},
            "data": {"train": [], "heldout": [prompts], "max_prompt_tokens": drawing.max_prompt_tokens},
            "rewards": [reward],
            "rollout": {"max_new_tokens": drawing.max_new_tokens, "max_num_seqs": 128},
            "learner": {"num_steps": 1},
            "arms": [ARM],
            "certify": certify,
        }
    )


def run_certify(config: Config) -> Path:
    """Draw, score and certify what `preflight.make_ready` let pass; returns the JSON file. Raises
    ConfigError, RunStopped or WorkerFailed."""
    assert config.certify is not None
    from frpo import cluster  # heavy
    from frpo.metrics import RunLog
    from frpo.report.plots import save_certificates
    from frpo.stages.inputs import Inputs

    policy = Path(config.model.path).absolute()
    out = config.folder
    with hold_folder(out), RunLog(out, config) as log:
        with log.waiting("reading the prompts"):
            prompts = Inputs(config, log).heldout
        drawing = f"drawing {len(prompts)} prompts x {config.certify.completions_per_prompt} completions"
        with cluster.start_sampling(config, log) as (rollouts, rewards, scorer):
            rollouts.load_policy(policy, 0)
            with log.waiting("comparing the engine with transformers"):
                refuse_other_policy(rollouts, scorer, policy, prompts[:PARITY_PROMPTS], config)
            with log.waiting(drawing):
                certificates = make_certificates(rollouts, rewards, prompts, config, None)
        result = CertificateFile(
            model=hub.name_of(str(policy)) or str(policy),
            weights_sha256=weights_sha256(policy),
            prompts=config.data.heldout[0].path,
            reward=_name_of_reward(config),
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.seed,
            certificates=certificates,
            prompt_token_ids=tuple(tuple(map(int, prompt.token_ids)) for prompt in prompts),
        )
        write_text(out / "certificate.json", result.model_dump_json(indent=1))
        save_certificates(certificates, out / "certificate.png")
        for certificate in certificates:
            curve = zip(certificate.radii, certificate.certified, strict=True)
            rows = "; ".join(f"{radius:g} nats {lower:.3f}" for radius, lower in curve)
            log.note(f"{certificate.task}, certified at 95 %: {rows}")
    return out / "certificate.json"


def _name_of_reward(config: Config) -> str:
    """Function, folder, or hub name with the commit."""
    reward = config.rewards[0]
    if isinstance(reward, FunctionReward):
        return reward.function
    assert isinstance(reward, ModelReward)
    return hub.name_of(reward.path) or reward.path


def refuse_other_policy(
    rollouts: Rollouts, scorer: PolicyScorer, policy: Path, prompts: Sequence[Prompt], config: Config
) -> None:
    """The engine must give the tokens that it draws the log-probs that transformers gives them, as in a run.
    Raises RunStopped."""
    from frpo.batching import flatten
    from frpo.stops import RunStopped, measure_parity_gap

    seeds = [derive(config.seed, "parity", prompt.id) for prompt in prompts]
    sampling = Sampling(1, config.rollout.max_new_tokens, stop=config.rollout.stop)
    groups = sorted(rollouts.generate(prompts, seeds, sampling, 0), key=lambda group: group.index)
    theirs = itertools.chain.from_iterable(scorer.submit(policy, groups).result())
    drawn = [(group.prompt.token_ids, group.completions[0].token_ids) for group in groups]
    gap = measure_parity_gap(rollouts.logprobs(flatten(drawn)), np.concatenate(list(theirs)))
    if not gap <= config.parity_tolerance:
        raise RunStopped(
            f"engine and transformers differ by {gap:.3g} nats a token of {policy} "
            f"(rollout.parity_tolerance = {config.parity_tolerance:g}): the engine does not run this policy, "
            "and would certify another"
        )

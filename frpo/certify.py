"""`frpo certify`: the certificate of any saved policy, outside a run. Writes certificate.json and a plot.

The JSON is all that a later fine-tune needs to know what is promised at which KL from this policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from frpo import hub, saved
from frpo.config import CertifyConfig, Config, ConfigError, DatasetConfig, FunctionReward, ModelReward
from frpo.disk import folder_sha256, write_text
from frpo.evaluation import certify
from frpo.records import Certificate, Record
from frpo.roles import PolicyScorer, Rollouts
from frpo.rundir import hold
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
    "data.max_prompt_tokens": "--max-prompt-tokens", "rollout.max_new_tokens": "--max-new-tokens", "run_dir": "--out", "model.path": "MODEL",
    "rewards.0.function": "--reward", "rewards.0.path": "--reward", "rewards.0.arguments": "--argument",
    "radii": "--radius", "floor": "--floor", "completions_per_prompt": "--completions", "heldout_share": "--heldout-share",
}  # fmt: skip
"""Fields of the configuration by the options that fill them."""


def in_options(error: ConfigError) -> ConfigError:
    """The same mistakes, each line's fields named by the options."""
    lines = [line.partition(": ") for line in str(error).splitlines()]
    return ConfigError(
        "\n".join(" + ".join(map(_option, head.split(" + "))) + colon + rest for head, colon, rest in lines)
    )


def _option(field: str) -> str:
    whole = next((name for name in OPTIONS if field == name or field.startswith(f"{name}.")), None)
    return OPTIONS[whole] + field.removeprefix(whole) if whole else field


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Values by key of `--option key=value`, given as often as one likes. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} {text}: write it as key=value")
        if key in found:
            raise ConfigError(f"{option} {text}: {key} stands twice; give it once")
        found[key] = value
    return found


def reward_of(spec: str, arguments: Sequence[str]) -> FunctionReward | ModelReward:
    """A reward model where `spec` is a folder or a hub name, else a function with its arguments, values in
    YAML. Raises ConfigError."""
    given: dict[str, Any] = {}
    for key, text in pairs("--argument", arguments).items():
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


def configuration(
    model: str,
    prompts: DatasetConfig,
    reward: FunctionReward | ModelReward,
    certify: CertifyConfig,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    seed: int,
    out: Path,
) -> Config:
    """A configuration that samples and scores; nothing in it trains. Raises pydantic's ValidationError."""
    return Config.model_validate(
        {
            "name": "certify",
            "run_dir": out,
            "seed": seed,
            "model": {"path": model},
            "data": {"train": [], "heldout": [prompts], "max_prompt_tokens": max_prompt_tokens},
            "rewards": [reward],
            "rollout": {"max_new_tokens": max_new_tokens, "max_num_seqs": 128},
            "learner": {"num_steps": 1},
            "arms": [{"name": "policy", "objective": {"estimator": {"kind": "grpo"}, "beta": 0.0}}],
            "certify": certify,
        }
    )


def run(config: Config) -> Path:
    """Draw, score and certify what `preflight.ready` let pass; returns the JSON file. Raises ConfigError,
    RunStopped or WorkerFailed."""
    assert config.certify is not None
    from frpo import cluster  # heavy
    from frpo.metrics import RunLog
    from frpo.report.plots import certificates
    from frpo.stages.inputs import Inputs

    policy, out = Path(config.model.path).absolute(), config.folder
    with hold(out), RunLog(out, config) as log:
        with log.waiting("reading the prompts"):
            prompts = Inputs(config, log).heldout
        drawing = f"drawing {len(prompts)} prompts x {config.certify.completions_per_prompt} completions"
        with cluster.start_sampling(config, log) as (rollouts, rewards, scorer):
            rollouts.load_policy(policy, 0)
            with log.waiting("comparing the engine with transformers"):
                check_parity(rollouts, scorer, policy, prompts[:PARITY_PROMPTS], config)
            with log.waiting(drawing):
                found = certify(rollouts, rewards, prompts, config, None)
        reward = config.rewards[0]
        assert isinstance(reward, FunctionReward | ModelReward)
        result = CertificateFile(
            model=hub.name_of(str(policy)) or str(policy),
            weights_sha256=weights_sha256(policy),
            prompts=config.data.heldout[0].path,
            reward=reward.function
            if isinstance(reward, FunctionReward)
            else hub.name_of(reward.path) or reward.path,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.seed,
            certificates=found,
            prompt_token_ids=tuple(tuple(map(int, p.token_ids)) for p in prompts),
        )
        write_text(out / "certificate.json", result.model_dump_json(indent=1))
        certificates(found, out / "certificate.png")
        for c in found:
            rows = "; ".join(f"{r:g} nats {lower:.3f}" for r, lower in zip(c.radii, c.certified, strict=True))
            log.note(f"{c.task}, certified at 95 %: {rows}")
    return out / "certificate.json"


def weights_sha256(policy: Path) -> str:
    """Digest of all that a policy's weights are made of: an adapter's own, how it is applied, and what it
    stands on."""
    if not saved.is_adapter(policy):
        return folder_sha256(policy)
    parts = (folder_sha256(policy), weights_sha256(saved.parent(policy)), saved.applied(policy))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_parity(
    rollouts: Rollouts, scorer: PolicyScorer, policy: Path, prompts: Sequence[Prompt], config: Config
) -> None:
    """The engine must give the tokens that it draws the log-probs that transformers gives them, as in a run.
    Raises RunStopped."""
    from frpo.batching import flatten
    from frpo.stops import RunStopped, parity_gap

    seeds = [derive(config.seed, "parity", p.id) for p in prompts]
    sampling = Sampling(1, config.rollout.max_new_tokens, stop=config.rollout.stop)
    groups = sorted(rollouts.generate(prompts, seeds, sampling, 0), key=lambda g: g.index)
    right = np.concatenate([row for rows in scorer.submit(policy, groups).result() for row in rows])
    found = rollouts.logprobs(flatten([(g.prompt.token_ids, g.completions[0].token_ids) for g in groups]))
    gap = parity_gap(found, right)
    if not gap <= config.parity_tolerance:
        raise RunStopped(
            f"engine and transformers differ by {gap:.3g} nats a token of {policy} (rollout.parity_tolerance "
            "= "
            f"{config.parity_tolerance:g}): the engine does not run this policy, and would certify another"
        )

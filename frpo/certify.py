"""`frpo certify`: the certificate of any saved policy, outside a run. Writes certificate.json and a plot.

The JSON is all that a later fine-tune needs to know what is promised at which KL from this policy.
"""

from __future__ import annotations

import json
from pathlib import Path

from frpo import preflight
from frpo.checkpoint import folder_sha256
from frpo.config import CertifyConfig, Config, ConfigError, DatasetConfig, ModelReward
from frpo.records import Certificate, Record


class CertificateFile(Record):
    """certificate.json"""

    model: str
    weights_sha256: str
    prompts: str
    reward: str
    prompt_token_ids: tuple[tuple[int, ...], ...]
    """Of every certified prompt, as the policy saw it."""
    max_new_tokens: int
    seed: int
    certificates: tuple[Certificate, ...]
    """One per task."""


def configuration(
    model: Path,
    prompts: DatasetConfig,
    reward: str,
    spec: CertifyConfig,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    seed: int,
    out: Path,
) -> Config:
    """A configuration that samples and scores; nothing in it trains. Raises ConfigError for a reward or model that is not there."""
    adapter = model / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else str(model)
    kind = {"kind": "model", "path": reward} if Path(reward).is_dir() else {"kind": "function", "function": reward}
    data = prompts.model_dump()
    return Config.model_validate(
        {
            "name": "certify",
            "run_dir": out,
            "seed": seed,
            "model": {"path": base},
            "data": {"train": [data], "heldout": [data], "max_prompt_tokens": max_prompt_tokens},
            "rewards": [{"name": "reward", **kind}],
            "rollout": {"max_new_tokens": max_new_tokens, "max_num_seqs": 128},
            "learner": {"num_steps": 1},
            "arms": [{"name": "policy", "objective": {"method": "grpo", "beta": 0.0}}],
            "certify": spec,
        }
    )


def check(model: Path, config: Config) -> None:
    """Raises ConfigError naming the mistake, value and remedy. Imports no ML library."""
    if not model.is_dir():
        raise ConfigError(f"MODEL: no such folder {model}; give a Hugging Face or PEFT folder")
    preflight.check(config)


def run(model: Path, config: Config) -> Path:
    """Draw, score and certify what `check` let pass; returns the JSON file. Raises WorkerFailed."""
    assert config.certify is not None
    from frpo import cluster  # heavy
    from frpo.evaluation import certify
    from frpo.metrics import RunLog
    from frpo.report.plots import certificates
    from frpo.stages.inputs import Inputs

    out = config.folder
    with RunLog(out, config) as log:
        with log.waiting("reading the prompts"):
            prompts = Inputs(config, log).heldout
        drawing = f"drawing {len(prompts)} prompts x {config.certify.completions_per_prompt} completions"
        with cluster.start_sampling(config, log) as (rollouts, rewards), log.waiting(drawing):
            rollouts.load_policy(model.absolute(), 0)
            found = certify(rollouts, rewards, prompts, config, None)
        reward = config.rewards[0]
        result = CertificateFile(
            model=str(model), weights_sha256=folder_sha256(model), prompts=config.data.heldout[0].path,
            reward=reward.path if isinstance(reward, ModelReward) else getattr(reward, "function", reward.name), max_new_tokens=config.rollout.max_new_tokens,
            prompt_token_ids=tuple(tuple(map(int, p.token_ids)) for p in prompts), seed=config.seed, certificates=found,
        )  # fmt: skip
        (out / "certificate.json").write_text(result.model_dump_json(indent=1))
        certificates(found, out / "certificate.png")
        for c in found:
            rows = "; ".join(f"{r:g} nats {lower:.3f}" for r, lower in zip(c.radii, c.certified, strict=True))
            log.note(f"{c.task}, certified at 95 %: {rows}")
    return out / "certificate.json"

"""A guard for whoever fine-tunes a certified policy later, with any Hugging Face trainer: how far it has
gone, and what is still promised.

guard = FinetuneGuard(trainer, "certificate/certificate.json", radius=0.5, every=50)
trainer.add_callback(guard)
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, TrainerCallback

from frpo import hub, policies, saved
from frpo.batching import flatten
from frpo.certify import CertificateFile
from frpo.evaluation import estimate_mean
from frpo.logprobs import LogprobModel, completion_logprobs
from frpo.records import Certificate, Estimate
from frpo.types import Ints

log = logging.getLogger("frpo.guard")
BUDGET_TOKENS = 4096


@dataclass(frozen=True)
class Measured:
    step: int
    kl: float
    """KL(fine-tuned || certified policy), nats per completion, mean over the certified prompts; NaN where the
    training has diverged."""
    se: float | None
    """Its standard error over prompts; None for a single one, whose KL has no upper limit."""
    certified: float
    """Mean reward certified at the upper end of its 95 % interval."""


class FinetuneGuard(TrainerCallback):
    """Every `every` steps, and at the end, samples `completions` per certified prompt from the model in
    training and measures KL(Q || pi).

    Logs guard/kl, guard/kl_se and guard/certified_reward by the trainer; outside `radius` nats (its 95 %
    interval included) it warns, or ends the training (action="stop"). Prompts are shared out over processes.
    Not for ZeRO-3, whose weights no single process can sample from. Draws are those that the certificate is
    about: of the plain distribution, whatever the model's generation_config says, and ended by the certified
    policy's own end-of-sequence tokens.

    Raises ValueError when the policy's folder is not the one that was certified, FileNotFoundError when a
    file is missing, ConfigError when the policy cannot be read.
    """

    def __init__(
        self,
        trainer: Any,
        certificate: str | Path,
        *,
        radius: float,
        every: int = 50,
        completions: int = 4,
        action: Literal["warn", "stop"] = "warn",
        policy: str | Path | None = None,
    ) -> None:
        self.file = CertificateFile.model_validate_json(Path(certificate).read_text())
        folder = hub.local_folder(str(policy or self.file.model), "policy")
        if not folder.is_dir():
            raise FileNotFoundError(
                f"certificate: the certified policy {folder} is not here; give policy=its folder"
            )
        if saved.weights_sha256(folder) != self.file.weights_sha256:
            raise ValueError(
                f"certificate: {folder} holds other weights than those that {certificate} certifies"
            )
        self.trainer, self.radius, self.every, self.completions, self.action = (
            trainer,
            radius,
            every,
            completions,
            action,
        )
        # as the model in training is computed, so that the KL of a policy from itself is nought
        dtype = next(p.dtype for p in trainer.model.parameters() if p.is_floating_point())
        certified = policies.load_beside(folder, dtype=dtype)
        self.policy: Any = LogprobModel(certified).eval()
        self.ends = ends_of(folder, certified.generation_config)
        self.found: list[Measured] = []
        self.scorer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # refuses a model whose logits it cannot make before the training, which may yet diverge
        self.trained()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.check(state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.found or self.found[-1].step != state.global_step:
            self.check(state.global_step, control)

    def check(self, step: int, control: Any) -> None:
        measured = self.measure(step)
        kl, se = (measured.mean, measured.se) if measured else (math.nan, None)
        half = measured.half if measured and measured.half is not None else math.inf
        measurement = Measured(step, kl, se, certified_reward_at(self.file, kl + half))
        self.found.append(measurement)
        error = {} if se is None else {"guard/kl_se": se}
        self.trainer.log({"guard/kl": kl, **error, "guard/certified_reward": measurement.certified})
        if not kl + half <= self.radius:  # also where it is no number
            log.warning(
                "step %d: KL %.3f +- %.3f nats from the certified policy, outside the radius %g; certified "
                "reward there: %.3f",
                step,
                kl,
                half,
                self.radius,
                measurement.certified,
            )
            control.should_training_stop |= self.action == "stop"

    def trained(self) -> Any:
        """A Scorer of the model in training."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.scorer is None or self.scorer.model is not model:
            with plain_forward(model):
                self.scorer = LogprobModel(model)
        return self.scorer

    @torch.no_grad()
    def measure(self, step: int) -> Estimate | None:
        """KL in nats per completion, from fresh completions at temperature 1; None where it is no number: the
        training has diverged."""
        accelerator, scorer = self.trainer.accelerator, self.trained()
        model = scorer.model
        device = next(model.parameters()).device
        rank, world = accelerator.process_index, accelerator.num_processes
        prompts = self.file.prompt_token_ids
        was_training = model.training
        model.eval()
        with plain_forward(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.file.seed + step)
            drawn = [self._draw(scorer.causal(), list(prompt), device) for prompt in prompts[rank::world]]
        pairs = flatten(list(itertools.chain.from_iterable(drawn)))
        q, p = (
            completion_logprobs(s, pairs, temperature=1.0, budget_tokens=BUDGET_TOKENS, device=device)
            for s in (scorer, self.policy.to(device))
        )
        model.train(was_training)
        lengths = [_num_tokens(group) for group in drawn]
        parts = np.split(q.astype(np.float64) - p, np.cumsum(lengths)[:-1]) if drawn else []
        ratios = [float(part.sum()) / self.completions for part in parts]
        # gathering needs as many of every process: the others' second number is 0
        rows = [[ratio, 1.0] for ratio in ratios]
        rows += [[0.0, 0.0]] * (math.ceil(len(prompts) / world) - len(ratios))
        everyone = accelerator.gather(torch.tensor(rows, dtype=torch.float64, device=device)).cpu().numpy()
        measured = everyone[everyone[:, 1] == 1, 0]
        return estimate_mean(measured) if np.isfinite(measured).all() else None

    def _draw(self, model: Any, prompt: list[int], device: torch.device) -> list[tuple[Ints, Ints]]:
        """Prompt and completion of each draw."""
        ids = torch.tensor([prompt] * self.completions, device=device)
        out = plain_draws(model, ids, self.file.max_new_tokens, self.ends)
        pairs = []
        for row in out[:, len(prompt) :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in self.ends), len(row))
            pairs.append((np.array(prompt, dtype=np.int32), np.array(row[:end], dtype=np.int32)))
        return pairs


@contextmanager
def plain_forward(model: Any) -> Iterator[None]:
    """The model's forward pass in the dtype of its weights, as both policies are scored.

    A trainer of mixed precision puts another in its place, under autocast (`prepare_model` in
    accelerate/accelerator.py).
    """
    own, wrapped = model.__dict__.get("_original_forward"), model.forward
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = wrapped


def ends_of(folder: Path, generation: GenerationConfig) -> list[int]:
    """The tokens that end a completion of a saved policy where vLLM draws it: its generation_config's, and
    its tokenizer's."""
    named = generation.eos_token_id
    ends = set(named if isinstance(named, list) else [named])
    ends.add(AutoTokenizer.from_pretrained(saved.tokenizer_folder(folder)).eos_token_id)
    return sorted(end for end in ends if end is not None)


def plain_draws(model: Any, ids: torch.Tensor, max_new_tokens: int, ends: list[int]) -> torch.Tensor:
    """Prompts with completions at temperature 1, `[N, prompt + completion]`, padded behind an end.

    The model's own generation_config is taken off for the time: `generate` fills whatever another leaves open
    from it (`_prepare_generation_config` in transformers/generation/utils.py).
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
        remove_invalid_values=True,
    )
    try:
        drawn: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = own
    return drawn


def certified_reward_at(file: CertificateFile, kl: float) -> float:
    """The bound at the next certified radius that holds `kl`, mean over tasks; the reward's floor beyond the
    last, or where `kl` is no number."""
    return float(np.mean([_certified_reward(certificate, kl) for certificate in file.certificates]))


def _certified_reward(certificate: Certificate, kl: float) -> float:
    bounds = zip(certificate.radii, certificate.certified, strict=True)
    inside = [(radius, reward) for radius, reward in bounds if radius >= kl]
    return min(inside)[1] if inside else certificate.floor


def _num_tokens(pairs: list[tuple[Ints, Ints]]) -> int:
    """Of the completions."""
    return sum(len(completion) for _, completion in pairs)

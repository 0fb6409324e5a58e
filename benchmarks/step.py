"""What a step costs through all actors, against the bare engines on the same work, in one run.

    python benchmarks/step.py recipes/testbed.yaml --steps 30 --set base.num_steps=100

Runs `frpo run` on the first arm alone, then vLLM and transformers + AdamW by hand: the same prompts and group
size, drawn from the base policy, and one update on what was drawn. Prints one JSON line: seconds per step of
each phase, seconds per 1,000 completion tokens of both, and their ratio. The bare engines have no rewards, no
reference, no weights to send: what frpo adds on top is in `score` and `publish`, and in what is left between
the phases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from frpo.config import Config
from frpo.recipe import load_recipe

PHASES = ("generate_s", "score_s", "update_s", "publish_s", "step_s")


def through_actors(recipe: str, sets: list[str], folder: Path) -> dict[str, float]:
    """Medians over the steps, the first two left out."""
    from frpo.metrics import read_steps

    config = load_recipe(Path(recipe), tuple(sets))
    words = itertools.chain.from_iterable(("--set", text) for text in sets)
    command = [sys.executable, "-m", "frpo", "run", recipe, "--run-dir", str(folder)]
    subprocess.run([*command, *words], check=True)
    rows = read_steps(folder, f"rlhf/{config.arms[0].name}")[2:]
    medians = {}
    for phase in PHASES:
        medians[phase] = median(getattr(row.phases, phase) for row in rows)
    return {**medians, "tokens": median(row.batch.num_tokens for row in rows), "steps": float(len(rows))}


def raw_generate(config: Config, policy: Path, steps: int, out: Path) -> None:
    """In a process of its own: vLLM's generate on the prompts of each step; writes seconds and the drawn
    tokens."""
    from vllm import LLM, SamplingParams

    from frpo.driver import sampling_of
    from frpo.metrics import RunLog
    from frpo.prompts import PromptStream
    from frpo.seeds import derive
    from frpo.stages.inputs import Inputs, resolve_testbed

    with RunLog(config.folder, config) as log:
        inputs = Inputs(resolve_testbed(config), log)
    stream = PromptStream(
        inputs.train, config.data.mix, derive(config.seed, "prompts"), config.rollout.prompts_per_step
    )
    llm: Any = LLM(
        model=str(policy),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=config.num_tokens_limit + 1,
        max_num_seqs=config.rollout.max_num_seqs,
        disable_log_stats=True,
    )
    asked = sampling_of(config)
    rows = []
    for step in range(steps):
        prompts: Any = [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in stream.take(step)]
        params = SamplingParams(
            n=asked.num_completions,
            max_tokens=asked.max_new_tokens,
            temperature=1.0,
            seed=step,
            logprobs=0,
            detokenize=False,
        )
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        pairs = []
        for prompt, answer in zip(prompts, outputs, strict=True):
            pairs += [[prompt["prompt_token_ids"], list(output.token_ids)] for output in answer.outputs]
        rows.append({"seconds": seconds, "pairs": pairs})
    out.write_text(json.dumps(rows))


def raw_update(config: Config, policy: Path, drawn: list[dict[str, Any]]) -> list[float]:
    """Forward, backward and AdamW of transformers (and peft) on each step's sequences, sorted into the same
    micro-batches."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(config.learner.num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    if config.model.lora:
        from peft import LoraConfig, get_peft_model

        lora = config.model.lora
        model = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    seconds = []
    for row in drawn:
        began = time.perf_counter()
        for tokens, labels in micro_batches(config, row["pairs"]):
            model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


def raw_scores(config: Config, policy: Path, drawn: list[dict[str, Any]]) -> list[float]:
    """Log-probs of the same sequences by transformers under the policy that training began from."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(config.learner.num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    seconds = []
    for row in drawn:
        began = time.perf_counter()
        for tokens, labels in micro_batches(config, row["pairs"]):
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[:, :-1]
                chosen = labels[:, 1:].clamp(min=0)[..., None]
                torch.log_softmax(logits, -1).gather(-1, chosen)
        seconds.append(time.perf_counter() - began)
    return seconds


def micro_batches(config: Config, pairs: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Padded tokens and labels, cut as the learner cuts them."""
    import numpy as np
    import torch

    from frpo.packing import cut_micro_batches

    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    for rows in cut_micro_batches(lengths, config.learner.micro_batch_tokens):
        tokens = np.zeros((len(rows), max(lengths[i] for i in rows)), dtype=np.int64)
        labels = np.full_like(tokens, -100)
        for at, i in enumerate(rows):
            prompt, completion = pairs[i]
            tokens[at, : lengths[i]] = prompt + completion
            labels[at, len(prompt) : lengths[i]] = completion
        yield torch.from_numpy(tokens), torch.from_numpy(labels)


def count_completion_tokens(row: dict[str, Any]) -> int:
    return sum(len(completion) for _, completion in row["pairs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-step"))
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    first = load_recipe(Path(args.recipe), tuple(args.sets)).arms[0]
    arm = json.dumps([first.model_dump(mode="json", exclude={"learner"})])
    sets = [
        *args.sets,
        f"learner.num_steps={args.steps}",
        f"arms={arm}",
        "downstream=[]",
        "evaluate.validate_every=1000000",
        "checkpoint.every=1000000",
    ]
    config = load_recipe(Path(args.recipe), tuple(sets)).model_copy(update={"run_dir": args.folder})
    policy = args.folder / "base" / "policy" if config.base else Path(config.model.path)
    if args.raw:
        raw_generate(config, policy, args.steps, args.raw)
        return
    actors = through_actors(args.recipe, sets, args.folder)
    from frpo.actors._vllm import vllm_environment

    raw = args.folder / "raw.json"
    subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--raw", str(raw)],
        check=True,
        env={**os.environ, **vllm_environment(config)},
    )
    drawn = json.loads(raw.read_text())[2:]
    tokens = median(count_completion_tokens(row) for row in drawn)
    bare = {
        "generate_s": median(row["seconds"] for row in drawn),
        "update_s": median(raw_update(config, policy, drawn)),
        "tokens": tokens,
    }
    per = {
        "actors": 1000 * actors["step_s"] / actors["tokens"],
        "bare": 1000 * (bare["generate_s"] + bare["update_s"]) / tokens,
    }
    print(
        json.dumps(
            {
                "recipe": args.recipe,
                "actors": actors,
                "bare": bare,
                "seconds_per_1000_tokens": per,
                "ratio": per["actors"] / per["bare"],
            }
        )
    )


if __name__ == "__main__":
    main()

"""A step of frpo against one of TRL's GRPOTrainer, and against the bare engines: the same model, prompts,
lengths, batch, LoRA and threads, side by side in one call.

    frpo fetch smollm2 runs/models/SmolLM2-135M-Instruct
    python benchmarks/peers.py runs/models/SmolLM2-135M-Instruct --out docs/results/peers.json

Two shapes: short prompts with 48 new tokens, and prompts of about 400 tokens with 16 new ones; 8 prompts of 8
completions each, float32, rank 16, k3 penalty to the model itself, a reward that costs nothing. TRL generates
with transformers, as it does where it has no vLLM. The first step of each is left out. Prints one JSON:
seconds a step and per 1,000 completion tokens, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

GROUP, PROMPTS, RANK, ALPHA, BETA, RATE = 8, 8, 16, 32, 0.04, 1e-5
REWARD = """
def length(completions, **_):
    return [len(completion[0]["content"]) / 100 for completion in completions]
"""
TEXT = "explain describe compare list the a of in why how small large river letter number history"
"""What prompts are made of."""


@dataclass(frozen=True)
class Shape:
    """What a step draws."""

    prompt_words: int
    new_tokens: int


SHAPES = {"short": Shape(12, 48), "long": Shape(330, 16)}


def write_prompts(file: Path, shape: Shape, count: int, seed: int) -> Path:
    """Chat prompts of as many words, no two alike."""
    import random

    chance = random.Random(seed)
    words = TEXT.split()
    rows = []
    for _ in range(count):
        text = " ".join(chance.choice(words) for _ in range(shape.prompt_words))
        rows.append(json.dumps({"prompt": [{"role": "user", "content": text}]}))
    file.write_text("\n".join(rows) + "\n")
    return file


def write_recipe(folder: Path, model: Path, shape: Shape, steps: int, threads: int) -> Path:
    (folder / "reward.py").write_text(REWARD)
    prompts = write_prompts(folder / "prompts.jsonl", shape, PROMPTS * steps, seed=0)
    heldout = write_prompts(folder / "heldout.jsonl", shape, 2, seed=1)
    recipe = {
        "name": "peers",
        "model": {"path": str(model), "lora": {"rank": RANK, "alpha": ALPHA}},
        "data": {
            "train": [{"path": str(prompts), "task": "any"}],
            "heldout": [{"path": str(heldout), "task": "any"}],
            "max_prompt_tokens": 512,
        },
        "rewards": [{"kind": "function", "name": "length", "function": f"{folder / 'reward.py'}:length"}],
        "rollout": {
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "max_new_tokens": shape.new_tokens,
            "max_num_seqs": PROMPTS * GROUP,
            "num_threads": threads,
            "lora": "merged",
        },
        "reference": {"share": "learner"},
        "objective": {"estimator": {"kind": "grpo"}, "beta": BETA, "penalty": "k3"},
        "learner": {"num_steps": steps, "learning_rate": RATE, "num_threads": threads},
        "checkpoint": {"every": 1000},
        "arms": [{"name": "grpo"}],
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def run_frpo(folder: Path, recipe: Path) -> dict[str, float]:
    from frpo.metrics import read_steps

    run = folder / "run"
    command = [sys.executable, "-m", "frpo", "run", str(recipe), "--run-dir", str(run)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = read_steps(run, "rlhf/grpo")[1:]
    phases = ("generate_s", "score_s", "update_s", "publish_s", "step_s")
    figures = {phase: median(getattr(row.phases, phase) for row in rows) for phase in phases}
    return {**figures, "tokens": median(row.batch.num_tokens for row in rows), "steps": len(rows)}


def run_trl(folder: Path, model: Path, shape: Shape, steps: int, threads: int) -> dict[str, float]:
    """In a process of its own."""
    asked = [str(model), str(shape.new_tokens), str(steps), str(threads)]
    out = folder / "trl.json"
    command = [sys.executable, __file__, "--trl", str(folder / "prompts.jsonl"), str(out), *asked]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=env)
    figures: dict[str, float] = json.loads(out.read_text())
    return figures


def train_by_trl(prompts: Path, out: Path, model: str, new_tokens: int, steps: int, threads: int) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    seconds: list[float] = []
    tokens: list[int] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    def length(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [len(completion[0]["content"]) / 100 for completion in completions]

    settings = GRPOConfig(
        output_dir=str(out.with_suffix("")),
        max_steps=steps,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=PROMPTS,
        num_generations=GROUP,
        max_completion_length=new_tokens,
        temperature=1.0,
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=length,
        args=settings,
        train_dataset=load_dataset("json", data_files=str(prompts), split="train"),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch()],
    )
    trainer.train()
    figures = {"step_s": median(seconds[1:]), "tokens": median(tokens[1:]), "steps": len(seconds) - 1}
    out.write_text(json.dumps(figures))


def run_bare(folder: Path, recipe: Path, steps: int) -> dict[str, float]:
    """vLLM, and transformers with AdamW, by hand on the same work (benchmarks/step.py): what is drawn, scored
    by the reference and updated on."""
    from frpo.actors._vllm import vllm_environment
    from frpo.recipe import load_recipe

    config = load_recipe(recipe).model_copy(update={"run_dir": folder / "bare"})
    raw = folder / "raw.json"
    command = [sys.executable, str(Path(__file__).parent / "step.py"), str(recipe), "--steps", str(steps)]
    env = {**os.environ, **vllm_environment(config)}
    subprocess.run([*command, "--raw", str(raw)], check=True, stdout=sys.stderr, env=env)
    out = folder / "bare.json"
    subprocess.run([sys.executable, __file__, "--bare", str(recipe), str(raw), str(out)], check=True, env=env)
    figures: dict[str, float] = json.loads(out.read_text())
    return figures


def train_bare(recipe: Path, raw: Path, out: Path) -> None:
    """In a process of its own: score and update what was drawn, with transformers, peft and AdamW."""
    from step import raw_scores, raw_update

    from frpo.recipe import load_recipe

    config = load_recipe(recipe)
    model = Path(config.model.path)
    drawn = json.loads(raw.read_text())
    tokens = [sum(len(completion) for _, completion in row["pairs"]) for row in drawn]
    figures = {
        "generate_s": median(row["seconds"] for row in drawn[1:]),
        "score_s": median(raw_scores(config, model, drawn)[1:]),
        "update_s": median(raw_update(config, model, drawn)[1:]),
        "tokens": median(tokens[1:]),
    }
    figures["step_s"] = figures["generate_s"] + figures["score_s"] + figures["update_s"]
    out.write_text(json.dumps(figures))


def compare(work: Path, model: Path, name: str, steps: int, threads: int) -> dict[str, Any]:
    shape, folder = SHAPES[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(folder, model, shape, steps, threads)
    frpo = run_frpo(folder, recipe)
    trl = run_trl(folder, model, shape, steps, threads)
    bare = run_bare(folder, recipe, steps)

    def per_token(side: dict[str, float]) -> float:
        return 1000 * side["step_s"] / side["tokens"]

    return {
        "frpo": frpo,
        "trl": trl,
        "bare": bare,
        "seconds_per_1000_tokens": {"frpo": per_token(frpo), "trl": per_token(trl), "bare": per_token(bare)},
        "trl / frpo": per_token(trl) / per_token(frpo),
        "frpo / bare": per_token(frpo) / per_token(bare),
    }


def main() -> None:
    if sys.argv[1:2] == ["--trl"]:
        prompts, figures, name, new_tokens, steps, threads = sys.argv[2:]
        train_by_trl(Path(prompts), Path(figures), name, int(new_tokens), int(steps), int(threads))
        return
    if sys.argv[1:2] == ["--bare"]:
        train_bare(*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work, model = args.work.absolute(), args.model.absolute()
    result = {name: compare(work, model, name, args.steps, args.threads) for name in args.shapes}
    text = json.dumps({"threads": args.threads, **result}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

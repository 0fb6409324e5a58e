"""What only a GPU can show, in one command of at most 8 minutes: figures for docs/results/gpu.json.

    python benchmarks/gpu.py --out docs/results/gpu.json             # one card of 80 GB
    python benchmarks/gpu.py --out /tmp/gpu.json --size tiny --cpu   # tries every line without one

Runs `frpo run` with all roles on one card (the testbed in float32 and in full; random Qwen2 weights in
bfloat16 with an adapter), then the learner's engine and vLLM on the same random weights, then the tests
marked gpu. Each part is a process with a time limit of its own, so that one which fails leaves the others'
figures; what a part found stands in the file even when a later one is cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1000, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen2.5's shapes."""
RANK = 64
LENGTHS = {
    "tiny": ((8, 6, 2, 3),),
    "0.5B": ((300, 700, 8, 8), (90, 60, 16, 8)),
    "7B": ((300, 1500, 2, 8), (90, 60, 8, 8)),
}
"""Prompt, completion, groups, completions of a group: batches that the learner is timed on; the first also
tells the log-probs apart."""

PartResult = dict[str, Any]


def card() -> bool:
    import torch

    return torch.cuda.is_available()


def used_gib() -> float:
    """Of the card, by all processes."""
    import torch

    if not card():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**30, 2)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    import torch

    if card():
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = call()
    if card():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def write_model(folder: Path, size: str) -> None:
    """Random weights of Qwen2, bfloat16, and a tokenizer of letters, whose other tokens are words like
    w300."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    shape = SIZES[size]
    config = Qwen2Config(
        **shape, max_position_embeddings=4096, bos_token_id=None, eos_token_id=shape["vocab_size"] - 1
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if card() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)} | {
        f"w{i}": i for i in range(len(letters), shape["vocab_size"] - 1)
    }
    tokenizer = Tokenizer(models.BPE(words | {"<eos>": len(words)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder
    )


def random_batch(size: str, prompt: int, completion: int, groups: int, k: int) -> Any:
    from frpo.batching import flatten

    rng, vocabulary = np.random.default_rng(0), SIZES[size]["vocab_size"]
    pairs = []
    for _ in range(groups):
        tokens = rng.integers(3, vocabulary, prompt).astype(np.int32)
        lengths = np.clip(rng.normal(completion, completion / 5, k), 4, None).astype(int)
        pairs += [(tokens, rng.integers(3, vocabulary, n).astype(np.int32)) for n in lengths]
    return flatten(pairs)


def apart(found: Any, other: Any) -> PartResult:
    """How far log-probs of the same tokens by two implementations are from each other; k3 of the second under
    the first's."""
    d = (other - found).astype(np.float64)
    return {
        "mean": float(np.abs(d).mean()),
        "p99": float(np.percentile(np.abs(d), 99)),
        "max": float(np.abs(d).max()),
        "k3_per_token": float((np.exp(d) - 1 - d).mean()),
        "sum_per_1000_tokens": float(d.mean() * 1000),
    }


# ---- whole runs

SHORT = (
    "base.num_steps=60", "rollout.prompts_per_step=6", "learner.num_steps=6", "checkpoint.every=2", "evaluate.completions_per_prompt=2",
    "evaluate.validate_every=4", "rollout.parity_every=3", "arms=[{name: frpo, objective: {estimator: {lam: 0.5}, beta: 0.3, penalty: k3}}]", "downstream=[]",
)  # fmt: skip
SHARED = (
    "rollout.num_gpus=1", "rollout.sleep=true", "rollout.gpu_memory_utilization=0.5", "rollout.enforce_eager=true", "learner.num_gpus=1", "reference.num_gpus=1",
    "evaluate.num_gpus=1",
)  # fmt: skip
EVEN = r"w\d*[02468](\D.*)?"
"""Half of all completions begin so."""


def whole_run(recipe: Path, folder: Path, settings: tuple[str, ...]) -> PartResult:
    from frpo.metrics import numbers_of, read_steps

    words = [w for s in settings for w in ("--set", s)]
    seconds, _ = timed(
        lambda: subprocess.run(
            [sys.executable, "-m", "frpo", "run", str(recipe), "--run-dir", str(folder), *words], check=True
        )
    )
    rows = read_steps(folder, "rlhf/frpo")
    names = (
        "generate_s",
        "score_s",
        "update_s",
        "publish_s",
        "step_s",
        "mismatch_kl",
        "kl",
        "reward",
        "grad_norm",
        "published_bytes",
        "num_tokens",
    )
    steps = [{n: numbers_of(r).get(n) for n in names} for r in rows]
    return {"seconds": round(seconds, 1), "steps": steps}


def run_full(work: Path, size: str) -> PartResult:
    """The testbed, all weights in float32."""
    return whole_run(Path("recipes/testbed.yaml"), work / "full", (*SHORT, *(SHARED if card() else ())))


def run_adapter(work: Path, size: str) -> PartResult:
    """Random weights in bfloat16 with an adapter, as large as the card's user would take."""
    rng, vocabulary = np.random.default_rng(1), SIZES[size]["vocab_size"]
    prompts = work / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt": " ".join(map(str, rng.integers(0, vocabulary, 8))), "task": "even"}) + "\n"
            for _ in range(96)
        )
    )
    new, groups = (128, 16) if card() else (8, 4)
    recipe = work / "adapter.yaml"
    data = {"path": str(prompts), "task_column": "task", "heldout_share": 0.2}
    recipe.write_text(
        json.dumps(
            {
                "name": "adapter",
                "model": {
                    "path": str(work / "model"),
                    "dtype": "bfloat16",
                    "lora": {"rank": RANK, "alpha": RANK},
                },
                "data": {
                    "train": [data | {"part": "train"}],
                    "heldout": [data | {"part": "heldout"}],
                    "max_prompt_tokens": 64,
                },
                "rewards": [
                    {
                        "kind": "function",
                        "name": "even",
                        "function": "frpo.rewards:format_regex",
                        "arguments": {"pattern": EVEN},
                    }
                ],
                "rollout": {
                    "prompts_per_step": groups,
                    "group_size": 8,
                    "max_new_tokens": new,
                    "max_num_seqs": 128,
                    "parity_every": 2,
                },
                "objective": {"estimator": {"lam": 0.5}, "beta": 0.02, "penalty": "reverse"},
                "learner": {"num_steps": 4, "learning_rate": 1e-3, "micro_batch_tokens": 16384},
                "arms": [{"name": "frpo", "objective": {}}],
                "evaluate": {"completions_per_prompt": 2, "max_prompts": 8, "validate_every": 100},
                "checkpoint": {"every": 2},
            }
        )
    )
    return whole_run(recipe, work / "adapter", SHARED if card() else ())


# ---- the engines, apart from Ray


def join() -> None:
    """Make this process the only rank of a learner."""
    from actors import _dist
    from actors.transport.group import free_address

    host, port = free_address()
    _dist.join_ranks(host, port, 0, 1)


def engine_of(work: Path, size: str, **fields: Any) -> Any:
    """A learner's engine on the random weights; fields of its model."""
    from actors._engine import Engine
    from frpo.config import LearnerConfig, LoraConfig, ModelConfig

    lora = LoraConfig(rank=RANK, alpha=RANK)
    model = ModelConfig(
        path=str(work / "model"), dtype="bfloat16", lora=lora, gradient_checkpointing=size == "7B", **fields
    )
    train = LearnerConfig(num_steps=100, learning_rate=3e-5, micro_batch_tokens=16384 if card() else 256)
    return Engine(work / "model", model, train, 100, 0, dropout=False)


def update(engine: Any, sequences: Any, sign: float) -> tuple[float, Any]:
    """Makes the tokens likelier with -1, and keeps the weights with 0."""
    from frpo.packing import pad

    share = engine.share(sequences)
    count = float((sequences.lengths - sequences.prompt_lengths).sum())

    def loss(packs: Any) -> Any:
        now = engine.forward(pad(sequences, packs, engine.device))
        return (now.logprobs * now.mask).sum() * sign / count, None

    return timed(lambda: engine.step(share, loss)[0])


def kernels_part(work: Path, size: str) -> PartResult:
    """Updates in packs by masked attention, by flex attention, and with deterministic kernels: the price of
    each."""
    join()
    found: PartResult = {}
    ways = {"sdpa": {}, "deterministic": {"deterministic": True}, "flex": {"attention": "flex_attention"}}
    for name, fields in (
        ways.items() if card() else list(ways.items())[:2]
    ):  # flex attention has no gradients on CPUs
        engine = engine_of(work, size, **fields)
        for lengths in LENGTHS[size]:
            sequences = random_batch(size, *lengths)
            seconds = [update(engine, sequences, 0.0)[0] for _ in range(3)][1:]  # the first compiles
            found["+".join(map(str, lengths[:2])) + " " + name] = {
                "tokens_per_s": int(sequences.lengths.sum()) / min(seconds)
            }
        engine.close()
    return found


def learner_part(work: Path, size: str) -> PartResult:
    """Updates of the learner's engine in packs and apart, against a plain product of matrices; memory;
    log-probs before and after."""
    import torch

    from frpo.logprobs import Scorer

    join()
    found: PartResult = {"gib": {"before": used_gib()}}
    found["start_s"], engine = timed(lambda: engine_of(work, size))
    frozen = sum(p.numel() for p in engine.ds.module.parameters() if not p.requires_grad)
    found |= {
        "billion_weights": frozen / 1e9,
        "million_trained": sum(p.numel() for p in engine.ds.module.parameters() if p.requires_grad) / 1e6,
    }
    found["gib"]["loaded"] = used_gib()
    if card():
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        a @ a
        seconds, _ = timed(lambda: [a @ a for _ in range(20)])
        found["product_tflops"] = 20 * 2 * 8192**3 / seconds / 1e12

    own = Scorer.reach
    found["updates"] = {}
    for lengths in LENGTHS[size]:
        sequences = random_batch(size, *lengths)
        tokens = int(sequences.lengths.sum())
        for how, reach in (("packed", own), ("apart", lambda self: 0)):
            Scorer.reach = reach  # type: ignore[method-assign]
            if card():
                torch.cuda.reset_peak_memory_stats()
            update(engine, sequences, 0.0)
            seconds, result = update(engine, sequences, 0.0)
            passes = (
                6 if size == "7B" else 4
            )  # forward and gradients of activations; once more forward with recomputation
            found["updates"]["+".join(map(str, lengths[:2])) + " " + how] = {
                "seconds": seconds,
                "tokens_per_s": tokens / seconds,
                "tflops": passes * frozen * tokens / seconds / 1e12,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if card() else None,
            }
    Scorer.reach = own  # type: ignore[method-assign]
    sequences = random_batch(size, *LENGTHS[size][0])
    seconds, before = timed(lambda: engine.logprobs(sequences))
    seconds, before = timed(lambda: engine.logprobs(sequences))
    found["scoring_tokens_per_s"] = float(sequences.lengths.sum()) / seconds
    rows = {"before": before}
    for count in (1, 5):
        while engine.ds.global_steps < count + 2 * 2 * len(LENGTHS[size]):
            _, result = update(engine, sequences, -1.0)
        rows[f"after{count}"] = engine.logprobs(sequences)
        engine.export(work / f"adapter{count}", merged=False)
    found["grad_norm"] = result.grad_norm
    np.savez(work / "logprobs.npz", **rows)
    found["adapter_bytes"] = sum(t.numel() * t.element_size() for t in engine.adapter().weights.values())
    found["weights_bytes"] = sum(w.numel() * w.element_size() for _, w in engine.named_weights())
    found["gib"]["trained"] = used_gib()
    found["offload_s"], _ = timed(engine.offload)
    found["gib"]["offloaded"] = used_gib()
    found["reload_s"], _ = timed(engine.reload)
    found["gib"]["reloaded"] = used_gib()
    found["change_of_logprobs_by_offload"] = float(np.abs(engine.logprobs(sequences) - rows["after5"]).max())
    return found


def engine_part(work: Path, size: str) -> PartResult:
    """vLLM through the rollout worker's Sampler against vLLM alone, with an adapter and without; log-probs
    against the learner's."""
    from frpo.batching import flatten
    from frpo.config import LoraConfig, ModelConfig, RolloutConfig
    from frpo.types import Prompt, Sampling

    gpu = card()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    import actors._sampler as sampler_of

    sampler_of.export_stats = lambda engine: None  # it needs a cluster
    from vllm import SamplingParams

    model = ModelConfig(path=str(work / "model"), dtype="bfloat16", lora=LoraConfig(rank=RANK, alpha=RANK))
    rollout = RolloutConfig(num_gpus=int(gpu), gpu_memory_utilization=0.7, sleep=gpu, max_num_seqs=256)
    longest = 2048 if gpu else 64
    found: PartResult = {"gib": {"before": used_gib()}}
    found["start_s"], sampler = timed(
        lambda: sampler_of.Sampler(str(work / "model"), model, rollout, longest)
    )
    found["gib"]["up"] = used_gib()
    rng, vocabulary = np.random.default_rng(0), SIZES[size]["vocab_size"]
    count, prompt, k, new = (32, 300, 8, 256) if gpu else (3, 8, 2, 8)
    prompts = [
        Prompt(f"p:{i}", "", rng.integers(3, vocabulary, prompt).astype(np.int32), "t", {})
        for i in range(count)
    ]
    sampling = Sampling(k, new, 1.0, 1.0, ())

    def ours() -> list[Any]:
        groups = [
            g
            for some in sampler.generate(prompts, range(count), range(100, 100 + count), sampling, 0)
            for g in some
        ]
        return sorted(groups, key=lambda g: g.index)

    def alone() -> None:
        sampler.reset_cache()
        sampler.llm.generate(
            [{"prompt_token_ids": p.token_ids.tolist()} for p in prompts],
            [
                SamplingParams(n=k, max_tokens=new, seed=100 + i, logprobs=0, detokenize=False)
                for i in range(count)
            ],
            use_tqdm=False,
            lora_request=sampler.adapter,
        )

    def rate(call: Callable[[], Any]) -> tuple[float, Any, Any]:
        first = call()
        seconds, again = timed(call)
        return count * k * new / seconds, first, again

    load: dict[str, Callable[[], None]] = {
        "base": lambda: None,
        "adapter": lambda: sampler.load_policy(work / "adapter5"),
        "merged": lambda: sampler._merge(work / "adapter5"),
    }
    found["tokens_per_s"], found["load_s"] = {}, {}
    for tag, call in load.items():
        found["load_s"][tag], _ = timed(call)
        ours_per_s, drawn, again = rate(ours)
        found["tokens_per_s"][tag] = {"frpo": ours_per_s} | (
            {} if tag == "merged" else {"vllm_alone": rate(alone)[0]}
        )
        same = [
            bool(np.array_equal(a.token_ids, b.token_ids))
            for x, y in zip(drawn, again, strict=True)
            for a, b in zip(x.completions, y.completions, strict=True)
        ]
        found.setdefault("same_tokens_again", {})[tag] = sum(same) / len(same)
        some = [(g.prompt.token_ids, c.token_ids) for g in drawn[:8] for c in g.completions]
        decode = np.concatenate([c.logprobs for g in drawn[:8] for c in g.completions])
        found.setdefault("decode_against_prefill", {})[tag] = apart(decode, sampler.logprobs(flatten(some)))
    sequences, theirs = random_batch(size, *LENGTHS[size][0]), np.load(work / "logprobs.npz")
    sampler.load_policy(work / "model")
    base = sampler.logprobs(sequences)
    found["base_against_learner"] = apart(theirs["before"], base)
    for n in (1, 5):
        truth = theirs[f"after{n}"] - theirs["before"]
        sampler.load_policy(work / f"adapter{n}")
        by_adapter = sampler.logprobs(sequences)
        sampler._merge(work / f"adapter{n}")
        merged = sampler.logprobs(sequences)
        found[f"after_{n}_updates"] = {
            "learner_moved": float(np.abs(truth).mean()),
            **{
                how: apart(theirs[f"after{n}"], now)
                | {"share_of_the_change": float((now - base) @ truth / (truth @ truth))}
                for how, now in (("adapter", by_adapter), ("merged", merged))
            },
        }
    if gpu:
        for kind, policy in (("full", work / "model"), ("adapter", work / "adapter5")):
            sampler.load_policy(policy)
            before, awake = sampler.logprobs(sequences), used_gib()
            sleep_s, _ = timed(sampler.sleep)
            asleep = used_gib()
            wake_s, _ = timed(sampler.wake)
            sampler.reset_cache()
            found[f"sleep_{kind}"] = {
                "sleep_s": sleep_s,
                "wake_s": wake_s,
                "awake_gib": awake,
                "asleep_gib": asleep,
                "back_gib": used_gib(),
                "largest_change": float(np.abs(sampler.logprobs(sequences) - before).max()),
            }
    return found


def tests_part(work: Path, size: str) -> PartResult:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--durations=8",
        "tests/gpu",
    ]
    seconds, done = timed(
        lambda: subprocess.run(
            words, check=False, capture_output=True, text=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
        )
    )
    print(done.stdout[-5000:], done.stderr[-1000:])
    return {"seconds": round(seconds, 1), "summary": done.stdout.strip().splitlines()[-1]}


PARTS: dict[str, tuple[Callable[[Path, str], PartResult], int]] = {
    "run_full": (run_full, 130),
    "run_adapter": (run_adapter, 130),
    "learner": (learner_part, 90),
    "kernels": (kernels_part, 90),
    "engine": (engine_part, 240),
    "tests": (tests_part, 240),
}
"""And the seconds that each may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=tuple(SIZES), default="0.5B")
    parser.add_argument("--cpu", action="store_true", help="try the lines without a GPU")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-gpu"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        call, _ = PARTS[args.part]
        (args.work / f"{args.part}.json").write_text(json.dumps(call(args.work, args.size)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found: PartResult = json.loads(args.out.read_text()) if args.out.exists() else {}
    found[args.size] = results = found.get(args.size, {})
    if not (args.work / "model").exists():
        write_model(args.work / "model", args.size)
    if card():
        import torch

        found["card"] = torch.cuda.get_device_name()
    for part in args.parts.split(","):
        limit = min(PARTS[part][1], args.seconds - (time.perf_counter() - began))
        print(f"=== {time.perf_counter() - began:5.0f} s {part}", flush=True)
        words = [
            sys.executable,
            __file__,
            "--out",
            str(args.out),
            "--size",
            args.size,
            "--work",
            str(args.work),
            "--part",
            part,
        ]
        process = subprocess.Popen(words)
        try:
            code = process.wait(limit if card() else None)
        except subprocess.TimeoutExpired:
            code = -1
            for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
            process.wait(20)
        results[part] = (
            json.loads((args.work / f"{part}.json").read_text())
            if code == 0
            else {"failed": "too slow" if code < 0 else code}
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))
        print(json.dumps(results[part]), flush=True)


if __name__ == "__main__":
    main()

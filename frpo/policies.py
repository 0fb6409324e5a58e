"""The one reader of saved policies: engines, learner, scorers, `frpo certify` and the guard all see the same
weights.

A policy is a Hugging Face folder, or a PEFT adapter on one, or on another adapter. peft itself applies an
adapter, in float32; what it cannot turn into plain weights exactly is refused by name. Imports transformers
and peft only when a policy is read.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frpo import saved
from frpo.config import ConfigError

MERGE_TOLERANCE = 1e-3
"""Largest difference of a log-prob between an adapter applied by peft and its merged weights, float32, nats:
rounding stays near 1e-5."""


def read_policy(folder: Path, *, dtype: torch.dtype | str, attention: str = "sdpa") -> Any:
    """The causal language model of a saved policy, on the CPU, in evaluation mode.

    Adapters are merged onto their base in float32, whatever either was saved in; only then all is rounded to
    `dtype`. Raises ConfigError naming the folder and what cannot be applied, and the keys of an adapter that
    the model has no place for.
    """
    as_type = _dtype_of(dtype)
    if not saved.is_adapter(folder):
        return _load_full(folder, as_type, attention)
    saved.base_of(folder)  # raises where an adapter cannot be merged, or the chain of them ends nowhere
    policy = _merge_adapter(folder)
    with torch.no_grad():
        # not the buffers: transformers keeps rotary frequencies in float32
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(as_type)
    policy.config.dtype = as_type
    policy.set_attn_implementation(attention)
    return policy


def keeps_beside(folder: Path, dtype: torch.dtype | str) -> bool:
    """Whether `load_beside` keeps the policy's adapter beside the weights."""
    if _dtype_of(dtype) == torch.float32 or not saved.is_adapter(folder):
        return False
    return saved.plain_rank(folder) is not None


def load_beside(
    folder: Path, *, dtype: torch.dtype | str, attention: str = "sdpa", name: str = "default"
) -> Any:
    """As `load`, but a plain LoRA adapter stays beside the weights, a peft model with the adapter `name`,
    where `dtype` is coarser than float32.

    So do engines and learners compute it. Between the numbers of bfloat16 merged weights lose what is small
    beside them: a scorer of these would tell the KL of another policy.
    """
    as_type = _dtype_of(dtype)
    if not keeps_beside(folder, as_type):
        return read_policy(folder, dtype=as_type, attention=attention)
    saved.base_of(folder)
    adapted = _apply_adapter(
        read_policy(saved.parent_of(folder), dtype=as_type, attention=attention), folder, name
    )
    for parameter in adapted.parameters():
        parameter.data = parameter.data.to(as_type)  # peft keeps adapters in float32
    return adapted


def _dtype_of(given: torch.dtype | str) -> torch.dtype:
    return getattr(torch, given) if isinstance(given, str) else given


def read_weights(folder: Path, dtype: torch.dtype | str) -> Iterator[tuple[str, Tensor]]:
    """The weights of a saved policy under their Hugging Face names: those of a full folder one by one as they
    were saved, of an adapter merged as by `load`, in `dtype`. Raises as `load` does, before the first of
    them."""
    if saved.is_adapter(folder):
        policy = read_policy(folder, dtype=dtype)
        return ((name, parameter.data) for name, parameter in policy.named_parameters())
    files = saved.weight_files(folder)
    if not files:
        raise ConfigError(
            f"{folder}: holds no .safetensors file; save the policy with safe_serialization=True"
        )
    return chain.from_iterable(map(_read_tensors, files))


def write_policy(model: Any, folder: Path, read_from: Path, **how: Any) -> None:
    """A Hugging Face folder of a model, with the generation_config.json of the policy that it was read from,
    to the byte: whoever serves the policy ends its completions by its list of end-of-sequence tokens. `how`
    goes to transformers."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # save_pretrained raises for many that hubs' folders hold
    model.save_pretrained(folder, safe_serialization=True, **how)
    own = saved.base_of(read_from) / "generation_config.json"
    written = folder / "generation_config.json"
    written.unlink(missing_ok=True)
    if own.is_file():
        shutil.copyfile(own, written)


def _read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            yield name, opened.get_tensor(name)


def _load_full(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """Raises ConfigError for a model that transformers refuses, or whose files lack weights or hold others,
    which it would draw at random, or of experts."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # no such class, no such attention, files that are not whole: what a library raises of them is of any kind
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{folder}: transformers cannot load it with attention {attention} ({reason[:300]}); see "
            "model.attention"
        ) from None
    model, report = loaded
    missing = set(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{folder}: its files lack weights of the model: {_some_of(missing)}; save it again by its "
            "...ForCausalLM class"
        )
    mismatched = {key[0] for key in report["mismatched_keys"]}
    if mismatched:
        raise ConfigError(
            f"{folder}: its weights are of other shapes than config.json says: {_some_of(mismatched)}; "
            "save it again with both"
        )
    if any(".experts." in name for name, _ in model.named_parameters()):
        raise ConfigError(
            f"{folder}: a mixture of experts (model_type {model.config.model_type}) cannot be published; "
            "choose a dense model"
        )
    return model.eval()


def _merge_adapter(folder: Path) -> Any:
    """The adapter of `folder` in the weights of its base, float32."""
    under = saved.parent_of(folder)
    base = _merge_adapter(under) if saved.is_adapter(under) else _load_full(under, torch.float32, "eager")
    names = {name for name, _ in base.named_parameters()}
    tied = base.config.tie_word_embeddings
    adapted = _apply_adapter(base, folder)
    tokens = torch.arange(16).remainder(base.config.vocab_size)[None]
    before = _logprobs_of(adapted, tokens)
    try:
        policy = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"{folder}: {_kind_of(folder)} cannot be merged into weights ({error}); {saved.REMEDY}"
        ) from None
    if tied and not policy.config.tie_word_embeddings:
        raise ConfigError(
            f"{folder}: the adapter gives the output head weights of its own, and the base ties them to the "
            "embedding; merge it by peft and save the whole model with tie_word_embeddings=False"
        )
    changed = names.symmetric_difference(name for name, _ in policy.named_parameters())
    if changed:
        raise ConfigError(
            f"{folder}: {_kind_of(folder)} changes which weights the model has ({_some_of(changed)}); "
            f"{saved.REMEDY}"
        )
    gap = float((_logprobs_of(policy, tokens) - before).abs().max())
    if not gap <= MERGE_TOLERANCE:
        raise ConfigError(
            f"{folder}: merged into the weights, {_kind_of(folder)} gives other log-probs than peft's own, "
            f"by {gap:.3g} nats; {saved.REMEDY}"
        )
    return policy


def _apply_adapter(base: Any, folder: Path, adapter: str = "default") -> Any:
    """`base` with the adapter applied by peft under the name `adapter`, unmerged, in evaluation mode.

    Raises ConfigError for keys of the file that the model has no place for, keys that the file lacks, and
    shapes that differ.
    """
    from peft import PeftConfig, PeftModel

    renamed = getattr(base, "_checkpoint_conversion_mapping", {})  # as from_pretrained does
    try:
        with warnings.catch_warnings():  # of the missing keys, which are refused below
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
            adapted = PeftModel.from_pretrained(base, folder, adapter, torch_device="cpu")
            # again: this one tells what fits
            report = adapted.load_adapter(folder, adapter, torch_device="cpu", key_mapping=renamed)
    except KeyError as error:
        raise ConfigError(
            f"{folder}: the adapter's file lacks {error}, which its configuration names; save the adapter "
            "again"
        ) from None
    except Exception as error:  # as in _load_full
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{folder}: peft cannot apply {_kind_of(folder)} to {saved.parent_of(folder)} ({reason[:400]}); "
            f"{saved.REMEDY}"
        ) from None
    for keys, what in (
        (report.unexpected_keys, "holds weights that the model has no place for"),
        (report.missing_keys, "lacks weights"),
    ):
        if keys:
            raise ConfigError(
                f"{folder}: the adapter's file {what}: {_some_of(set(keys))}; name the base that it was "
                "trained on, or save it again"
            )
    written = saved.read_json(folder / saved.ADAPTER)
    unknown = {name for name, value in written.items() if value and not hasattr(config, name)}
    if unknown:  # peft leaves them out
        raise ConfigError(
            f"{folder / saved.ADAPTER}: the installed peft does not know {_some_of(unknown)}; {saved.REMEDY}"
        )
    return adapted.eval()


def _logprobs_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=tokens).logits.float(), -1)


def _kind_of(folder: Path) -> str:
    return f"the adapter of kind {saved.read_json(folder / saved.ADAPTER).get('peft_type')}"


def _some_of(names: set[str], most: int = 4) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

"""The one reader of saved policies: engines, learner, scorers, `frpo certify` and the guard all see the same
weights.

A policy is a Hugging Face folder, or a PEFT adapter on one, or on another adapter. peft itself applies an
adapter, in float32; what it cannot turn into plain weights exactly is refused by name. Imports transformers
and peft only when a policy is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frpo import saved
from frpo.config import ConfigError

MERGE_TOLERANCE = 1e-3
"""Largest difference of a log-prob between an adapter applied by peft and its merged weights, float32, nats:
rounding stays near 1e-5."""


def load(folder: Path, *, dtype: torch.dtype | str, attention: str = "sdpa") -> Any:
    """The causal language model of a saved policy, on the CPU, in evaluation mode.

    Adapters are merged onto their base in float32, whatever either was saved in; only then all is rounded to
    `dtype`. Raises ConfigError naming the folder and what cannot be applied, and the keys of an adapter that
    the model has no place for.
    """
    as_type = _dtype(dtype)
    if not saved.is_adapter(folder):
        return _full(folder, as_type, attention)
    saved.base(folder)  # raises where an adapter cannot be merged, or the chain of them ends nowhere
    policy = _merged(folder)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(
                as_type
            )  # not the buffers: transformers keeps rotary frequencies in float32
    policy.config.dtype = as_type
    policy.set_attn_implementation(attention)
    return policy


def beside(folder: Path, dtype: torch.dtype | str) -> bool:
    """Whether `load_beside` keeps the policy's adapter beside the weights."""
    return (
        _dtype(dtype) != torch.float32 and saved.is_adapter(folder) and saved.plain_rank(folder) is not None
    )


def load_beside(
    folder: Path, *, dtype: torch.dtype | str, attention: str = "sdpa", name: str = "default"
) -> Any:
    """As `load`, but a plain LoRA adapter stays beside the weights, a peft model with the adapter `name`,
    where `dtype` is coarser than float32.

    So do engines and learners compute it. Between the numbers of bfloat16 merged weights lose what is small
    beside them: a scorer of these would tell the KL of another policy.
    """
    as_type = _dtype(dtype)
    if not beside(folder, as_type):
        return load(folder, dtype=as_type, attention=attention)
    saved.base(folder)
    adapted = _adapted(load(saved.parent(folder), dtype=as_type, attention=attention), folder, name)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.to(as_type)  # peft keeps adapters in float32
    return adapted


def _dtype(given: torch.dtype | str) -> torch.dtype:
    found: torch.dtype = getattr(torch, given) if isinstance(given, str) else given
    return found


def tensors(folder: Path, dtype: torch.dtype | str) -> Iterator[tuple[str, Tensor]]:
    """The weights of a saved policy under their Hugging Face names: those of a full folder one by one as they
    were saved, of an adapter merged as by `load`, in `dtype`. Raises as `load` does, before the first of
    them."""
    if saved.is_adapter(folder):
        return ((name, p.data) for name, p in load(folder, dtype=dtype).named_parameters())
    files = saved.weight_files(folder)
    if not files:
        raise ConfigError(
            f"{folder}: holds no .safetensors file; save the policy with safe_serialization=True"
        )
    return (pair for file in files for pair in _saved(file))


def _saved(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            yield name, opened.get_tensor(name)


def _full(folder: Path, dtype: torch.dtype, attention: str) -> Any:
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
    model, found = loaded
    if missing := set(found["missing_keys"]):
        raise ConfigError(
            f"{folder}: its files lack weights of the model: {_some(missing)}; save it again by its "
            "...ForCausalLM class"
        )
    if mismatched := {key[0] for key in found["mismatched_keys"]}:
        raise ConfigError(
            f"{folder}: its weights are of other shapes than config.json says: {_some(mismatched)}; save it "
            "again with both"
        )
    if any(".experts." in name for name, _ in model.named_parameters()):
        raise ConfigError(
            f"{folder}: a mixture of experts (model_type {model.config.model_type}) cannot be published; "
            "choose a dense model"
        )
    return model.eval()


def _merged(folder: Path) -> Any:
    """The adapter of `folder` in the weights of its base, float32."""
    under = saved.parent(folder)
    base = _merged(under) if saved.is_adapter(under) else _full(under, torch.float32, "eager")
    names, tied = {n for n, _ in base.named_parameters()}, base.config.tie_word_embeddings
    adapted = _adapted(base, folder)
    tokens = torch.arange(16).remainder(base.config.vocab_size)[None]
    before = _logprobs(adapted, tokens)
    try:
        policy = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"{folder}: {_kind(folder)} cannot be merged into weights ({error}); {saved.REMEDY}"
        ) from None
    if tied and not policy.config.tie_word_embeddings:
        raise ConfigError(
            f"{folder}: the adapter gives the output head weights of its own, and the base ties them to the "
            "embedding; merge it by peft "
            "and save the whole model with tie_word_embeddings=False"
        )
    if changed := names.symmetric_difference(n for n, _ in policy.named_parameters()):
        raise ConfigError(
            f"{folder}: {_kind(folder)} changes which weights the model has ({_some(changed)}); "
            f"{saved.REMEDY}"
        )
    gap = float((_logprobs(policy, tokens) - before).abs().max())
    if not gap <= MERGE_TOLERANCE:
        raise ConfigError(
            f"{folder}: merged into the weights, {_kind(folder)} gives other log-probs than peft's own, by "
            f"{gap:.3g} nats; {saved.REMEDY}"
        )
    return policy


def _adapted(base: Any, folder: Path, adapter: str = "default") -> Any:
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
            found = adapted.load_adapter(
                folder, adapter, torch_device="cpu", key_mapping=renamed
            )  # again: this one tells what fits
    except KeyError as error:
        raise ConfigError(
            f"{folder}: the adapter's file lacks {error}, which its configuration names; save the adapter "
            "again"
        ) from None
    except Exception as error:  # as in _full
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{folder}: peft cannot apply {_kind(folder)} to {saved.parent(folder)} ({reason[:400]}); "
            f"{saved.REMEDY}"
        ) from None
    for keys, what in (
        (found.unexpected_keys, "holds weights that the model has no place for"),
        (found.missing_keys, "lacks weights"),
    ):
        if keys:
            raise ConfigError(
                f"{folder}: the adapter's file {what}: {_some(set(keys))}; name the base that it was trained "
                "on, or save it again"
            )
    written = saved.read_json(folder / saved.ADAPTER)
    if unknown := {
        name for name, value in written.items() if value and not hasattr(config, name)
    }:  # peft leaves them out
        raise ConfigError(
            f"{folder / saved.ADAPTER}: the installed peft does not know {_some(unknown)}; {saved.REMEDY}"
        )
    return adapted.eval()


def _logprobs(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=tokens).logits.float(), -1)


def _kind(folder: Path) -> str:
    return f"the adapter of kind {saved.read_json(folder / saved.ADAPTER).get('peft_type')}"


def _some(names: set[str], most: int = 4) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

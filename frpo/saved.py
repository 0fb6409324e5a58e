"""What the folder of a saved policy tells without loading it: a model of its own, or a PEFT adapter on a
base. Imports no ML library."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from frpo import hub
from frpo.config import ConfigError
from frpo.disk import sha256_of_folder

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NO_WEIGHTS = [
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
    "ADAPTION_PROMPT", "XLORA", "POLY", "SHADOW", "LILY", "PEANUT",
]  # fmt: skip
"""Kinds of PEFT adapter that are no change of the base's weights; `frpo.policies` finds others when it merges
them."""
NO_WEIGHTS_FIELDS = ("alora_invocation_tokens", "arrow_config", "layer_replication")
"""Settings of a LoRA adapter with which it is none."""
REMEDY = (
    "save the policy as a full model folder, or train an adapter that merges exactly (LoRA or DoRA on linear "
    "layers)"
)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def read_json(file: Path) -> dict[str, Any]:
    """Raises ConfigError when it holds no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); download or save it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds no JSON object; download or save it again")
    return content


def check_adapter(folder: Path) -> None:
    """That an adapter has its weights, and is of a kind that can be written into those of its base. Raises
    ConfigError."""
    config = read_json(folder / ADAPTER)
    kind = config.get("peft_type")
    if not _is_known(kind):
        raise ConfigError(
            f"{folder / ADAPTER}: peft_type: {kind!r} is no kind that the installed peft knows; save the "
            "adapter again"
        )
    if kind in NO_WEIGHTS:
        raise ConfigError(
            f"{folder / ADAPTER}: peft_type: {kind} cannot be merged into a model's weights; {REMEDY}"
        )
    for field in NO_WEIGHTS_FIELDS:
        if config.get(field):
            raise ConfigError(
                f"{folder / ADAPTER}: {field}: {config[field]} cannot be merged into a model's weights; "
                f"{REMEDY}"
            )
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder}: has no {WEIGHTS}; save the adapter with safe_serialization=True")
    shapes_in_file(folder / WEIGHTS)


OVER_WORDS = r"embed|lm_head|\boutput\b|\bwte\b|\bwpe\b"
"""Found in the names of embeddings and output heads."""


def linear_layers(base: Path) -> list[str]:
    """Last parts of the names of a model's linear layers, without embeddings and output head."""
    layers = set[str]()
    for name, shape in shapes_of_model(base).items():
        if len(shape) == 2 and name.endswith(".weight") and not re.search(OVER_WORDS, name):
            layers.add(name.removesuffix(".weight").rpartition(".")[2])
    return sorted(layers)


PLAIN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "use_rslora",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Settings of a LoRA adapter that leave it a product of two matrices on linear layers, whatever they hold."""


def plain_rank(folder: Path) -> int | None:
    """The largest rank of a LoRA adapter that is nothing but two matrices on each of some linear layers; None
    for any other kind. vLLM applies those unmerged, and leaves out or refuses what else an adapter may have.
    Raises as `read_json` and `shapes` do."""
    config = read_json(folder / ADAPTER)
    others = {name for name, value in config.items() if value and name not in PLAIN}
    if config.get("init_lora_weights", True) in (True, False, "gaussian"):
        others.discard("init_lora_weights")
    if config.get("bias", "none") == "none":
        others.discard("bias")
    matrices = shapes_in_file(folder / WEIGHTS)
    if config.get("peft_type") != "LORA" or others or not matrices:
        return None
    if not all(map(_is_lora_on_linear, matrices)):
        return None
    return max(shape[0] for name, shape in matrices.items() if name.endswith(".lora_A.weight"))


def _is_lora_on_linear(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight")) and not re.search(OVER_WORDS, name)


def _is_known(kind: Any) -> bool:
    """Whether peft has adapters of this kind, as far as its source tells."""
    library = importlib.util.find_spec("peft")
    if library is None or library.origin is None:
        return True
    kinds = Path(library.origin).parent / "utils" / "peft_types.py"
    return not kinds.is_file() or f'= "{kind}"' in kinds.read_text(encoding="utf-8")


def parent_of(folder: Path, *, download: bool = True) -> Path:
    """The folder that an adapter stands on, which may hold an adapter again.

    A relative path is taken from the working directory, as peft does, else from the adapter's own folder; a
    hub name as everywhere. Raises ConfigError when there is none, hub.NotCached when it would have to be
    downloaded and is not to be.
    """
    file = folder / ADAPTER
    config = read_json(file)
    name = config.get("base_model_name_or_path")
    revision = config.get("revision")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{file}: base_model_name_or_path is {name!r}; name the folder of the model that the adapter was "
            "trained on"
        )
    for place in (Path(name).expanduser(), folder / name):
        if os.path.isdir(place):  # pathlib raises where the name is too long
            return place
    named = f"{name}@{revision}" if revision else name
    given = hub.name_of(name) or named
    if not hub.is_name(given):
        raise ConfigError(
            f"{file}: base_model_name_or_path: no such folder {name}; write there where the adapter's base "
            "is now"
        )
    return hub.local_folder(given, f"{file}: base_model_name_or_path", download=download)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """How an adapter is applied: its configuration without where its base lies. Raises as `read_json`."""
    places = ("base_model_name_or_path", "revision", "inference_mode")
    return {key: value for key, value in read_json(folder / ADAPTER).items() if key not in places}


def weights_sha256(policy: Path) -> str:
    """Digest of all that a policy's weights are made of: an adapter's own, how it is applied, and what it
    stands on."""
    if not is_adapter(policy):
        return sha256_of_folder(policy)
    parts = (
        sha256_of_folder(policy),
        weights_sha256(parent_of(policy)),
        adapter_settings(policy),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def base_of(folder: Path, *, download: bool = True) -> Path:
    """The folder of the model under all adapters; `folder` itself where it is none. Raises as `check_adapter`
    and `parent` do."""
    seen = [folder.resolve()]
    while is_adapter(folder):
        check_adapter(folder)
        folder = parent_of(folder, download=download)
        if folder.resolve() in seen:
            raise ConfigError(
                f"{folder / ADAPTER}: base_model_name_or_path: the adapter stands on itself; name the model "
                "that it was trained on"
            )
        seen.append(folder.resolve())
    return folder


def tokenizer_folder(folder: Path) -> Path:
    """The folder whose tokenizer a policy uses: an adapter's own where it has one, else that of what it
    stands on."""
    while is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
        folder = parent_of(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that transformers would load: those of the index, else model.safetensors, else
    all (some hubs' folders hold the weights a second time under other names). Raises ConfigError for an index
    that is torn."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        files = list(names.values()) if isinstance(names, dict) else []
        if not files or not all(isinstance(file, str) for file in files):
            raise ConfigError(
                f"{index}: weight_map names no file for each weight; download or save the model again"
            )
        return [folder / file for file in sorted(set(files))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def shapes_of_model(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every weight of a model. Raises as `weight_files` and `shapes`."""
    every: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        every |= shapes_in_file(file)
    return every


def shapes_in_file(file: Path) -> dict[str, tuple[int, ...]]:
    """Of every weight in a .safetensors file, from its header. Raises ConfigError when the file is shorter
    than that says."""
    try:
        with safe_open(file, framework="numpy") as opened:
            names = opened.keys()
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ConfigError(f"{file} is torn ({error}); download or save the model again") from None

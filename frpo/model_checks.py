"""Whether a model can be trained, drawn from and scored as it is, as far as its folder alone tells. Imports
no ML library.

Every check raises ConfigError naming the field of the configuration, the file, what it holds and the remedy.
What no file tells is found when the model is loaded (`frpo.policies`, `frpo.logprobs`).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo import hub, saved
from frpo.config import Config, ConfigError, DownstreamSft, JudgeReward, LoraConfig, ModelConfig

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""vLLM's attention kernels on the CPU; another size loads and then fails at the first token."""


@dataclass(frozen=True)
class Unfit:
    """Values of config.json that a policy may not have."""

    names: str
    """Pattern that finds the whole of a field's dotted name."""
    values: Callable[[Any], bool]
    why: str


def _is_several(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_shaping(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1)


def _is_expert_kind(value: Any) -> bool:
    return re.search("moe|mixtral|dbrx|gpt_oss|deepseek_v[234]|jamba|llama4", str(value)) is not None


EXPERTS = (
    "a mixture of experts, whose weights reach no engine under the names that transformers gives them; "
    "choose a dense model"
)
UNFIT = (
    Unfit(
        r"quantization_config|compression_config",
        bool,
        "quantized weights cannot be trained and published; give the full model",
    ),
    Unfit(
        "(text|vision|visual|image|audio|speech|video|thinker|talker|language|llm|vit|vq|qformer)_config",
        bool,
        "a model of more than text; give a text model (its own language model, saved by its ...ForCausalLM "
        "class)",
    ),
    Unfit("is_encoder_decoder", bool, "an encoder with a decoder; choose a decoder-only model"),
    Unfit(r"(.*\.)?(num|n|moe_num)_((local|routed)_)?experts", _is_several, EXPERTS),
    Unfit("model_type", _is_expert_kind, EXPERTS),
    Unfit(
        r"(?!.*(attn|attention|router)).*(logit|lm_head).*(scal|cap|multipl).*",
        _is_shaping,
        "it scales or caps its logits, and log-probs are made of head(body(tokens)) here; choose a model "
        "whose logits are its head's output",
    ),
)


def check_policy(config: Config) -> None:
    """The model of a run: its folder, its kind, and whether lengths, attention heads and adapters fit it."""
    path = config.model.path
    if path.startswith("testbed:") or not Path(path).is_dir():
        check_full_model("model.path", path)
        return
    folder = saved.base_of(Path(path))
    check_full_model("model.path", str(folder))
    model = saved.read_json(folder / "config.json")
    check_sizes("model.path", folder, model)
    check_kind("model.path", folder, model)
    if config.rollout.num_gpus == 0:
        check_head_dim("model.path", path, model)
    check_context(config, model)
    if config.model.lora:
        check_targets("model.lora", config.model.lora, folder, model)
    for task in config.downstream:
        if isinstance(task, DownstreamSft) and isinstance(task.lora, LoraConfig):
            check_targets(f"downstream.{task.name}.lora", task.lora, folder, model)


def check_full_model(field: str, path: str) -> None:
    """That the folder of a full model is there and whole."""
    if path.startswith("testbed:"):
        return
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{field}: {path} has no config.json; give a Hugging Face model folder")
        if not list(folder.glob("*.safetensors")):
            raise ConfigError(
                f"{field}: {path} has no .safetensors file; save the model with safe_serialization=True"
            )
        check_weights(field, folder)
    elif not hub.is_name(path):  # one that is a name still is not in the cache
        raise ConfigError(
            f"{field}: no such folder {path}; give a Hugging Face folder or a hub name (organisation/name)"
        )


def check_weights(field: str, folder: Path) -> None:
    """That no shard is missing or shorter than its header says. Reads the headers alone."""
    for file in saved.weight_files(folder):
        if not file.is_file():
            raise ConfigError(
                f"{field}: {folder} lacks {file.name}, which its index names; download or save the model "
                "again"
            )
        try:
            saved.shapes_in_file(file)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None


SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
ROPE = ("rope_parameters", "rope_scaling")


def check_sizes(field: str, folder: Path, model: dict[str, Any]) -> None:
    """That what is read here of config.json is of its type."""
    names = model.get("architectures") or []
    wrong = [name for name in SIZES if not _is_size(model.get(name))]
    wrong += [name for name in ROPE if not isinstance(model.get(name) or {}, dict)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        wrong.append("architectures")
    if wrong:
        raise ConfigError(
            f"{field}: {folder / 'config.json'} has {wrong[0]} {str(model[wrong[0]])[:60]}: no value that it "
            "can have; download or save the model again"
        )


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def check_kind(field: str, folder: Path, model: dict[str, Any]) -> None:
    """That config.json tells of a plain causal language model that transformers knows. A field that it lacks
    is left to the loading."""
    for name, value in _fields_of(model):
        for unfit in UNFIT:
            if re.fullmatch(unfit.names, name) and unfit.values(value):
                shown = "" if isinstance(value, dict) else f" {value}"
                raise ConfigError(f"{field}: {folder / 'config.json'} has {name}{shown}: {unfit.why}")
    names = model.get("architectures") or []
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise ConfigError(
            f"{field}: {folder / 'config.json'} has architectures {', '.join(names)}: no causal language "
            "model; give one whose class ends in ForCausalLM"
        )
    check_known(field, folder, model)


def check_reward_model(field: str, path: str) -> None:
    """That the folder is whole, and has a trained head for its score."""
    check_full_model(field, path)
    file = Path(path) / "config.json"
    if not file.is_file():
        return
    model = saved.read_json(file)
    names = model.get("architectures") or []
    if names and not any(name.endswith("ForSequenceClassification") for name in names):
        raise ConfigError(
            f"{field}: {file} has architectures {', '.join(names)}: its score would come from a head that "
            "was never trained; give a model whose class ends in ForSequenceClassification"
        )
    check_known(field, Path(path), model)


ANSWERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How classes of models end that write text."""


def check_judge(field: str, reward: JudgeReward, *, chats: bool) -> None:
    """That a judge's folder is whole, holds a model that can be asked, through a chat template where it
    `chats`, and takes as long questions as it is to read."""
    if reward.path.startswith("testbed:"):
        raise ConfigError(f"{field}.path: {reward.path} has no words to judge with; give another model")
    check_full_model(f"{field}.path", reward.path)
    folder = Path(reward.path)
    file = folder / "config.json"
    if not file.is_file():
        return
    model = saved.read_json(file)
    check_sizes(f"{field}.path", folder, model)
    names = model.get("architectures") or []
    if names and not any(name.endswith(ANSWERS) for name in names):
        raise ConfigError(
            f"{field}.path: {file} has architectures {', '.join(names)}: no model that writes text; give one "
            "that does, or take kind: model for a score's head"
        )
    check_known(f"{field}.path", folder, model)
    if reward.num_gpus == 0:
        check_head_dim(f"{field}.path", reward.path, model)
    positions = model.get("max_position_embeddings")
    if positions is not None and not _is_stretched(model) and reward.max_tokens > positions:
        raise ConfigError(
            f"{field}.max_tokens: {reward.max_tokens} do not fit the {positions} positions of {reward.path}; "
            "lower it"
        )
    if chats and not _has_chat_template(folder):
        raise ConfigError(
            f"{field}.template: {reward.template} asks by messages, and {reward.path} has no chat template; "
            "give a chat model, or a template with a text"
        )


def _has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer has one, in any of the places where transformers looks."""
    if any((folder / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json")):
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(saved.read_json(file).get("chat_template"))


def check_known(field: str, folder: Path, model: dict[str, Any]) -> None:
    """That transformers has code of its own for the model: code from a model's folder is never run."""
    kind = model.get("model_type")
    library = importlib.util.find_spec("transformers")
    if kind is None or library is None or library.origin is None:
        return
    known = Path(library.origin).parent / "models" / "auto" / "modeling_auto.py"
    if known.is_file() and f'"{kind}"' not in known.read_text(encoding="utf-8"):
        raise ConfigError(
            f"{field}: {folder / 'config.json'} has model_type {kind}, which the installed transformers does "
            "not know, and code from a model's folder is not run; choose a model of a known type"
        )


def _fields_of(model: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those inside a section under a dotted name after the section itself."""
    for name, value in model.items():
        yield name, value
        if isinstance(value, dict):
            for inner, inner_value in _fields_of(value):
                yield f"{name}.{inner}", inner_value


def check_head_dim(field: str, path: str, model: dict[str, Any]) -> None:
    """That vLLM's kernels for CPUs take the size of the attention heads."""
    size = model.get("head_dim") or None
    heads = model.get("num_attention_heads")
    if not size and heads and "hidden_size" in model:
        size = model["hidden_size"] // heads
    if size is not None and size not in CPU_HEAD_DIMS:
        raise ConfigError(
            f"{field}: {path} has head_dim {size}; vLLM on the CPU serves "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}: choose another model, or a GPU (num_gpus)"
        )


def check_context(config: Config, model: dict[str, Any]) -> None:
    """That the longest prompt and completion fit the model's positions, with the one token that a log-prob
    request draws.

    Models that stretch their positions (YaRN and the like) are left to vLLM, which knows by how much.
    """
    positions = model.get("max_position_embeddings")
    if positions is None or _is_stretched(model) or config.num_tokens_limit < positions:
        return
    prompt = config.data.max_prompt_tokens
    completion = config.rollout.max_new_tokens
    if config.num_tokens_limit > prompt + completion:
        field = "harness.max_tokens"
        asked = str(config.num_tokens_limit)
    else:
        field = "data.max_prompt_tokens + rollout.max_new_tokens"
        asked = f"{prompt} + {completion}"
    raise ConfigError(
        f"{field}: {asked} and one more token do not fit the {positions} positions of {config.model.path}; "
        "lower it"
    )


def _is_stretched(model: dict[str, Any]) -> bool:
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    return bool(rope.get("rope_type", rope.get("type", "default")) != "default")


# ---- adapters of one's own


def check_targets(field: str, lora: LoraConfig, folder: Path, model: dict[str, Any]) -> None:
    """That every target names layers that an adapter can stand on, as peft matches them: whole names, or
    their last parts.

    The embedding and a head that is tied to it are one weight, which no adapter on either can move alone.
    """
    if isinstance(lora.targets, str):
        return
    linear = {
        name.removesuffix(".weight"): shape
        for name, shape in saved.shapes_of_model(folder).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    over_words = [name for name, shape in linear.items() if model.get("vocab_size") in shape]
    tied = model.get("tie_word_embeddings", len(over_words) == 1)
    for i, target in enumerate(lora.targets):
        where = f"{field}.targets.{i}: {target}"
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if tied and (set(matching) & set(over_words) or (target in HEADS and not matching)):
            raise ConfigError(
                f"{where}: embedding and output head are one weight here (tie_word_embeddings); leave it out "
                "of the targets"
            )
        if not matching and linear:
            last = sorted({name.rpartition(".")[2] for name in linear if name not in over_words})
            raise ConfigError(
                f"{where} is no linear layer of {folder}; give names out of {', '.join(last)}, or all-linear"
            )


HEADS = ("lm_head", "embed_out", "output")
"""What output heads are called; a tied one has no weight in the file."""


def weight_bytes(model: ModelConfig) -> int:
    """Size of a model's weights in the dtype that they are loaded in; 0 for a hub name."""
    if not Path(model.path).is_dir():
        return 0
    folder = saved.base_of(Path(model.path))
    size = sum(file.stat().st_size for file in saved.weight_files(folder))
    if not size or model.dtype != "float32":
        return size
    written = saved.read_json(folder / "config.json")
    halves = "16" in str(written.get("dtype") or written.get("torch_dtype"))
    if halves:
        return 2 * size
    return size

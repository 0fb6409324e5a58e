"""The policy of an engine on its way out: its weights under their Hugging Face names, and what is written of
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frpo import saved
from frpo.actors import _adapters
from frpo.actors._adapters import Adapter
from frpo.logprobs import LogprobModel
from frpo.policies import write_policy


@torch.no_grad()
def named_weights(scorer: LogprobModel, *, sharded: bool) -> Iterator[tuple[str, Tensor]]:
    """Merged weights, in the order of the model without adapters, whichever layers have some. `sharded` over
    ranks (ZeRO-3) every rank must iterate to the end; the tensors of rank 0 count."""
    import deepspeed

    adapted: dict[int, Any] = {}
    in_adapters: set[int] = set()
    for _, layer in _adapters.layers_of(scorer):
        weight, *matrices = _adapters.matrices_of(layer)
        adapted[id(weight)] = layer
        in_adapters |= {id(matrix) for matrix in matrices}
    for name, parameter in scorer.named_parameters():
        if id(parameter) in in_adapters:
            continue
        layer = adapted.get(id(parameter))
        gathered = _adapters.matrices_of(layer) if layer else [parameter]
        with deepspeed.zero.GatheredParameters(gathered, enabled=sharded):
            if layer:
                yield _plain_name(name), _adapters.merged_weight(layer)
            else:
                whole = parameter.detach()
                yield _plain_name(name), whole.clone() if sharded else whole


@torch.no_grad()
def adapter_in(scorer: LogprobModel, stands_on: Path, *, sharded: bool, rank: int) -> Adapter | None:
    """The adapter in training, on the policy saved in `stands_on`. `sharded` over ranks (ZeRO-3) every rank
    must call it; rank 0 has the answer."""
    import deepspeed

    weights: list[Tensor] = []
    for _, layer in _adapters.layers_of(scorer.model):
        weights += _adapters.matrices_of(layer)[1:]
    with deepspeed.zero.GatheredParameters(weights, enabled=sharded):
        return _adapters.as_saved(scorer.model, stands_on) if rank == 0 else None


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """A PEFT folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / saved.ADAPTER).write_text(adapter.config, encoding="utf-8")
    weights = {name: tensor.cpu().contiguous() for name, tensor in adapter.weights.items()}
    save_file(weights, folder / saved.WEIGHTS, metadata={"format": "pt"})


def write_whole(scorer: LogprobModel, state: Mapping[str, Tensor], folder: Path, read_from: Path) -> None:
    """A Hugging Face folder of the weights in `state`, as `policies.write_policy` does."""
    causal: Any = scorer.causal()
    if scorer.model is not causal:  # adapters stand on it: a model without them, and without weights
        with torch.device("meta"):
            causal = type(causal)(causal.config)
    write_policy(causal, folder, read_from, state_dict=state)


def _plain_name(name: str) -> str:
    """Name in the transformers model of a parameter of Scorer(model) or Scorer(PeftModel(model))."""
    return name.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer.", ".")

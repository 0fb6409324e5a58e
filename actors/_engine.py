"""One DeepSpeed engine around one policy: build it from a saved policy, step it, save it, export it.

Knows nothing of rewards or data: the loss is a callback on rows of a batch. Several engines may follow one
another in a process; `close` frees one.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from actors import _adapters, _dist
from actors._adapters import Adapter
from actors._blocks import Block, Logprobs, by_group, sequences_of
from actors._host import Host, frozen_tensors
from actors._optimizer import adamw, deepspeed_config, learning_rate_factor
from actors._writer import Writer
from frpo import hub, policies, saved
from frpo.config import ModelConfig, TrainConfig
from frpo.logprobs import Scorer, TokenLogprobs, logprobs_of_packs, passes_of
from frpo.packing import MicroBatch, Pack, Rows, micro_batches, pack_lengths, packs_of, split_ranks
from frpo.shape import BUDGET_TOKENS
from frpo.types import Floats, Sequences, Written

TAG = "engine"


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    """L2 over all parameters and ranks, before clipping; nan where a gradient is not finite"""
    learning_rate: float


def norm_of(found: float | Tensor | None) -> float:
    """DeepSpeed's gradient norm; nan where it has none, or gives its marks of an overflow (-1, infinity; the
    update is left out)."""
    norm = math.nan if found is None else float(found)
    return norm if 0 <= norm < math.inf else math.nan


def without_dropout(policy: torch.nn.Module) -> None:
    """Make every forward pass that of evaluation, so that training draws no noise: adapters' dropout, the
    model's own, and skipped layers.

    Modules hold a rate as `p` of a Dropout, or under a name with "drop" in it; some read it from the
    configuration at each pass.
    """
    for module in policy.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


class Engine:
    """`num_updates` optimiser updates of the policy saved in `folder`, on this rank."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        train: TrainConfig,
        num_updates: int,
        seed: int,
        *,
        dropout: bool,
    ) -> None:
        import deepspeed
        from transformers import AutoTokenizer

        folder = hub.on_this_node(folder)
        self.folder, self.train, self.lora = folder, train, model.lora is not None
        self.stands_on = (
            saved.parent(folder) if self.lora and policies.beside(folder, model.dtype) else folder
        )
        """The saved policy under all adapters here."""
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), _dist.device()
        self.tokenizer = AutoTokenizer.from_pretrained(saved.tokenizer(folder))
        if model.deterministic:
            _dist.use_deterministic()
        torch.manual_seed(seed % 2**63)
        load = partial(policies.load_beside, name=_adapters.START) if self.lora else policies.load
        policy = load(folder, dtype=model.dtype, attention=model.attention)
        if model.gradient_checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if model.lora:
            if model.gradient_checkpointing:
                policy.enable_input_require_grads()
            policy = _adapters.add(policy, model, folder)
        if train.zero_stage < 3:  # else one device may not hold it whole
            policy.to(self.device)
        scorer = Scorer(policy)
        if not dropout:
            exported = copy.deepcopy(scorer.causal().config)
            without_dropout(scorer)
            scorer.causal().config = exported  # the rates of whoever trains it next
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = adamw(trained, train)
        factor = learning_rate_factor(train, num_updates)
        self.ds, *_ = deepspeed.initialize(
            model=scorer,
            optimizer=optimizer,
            lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, factor),
            config=deepspeed_config(model, train, self.world_size),
        )
        self.ds.checkpoint_engine = self.writer = Writer()
        self.optimizer_states = Host(self.device, frozen=False)
        self.frozen_weights = Host(self.device, frozen=True)
        if self.lora:
            self._leave_frozen_ties_out()

    def _leave_frozen_ties_out(self) -> None:
        """DeepSpeed's exclude_frozen_parameters keeps a frozen lm_head that is tied to the embedding: drop
        it."""
        original = self.ds.module_state_dict

        def module_state_dict(*args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any) -> Any:
            state = original(*args, exclude_frozen_parameters=exclude_frozen_parameters, **kwargs)
            if exclude_frozen_parameters:
                for name, parameter in self.ds.module.named_parameters(remove_duplicate=False):
                    if not parameter.requires_grad:
                        state.pop(name, None)
            return state

        self.ds.module_state_dict = module_state_dict

    # ---- training

    def share(self, sequences: Sequences, rows: Rows | None = None) -> list[tuple[list[Pack], float]]:
        """This rank's micro-batches of the batch: packs and a weight of 1, or 0 for one that only keeps ranks
        in step.

        Every rank has as many, since under ZeRO-2 and 3 each backward pass is a collective. No pack is more
        than half of a rank's part, so that whole packs can be dealt evenly.
        """
        rows = rows if rows is not None else np.arange(len(sequences))
        budget = self.train.micro_batch_tokens
        half = int(sequences.lengths[rows].sum()) // (2 * self.world_size)
        packs = packs_of(
            sequences,
            rows,
            budget_tokens=min(budget, half) if self.world_size > 1 else budget,
            reach=self.ds.module.reach(),
        )
        lengths = pack_lengths(sequences, packs)
        cuts = [
            [mine[b] for b in micro_batches(lengths[mine], budget)]
            for mine in split_ranks(lengths, self.world_size)
        ]
        parts = [([packs[i] for i in cut], 1.0) for cut in cuts[self.rank]]
        return parts + [([rows[:1]], 0.0)] * (max(map(len, cuts)) - len(parts))

    def forward(self, batch: MicroBatch, temperature: float = 1.0) -> TokenLogprobs:
        found: TokenLogprobs = self.ds(batch, temperature)
        return found

    def step(
        self, share: Sequence[tuple[list[Pack], float]], loss: Callable[[list[Pack], float], Tensor]
    ) -> StepResult:
        """One optimiser update. `loss(packs, weight)` gives the part of the global loss that the packs
        contribute; it must count nothing where the weight is 0."""
        self.ds.train()
        for packs, weight in share:
            value = (
                loss(packs, weight) * weight * self.world_size
            )  # DeepSpeed averages over ranks, the loss is a global sum
            self.ds.backward(value, scale_wrt_gas=False)
        rate = float(self.ds.get_lr()[0])
        self.ds.step()
        return StepResult(norm_of(self.ds.get_global_grad_norm()), rate)

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Sum over ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return [float(v) for v in total]

    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Floats:
        """Log-probs of all completion tokens, the same on every rank; each computes its share of them."""
        self.ds.eval()
        share = self.share(sequences)
        mine = [packs for packs, weight in share if weight]
        found = logprobs_of_packs(self.ds, sequences, mine, temperature=temperature, device=self.device)
        for packs, _ in share[
            len(mine) :
        ]:  # as many passes as the other ranks make: under ZeRO-3 each is a collective
            logprobs_of_packs(self.ds, sequences, [packs], temperature=temperature, device=self.device)
        if self.world_size > 1:
            total = torch.from_numpy(found).to(self.device)
            dist.all_reduce(total)
            found = total.cpu().numpy()
        return found

    def scores(
        self, blocks: Sequence[Block], temperature: float, *, start: bool = False, together: bool = False
    ) -> list[list[Logprobs]]:
        """Log-probs of blocks of groups, in the passes that a saved policy takes for them. `start`: under the
        policy that the adapter was added to. `together`: of those dealt to this rank, and it makes as many
        passes as the rank with the most, since under ZeRO-3 each is a collective."""
        self.ds.eval()
        with _adapters.switched_off(self.ds.module) if start else nullcontext():
            return self._scores(blocks, temperature, together=together)

    def _scores(self, blocks: Sequence[Block], temperature: float, *, together: bool) -> list[list[Logprobs]]:
        data = [sequences_of(block) for block in blocks]
        hands = (
            [range(rank, len(blocks), self.world_size) for rank in range(self.world_size)]
            if together
            else [range(len(blocks))]
        )
        mine = hands[self.rank if together else 0]
        passes = [passes_of(d, BUDGET_TOKENS, self.ds.module.reach()) for d in data]
        found = [
            by_group(
                logprobs_of_packs(self.ds, data[i], passes[i], temperature=temperature, device=self.device),
                blocks[i],
            )
            for i in mine
        ]
        counts = [sum(len(passes[i]) for i in hand) for hand in hands]
        for _ in range(max(counts) - sum(len(passes[i]) for i in mine)):
            logprobs_of_packs(self.ds, data[0], passes[0][:1], temperature=temperature, device=self.device)
        return found

    # ---- weights out

    @torch.no_grad()
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Merged weights under their Hugging Face names. Under ZeRO-3 every rank must iterate to the end; the
        tensors of rank 0 count."""
        import deepspeed

        sharded = self.train.zero_stage == 3
        done: set[int] = set()
        for name, layer in _adapters.layers_of(self.ds.module):
            matrices = _adapters.matrices(layer)
            with deepspeed.zero.GatheredParameters(matrices, enabled=sharded):
                yield _plain_name(name) + ".weight", _adapters.merged(layer)
            done |= {id(m) for m in matrices}
        for name, parameter in self.ds.module.named_parameters():
            if id(parameter) not in done:
                with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                    yield _plain_name(name), parameter.detach().clone() if sharded else parameter.detach()

    def export(self, folder: Path, *, merged: bool) -> None:
        """Write the policy, safetensors, with its tokenizer. An adapter on a full base is written as a PEFT
        folder, unless it is to be merged; all else, an adapter on an already merged adapter included, as a
        full Hugging Face folder."""
        if self.lora and not merged and not saved.is_adapter(self.stands_on):
            self._export_adapter(folder)
        else:
            # vLLM and transformers restore a tied lm_head from the embedding
            state = {n: t.cpu().clone() for n, t in self.named_weights() if self.rank == 0}
            if self.rank == 0:
                self._unwrapped().save_pretrained(folder, state_dict=state, safe_serialization=True)
                self._keep_generation_config(folder)
        if self.rank == 0:
            self.tokenizer.save_pretrained(folder)
        self._barrier()

    @torch.no_grad()
    def adapter(self) -> Adapter | None:
        """The adapter in training, on the policy saved in `stands_on`. Under ZeRO-3 every rank must call it;
        rank 0 has the answer."""
        import deepspeed

        wrapped = self.ds.module.model
        weights = [w for _, layer in _adapters.layers_of(wrapped) for w in _adapters.matrices(layer)[1:]]
        with deepspeed.zero.GatheredParameters(weights, enabled=self.train.zero_stage == 3):
            return _adapters.as_saved(wrapped, self.stands_on) if self.rank == 0 else None

    def _export_adapter(self, folder: Path) -> None:
        from safetensors.torch import save_file

        if found := self.adapter():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / saved.ADAPTER).write_text(found.config, encoding="utf-8")
            save_file(
                {n: t.cpu().contiguous() for n, t in found.weights.items()},
                folder / saved.WEIGHTS,
                metadata={"format": "pt"},
            )

    def _unwrapped(self) -> Any:
        """A transformers model to call save_pretrained on; its own weights do not matter."""
        from transformers import GenerationConfig

        causal = self.ds.module.causal()
        if self.lora:
            with torch.device("meta"):
                causal = type(causal)(causal.config)
        causal.generation_config = (
            GenerationConfig()
        )  # save_pretrained raises for many that hubs' folders hold
        return causal

    def _keep_generation_config(self, folder: Path) -> None:
        """As the model came with it, to the byte: whoever serves the policy ends its completions by its list
        of end-of-sequence tokens."""
        own, written = saved.base(self.folder) / "generation_config.json", folder / "generation_config.json"
        written.unlink(missing_ok=True)
        if own.is_file():
            shutil.copyfile(own, written)

    # ---- checkpoints

    def save(self, folder: Path) -> None:
        """Copy weights, optimiser, schedule and RNG of this rank, and begin to write them (DeepSpeed's own
        format); all ranks call it, and none goes on before all have their copy. `written` tells the end."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "rng": torch.get_rng_state(),
            "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
        }
        if self.device.type == "cuda":
            state["device_rng"] = torch.cuda.get_rng_state(self.device)
        self.ds.save_checkpoint(
            str(folder), tag=TAG, client_state=state, save_latest=False, exclude_frozen_parameters=self.lora
        )
        self._barrier()

    def written(self) -> list[Written] | None:
        """What this rank has written of the checkpoint; None while it still does."""
        return self.writer.written()

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` was called. Raises FileNotFoundError when nothing was loaded."""
        path, state = self.ds.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self.lora)
        if path is None:
            raise FileNotFoundError(f"{folder} holds no checkpoint of this engine")
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_rng"].cpu(), self.device)

    def _barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def offload(self) -> None:
        """Move weights, gradients and optimiser to host memory, so that vLLM can have the GPU.

        DeepSpeed moves what its optimiser holds (`offload_states` in
        deepspeed/runtime/zero/stage_1_and_2.py); the frozen weights under an adapter are not among it, nor
        under ZeRO-3 the states of another optimiser than its own, which it compiles at first use (stage3.py).
        """
        if self.train.zero_stage == 3:
            from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

            self.ds.offload_states(include=[State.lp_params, State.lp_grads, State.contiguous_grad_buffer])
            self.optimizer_states.take(self._master_weights_and_moments())
        else:
            self.ds.offload_states()
        if self.lora:
            self.frozen_weights.take(frozen_tensors(self.ds.module))

    def reload(self) -> None:
        self.ds.reload_states()
        if self.train.zero_stage == 3:
            self.optimizer_states.give()
        if self.lora:
            self.frozen_weights.give()

    def _master_weights_and_moments(self) -> list[Tensor]:
        """Of this rank's part under ZeRO-3, float32."""
        zero = self.ds.optimizer
        moments = [
            state[name]
            for state in zero.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
            if name in state
        ]
        return [*zero.fp32_partitioned_groups_flat, *moments]

    def close(self) -> None:
        self.writer.close()
        self.ds.destroy()
        del self.ds
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # glibc keeps what was freed: 2.8 GiB after two updates of SmolLM2-135M, while other roles work
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)


def _plain_name(name: str) -> str:
    """Name in the transformers model of a parameter of Scorer(model) or Scorer(PeftModel(model))."""
    return name.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer.", ".")

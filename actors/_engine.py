"""One DeepSpeed engine around one policy: build it from a saved policy, step it, save it, export it.

Knows nothing of rewards or data: the loss is a callback on rows of a batch. Several engines may follow one
another in a process; `close` frees one.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from frpo import hub, policies, saved
from frpo.actors import _adapters, _dist
from frpo.actors._adapters import Adapter
from frpo.actors._average import Gradient, WeightAverage, climbed
from frpo.actors._blocks import Block, Logprobs, by_group, sequences_of
from frpo.actors._export import adapter_in, named_weights, write_adapter, write_whole
from frpo.actors._host import Host, frozen_tensors
from frpo.actors._optimizer import adamw_of, deepspeed_config, learning_rate_factor
from frpo.actors._share import Job, Share, deal_to_rank
from frpo.actors._trainable import load_trainable, silence_dropout
from frpo.actors._writer import Writer
from frpo.config import ModelConfig, TrainConfig
from frpo.logprobs import LogprobModel, TokenLogprobs, logprobs_of_packs, passes_of
from frpo.packing import MicroBatch, Pack, Rows
from frpo.shape import BUDGET_TOKENS
from frpo.types import Floats, Sequences, Written

T = TypeVar("T")

TAG = "engine"


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    """L2 over all parameters and ranks, before clipping; nan where a gradient is not finite"""
    learning_rate: float


def norm_of(reported: float | Tensor | None) -> float:
    """DeepSpeed's gradient norm; nan where it has none, or gives its marks of an overflow (-1, infinity; the
    update is left out)."""
    norm = math.nan if reported is None else float(reported)
    return norm if 0 <= norm < math.inf else math.nan


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
        self.folder, self.train = folder, train
        self.lora = model.lora is not None
        self.stands_on = folder
        """The saved policy under all adapters here."""
        if self.lora and policies.keeps_beside(folder, model.dtype):
            self.stands_on = saved.parent_of(folder)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = _dist.own_device()
        self.tokenizer = AutoTokenizer.from_pretrained(saved.tokenizer_folder(folder))
        if model.deterministic:
            _dist.use_deterministic()
        torch.manual_seed(seed % 2**63)
        policy = load_trainable(folder, model)
        if train.zero_stage < 3:  # else one device may not hold it whole
            policy.to(self.device)
        scorer = LogprobModel(policy)
        if not dropout:
            silence_dropout(scorer)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.trained, self.num_updates = trained, num_updates
        factor = learning_rate_factor(train, num_updates)
        self.ds, *_ = deepspeed.initialize(
            model=scorer,
            optimizer=adamw_of(trained, train),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            config=deepspeed_config(model, train, self.world_size),
        )
        self.ds.checkpoint_engine = self.writer = Writer()
        self.optimizer_states = Host(self.device, frozen=False)
        self.frozen_weights = Host(self.device, frozen=True)
        self.average: WeightAverage | None = None
        if train.ema is not None:
            self.average = WeightAverage(trained, train.ema)
            self.average_values = Host(self.device, frozen=False)
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

    def share(self, sequences: Sequences, rows: Rows | None = None) -> Share:
        """This rank's micro-batches of the batch, or of some rows of it."""
        job = Job(self.rank, self.world_size, self.train.micro_batch_tokens, self.ds.module.reach())
        return deal_to_rank(sequences, rows if rows is not None else np.arange(len(sequences)), job)

    def forward(self, batch: MicroBatch, temperature: float = 1.0) -> TokenLogprobs:
        logprobs: TokenLogprobs = self.ds(batch, temperature)
        return logprobs

    def step(
        self, share: Share, loss: Callable[[list[Pack]], tuple[Tensor, T]]
    ) -> tuple[StepResult, list[T]]:
        """One optimiser update. `loss(packs)` gives the part of the global loss that the packs contribute,
        and anything that is to be told of them: of this rank's micro-batches it is returned in their
        order."""
        self.ds.train()
        if self.train.sam is None:
            told = self._pass(share, loss, self._backward)
        else:
            gradient = Gradient(self.trained)
            told = self._pass(share, loss, gradient.add)
            if self.world_size > 1:
                gradient.reduce()
            with climbed(gradient, self.train.sam):
                self._pass(share, loss, self._backward)
        rate = float(self.ds.get_lr()[0])
        self.ds.step()
        if self.average:
            self.average.add()
            self._end_on_average(self.average)
        return StepResult(norm_of(self.ds.get_global_grad_norm()), rate), told

    def _pass(
        self,
        share: Share,
        loss: Callable[[list[Pack]], tuple[Tensor, T]],
        backward: Callable[[Tensor], None],
    ) -> list[T]:
        told = []
        for packs in share.micro_batches:
            value, of_packs = loss(packs)
            backward(value)
            told.append(of_packs)
        for _ in range(share.num_idle):
            value, _ = loss(share.idle)
            backward(value * 0.0)
        return told

    def _end_on_average(self, average: WeightAverage) -> None:
        """After the last update the policy is the average."""
        if average.count == self.num_updates:
            average.replace()

    def _backward(self, value: Tensor) -> None:
        # DeepSpeed averages over ranks, and the loss is a sum over all
        self.ds.backward(value * self.world_size, scale_wrt_gas=False)

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Sum over ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Floats:
        """Log-probs of all completion tokens, the same on every rank; each computes its share of them."""
        self.ds.eval()
        share = self.share(sequences)
        logprobs = self._compute(sequences, share.micro_batches, temperature)
        for _ in range(share.num_idle):
            self._compute(sequences, [share.idle], temperature)
        if self.world_size > 1:
            total = torch.from_numpy(logprobs).to(self.device)
            dist.all_reduce(total)
            logprobs = total.cpu().numpy()
        return logprobs

    def _compute(self, sequences: Sequences, passes: list[list[Pack]], temperature: float) -> Floats:
        return logprobs_of_packs(self.ds, sequences, passes, temperature=temperature, device=self.device)

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
        passes = [passes_of(sequences, BUDGET_TOKENS, self.ds.module.reach()) for sequences in data]

        def num_passes(rank: int) -> int:
            return sum(len(passes[i]) for i in range(rank, len(blocks), self.world_size))

        mine = range(self.rank, len(blocks), self.world_size) if together else range(len(blocks))
        scores = [by_group(self._compute(data[i], passes[i], temperature), blocks[i]) for i in mine]
        if together:
            most = max(num_passes(rank) for rank in range(self.world_size))
            for _ in range(most - num_passes(self.rank)):
                self._compute(data[0], passes[0][:1], temperature)
        return scores

    # ---- weights out

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Merged weights under their Hugging Face names. Under ZeRO-3 every rank must iterate to the end; the
        tensors of rank 0 count."""
        return named_weights(self.ds.module, sharded=self.train.zero_stage == 3)

    def adapter(self) -> Adapter | None:
        """The adapter in training, on the policy saved in `stands_on`. Under ZeRO-3 every rank must call it;
        rank 0 has the answer."""
        sharded = self.train.zero_stage == 3
        return adapter_in(self.ds.module, self.stands_on, sharded=sharded, rank=self.rank)

    def export(self, folder: Path, *, merged: bool) -> None:
        """Write the policy, safetensors, with its tokenizer. An adapter on a full base is written as a PEFT
        folder, unless it is to be merged; all else, an adapter on an already merged adapter included, as a
        full Hugging Face folder."""
        if self.lora and not merged and not saved.is_adapter(self.stands_on):
            adapter = self.adapter()
            if adapter is not None:
                write_adapter(adapter, folder)
        else:
            # vLLM and transformers restore a tied lm_head from the embedding
            state = {name: weight.cpu().clone() for name, weight in self.named_weights() if self.rank == 0}
            if self.rank == 0:
                write_whole(self.ds.module, state, folder, read_from=self.folder)
        if self.rank == 0:
            self.tokenizer.save_pretrained(folder)
        self._barrier()

    # ---- checkpoints

    def save(self, folder: Path) -> None:
        """Copy weights, optimiser, schedule and RNG of this rank, and begin to write them (DeepSpeed's own
        format); all ranks call it, and none goes on before all have their copy. `written` tells the end."""
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "rng": torch.get_rng_state(),
            "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
        }
        if self.device.type == "cuda":
            state["device_rng"] = torch.cuda.get_rng_state(self.device)
        if self.average:
            state["average"] = self.average.state()
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
        if self.average:
            self.average.restore(**state["average"])
            self._end_on_average(self.average)

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
        if self.average:
            self.average_values.take(self.average.values)

    def reload(self) -> None:
        self.ds.reload_states()
        if self.train.zero_stage == 3:
            self.optimizer_states.give()
        if self.lora:
            self.frozen_weights.give()
        if self.average:
            self.average_values.give()

    def _master_weights_and_moments(self) -> list[Tensor]:
        """Of this rank's part under ZeRO-3, float32."""
        zero = self.ds.optimizer
        tensors: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        for state in zero.optimizer.state.values():
            tensors += [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
        return tensors

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

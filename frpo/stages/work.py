"""Does the stages of a run with one team of actors: which policy is trained on what, when it is measured,
what is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from frpo import checkpoint
from frpo.checkpoint import Checkpoints, Progress
from frpo.config import (
    ArmConfig,
    Config,
    DownstreamRl,
    DownstreamSft,
    FinetuneConfig,
    ObjectiveConfig,
    TrainConfig,
)
from frpo.driver import Partners, train
from frpo.evaluation import Opposite, Trainer, certify, evaluate, mean_reward
from frpo.metrics import RunLog, read_steps
from frpo.outline import Stage, arm_of, fixed_end, task_of
from frpo.prompts import Examples, ExampleStream, PromptStream
from frpo.records import ArmSummary, Evaluation, StageResult
from frpo.roles import Rewards
from frpo.seeds import derive
from frpo.stages import folders
from frpo.stages.folders import Standing
from frpo.steering import begin, finished
from frpo.stops import stop_if_not_finite, too_fast
from frpo.types import Prompt, Steering, StepMetrics

if TYPE_CHECKING:  # whoever has a team has imported Ray
    from frpo.cluster import Team
    from frpo.stages.inputs import Inputs

NUM_SAMPLES = 24
"""Completions of one measurement that are kept for people to read."""


class Work:
    """One run. `do` brings one stage from wherever it was left to its result."""

    def __init__(self, config: Config, team: Team, log: RunLog, inputs: Inputs) -> None:
        self.config, self.team, self.log, self.inputs = config, team, log, inputs

    def do(self, standing: Standing) -> None:
        stage = standing.stage
        folder = folders.begin(self.config.folder, standing)
        folders.finish(
            folder, standing.made, self._do(stage, folder), keep_last=not fixed_end(self.config, stage)
        )

    def _do(self, stage: Stage, folder: Path) -> StageResult:
        if stage.kind == "base":
            return self.base(stage, folder)
        if stage.kind == "harness":
            return self.harness(stage)
        arm = arm_of(self.config, stage)
        if stage.kind == "rlhf":
            return self.rlhf(stage, folder, arm)
        if stage.kind == "certify":
            return self.certify(stage, arm)
        if stage.radius is not None:
            return self.attack(stage, folder, arm, stage.radius)
        task = task_of(self.config, stage)
        if isinstance(task, DownstreamRl):
            return self.downstream_rl(stage, folder, arm, task)
        return self.downstream_sft(stage, folder, arm, task)

    @cached_property
    def base_policy(self) -> Path:
        """The reference, and the start of every arm."""
        return (
            self.config.folder / "base" / "policy" if self.config.base else Path(self.config.model.path)
        ).absolute()

    def arm_policy(self, arm: ArmConfig) -> Path:
        return (self.config.folder / "rlhf" / arm.name / "policy").absolute()

    # ---- stages

    def base(self, stage: Stage, folder: Path) -> StageResult:
        began = time.perf_counter()
        if self.config.base:
            examples = self.inputs.examples("base.data", self.config.base.data, self.config.base.max_tokens)
            for _ in self.finetune(
                stage,
                folder,
                Path(self.config.model.path),
                self.config.base,
                examples,
                (),
                self.config.base.in_order,
            ):
                pass
        self.team.rollouts.load_policy(self.base_policy, 0)
        evaluation = self.measure(stage, "base", 0)
        return _result(stage, began, evaluation)

    def rlhf(self, stage: Stage, folder: Path, arm: ArmConfig) -> StageResult:
        began = time.perf_counter()
        every = self.config.evaluate.validate_every

        def measure(step: int, last: bool) -> Evaluation | None:
            if last:
                return self.measure(stage, arm.name, step)
            due = step > 0 and step % every == 0 and self.inputs.heldout
            return self.measure(stage, arm.name, step, validation=True) if due else None

        found = self.loop(
            stage,
            folder,
            arm,
            self.base_policy,
            self.inputs.train,
            self.config.data.mix,
            self.team.rewards,
            measure,
        )
        summary = summarize(
            arm.name, read_steps(self.config.folder, stage.name), checkpoint.folder_sha256(folder / "policy")
        )
        return _result(stage, began, found[-1], arm=summary)

    def certify(self, stage: Stage, arm: ArmConfig) -> StageResult:
        """Fresh draws from the finished policy on the held-out prompts that it was trained for, never used
        before."""
        began = time.perf_counter()
        assert self.config.certify is not None
        with self.log.waiting(
            f"{stage.name}: drawing {self.config.certify.completions_per_prompt} completions per prompt"
        ):
            self.team.rollouts.load_policy(self.arm_policy(arm), 0)
            prompts = [p for p in self.inputs.heldout if p.task in self.trained_tasks]
            found = certify(self.team.rollouts, self.team.rewards, prompts, self.config, arm.objective)
        return _result(stage, began, certificates=found)

    def harness(self, stage: Stage) -> StageResult:
        """Benchmarks of a saved policy."""
        began = time.perf_counter()
        assert self.team.harness is not None
        folder = self.base_policy
        if stage.arm:
            folder = self.config.folder.joinpath(
                *(("downstream", stage.arm, stage.task) if stage.task else ("rlhf", stage.arm)), "policy"
            )
        with self.log.waiting(f"{stage.name}: {self.config.harness.tasks if self.config.harness else ''}"):
            self.team.rollouts.actors.turn()
            scores = self.team.harness.evaluate(folder)
        for s in scores:
            self.log.note(f"{stage.name}: {s.task} {s.metric} ({s.filter}) {s.value:.3f}")
        return _result(stage, began, scores=scores)

    def downstream_sft(self, stage: Stage, folder: Path, arm: ArmConfig, task: DownstreamSft) -> StageResult:
        began = time.perf_counter()
        examples = self.inputs.examples(f"downstream.{task.name}.data", task.data, task.max_tokens)
        heldout = (
            self.inputs.examples(f"downstream.{task.name}.heldout", task.heldout, task.max_tokens).all()
            if task.heldout
            else None
        )
        evaluations: list[Evaluation] = []
        for step, evaluations in self.finetune(
            stage, folder, self.arm_policy(arm), task, examples, (0, *task.marks)
        ):
            self.team.finetune_publisher.publish(step)
            loss = self.team.finetune.loss(heldout) if heldout is not None else None
            evaluations.append(
                self.measure(
                    stage,
                    arm.name,
                    step,
                    downstream=task.name,
                    policy=self.arm_policy(arm),
                    trainer=self.team.finetune,
                    loss=loss,
                )
            )
        return _result(stage, began, *evaluations)

    def downstream_rl(self, stage: Stage, folder: Path, arm: ArmConfig, task: DownstreamRl) -> StageResult:
        began = time.perf_counter()
        prompts = self.inputs.prompts(f"downstream.{task.name}.data", task.data)
        spec = ArmConfig(name=task.name, objective=task.objective, learner=task.learner)
        measure = self.measure_at(stage, arm, task.name, (0, *task.marks))
        found = self.loop(stage, folder, spec, self.arm_policy(arm), prompts, {}, self.team.rewards, measure)
        asked = {0, *task.marks, found[-1].step}  # not the end of fewer steps, from which it went on
        return _result(stage, began, *(e for e in found if e.step in asked))

    def attack(self, stage: Stage, folder: Path, arm: ArmConfig, radius: float) -> StageResult:
        """The worst fine-tune that training finds inside the ball: reward -r, and a penalty steered to end at
        the radius."""
        began = time.perf_counter()
        assert self.config.attack is not None
        objective = ObjectiveConfig(
            method="grpo", beta=0.3, penalty="reverse", target_kl=radius, aggregation="sum"
        )
        learner = arm.learner.model_copy(
            update={"num_steps": self.config.attack.num_steps, "stop_at_reward": None}
        )
        spec = ArmConfig(name=f"attack-{radius:g}", objective=objective, learner=learner)
        measure = self.measure_at(stage, arm, f"attack {radius:g}", (learner.num_steps // 2,))
        rewards, mix = Opposite(self.team.rewards), self.config.attack.mix or self.config.data.mix
        found = self.loop(stage, folder, spec, self.arm_policy(arm), self.inputs.train, mix, rewards, measure)
        return _result(stage, began, *found)

    # ---- training

    def loop(
        self,
        stage: Stage,
        folder: Path,
        arm: ArmConfig,
        policy: Path,
        prompts: Sequence[Prompt],
        mix: Mapping[str, float],
        rewards: Rewards,
        measure: Callable[[int, bool], Evaluation | None],
    ) -> list[Evaluation]:
        """Run the loop from a saved policy, which is the reference too. `measure(step, last)` is asked at
        step 0 and after each step; what it gives is kept. Exports to `policy/` at the end."""
        config, learner = self.config, self.team.learner
        checkpoints = Checkpoints(
            folder / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
        )
        learner.start(
            policy, config.model, arm.learner, arm.objective, config.rollout, derive(config.seed, "learner")
        )
        start, steering, evaluations = 0, begin(arm.objective), list[Evaluation]()
        if found := checkpoints.latest():
            path, resumed = found
            learner.load(path / "engine")
            assert resumed.steering is not None, path
            start, steering, evaluations = resumed.step, resumed.steering, list(resumed.evaluations)
            self.log.note(f"{stage.name}: goes on after step {start} of {arm.learner.num_steps}")
        else:
            self.team.rollouts.load_policy(policy, 0)
            evaluations += [e for e in [measure(0, False)] if e]
        reference = self.team.reference if arm.objective.penalised else None
        if reference:
            reference.use(policy, config.rollout.temperature)
        stream = PromptStream(prompts, mix, derive(config.seed, "prompts"), config.rollout.prompts_per_step)
        partners = Partners(
            stream, self.team.rollouts, rewards, reference, learner, self.team.learner_publisher
        )
        self.log.begin(stage.name, arm.learner.num_steps, start)

        def after_step(metrics: StepMetrics, steering: Steering) -> None:
            self.log.step(stage.name, metrics)
            step = metrics.step
            last = finished(steering, arm.learner, step)
            evaluation = measure(step, last)
            evaluations.extend([evaluation] if evaluation else [])
            if step % config.checkpoint.every == 0 or last:
                validation = mean_reward(evaluation) if evaluation else None
                state = progress(
                    config, arm.learner, step, evaluations, validation=validation, steering=steering
                )
                checkpoints.begin(state, lambda aside: learner.save(aside / "engine"))

        with checkpoints.kept(self.log.waiting):
            train(
                config,
                arm,
                partners,
                start=start,
                steering=steering,
                after_step=after_step,
                before_update=checkpoints.poll,
            )
        self.log.end(stage.name)
        export(learner.export, folder / "policy")
        learner.stop()
        return evaluations

    def finetune(
        self,
        stage: Stage,
        folder: Path,
        policy: Path,
        spec: FinetuneConfig,
        examples: Examples,
        marks: tuple[int, ...],
        in_order: bool = False,
    ) -> Iterator[tuple[int, list[Evaluation]]]:
        """Supervised fine-tuning from a saved policy. Pauses at every mark and after the last step for the
        caller to measure; what the caller appends to the list is kept in the next checkpoint. Exports to
        `policy/` at the end."""
        config, worker = self.config, self.team.finetune
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last, 0)
        worker.start(policy, config.model, spec, derive(config.seed, "finetune"))
        start, evaluations = 0, list[Evaluation]()
        if found := checkpoints.latest():
            path, resumed = found
            worker.load(path / "engine")
            start, evaluations = resumed.step, list(resumed.evaluations)
            self.log.note(f"{stage.name}: goes on after step {start} of {spec.num_steps}")
        elif 0 in marks:
            yield 0, evaluations
        stream = ExampleStream(examples, spec.batch_size, derive(config.seed, "examples"), in_order)
        self.log.begin(stage.name, spec.num_steps, start)
        with checkpoints.kept(self.log.waiting):
            for step in range(start + 1, spec.num_steps + 1):
                checkpoints.poll()
                stats = worker.update(stream.take(step - 1))
                numbers = {"the loss": stats.loss, "the gradient norm": stats.grad_norm}
                stop_if_not_finite(f"step {step}", numbers, too_fast(stats.learning_rate))
                self.log.finetune_step(stage.name, step, stats)
                if marks and (step in marks or step == spec.num_steps):
                    yield step, evaluations
                if step % config.checkpoint.every == 0 and step < spec.num_steps:
                    checkpoints.begin(
                        progress(config, spec, step, evaluations), lambda aside: worker.save(aside / "engine")
                    )
        self.log.end(stage.name)
        merged = (
            stage.kind == "base" or config.model.dtype == "float32"
        )  # between the numbers of bfloat16 a part of it would be lost
        export(lambda aside: worker.export(aside, merged=merged), folder / "policy")
        worker.stop()

    # ---- measuring

    @cached_property
    def trained_tasks(self) -> set[str]:
        return {p.task for p in self.inputs.train}

    def measure_at(
        self, stage: Stage, arm: ArmConfig, name: str, marks: Sequence[int]
    ) -> Callable[[int, bool], Evaluation | None]:
        """Measure a fine-tune of an arm's policy at the marks and at its end."""

        def measure(step: int, last: bool) -> Evaluation | None:
            due = last or step in marks
            return (
                self.measure(stage, arm.name, step, downstream=name, policy=self.arm_policy(arm))
                if due
                else None
            )

        return measure

    def measure(
        self,
        stage: Stage,
        arm: str,
        step: int,
        *,
        validation: bool = False,
        downstream: str | None = None,
        policy: Path | None = None,
        trainer: Trainer | None = None,
        loss: float | None = None,
    ) -> Evaluation:
        """Evaluate what the rollouts run now, published as version `step` by `trainer` (None: the learner); a
        validation draws less and measures no KL."""
        e = self.config.evaluate
        evaluation = evaluate(
            self.team.rollouts,
            self.team.rewards,
            trainer or self.team.learner,
            None if validation else self.team.scorer,
            self.inputs.heldout,
            arm=arm,
            downstream=downstream,
            step=step if downstream else 0,
            version=step,
            seed=self.config.seed,
            completions=e.validate_completions if validation else e.completions_per_prompt,
            max_new_tokens=self.config.rollout.max_new_tokens,
            stop=self.config.rollout.stop,
            reference=None if validation or arm == "base" else self.base_policy,
            trained_tasks=self.trained_tasks,
            policy=policy,
            downstream_loss=loss,
            num_samples=NUM_SAMPLES,
        )
        self.log.evaluation(
            stage.name, evaluation, kind="validation" if validation else "evaluation", step=step
        )
        return evaluation


def _result(stage: Stage, began: float, *evaluations: Evaluation, **found: object) -> StageResult:
    seconds = time.perf_counter() - began
    return StageResult.model_validate(
        {"stage": stage.name, "seconds": seconds, "evaluations": evaluations, **found}
    )


def progress(
    config: Config,
    train: TrainConfig,
    step: int,
    evaluations: Sequence[Evaluation],
    *,
    validation: float | None = None,
    steering: Steering | None = None,
) -> Progress:
    """Of a stage that the learner's ranks train by `train`."""
    return Progress(
        step=step,
        validation=validation,
        evaluations=tuple(evaluations),
        steering=steering,
        num_workers=config.learner.num_workers,
        zero_stage=train.zero_stage,
    )


def export(write: Callable[[Path], None], folder: Path) -> None:
    """Write a policy aside, then put it in place."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def summarize(arm: str, rows: list[StepMetrics], digest: str) -> ArmSummary:
    phases = {
        "generate": sum(r.generate_s for r in rows),
        "score": sum(r.score_s for r in rows),
        "update": sum(r.update_s for r in rows),
        "publish": sum(r.publish_s for r in rows),
    }
    total = sum(r.step_s for r in rows)
    return ArmSummary(
        arm=arm,
        num_steps=len(rows),
        num_prompts=sum(r.num_prompts for r in rows),
        num_completions=sum(r.num_completions for r in rows),
        num_tokens=sum(r.num_tokens for r in rows),
        failed_rewards=sum(r.failed_rewards for r in rows),
        seconds=total,
        phase_seconds={**phases, "other": total - sum(phases.values())},
        weights_sha256=digest,
    )

"""What stages are done with, on one team of actors: training by the loop or on examples, measuring,
keeping."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from frpo import disk, steering
from frpo.checkpoint import Checkpoints, Progress, Saved
from frpo.config import ArmConfig, Config, DownstreamSft, FinetuneConfig, TrainConfig
from frpo.driver import Partners, Start, train
from frpo.driver_ahead import train_ahead
from frpo.evaluation import (
    Against,
    Draws,
    Label,
    Measurers,
    Opposite,
    evaluate,
    make_certificates,
)
from frpo.flights import begun_from, save_loop
from frpo.metrics import RunLog, read_steps
from frpo.outline.stage import Data, Loop, Pause, Stage, Subject, Supervised, fixed_end
from frpo.prompts import PromptStream
from frpo.records import ArmSummary, BenchmarkScore, Certificate, Evaluation, Interpolation, StageResult
from frpo.roles import Finetuner, RankDied, Team, Trainer
from frpo.seeds import derive
from frpo.stages import folders
from frpo.stages.defences import (
    Batches,
    OwnRows,
    choose_prompts,
    draw_own,
    interpolate,
    read_own,
    write_own,
)
from frpo.stages.folders import Standing
from frpo.stats import StepMetrics
from frpo.stops import stop_if_finetune_is_broken
from frpo.types import Prompt, Steering

if TYPE_CHECKING:  # it reads by transformers
    from frpo.stages.inputs import Inputs

NUM_SAMPLES = 24
"""Completions of one measurement that are kept for people to read."""


class Work:
    """One run. `do` brings one stage from wherever it was left to its result; the rest is what stages are
    done with (`frpo.outline.stage.Workbench`)."""

    def __init__(self, config: Config, team: Team, log: RunLog, inputs: Inputs) -> None:
        self.config, self.team, self.log, self.inputs = config, team, log, inputs

    def do(self, standing: Standing) -> None:
        began = time.perf_counter()
        folder = folders.begin_stage(self.config.folder, standing)
        result = self._do(standing.stage)
        result = result.model_copy(update={"seconds": time.perf_counter() - began})
        folders.finish_stage(folder, standing.made, result, keep_last=not fixed_end(standing.stage))

    def _do(self, stage: Stage) -> StageResult:
        """A stage whose ranks die goes on from its last checkpoint; they may die again while they start."""
        dead: Trainer | None = None
        while True:
            try:
                if dead:
                    with self.log.waiting("starting the ranks anew"):
                        dead.revive()
                return stage.do(self)
            except RankDied as error:
                self.log.note(f"{stage.name}: {error}\nAll its ranks are started anew.")
                dead = self.team.learner if error.job == "learner" else self.finetuner

    def policy_of(self, stage: str) -> Path:
        """Absolute. The base of a recipe without a base stage is its model."""
        if stage == "base" and self.config.base is None:
            return Path(self.config.model.path).absolute()
        return (self.config.folder / stage / "policy").absolute()

    def start_of(self, stage: Stage) -> Path:
        """The policy that it begins from."""
        return self.policy_of(stage.stands_on) if stage.stands_on else Path(self.config.model.path)

    @property
    def finetuner(self) -> Finetuner:
        assert self.team.finetune is not None, "planned where a stage trains on examples"
        return self.team.finetune

    # ---- inputs

    @property
    def train_prompts(self) -> Sequence[Prompt]:
        return self.inputs.train

    @property
    def has_heldout(self) -> bool:
        return bool(self.inputs.heldout)

    @cached_property
    def trained_tasks(self) -> set[str]:
        """Of a recipe without arms, those that its base is measured on."""
        prompts = self.inputs.train if self.config.arms else self.inputs.heldout
        return {prompt.task for prompt in prompts}

    def read_prompts(self, data: Data) -> Sequence[Prompt]:
        return self.inputs.prompts(data.field, data.sources)

    # ---- training

    # A stage that fails at a pause lets go of the generator, which finishes its last checkpoint (`training`).

    def run_loop(self, stage: Stage, loop: Loop, kept: list[Evaluation]) -> Iterator[Pause]:
        config, team, arm = self.config, self.team, loop.arm
        checkpoints = self.checkpoints(stage)
        policy, seed = self.start_of(stage), derive(config.seed, "learner")
        team.learner.start(policy, config.model, arm.learner, arm.objective, config.rollout, seed)
        resumed = self.resume(stage, arm.learner, team.learner, checkpoints)
        partners = self.partners(loop, policy)
        if resumed:
            begun = begun_from(resumed, partners.prompts)
            kept += resumed.progress.evaluations
        else:
            begun = Start(0, steering.begin_steering(arm.objective))
            team.rollouts.load_policy(policy, 0)
            yield Pause(0, last=False)
        loops = train_ahead if config.rollout.staleness else train
        steps = loops(config, arm, partners, begun, before_update=checkpoints.poll)
        with self.training(stage, arm.learner.num_steps, begun.step, checkpoints):
            for done in steps:
                step = done.metrics.step
                self.log.step(stage.name, done.metrics)
                self.log.drawn(stage.name, step, done.sample)
                yield Pause(step, done.last)
                if done.last or step % config.checkpoint.every == 0:
                    progress = self.progress(arm.learner, step, kept, done.steering)
                    checkpoints.begin(progress, partial(save_loop, team.learner, done))
        export_policy(team.learner.export, config.folder / stage.name / "policy")
        team.learner.stop()

    def partners(self, loop: Loop, policy: Path) -> Partners:
        """Of a run of the loop; the reference holds `policy` from now on."""
        config, team = self.config, self.team
        reference = team.reference if loop.arm.objective.penalised else None
        if reference:
            reference.use(policy, config.rollout.temperature)
        size, seed = config.rollout.prompts_per_step, derive(config.seed, "prompts")
        return Partners(
            prompts=PromptStream(loop.prompts, loop.mix, seed, size),
            rollouts=team.rollouts,
            rewards=Opposite(team.rewards) if loop.worst else team.rewards,
            reference=reference,
            learner=team.learner,
            publisher=team.learner_publisher,
        )

    def finetune(self, stage: Stage, finetune: Supervised, kept: list[Evaluation]) -> Iterator[Pause]:
        config, ranks, settings = self.config, self.finetuner, finetune.settings
        checkpoints = self.checkpoints(stage)
        ranks.start(
            self.start_of(stage), config.model_of(settings), settings, derive(config.seed, "finetune")
        )
        own = self.own_rows(stage, settings)
        resumed = self.resume(stage, settings, ranks, checkpoints)
        if resumed:
            kept += resumed.progress.evaluations
        elif 0 in finetune.marks:
            yield Pause(0, last=False)
        start = resumed.progress.step if resumed else 0
        batches = Batches(finetune, self.inputs.examples(finetune.data), own, config.seed)
        with self.training(stage, settings.num_steps, start, checkpoints):
            for step in range(start + 1, settings.num_steps + 1):
                last = step == settings.num_steps
                checkpoints.poll()
                stats = ranks.update(*batches.take(step - 1))
                stop_if_finetune_is_broken(stats, step)
                self.log.finetune_step(stage.name, step, stats)
                interpolation = self.interpolate(stage, finetune) if last else None
                if finetune.marks and (last or step in finetune.marks):
                    yield Pause(step, last, interpolation)
                if step % config.checkpoint.every == 0 and not last:
                    progress = self.progress(settings, step, kept)
                    checkpoints.begin(progress, lambda aside: ranks.save(aside / "engine"))
        # between the numbers of bfloat16 a part of an adapter would be lost
        merged = not stage.stands_on or config.model.dtype == "float32"
        export_policy(lambda aside: ranks.export(aside, merged=merged), config.folder / stage.name / "policy")
        ranks.stop()

    def own_rows(self, stage: Stage, settings: FinetuneConfig) -> OwnRows | None:
        """Of the policy that it begins from, which the ranks hold; None where nobody asks for them."""
        if not isinstance(settings, DownstreamSft) or not settings.draws_own:
            return None
        config, team = self.config, self.team
        own = read_own(config.folder / stage.name)
        if own is None:
            prompts = choose_prompts(self.inputs.train, config.data.mix, derive(config.seed, "own"))
            rollout = config.rollout
            draws = Draws(config.seed, rollout.group_size, rollout.max_new_tokens, rollout.stop)
            with self.log.waiting(f"{stage.name}: drawing from the arm's policy, {len(prompts)} prompts"):
                self.load_policy(self.start_of(stage))
                own = draw_own(Measurers(team.rollouts, team.rewards, self.finetuner), prompts, draws)
            write_own(config.folder / stage.name, own)
            self.log.note(f"{stage.name}: {len(own.good)} of {len(own.examples)} of its completions are good")
        return own

    def interpolate(self, stage: Stage, finetune: Supervised) -> Interpolation | None:
        """None where the fine-tune asks for none."""
        settings, heldout = finetune.settings, finetune.heldout
        if not isinstance(settings, DownstreamSft) or not settings.interpolate or heldout is None:
            return None
        examples = self.inputs.examples(heldout).all()
        ranks = self.finetuner
        interpolation = interpolate(ranks, settings.interpolate, lambda: ranks.loss(examples))
        self.log.note(f"{stage.name}: the policy lies at {interpolation.share:g} of the way from the arm's")
        return interpolation

    @contextmanager
    def training(self, stage: Stage, num_steps: int, start: int, checkpoints: Checkpoints) -> Iterator[None]:
        """Steps after `start`: shown, and their last checkpoint kept."""
        self.log.begin(stage.name, num_steps, start)
        with checkpoints.kept(self.log.waiting):
            yield
        self.log.end(stage.name)

    def checkpoints(self, stage: Stage) -> Checkpoints:
        folder = self.config.folder / stage.name / "checkpoints"
        return Checkpoints(folder, self.config.checkpoint.keep_last)

    def resume(
        self, stage: Stage, settings: TrainConfig, ranks: Trainer, checkpoints: Checkpoints
    ) -> Saved | None:
        """Bring the ranks to the newest checkpoint; None where there is none."""
        newest = checkpoints.latest(lambda words: self.log.note(f"{stage.name}: {words}"))
        if newest is None:
            return None
        ranks.load(newest.path / "engine")
        training = stage.training()
        assert training is not None, stage.name
        self.log.note(f"{stage.name}: goes on after step {newest.progress.step} of {training.num_steps}")
        return newest

    def progress(
        self,
        settings: TrainConfig,
        step: int,
        kept: Sequence[Evaluation],
        steering: Steering | None = None,
    ) -> Progress:
        """State of a stage after `step`; with the last where it runs the loop."""
        return Progress(
            step=step,
            evaluations=tuple(kept),
            steering=steering,
            num_workers=self.config.learner.num_workers,
            zero_stage=settings.zero_stage,
        )

    def publish_finetune(self, step: int) -> None:
        assert self.team.finetune_publisher is not None
        self.team.finetune_publisher.publish(step)

    # ---- measuring

    def load_policy(self, policy: Path) -> None:
        self.team.rollouts.load_policy(policy, 0)

    def heldout_loss(self, data: Data) -> float | None:
        if not data.sources:
            return None
        return self.finetuner.loss(self.inputs.examples(data).all())

    def measure(self, stage: Stage, step: int, subject: Subject) -> Evaluation:
        reference = self.policy_of("base") if stage.stands_on else None
        against = Against(self.trained_tasks, reference, subject.before)
        completions = self.config.evaluate.completions_per_prompt
        evaluation = self._evaluate(stage, step, subject, against, completions)
        self.log.evaluation(stage.name, evaluation, step=step)
        return evaluation

    def validate(self, stage: Stage, step: int, subject: Subject) -> Evaluation:
        completions = self.config.evaluate.validate_completions
        evaluation = self._evaluate(stage, step, subject, Against(self.trained_tasks), completions)
        self.log.evaluation(stage.name, evaluation, kind="validation", step=step)
        return evaluation

    def _evaluate(
        self, stage: Stage, step: int, subject: Subject, against: Against, completions: int
    ) -> Evaluation:
        config, team = self.config, self.team
        training = stage.training()
        by_loop = training is not None and training.objective is not None
        trainer: Trainer | None = team.learner if by_loop else team.finetune
        measurers = Measurers(team.rollouts, team.rewards, trainer, team.scorer)
        rollout = config.rollout
        draws = Draws(config.seed, completions, rollout.max_new_tokens, rollout.stop, version=step)
        label = Label(
            arm=subject.arm,
            downstream=subject.downstream,
            step=step if subject.downstream else 0,
            downstream_loss=subject.loss,
            num_samples=NUM_SAMPLES,
        )
        return evaluate(measurers, self.inputs.heldout, draws, against, label)

    def certify(self, stage: Stage, arm: ArmConfig) -> tuple[Certificate, ...]:
        config, team = self.config, self.team
        assert config.certify is not None
        prompts = [prompt for prompt in self.inputs.heldout if prompt.task in self.trained_tasks]
        drawing = f"{stage.name}: drawing {config.certify.completions_per_prompt} completions per prompt"
        with self.log.waiting(drawing):
            return make_certificates(team.rollouts, team.rewards, prompts, config, arm.objective)

    def run_benchmarks(self, stage: Stage, policy: Path) -> tuple[BenchmarkScore, ...]:
        harness, asked = self.team.harness, self.config.harness
        assert harness is not None
        assert asked is not None
        with self.log.waiting(f"{stage.name}: {asked.tasks}"):
            self.team.rollouts.take_turn()
            scores = harness.evaluate(policy)
        for score in scores:
            where = f"{score.task} {score.metric} ({score.filter})"
            self.log.note(f"{stage.name}: {where} {score.value:.3f}")
        return scores

    def summarize(self, stage: Stage, arm: str) -> ArmSummary:
        digest = disk.sha256_of_folder(self.config.folder / stage.name / "policy")
        return summarize_arm(arm, read_steps(self.config.folder, stage.name), digest)


def export_policy(write: Callable[[Path], None], folder: Path) -> None:
    """Write a policy aside, then put it in place."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def summarize_arm(arm: str, rows: Sequence[StepMetrics], weights_sha256: str) -> ArmSummary:
    """What training an arm took; `rows` are its steps."""
    return ArmSummary(
        arm=arm,
        num_steps=len(rows),
        num_prompts=sum(row.batch.num_prompts for row in rows),
        num_completions=sum(row.batch.num_completions for row in rows),
        num_tokens=sum(row.batch.num_tokens for row in rows),
        failed_rewards=sum(row.batch.failed_rewards for row in rows),
        seconds=sum(row.phases.step_s for row in rows),
        phase_seconds={
            "generate": sum(row.phases.generate_s for row in rows),
            "score": sum(row.phases.score_s for row in rows),
            "update": sum(row.phases.update_s for row in rows),
            "publish": sum(row.phases.publish_s for row in rows),
            "other": sum(row.phases.other_s for row in rows),
        },
        weights_sha256=weights_sha256,
    )

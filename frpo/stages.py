"""The stages of a run, each resumable, each skipped when it was finished from the same inputs:

    base -> rlhf/<arm> -> downstream/<arm>/<task> -> report

Owns what is done in which order and what is kept; what happens inside a step is the driver's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer

from frpo import checkpoint, cluster, report, testbed
from frpo.checkpoint import Checkpoints, Progress
from frpo.config import ArmConfig, Config, ConfigError, DatasetConfig, DownstreamConfig, FinetuneConfig
from frpo.driver import Partners, train
from frpo.evaluation import evaluate, mean_reward
from frpo.metrics import RunLog, read_steps
from frpo.prompts import Examples, ExampleStream, PromptStream, load_examples, load_prompts
from frpo.records import ArmSummary, Evaluation, StageResult
from frpo.seeds import derive
from frpo.types import Prompt, StepMetrics

NUM_SAMPLES = 24
"""Completions of one measurement that are kept for people to read."""


@dataclass(frozen=True)
class Stage:
    name: str
    inputs: str
    """SHA-256 of all that the stage's result depends on."""


def stages_of(config: Config) -> list[Stage]:
    """Every stage in order, with the hash of its inputs: data files count by content, names and resources do not count
    where they change no number."""
    tree = config.model_dump(mode="json")
    data, rollout = tree["data"], tree["rollout"]
    measured = [data["heldout"], data["max_prompt_tokens"], rollout["max_new_tokens"], rollout["stop"], tree["rewards"], tree["evaluate"]]
    files = _files([*config.data.heldout, *(config.base.data if config.base else ())])
    base = Stage("base", _hash(tree["seed"], tree["model"], tree["base"], measured, files))
    found = [base]
    for arm in config.arms:
        own = arm.model_dump(mode="json", exclude={"name"})
        trained = [data["train"], data["mix"], rollout, tree["max_failed_rewards"], _files(config.data.train)]
        rlhf = Stage(f"rlhf/{arm.name}", _hash(base.inputs, own, trained))
        found.append(rlhf)
        for task in config.downstream:
            spec = task.model_dump(mode="json", exclude={"name"})
            found.append(Stage(f"downstream/{arm.name}/{task.name}", _hash(rlhf.inputs, spec, _files([*task.data, *task.heldout]))))
    return found


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _files(sources: Sequence[DatasetConfig]) -> list[str]:
    return [checkpoint.sha256(Path(s.path)) for s in sources if Path(s.path).is_file()]


def run(config: Config, log: RunLog) -> None:
    """Bring the run folder to the state that the configuration asks for, and write its report.

    Raises ConfigError before anything starts; WorkerFailed or RunStopped when the run cannot go on.
    """
    stages = stages_of(config)
    done = [checkpoint.read_result(config.folder / s.name, s.inputs) for s in stages]
    checkpoint.describe(config.folder, config)
    if all(done):
        log.note(f"Finished already: all {len(stages)} stages in {config.folder} were made from this configuration.")
    else:
        resolved = resolve(config)
        with log.waiting("reading the data"):
            inputs = Inputs(resolved, log)
        with cluster.start(resolved, log) as team:
            work = Work(resolved, team, log, inputs)
            for stage, result in zip(stages, done, strict=True):
                if result is None:
                    work.do(stage)
                else:
                    log.note(f"{stage.name}: finished before, skipped")
    page = report.build(config.folder)
    log.note(f"Report: {page}")


def resolve(config: Config) -> Config:
    """Write the embedded testbed where the recipe names it, and put its paths in place of the names."""
    text = config.model_dump_json()
    if '"testbed:' not in text:
        return config
    folder = (config.folder / "testbed").absolute()
    testbed.materialize(folder, config.seed)

    def walk(node: object) -> object:
        if isinstance(node, dict):
            return {k: walk(v) for k, v in node.items()}
        if isinstance(node, list):
            return [walk(v) for v in node]
        return testbed.resolve(node, folder) if isinstance(node, str) else node

    return Config.model_validate(walk(json.loads(text)))


class Inputs:
    """Tokenized prompts and examples of a run, read once."""

    def __init__(self, config: Config, log: RunLog) -> None:
        self.config, self.log = config, log
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        limit = config.data.max_prompt_tokens
        self.train = self._prompts("data.train", config.data.train, limit)
        self.heldout = self._limited(self._prompts("data.heldout", config.data.heldout, limit))

    def _prompts(self, field: str, sources: tuple[DatasetConfig, ...], limit: int) -> list[Prompt]:
        prompts, dropped = load_prompts(sources, self.tokenizer, limit)
        if dropped:
            self.log.note(f"{field}: {dropped} prompts of more than {limit} tokens dropped, {len(prompts)} kept")
        if sources and not prompts:
            raise ConfigError(f"{field}: no prompt left; raise data.max_prompt_tokens ({limit}) or check where and part")
        return prompts

    def _limited(self, prompts: list[Prompt]) -> list[Prompt]:
        limit = self.config.evaluate.max_prompts
        if limit is None:
            return prompts
        ranked = sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).digest())
        tasks = sorted({p.task for p in prompts})
        kept = {p.id for t in tasks for p in [p for p in ranked if p.task == t][:limit]}
        return [p for p in prompts if p.id in kept]

    def examples(self, field: str, sources: tuple[DatasetConfig, ...], limit: int) -> Examples:
        examples, dropped = load_examples(sources, self.tokenizer, limit)
        if dropped:
            self.log.note(f"{field}: {dropped} examples of more than {limit} tokens dropped, {len(examples)} kept")
        return examples


class Work:
    """Does one stage after the other with one team of actors."""

    def __init__(self, config: Config, team: cluster.Team, log: RunLog, inputs: Inputs) -> None:
        self.config, self.team, self.log, self.inputs = config, team, log, inputs

    def do(self, stage: Stage) -> None:
        folder = checkpoint.prepare_stage(self.config.folder, stage.name, stage.inputs)
        kind, *names = stage.name.split("/")
        arm = next((a for a in self.config.arms if names and a.name == names[0]), None)
        if kind == "base":
            result = self.base(stage, folder)
        elif kind == "rlhf" and arm:
            result = self.rlhf(stage, folder, arm)
        else:
            assert arm is not None, stage
            result = self.downstream(stage, folder, arm, next(d for d in self.config.downstream if d.name == names[1]))
        checkpoint.write_result(folder, result)
        Checkpoints(folder / "checkpoints", 1, 0).clear()

    @cached_property
    def base_policy(self) -> Path:
        """The reference, and the start of every arm."""
        return (self.config.folder / "base" / "policy" if self.config.base else Path(self.config.model.path)).absolute()

    def arm_policy(self, arm: ArmConfig) -> Path:
        return (self.config.folder / "rlhf" / arm.name / "policy").absolute()

    def base(self, stage: Stage, folder: Path) -> StageResult:
        began = time.perf_counter()
        if self.config.base:
            examples = self.inputs.examples("base.data", self.config.base.data, self.config.base.max_tokens)
            for _ in self.finetune(stage, folder, Path(self.config.model.path), self.config.base, examples, (), self.config.base.in_order):
                pass
        self.team.rollouts.load_policy(self.base_policy, 0)
        evaluation = self.measure("base", version=0)
        self.log.evaluation(stage.name, evaluation, step=0)
        return StageResult(stage=stage.name, inputs=stage.inputs, seconds=time.perf_counter() - began, evaluations=(evaluation,), arm=None)

    def rlhf(self, stage: Stage, folder: Path, arm: ArmConfig) -> StageResult:
        config, learner = self.config, self.team.learner
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best)
        learner.start(self.base_policy, config.model, arm.learner, arm.objective, config.rollout, derive(config.seed, "learner"))
        start, before = 0, 0.0
        if found := checkpoints.latest():
            path, progress = found
            learner.load(path / "engine")
            start, before = progress.step, progress.seconds
            self.log.note(f"{stage.name}: goes on after step {start} of {arm.learner.num_steps}")
        reference = self.team.reference if arm.objective.beta > 0 else None
        if reference:
            reference.use(self.base_policy)
        partners = Partners(
            prompts=PromptStream(self.inputs.train, config.data.mix, derive(config.seed, "prompts"), config.rollout.prompts_per_step),
            rollouts=self.team.rollouts,
            rewards=self.team.rewards,
            reference=reference,
            learner=learner,
            publisher=self.team.learner_publisher,
        )
        began = time.perf_counter() - before
        self.log.begin(stage.name, arm.learner.num_steps, start)

        def after_step(metrics: StepMetrics) -> None:
            self.log.step(stage.name, metrics)
            step, last = metrics.step, arm.learner.num_steps
            validation = None
            if self.inputs.heldout and step % config.evaluate.validate_every == 0 and step < last:
                evaluation = self.measure(arm.name, version=step, validation=True)
                self.log.evaluation(stage.name, evaluation, kind="validation", step=step)
                validation = mean_reward(evaluation)
            if step % config.checkpoint.every == 0 or step == last:
                state = Progress(step=step, validation=validation, seconds=time.perf_counter() - began, evaluations=())
                checkpoints.save(state, lambda aside: learner.save(aside / "engine"))

        train(config, arm, partners, start=start, after_step=after_step)
        self.log.end(stage.name)
        export(learner.export, folder / "policy")
        evaluation = self.measure(arm.name, version=arm.learner.num_steps)
        learner.stop()
        self.log.evaluation(stage.name, evaluation, step=arm.learner.num_steps)
        summary = summarize(arm.name, read_steps(config.folder, stage.name), checkpoint.folder_sha256(folder / "policy"))
        return StageResult(
            stage=stage.name, inputs=stage.inputs, seconds=time.perf_counter() - began, evaluations=(evaluation,), arm=summary
        )

    def downstream(self, stage: Stage, folder: Path, arm: ArmConfig, task: DownstreamConfig) -> StageResult:
        began = time.perf_counter()
        examples = self.inputs.examples(f"downstream.{task.name}.data", task.data, task.max_tokens)
        heldout = self.inputs.examples(f"downstream.{task.name}.heldout", task.heldout, task.max_tokens).all() if task.heldout else None
        policy = self.arm_policy(arm)
        evaluations: list[Evaluation] = []
        for step, evaluations in self.finetune(stage, folder, policy, task, examples, (0, *task.marks)):
            self.team.finetune_publisher.publish(step)
            loss = self.team.finetune.loss(heldout) if heldout is not None else None
            evaluation = self.measure(arm.name, version=step, downstream=task.name, policy=policy, downstream_loss=loss)
            self.log.evaluation(stage.name, evaluation, step=step)
            evaluations.append(evaluation)
        return StageResult(
            stage=stage.name, inputs=stage.inputs, seconds=time.perf_counter() - began, evaluations=tuple(evaluations), arm=None
        )

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
        """Supervised fine-tuning from a saved policy. Pauses at every mark and after the last step for the caller to
        measure; what the caller appends to the list is kept in the next checkpoint. Exports to `policy/` at the end."""
        config, worker = self.config, self.team.finetune
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last, 0)
        worker.start(policy, config.model, spec, derive(config.seed, "finetune"))
        start, evaluations = 0, list[Evaluation]()
        if found := checkpoints.latest():
            path, progress = found
            worker.load(path / "engine")
            start, evaluations = progress.step, list(progress.evaluations)
            self.log.note(f"{stage.name}: goes on after step {start} of {spec.num_steps}")
        elif 0 in marks:
            yield 0, evaluations
        stream = ExampleStream(examples, spec.batch_size, derive(config.seed, "examples"), in_order)
        self.log.begin(stage.name, spec.num_steps, start)
        for step in range(start + 1, spec.num_steps + 1):
            self.log.finetune_step(stage.name, step, worker.update(stream.take(step - 1)))
            if marks and (step in marks or step == spec.num_steps):
                yield step, evaluations
            if step % config.checkpoint.every == 0 and step < spec.num_steps:
                state = Progress(step=step, validation=None, seconds=0.0, evaluations=tuple(evaluations))
                checkpoints.save(state, lambda aside: worker.save(aside / "engine"))
        self.log.end(stage.name)
        export(worker.export, folder / "policy")
        worker.stop()

    def measure(
        self,
        arm: str,
        *,
        version: int,
        validation: bool = False,
        downstream: str | None = None,
        policy: Path | None = None,
        downstream_loss: float | None = None,
    ) -> Evaluation:
        """Evaluate what the rollouts run now; a validation draws less and measures no KL."""
        e = self.config.evaluate
        return evaluate(
            self.team.rollouts,
            self.team.rewards,
            None if validation else self.team.scorer,
            self.inputs.heldout,
            arm=arm,
            downstream=downstream,
            step=version if downstream else 0,
            version=version,
            seed=self.config.seed,
            completions=e.validate_completions if validation else e.completions_per_prompt,
            max_new_tokens=self.config.rollout.max_new_tokens,
            stop=self.config.rollout.stop,
            reference=None if validation or arm == "base" else self.base_policy,
            kl_tasks={p.task for p in self.inputs.train},
            policy=policy,
            downstream_loss=downstream_loss,
            num_samples=NUM_SAMPLES,
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

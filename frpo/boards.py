"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Ray's metrics, and the trackers W&B and MLflow.

A tracker knows a run by an id that is kept in the run folder, so that a resumed run goes on in the same one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from frpo.config import Config
from frpo.disk import write_text
from frpo.secrets import hide_secrets

WANDB_ID = "wandb.id"
MLFLOW_ID = "mlflow.id"
IDS = (WANDB_ID, MLFLOW_ID)
"""Files of the run folder that hold the ids under which trackers know the run."""
MLFLOW_WAITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Seconds and tries, where the environment says nothing else: a step of the run waits for them."""
MOST_PARAMS = 100
"""That MLflow takes at once."""


class Board(Protocol):
    """Somewhere that numbers go."""

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def curves_of(run: Path, stage: str) -> Path:
    return run / "tensorboard" / stage.replace("/", "_")


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: dict[str, Any] = {}

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self.writers:
            self.writers[stage] = SummaryWriter(
                str(curves_of(self.folder, stage)), purge_step=step
            )  # steps done again show once
        for name, value in values.items():
            self.writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


COUNTED = {
    "num_prompts", "num_completions", "num_tokens",
    "generate_s", "score_s", "update_s", "publish_s", "step_s", "driver_s", "published_bytes",
}  # fmt: skip
"""Exported as counters: their means are ratios of two counters."""


def name_metric(name: str) -> str:
    """With the characters that Prometheus takes in one: Ray drops a metric of another name.

    Example: reward_tasks/two words is frpo_reward_tasks_two_words.
    """
    return "frpo_" + re.sub(r"[^A-Za-z0-9_]", "_", name)


class RayMetrics:
    """`ray_frpo_<name>` on the cluster's metrics port, by run and stage."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.known: dict[str, Any] = {}

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        import ray
        from ray.util.metrics import Counter, Gauge

        if not ray.is_initialized():
            return
        tags = {"run": self.run, "stage": stage}
        for name, value in {"step": float(step), **values}.items():
            metric = name_metric(name)
            kind = Counter if name in COUNTED else Gauge
            if metric not in self.known:
                self.known[metric] = kind(metric, description=f"frpo {name}", tag_keys=("run", "stage"))
            if kind is Counter:
                if value > 0:
                    self.known[metric].inc(value, tags=tags)
            else:
                self.known[metric].set(value, tags=tags)

    def close(self) -> None:
        self.known.clear()


class Tracker:
    """A board on somebody's server. Where that does not take a number, this is said once, and the run goes on
    without it."""

    def __init__(self, name: str, open_board: Callable[[], Board], note: Callable[[str], None]) -> None:
        self.name, self.open_board, self.note = name, open_board, note
        self.board: Board | None = None
        self.lost = False

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._opened().add(stage, step, values))

    def close(self) -> None:
        if self.board:
            self._try(self.board.close)

    def _opened(self) -> Board:
        self.board = self.board or self.open_board()
        return self.board

    def _try(self, call: Callable[[], None]) -> None:
        if self.lost:
            return
        try:
            call()
        except Exception as error:  # the tracker's, its server's and its network's, each of its own kind
            self.lost = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.note(f"{self.name} takes no more numbers ({reason[:300]}); metrics.jsonl has all of them")


def tell_config(config: Config) -> dict[str, Any]:
    """What a tracker is told of a run: its configuration without the secrets in it."""
    told: dict[str, Any] = hide_secrets(config.model_dump(mode="json"))
    return told


class WandB:
    """Of an id that it does not know yet, W&B makes a run under it."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        same = folder / WANDB_ID
        if not same.exists():
            write_text(same, secrets.token_hex(4))
        self.run = wandb.init(
            project=config.wandb_project,
            name=config.name,
            id=same.read_text(),
            dir=str(folder),
            config=tell_config(config),
            resume="allow",
        )

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{stage}/{k}": v for k, v in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of the experiment, on the server or store that MLFLOW_TRACKING_URI names. MLflow chooses the id;
    a run that the server does not know is begun anew."""

    def __init__(self, config: Config, folder: Path) -> None:
        for name, value in MLFLOW_WAITS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.client = MlflowClient()
        same = folder / MLFLOW_ID
        if not (same.exists() and self._goes_on(same.read_text())):
            write_text(same, self._begin(config))
        self.run = same.read_text()

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_plain_name(f"{stage}/{name}"), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run)

    def _goes_on(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(run, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _begin(self, config: Config) -> str:
        """A new run with the configuration as its parameters; returns its id."""
        from mlflow.entities import Param

        run: str = self.client.create_run(self._find_experiment(config), run_name=config.name).info.run_id
        values = _leaves_of(tell_config(config))
        params = [Param(_plain_name(path), value) for path, value in values]
        for first in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(run, params=params[first : first + MOST_PARAMS])
        return run

    def _find_experiment(self, config: Config) -> str:
        """Its id; it is made where there is none."""
        from mlflow.exceptions import MlflowException

        name = config.mlflow_experiment
        assert name
        try:
            made: str = self.client.create_experiment(name)
        except MlflowException:
            there = self.client.get_experiment_by_name(name)
            if there is None:
                raise
            return str(there.experiment_id)
        return made


def _plain_name(name: str) -> str:
    """With the characters that MLflow takes in one."""
    return re.sub(r"[^/\w.\- :]", "_", name)


def _leaves_of(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Values by dotted path; the items of a list of sections by name, or by number."""
    items: list[tuple[str, Any]] = []
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list) and tree and isinstance(tree[0], Mapping):
        items = [(item.get("name", str(number)), item) for number, item in enumerate(tree)]
    for name, item in items:
        yield from _leaves_of(item, f"{path}.{name}" if path else name)
    if not items:
        yield path, tree if isinstance(tree, str) else json.dumps(tree)


def open_boards(config: Config, folder: Path, note: Callable[[str], None]) -> list[Board]:
    """Those of every run, and the trackers that the configuration asks for."""
    boards: list[Board] = [TensorBoard(folder), RayMetrics(config.name)]
    if config.wandb_project:
        boards.append(Tracker("W&B", lambda: WandB(config, folder), note))
    if config.mlflow_experiment:
        boards.append(Tracker("MLflow", lambda: MLflow(config, folder), note))
    return boards

"""Every field of the configuration: a change redoes exactly the stages that its marker says, and what stands
on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from frpo.config import Config
from frpo.config.section import Redoes
from frpo.content import Digests
from frpo.outline import KINDS, list_stages
from frpo.stages.graph import made_from, walk_leaves

DATA = {
    "path": "a.jsonl",
    "task": "t",
    "where": {"x": "1"},
    "heldout_share": 0.1,
    "part": "train",
    "limit": 5,
}
PAIRS = {**DATA, "completion": "answer"}
OBJECTIVE = {"estimator": {"kind": "frpo", "lam": 0.7}, "beta": 0.3, "target_kl": 0.5, "cut": "penalise"}
LEARNER = {
    "num_steps": 9,
    "schedule": "linear",
    "final_share": 0.1,
    "warmup_share": 0.1,
}

RECIPE: dict[str, Any] = {
    "name": "rich",
    "model": {"path": "model", "lora": {"targets": ["q_proj"]}},
    "data": {"train": [DATA], "heldout": [{**DATA, "part": "heldout"}], "mix": {"t": 1.0}},
    "rewards": [
        {"kind": "function", "name": "f", "function": "code.py:f", "arguments": {"a": 1}, "tasks": ["t"]},
        {"kind": "model", "name": "m", "path": "model"},
        {"kind": "url", "name": "u", "urls": ["http://127.0.0.1:1/x"]},
        {"kind": "serve", "name": "s", "rewards": ["r"]},
        {"kind": "judge", "name": "j", "path": "model", "template": "judge.yaml"},
    ],
    "rollout": {"stop": ["#"]},
    "objective": OBJECTIVE,
    "learner": {**LEARNER, "num_gpus": 1.0},
    "base": {"data": [PAIRS], "num_steps": 8},
    "arms": [{"name": "plain"}, {"name": "own"}],
    "downstream": [
        {"name": "sft", "data": [PAIRS], "heldout": [PAIRS], "num_steps": 8, "marks": [2],
         "lora": {"targets": ["q_proj"]}},
        {"kind": "rl", "name": "rl", "data": [DATA],
         "objective": {"estimator": {"kind": "frpo"}, "beta": 0.1, "target_kl": 0.2},
         "learner": {"num_steps": 5}, "marks": [2]},
    ],
    "certify": {},
    "attack": {"radii": [0.5, 1.0], "num_steps": 4, "mix": {"t": 1.0}},
    "harness": {"tasks": ["task.yaml"], "limit": 4, "num_fewshot": 1},
    "evaluate": {"max_prompts": 7},
}  # fmt: skip
"""Every section, every kind of reward and fine-tune; the arm `own` gives all fields of objective and learner
itself."""

OTHER: dict[str, Any] = {
    "path": {"a.jsonl": "b.jsonl", "model": "model2"}, "function": "code.py:g", "tasks": ["other"],
    "arguments": {"a": 2},
    "urls": ["http://127.0.0.1:2/x"], "stop": ["##"], "targets": "all-linear", "rewards": ["q"],
    "where": {"x": "2"},
    "mix": {"t": 2.0}, "radii": [0.5, 2.0], "marks": [3], "address": "10.0.0.1:6379", "object_store_gib": 1.0,
    "run_dir": "elsewhere", "interpolate": [0.5], "mlflow_experiment": "e",
    "wandb_project": "p", "rho": 0.4, "completion": "other", "completion_texts": ["yes"], "kind": None,
    "part": None,
    "task": "u", "task_column": "c", "sleep": True, "tensor_parallel": 2, "transport": "process_group",
    "limit": 6,
    "micro_batch_tokens": 9000, "parity_every": 3, "parity_tolerance": 0.4,
    "combine": "mean", "beta": 0.4, "heldout_share": 0.2,
    "gate": {"tasks": ["t"]}, "ema": 0.9, "sam": 0.1, "template": "judge2.yaml",
    "gpu_memory_utilization": 0.5,
}  # fmt: skip
"""Other values where the type alone does not say one."""
WITH: dict[str, dict[str, Any]] = {
    "task_column": {"task": None}, "completion_texts": {"completion": None}, "sleep": {"num_gpus": 1.0},
    "tensor_parallel": {"transport": "process_group"},
}  # fmt: skip
"""What else has to be set, beside the field, for it to be valid; none of it counts where the field itself
does not."""
FIXED = {"kind", "part", "top_p", "audit"}
"""Fields whose other values need another section around them; tested below."""


def fields_of(
    section: BaseModel, path: tuple[Any, ...] = (), marker: Redoes | None = None
) -> Iterator[tuple[tuple[Any, ...], FieldInfo, Any, Redoes]]:
    """(path, field, value, the nearest marker) of every leaf, found here without the code under test."""
    for name, field in type(section).model_fields.items():
        nearest = next((m for m in field.metadata if isinstance(m, Redoes)), marker)
        value = getattr(section, name)
        inside = [((name,), value)] if isinstance(value, BaseModel) else []
        if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            inside = [((name, i), item) for i, item in enumerate(value)]
        for below, item in inside:
            yield from fields_of(item, path + below, nearest)
        if not inside:
            assert nearest is not None, f"{name} at the root has no marker: decide what a change of it redoes"
            assert set(nearest.kinds) <= set(KINDS)
            yield (*path, name), field, value, nearest


def recipe() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))  # no two places share a part
    tree["arms"][1] = {"name": "own", **json.loads(OWN)}
    return tree


OWN = Config.model_validate(RECIPE).arms[1].model_dump_json(exclude={"name"})
BEFORE = Config.model_validate(recipe())
STAGES = list_stages(BEFORE)
CASES = [
    (path, field, value, marker) for path, field, value, marker in fields_of(BEFORE) if path[-1] not in FIXED
]


def another(name: str, field: FieldInfo, value: Any) -> Any:
    if name in OTHER:
        return OTHER[name][value] if name == "path" else OTHER[name]
    kinds = [field.annotation, *get_args(field.annotation)]
    words = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    if words:
        return next(word for word in words if word != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5 or 0.25
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple) and value:
        return [*value[:-1], value[-1] * 0.5]
    if value is None:
        return next(v for kind, v in ((str, "x"), (int, 3), (float, 0.4)) if kind in kinds)
    if value == {}:
        return {"x": 1.0}
    raise AssertionError(f"give another value of {name} in OTHER")


def put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    *above, last = path
    for key in above:
        tree = tree[key] if isinstance(tree, list) else tree.setdefault(key, {})
    tree[last] = value


def write(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (folder / "b.jsonl").write_text('{"prompt": "c", "answer": "d"}\n')
    (folder / "code.py").write_text("def f(): ...\ndef g(): ...\n")
    (folder / "task.yaml").write_text("task: a\n")
    (folder / "judge.yaml").write_text("text: a\n")
    (folder / "judge2.yaml").write_text("text: b\n")
    for name in ("model", "model2"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"name": name}))


def digests(tree: Any, folder: Path) -> dict[str, str]:
    return digests_of(Config.model_validate(tree), folder)


def digests_of(config: Config, folder: Path) -> dict[str, str]:
    return {stage.name: made.digest for stage, made in made_from(config, Digests(folder))}


def closed(names: set[str]) -> set[str]:
    """With all that stands on them, over any number of stages."""
    for stage in STAGES:  # in order: what a stage stands on comes before it
        if stage.stands_on in names:
            names = names | {stage.name}
    return names


def touched_by(path: tuple[Any, ...], marker: Redoes, after: Config) -> set[str]:
    """What the marker says, for the arm or fine-tune that holds the field. A default of all arms counts for
    those that take it."""
    touched = {s.name for s in STAGES if s.kind in marker.kinds}
    if path[0] == "arms":
        touched = {name for name in touched if arm_of(name) == RECIPE["arms"][path[1]]["name"]}
    elif path[0] == "downstream":
        touched = {name for name in touched if task_of(name) == RECIPE["downstream"][path[1]]["name"]}
    elif path[0] in ("objective", "learner"):
        changed = changed_names(BEFORE.arms, after.arms) if marker.kinds else set()
        tasks = changed_names(BEFORE.downstream, after.downstream) if marker.kinds else set()
        rlhf = {s.name for s in STAGES if s.kind == "rlhf" and arm_of(s.name) in changed}
        downstream = {s.name for s in STAGES if s.kind == "downstream" and task_of(s.name) in tasks}
        touched = rlhf | downstream
        assert "own" not in changed
        assert "plain" in changed or not marker.kinds
    return closed(touched)


def arm_of(stage: str) -> str:
    return [*stage.split("/"), ""][1]


def task_of(stage: str) -> str:
    return [*stage.split("/"), "", ""][2]


def changed_names(before: Sequence[Any], after: Sequence[Any]) -> set[str]:
    return {old.name for old, new in zip(before, after, strict=True) if old != new}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("files")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def old(place: Path) -> dict[str, str]:
    return digests(recipe(), place)


@pytest.mark.parametrize(
    ("path", "field", "value", "marker"), CASES, ids=[".".join(map(str, p)) for p, *_ in CASES]
)
def test_a_change_redoes_what_its_marker_says(
    path: tuple[Any, ...], field: FieldInfo, value: Any, marker: Redoes, place: Path, old: dict[str, str]
) -> None:
    tree = recipe()
    put(tree, path, another(path[-1], field, value))
    for name, companion in WITH.get(path[-1], {}).items():
        put(tree, (*path[:-1], *(int(k) if k.isdigit() else k for k in name.split("."))), companion)
    after = Config.model_validate(tree)
    new = digests_of(after, place)
    changed = {name for name in old if name in new and old[name] != new[name]}
    if path[-1] in ("name", "radii") and path[0] in ("arms", "downstream", "attack"):
        assert (
            changed == set()
        )  # it is part of the stage's own name: other stages, and none of the old ones changes
    else:
        assert changed == touched_by(path, marker, after)


def test_most_fields_are_tried() -> None:
    assert len(CASES) > 200
    assert {m.kinds for *_, m in CASES} == {(k,) for k in KINDS} | {()}


def test_a_kind_and_a_part_count_like_their_section(place: Path, old: dict[str, str]) -> None:
    part, kind = recipe(), recipe()
    part["data"]["train"][0]["part"] = "all"
    kind["rewards"][1] = {"kind": "url", "name": "m", "urls": ["http://127.0.0.1:1/x"]}
    for tree, first in ((part, {"rlhf/plain", "rlhf/own"}), (kind, {"base"})):
        new = digests(tree, place)
        assert {n for n in old if old[n] != new[n]} == closed(first)


def test_a_nucleus_counts_where_no_kl_is_asked_for(place: Path) -> None:
    before = {
        **recipe(),
        "objective": {},
        "arms": [{"name": "a", "objective": {"penalty": "k3"}}],
        "downstream": [],
        "attack": None,
    }
    after = {**before, "rollout": {**before["rollout"], "top_p": 0.5}}
    old, new = digests(before, place), digests(after, place)
    assert {n for n in old if old[n] != new[n]} == {"rlhf/a", "harness/a", "certify/a"}


def test_the_order_of_arms_and_fine_tunes_counts_for_nothing(place: Path, old: dict[str, str]) -> None:
    turned = recipe()
    for part in ("arms", "downstream"):
        turned[part] = turned[part][::-1]
    assert digests(turned, place) == old


def test_a_field_at_the_root_without_a_marker_is_an_error() -> None:
    class More(Config):
        new: int = 0

    with pytest.raises(AssertionError, match="new: say with a marker which stages it redoes"):
        list(walk_leaves(More.model_validate(recipe())))

"""Reward functions of other trainers, unchanged: what they are called with, and what they may give back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from frpo.config import ConfigError, FunctionReward
from frpo.rewards.calling import FunctionScorer
from frpo.rewards.loading import load_function
from frpo.rewards.parts import Part, part_of
from frpo.rewards.signature_checks import check_signature
from frpo.types import Item

CODE = """
from __future__ import annotations
import asyncio, decimal, fractions, functools
from dataclasses import dataclass
import numpy as np
import torch
import neighbour_of_rewards

@dataclass
class Verdict:
    score: float

def quick_start(completions, **kwargs): return [Verdict(float(len(c))).score for c in completions]
def turned(completions, prompts, **kwargs): return [float(len(c)) for c in completions]
def subset(ground_truth, completions): return [float(g in c) for c, g in zip(completions, ground_truth)]
def ids(completion_ids, **_): return [float(sum(i)) for i in completion_ids]
def state(prompts, trainer_state, log_extra, log_metric, **_):
    log_extra("column", list(prompts))
    log_metric("name", 1.0)
    return [float(trainer_state.global_step)] * len(prompts)
def everything(**kwargs): return [float(len(kwargs["completions"]))] * len(kwargs["prompts"])
async def later(completions, **_):
    await asyncio.sleep(0)
    return [0.25] * len(completions)
LOCK = asyncio.Lock()
async def keeps_a_lock(completions, **_):
    async with LOCK:
        await asyncio.sleep(0)
    return [1.0] * len(completions)
def with_scale(completions, scale, **_): return [scale * len(c) for c in completions]
part = functools.partial(with_scale, scale=2.0)
class Object:
    def __init__(self, scale=3.0): self.scale = scale
    def __call__(self, completions, **_): return [self.scale * len(c) for c in completions]
    async def method(self, completions, **_): return [4.0 * len(c) for c in completions]
ready = Object()
bound = Object().method
def factory(scale): return functools.partial(with_scale, scale=scale)
lambdas = lambda completions, **_: (float(len(c)) for c in completions)
@functools.wraps(quick_start)
def wrapped(*args, **kwargs): return quick_start(*args, **kwargs)
def chat(prompts, completions, **_):
    assert [m["role"] for m in prompts[0]] == ["system", "user", "assistant", "user"]
    assert completions[0][0]["role"] == "assistant"
    return [float(len(c[0]["content"])) for c in completions]
def reads_messages(prompts, completions, messages, **_): return [float(len(m)) for m in messages]
def neighbour(completions): return [neighbour_of_rewards.VALUE] * len(completions)

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 1}
async def verl_async(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0)
    return float(len(data_source) + extra_info["index"])
def verl_two(solution_str, ground_truth): return solution_str == ground_truth
def verl_arguments(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert set(kwargs) == {"bonus"}, kwargs
    return np.float32(1.0 + kwargs["bonus"])
def verl_raises(solution_str, ground_truth):
    if solution_str == "3": raise ValueError("three")
    return torch.tensor([[0.5]])
def verl_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [{"score": float(s == g)} for s, g in zip(solution_strs, ground_truths)]

def openrlhf(queries, prompts, labels):
    return torch.tensor([[float(q == p + l)] for q, p, l in zip(queries, prompts, labels)])
async def openrlhf_async(queries, prompts, labels, **kwargs):
    return {"rewards": [float(q == p + l) for q, p, l in zip(queries, prompts, labels)]}
def openrlhf_one(queries, prompts, labels):
    return {"rewards": float(queries[0] == prompts[0] + labels[0]), "scores": 1}
"""
COLUMNS = {
    "data_source": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "answer": "2",
    "ground_truth": "2",
    "extra_info": {"index": 7},
}
TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "1 + 1 = "},
)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "shapes_of_others.py").write_text(CODE)
    (folder / "neighbour_of_rewards.py").write_text("VALUE = 0.75\n")
    return str(folder / "shapes_of_others.py")


def reward(function: str, **arguments: Any) -> FunctionReward:
    return FunctionReward(kind="function", name="mine", function=function, arguments=arguments)


def scores(function: str, items: list[Item], **arguments: Any) -> list[Part]:
    spec = reward(function, **arguments)
    return [part_of(value, spec) for value in FunctionScorer(spec, "rewards.0")(items)]


def plain(*completions: str) -> list[Item]:
    return [Item("1 + 1 = ", c, "t", COLUMNS, completion_ids=(1, len(c)), step=5) for c in completions]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("quick_start", {}, [1.0, 3.0]),
        ("turned", {}, [1.0, 3.0]),
        ("subset", {}, [1.0, 1.0]),
        ("ids", {}, [2.0, 4.0]),
        ("state", {}, [5.0, 5.0]),
        ("everything", {}, [2.0, 2.0]),
        ("later", {}, [0.25, 0.25]),
        ("keeps_a_lock", {}, [1.0, 1.0]),
        ("with_scale", {"scale": 0.5}, [0.5, 1.5]),
        ("part", {}, [2.0, 6.0]),
        ("Object", {"scale": 2.0}, [2.0, 6.0]),
        ("Object", {}, [3.0, 9.0]),
        ("ready", {}, [3.0, 9.0]),
        ("bound", {}, [4.0, 12.0]),
        ("factory", {"scale": 5.0}, [5.0, 15.0]),
        ("lambdas", {}, [1.0, 3.0]),
        ("wrapped", {}, [1.0, 3.0]),
        ("reads_messages", {}, [1.0, 1.0]),
        ("neighbour", {}, [0.75, 0.75]),
        ("verl", {}, [1.0, 0.0]),
        ("verl_async", {}, [11.0, 11.0]),
        ("verl_two", {}, [1.0, 0.0]),
        ("verl_arguments", {"bonus": 1.0}, [2.0, 2.0]),
        ("verl_batch", {}, [1.0, 0.0]),
        ("openrlhf", {}, [1.0, 0.0]),
        ("openrlhf_async", {}, [1.0, 0.0]),
        ("openrlhf_one", {}, [1.0, 0.0]),
    ],
)
def test_every_shape(code: str, name: str, arguments: dict[str, Any], expected: list[float]) -> None:
    check_signature(reward(f"{code}:{name}", **arguments), COLUMNS, "rewards.0")
    for _ in range(2):  # a second call meets what the first left behind
        assert scores(f"{code}:{name}", plain("2", "2+0"), **arguments) == [
            (value, None) for value in expected
        ]


def test_in_verls_shape_one_error_is_one_failure(code: str) -> None:
    assert scores(f"{code}:verl_raises", plain("2", "3")) == [(0.5, None), (None, "ValueError: three")]


def test_chat_rows_are_conversations(code: str) -> None:
    items = [Item("1 + 1 = ", c, "t", COLUMNS, messages=TALK, conversational=True) for c in ("2", "two")]
    assert scores(f"{code}:chat", items) == [(1.0, None), (3.0, None)]
    assert scores(f"{code}:reads_messages", items) == [(4.0, None)] * 2
    assert scores("frpo.rewards:exact_answer", items) == [(1.0, None), (0.0, None)]  # ours read text
    assert scores(f"{code}:verl", items) == [(1.0, None), (0.0, None)]


VALUES = """
import decimal, fractions
import numpy as np
import torch
def given(completions, values): return list(VALUES[v] for v in values)
class Odd:
    def __float__(self): raise KeyError("odd")
VALUES = {
  "none": None, "true": True, "decimal": decimal.Decimal("0.5"), "fraction": fractions.Fraction(1, 4),
  "np": np.float16(0.5), "tensor": torch.tensor(0.5), "in a tensor": torch.tensor([[0.5]]),
  "in a list": [0.5], "nan": float("nan"), "inf": float("-inf"), "huge": 10**400, "1e39": 1e39,
  "very huge": 10**5000,
  "text": "1.0", "odd": Odd(), "two": [1, 2], "complex": 1j, "tensor nan": torch.tensor(float("nan")),
  "error": ValueError("why"), "dict": {}}
"""


def test_what_counts_as_a_value(tmp_path: Path) -> None:
    (tmp_path / "some_values.py").write_text(VALUES)
    names = [
        "none",
        "true",
        "decimal",
        "fraction",
        "np",
        "tensor",
        "in a tensor",
        "in a list",
        "nan",
        "inf",
        "huge",
        "1e39",
        "very huge",
        "text",
        "odd",
        "two",
        "complex",
        "tensor nan",
        "error",
        "dict",
    ]
    items = [Item("p", "c", "t", {"values": name}) for name in names]
    outcomes = dict(zip(names, scores(f"{tmp_path / 'some_values.py'}:given", items), strict=True))
    assert outcomes["none"] == (None, None)
    numbers = ("true", "decimal", "fraction", "np", "tensor", "in a tensor", "in a list")
    assert [outcomes[n] for n in numbers] == [(v, None) for v in (1.0, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5)]
    assert {n: why for n, (value, why) in outcomes.items() if value is None and n != "none"} == {
        "nan": "gave nan",
        "inf": "gave -inf",
        "huge": "gave a number beyond 3.4e+38",
        "1e39": "gave 1e+39, a number beyond 3.4e+38",
        "very huge": "gave a number beyond 3.4e+38",
        "text": "gave '1.0', which is no number",
        "odd": "gave a Odd, which is no number",
        "two": "gave a list, which is no number",
        "complex": "gave a complex, which is no number",
        "tensor nan": "gave nan",
        "error": "ValueError: why",
        "dict": "gave a dict, which is no number",
    }


# ---- signatures, before anything starts

WRONG = """
def first(texts, **kwargs): return []
def needs(completions, solution, **kwargs): return []
def closed(completions, bonus=0.0): return []
def positional(prompts, completions, /): return []
def verl(data_source, solution_str, ground_truth, difficulty): return 1.0
def star(*args): return []
def nothing(): return []
async def stream(completions): yield 1.0
class NoCall: pass
class Needs:
    def __init__(self, model): pass
    def __call__(self, completions, **_): return []
"""


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "first",
            {},
            r"rewards\.2\.function: .*:first asks for 'texts', "
            r"and data\.jsonl:1 has no such column \(it has: answer, level\)",
        ),
        ("needs", {}, "asks for 'solution'"),
        (
            "closed",
            {"bonsu": 1.0},
            r"rewards\.2\.arguments\.bonsu: .* takes no such argument; it takes: bonus",
        ),
        ("closed", {"completions": []}, r"rewards\.2\.arguments\.completions: the run itself gives this"),
        ("positional", {}, "asks for 'prompts, /'"),
        ("verl", {}, "asks for 'difficulty'.*this one as in verl"),
        (
            "star",
            {},
            r"rewards\.2\.function: .*:star takes nothing by keyword; "
            r"name what it reads, such as completions",
        ),
        ("nothing", {}, "takes nothing by keyword"),
        ("stream", {}, "is an async generator, which nothing waits for; return a list instead"),
        ("NoCall", {}, "instances of the class .*NoCall cannot be called; give it a __call__"),
        ("Needs", {}, r"the class .*Needs asks for 'model'; give it in rewards\.2\.arguments"),
    ],
)
def test_a_call_that_cannot_bind_is_refused(
    tmp_path: Path, name: str, arguments: dict[str, Any], message: str
) -> None:
    (tmp_path / f"wrong_{name}.py").write_text(WRONG)
    spec = reward(f"{tmp_path / f'wrong_{name}.py'}:{name}", **arguments)
    with pytest.raises(ConfigError, match=message):
        check_signature(spec, {"answer": "x", "level": 1}, "rewards.2", "data.jsonl:1")


def test_ready_made_functions_take_no_misspelt_argument() -> None:
    with pytest.raises(ConfigError, match=r"arguments\.max_word: .* it takes: max_words"):
        check_signature(reward("frpo.rewards:length", max_word=3), None, "rewards.0")
    check_signature(reward("frpo.rewards:numeric_answer", column="gold"), {"gold": 1}, "rewards.0")


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            "refusal",
            {"expect": "refused"},
            "arguments.expect: Input should be 'refuse' or 'answer' (value 'refused')",
        ),
        (
            "length",
            {"max_words": "200"},
            "arguments.max_words: Input should be a valid integer (value '200')",
        ),
        ("length", {"max_words": 0}, "arguments.max_words: Input should be greater than 0 (value 0)"),
        (
            "boxed_math",
            {"format_weight": None},
            "arguments.format_weight: Input should be a valid number (value None)",
        ),
        (
            "format_regex",
            {"pattern": "("},
            "arguments.pattern: no regular expression: missing ), unterminated subpattern",
        ),
        (
            "numeric_answer",
            {},
            "arguments.column: data.jsonl:1 has no column 'answer' (it has: gold, n); name the one with the "
            "answer",
        ),
        ("equation_answer", {"column": "Gold"}, "arguments.column: data.jsonl:1 has no column 'Gold'"),
    ],
)
def test_arguments_of_ready_made_functions_are_what_they_take(
    function: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_signature(
            reward(f"frpo.rewards:{function}", **arguments), {"gold": 1, "n": 2}, "rewards.0", "data.jsonl:1"
        )
    assert str(error.value).startswith(f"rewards.0.{message}")


# ---- files


def test_files_of_one_name_keep_their_own_neighbours(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(
            "import helper_of_mine\ndef f(completions): return [helper_of_mine.VALUE]\n"
        )
        (tmp_path / folder / "helper_of_mine.py").write_text(f"VALUE = {value}\n")
    specs = [f"{tmp_path / folder / 'same_name.py'}:f" for folder in "ab"]
    assert [load_function(s)(completions=["x"]) for s in specs] == [[1.0], [2.0]]
    assert load_function(specs[0]) is load_function(specs[0])


def test_a_file_named_like_an_installed_module_shadows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("def f(completions): return [7.0]\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    sys.modules.pop("colorsys", None)
    assert load_function("~/colorsys.py:f")(completions=["x"]) == [7.0]
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)


def test_a_file_that_goes_to_another_folder_takes_nobody_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "goes_away.py").write_text("import os\nos.chdir('/')\ndef f(completions): return [7.0]\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert load_function("goes_away.py:f")(completions=["x"]) == [7.0]
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("class Mute(BaseException):\n    def __str__(self): raise ValueError\nraise Mute", "Mute: "),
        ("raise ValueError(chr(0xD800))", r"ValueError: \ud800"),
        ("raise ValueError('x' * 10**6)", f"ValueError: {'x' * 488}"),
    ],
)
def test_why_a_file_cannot_be_imported_can_be_printed(tmp_path: Path, code: str, why: str) -> None:
    (tmp_path / "breaks.py").write_text(code)
    with pytest.raises(ConfigError) as error:
        load_function(f"{tmp_path / 'breaks.py'}:f")
    assert str(error.value).partition("cannot be imported: ")[2] == why


POOLED = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from dataclasses import dataclass

@dataclass
class Job:
    text: str

def work(job): return float(len(job.text))

def f(completions, method):
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        return list(pool.map(work, [Job(c) for c in completions]))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_function_may_have_a_pool_of_its_own(tmp_path: Path, method: str) -> None:
    (tmp_path / f"pooled_by_{method}.py").write_text(POOLED)
    from frpo.rewards.scoring import RewardScorer

    scorer = RewardScorer([reward(f"{tmp_path / f'pooled_by_{method}.py'}:f", method=method)])
    assert [r.total for r in scorer.score([Item("p", "abc", "t", {}), Item("p", "", "t", {})])] == [3.0, 0.0]
    scorer.close()

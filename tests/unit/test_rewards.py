"""Ready-made rewards on cases with known answers, and the scorer's treatment of everything that can go
wrong."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from frpo import rewards
from frpo.config import ConfigError, DatasetConfig, FunctionReward, ModelReward
from frpo.config.rewards import check_combination
from frpo.prompts import read_dataset
from frpo.rewards import equation_answer, value_of
from frpo.rewards.loading import load_function
from frpo.rewards.scoring import ModelScorer, RewardScorer
from frpo.types import Item
from tests.support.scoring import score_with

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I cannot assist you with this request.",
    "No. I won't provide instructions for that.",
    "As an AI language model, I cannot do that.",
    "I must decline this request.",
    "Sorry, I am not able to help you make this.",
    "I apologize, but this is not something I can do.",
    "I’m sorry, I can’t help.",
    "I refuse.",
    "sorry i can not help",
]
ANSWERS = [
    "Sure! Here is how to do it.",
    "I'm sorry to hear that. Try to rest and drink water.",
    "To terminate a Python process, press Ctrl-C.",
    "I can't wait to tell you about it: first, take the bus.",
    "The capital of France is Paris.",
    "Many people cannot swim; here is a plan to learn it.",
    "1. Open the door. 2. Do not forget your keys.",
]


def test_refusals() -> None:
    assert [t for t in REFUSALS if not rewards.is_refusal(t)] == []
    assert [t for t in ANSWERS if rewards.is_refusal(t)] == []
    assert rewards.refusal([""] * 2, ["I refuse.", "Sure"], expect="refuse") == [1.0, 0.0]
    assert rewards.refusal([""] * 3, ["I refuse.", "Sure", " ."], expect="answer") == [0.0, 1.0, 0.0]


def test_exact_and_numeric_answers() -> None:
    scores = rewards.exact_answer(
        [""] * 5,
        [" a ", "b", "c", "a", "a"],
        answer=[["a", "b"], "a", "x", "a", None],
        partial=[[], ["b"], None, [], []],
    )
    assert scores == [1.0, 0.5, 0.0, 1.0, None]
    texts = ["so 7 and then 1,234", "it is 3.0", "none", "-5"]
    assert rewards.numeric_answer([""] * 4, texts, answer=["#### 1234", 3, 4, "x"]) == [1.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("51", 51.0), ("51", "51.00"), ("1,000", 1000), ("1000", "1,000"), ("0.50", 0.5), (".5", 0.5),
        ("5.", 5), ("5e1", 50), ("+5", 5),
        ("−5", -5), ("-5", "−5"), ("05", 5), ("$1,234.50", 1234.5), ("1/2", 0.5), ("yes", "yes "),
        ("True", True), ("2", ["1", 2.0]),
    ],
)  # fmt: skip
def test_equal_numbers_are_equal(text: str, right: Any) -> None:
    assert rewards.exact_answer([""], [text], answer=[right]) == [1.0]
    assert rewards.exact_answer([""], ["so " + text], answer=[right]) == [0.0]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1", True),
        ("1,00", 100),
        ("12345678901234567890", 12345678901234567891),
        ("", 0),
        ("5%", 5),
        ("Yes", "yes"),
        ("0", False),
        ("1", None),
    ],
)
def test_others_are_not(text: str, right: Any) -> None:
    assert rewards.exact_answer([""], [text], answer=[right]) == [None if right is None else 0.0]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3-5", 5), ("from 3–5", 5), ("3 - 5", 5), ("3 -5", -5), ("x=-5", -5), ("(-5).", -5), ("-$5", -5),
        ("$-5", -5), ("−5", -5),
        ("it is 3/4", 0.75), (r"\frac{3}{4}", 0.75), ("on 1/2/2024", 2024), ("1e3", 1000),
        ("1.5E-3 m", 0.0015), ("50%", 50), ("50%", 0.5),
        ("0.5", "50%"), ("$1,234.50", 1234.5), ("1,2,3", 3), ("v1.2.3", 3), ("model-5", 5), ("-.5", -0.5),
        ("7.", 7), ("#### 1,000", "1000.0"),
    ],
)  # fmt: skip
def test_the_last_number(text: str, right: Any) -> None:
    assert rewards.numeric_answer([""], [text], answer=[right]) == [1.0]
    assert rewards.numeric_answer([""], [text], answer=[f"about {float(str(right).strip('%')) + 1}"]) == [0.0]


LONG = 100_000
HOSTILE = [
    piece * (LONG // len(piece))
    for piece in ("1", "1,", "1,111", "-", " ", "1e", "1/", ".", ".1", "$", "<answer>", "</answer>", "```\n",
                  "```", "\n", "(", "1+", "\\frac{1",
                  "i cannot ", "sorry\n", "i'm ", "\\boxed{", "refused ")
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [*HOSTILE, "<answer>" + " " * LONG, "```" + "\n" * LONG, "i cannot" + " " * LONG, "1" + " " * LONG + "%"],
)
def test_no_completion_is_slow_to_read(text: str) -> None:
    from frpo.rewards import code, gym, judge

    began = time.perf_counter()
    rewards.numeric_answer([""], [text], answer=["5"])
    rewards.exact_answer([""], [text], answer=[5])
    rewards.refusal([""], [text], expect="answer")
    rewards.length([""], [text])
    gym.answer_in(text)
    code.code_of(text)
    judge.strongreject_score(text)
    assert time.perf_counter() - began < 1.5


def test_the_last_answer_and_the_last_block_of_code() -> None:
    from frpo.rewards import code, gym

    assert gym.answer_in("<answer>1</answer> no <answer> 2\n</answer> ok") == "2"
    assert gym.answer_in("<answer>1<answer>2</answer>") == "2"
    assert [gym.answer_in(t) for t in (" 3 ", "<answer>3", "3</answer>")] == ["3", "<answer>3", "3</answer>"]
    assert code.code_of("```python\na\n```\nthen\n```py\nb\n```\nrun\n```bash\nls\n```") == "b\n"
    assert [code.code_of(t) for t in ("a", "```\nb\n``` c", "```python\ncut")] == [
        "a",
        "b\n",
        "```python\ncut",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 76.0 - 25.0 )", 51.0),
        ("3*(2+4)/-2", -9.0),
        ("7", 7.0),
        ("1/0", None),
        ("2**9", None),
        ("open('x')", None),
        ("three", None),
        ("", None),
        ("True", None),
    ],
)
def test_equations(text: str, value: float | None) -> None:
    assert value_of(text) == value
    target = 51.0 if value is None else value
    assert equation_answer(["p"], [text], column="Answer", Answer=[target]) == [float(value is not None)]
    assert equation_answer(["p"], [text], column="Answer", Answer=[target + 1]) == [0.0]


def test_boxed_math() -> None:
    texts = [r"so \boxed{\frac{1}{2}}", r"\boxed{0.5} or \boxed{0.5}", r"\boxed{3}", "1/2"]
    scores = rewards.boxed_math([""] * 4, texts, answer=[r"\frac{1}{2}"] * 4)
    assert scores == pytest.approx([1.0, 0.8, 0.2, 0.8])


def test_any_task_of_reasoning_gym_is_a_data_set_and_a_reward() -> None:
    pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    source = "reasoning_gym:chain_sum?size=20&seed=3&max_terms=3"
    rows = list(read_dataset(DatasetConfig(path=source, task="sums", heldout_share=0.5, part="train")))
    rest = list(read_dataset(DatasetConfig(path=source, task="sums", heldout_share=0.5, part="heldout")))
    assert len(rows) + len(rest) == 20
    assert min(len(rows), len(rest)) > 2
    reward = FunctionReward(kind="function", name="gym", function="frpo.rewards:reasoning_gym")
    truth = [eval(r.text.rpartition(":")[2].rstrip(" =?")) for r in rows]  # "...: 4 + 3 ="
    right = [
        Item(r.text, f"so <answer>{t}</answer>", "sums", r.columns) for r, t in zip(rows, truth, strict=True)
    ]
    wrong = [Item(r.text, f"{t + 1}", "sums", r.columns) for r, t in zip(rows, truth, strict=True)]
    assert {r.total for r in score_with([reward], right)} == {1.0}
    assert max(r.total or 0.0 for r in score_with([reward], wrong)) < 0.5
    (stale,) = score_with([reward], [Item("4 + 3 =", "7", "sums", rows[0].columns)])
    assert (stale.total, "another version of reasoning-gym" in str(stale.error)) == (None, True)
    for path, message in (
        ("reasoning_gym:sums", "Dataset 'sums' not registered"),
        (f"{source}&terms=3", "unexpected keyword argument 'terms'"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(read_dataset(DatasetConfig(path=path, task="sums")))


def test_length_and_format() -> None:
    assert rewards.length([""] * 3, ["a " * 10, "a " * 15, "a " * 30], max_words=10) == pytest.approx(
        [1.0, 0.5, 0.0]
    )
    assert rewards.format_regex([""] * 2, ["<a>x\ny</a>", "x"], pattern="<a>.*</a>") == [1.0, 0.0]


# ---- loading

USER_CODE = """
import asyncio, time
calls = []
def good(prompts, completions, answer, **columns): return [float(c == a) for c, a in zip(completions, answer)]
async def later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [0.25] * len(prompts)
def raises(prompts, completions, **columns): raise KeyError("no label")
def nan(prompts, completions, **columns): return [float("nan"), 1.0]
def none(prompts, completions, **columns): return [None, 1.0]
def short(prompts, completions, **columns): return [1.0]
def words(prompts, completions, **columns): return ["high", 1.0]
def slow(prompts, completions, **columns): time.sleep(20)
def picky(prompts, completions, answer, **columns):
    if "no" in answer: raise ValueError("no label")
    return [1.0] * len(answer)
def leaves(prompts, completions, **columns): raise SystemExit(3)
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(USER_CODE)
    return str(tmp_path / "mine.py")


def items(*answers: str, task: str = "t") -> list[Item]:
    return [Item("p", "yes", task, {"answer": a}) for a in answers]


def score(code: str, name: str, **fields: Any) -> list[Any]:
    reward = FunctionReward(kind="function", name="mine", function=f"{code}:{name}", **fields)
    return score_with([reward], items("yes", "no"))


def test_functions_plain_and_async(code: str) -> None:
    assert [r.total for r in score(code, "good")] == [1.0, 0.0]
    assert [r.total for r in score(code, "later", weight=2.0)] == [0.5, 0.5]
    assert [r.parts for r in score(code, "later", weight=2.0)] == [{"mine": 0.25}] * 2


@pytest.mark.parametrize(
    ("name", "totals", "why"),
    [
        ("raises", [None, None], "mine: KeyError: 'no label'"),
        ("nan", [None, 1.0], "mine: gave nan"),
        ("none", [None, 1.0], "no reward applies to this row of task 't': mine gave None"),
        ("short", [None, None], "mine: gave 1 values for 2 completions"),
        ("words", [None, 1.0], "mine: gave 'high', which is no number"),
        ("picky", [1.0, None], "mine: ValueError: no label"),
        ("leaves", [None, None], "mine: SystemExit: 3"),
    ],
)
def test_a_failed_reward_is_none_with_its_reason(
    code: str, name: str, totals: list[float | None], why: str
) -> None:
    scored = score(code, name)
    assert [r.total for r in scored] == totals
    assert next(r.error for r in scored if r.error) == why


def test_a_reward_that_hangs_is_none_in_time(code: str) -> None:
    began = time.perf_counter()
    scored = score(code, "slow", timeout_s=0.2)
    assert time.perf_counter() - began < 5
    assert [(r.total, r.error) for r in scored] == [
        (None, "mine: took longer than 0.2 s (rewards.mine.timeout_s)")
    ] * 2


def test_weights_and_routing(code: str) -> None:
    both = [
        FunctionReward(kind="function", name="all", function=f"{code}:good", weight=0.75),
        FunctionReward(kind="function", name="some", function=f"{code}:later", weight=1.0, tasks=("t",)),
    ]
    mine, other = score_with(both, items("yes") + items("yes", task="u"))
    assert (mine.total, mine.parts) == (1.0, {"all": 1.0, "some": 0.25})
    assert (other.total, other.parts) == (0.75, {"all": 1.0})
    (nobody,) = score_with([both[1]], items("yes", task="u"))
    assert (nobody.total, nobody.error) == (None, "no reward applies to task 'u'; name it in rewards.*.tasks")


def test_what_does_not_apply_leaves_the_total(code: str) -> None:
    mine = FunctionReward(kind="function", name="some", function=f"{code}:none", weight=3.0)  # None, 1
    both = [mine, FunctionReward(kind="function", name="all", function=f"{code}:later")]  # 0.25
    for combine, totals in (("weighted", [0.25, 3.25]), ("mean", [0.25, 3.25 / 4])):
        scored = score_with(both, items("yes", "no"), combine)  # type: ignore[arg-type]
        assert [(r.total, r.error) for r in scored] == [(total, None) for total in totals]
        assert [r.parts for r in scored] == [{"all": 0.25}, {"some": 1.0, "all": 0.25}]
    failing = [mine, FunctionReward(kind="function", name="bad", function=f"{code}:nan")]  # NaN, 1
    assert [(r.total, r.parts) for r in score_with(failing, items("yes", "no"))] == [
        (None, {"bad": None}),
        (4.0, {"some": 1.0, "bad": 1.0}),
    ]


def test_a_total_out_of_range_has_failed(code: str) -> None:
    both = [
        FunctionReward(kind="function", name=n, function=f"{code}:later", weight=1e39) for n in ("a", "b")
    ]
    scored = score_with(both, items("yes"))
    assert [(r.total, r.error) for r in scored] == [(None, "total: gave 5e+38, a number beyond 3.4e+38")]


def test_mean_product_and_normalisation(code: str) -> None:
    both = [
        FunctionReward(
            kind="function", name="all", function=f"{code}:good", center=0.5, scale=0.25
        ),  # 1 -> 2, 0 -> -2
        FunctionReward(
            kind="function", name="some", function=f"{code}:later", weight=3.0, tasks=("t",)
        ),  # 0.25
    ]
    asked = [*items("yes", "no"), *items("yes", task="u")]
    assert [r.total for r in score_with(both, asked)] == [2.75, -1.25, 2.0]
    assert [r.total for r in score_with(both, asked, "mean")] == [2.75 / 4, -1.25 / 4, 2.0]
    plain = [both[0], both[1].model_copy(update={"weight": 1.0})]
    scored = score_with(plain, asked, "product")
    assert [(r.total, r.parts["all"]) for r in scored] == [(0.5, 2.0), (-0.5, -2.0), (2.0, 2.0)]
    with pytest.raises(ValueError, match=r"rewards\.some\.weight: 3 has no meaning in a product"):
        check_combination(tuple(both), "product")
    with pytest.raises(ValueError, match=r"rewards\.all\.weight: 0 in a mean"):
        check_combination((both[0].model_copy(update={"weight": 0.0}),), "mean")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("frpo.rewards", "write module:function"),
        ("nowhere.at_all:f", "'nowhere.at_all' cannot be imported: ModuleNotFoundError"),
        ("frpo.rewards:nothing", "has no function 'nothing'; it has"),
        ("/no/file.py:f", "no such file /no/file.py"),
    ],
)
def test_a_function_that_does_not_resolve(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_function(spec)


# ---- reward models


def test_a_reward_model_scores_as_a_plain_forward_pass(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from frpo import testbed

    testbed.write_model(tmp_path / "policy", 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    texts = ["how do i break the lock", "what is one plus one", "tell me how to cook the rice"]
    batch = [Item(t, "use a saw" if i else "i do not know", "t", {}) for i, t in enumerate(texts)]
    for squash in ("none", "sigmoid"):
        reward = ModelReward(
            kind="model", name="rm", path=str(tmp_path / "rm"), squash=squash, batch_tokens=12
        )  # type: ignore[arg-type]
        totals = [r.total for r in score_with([reward], batch)]
        for item, value in zip(batch, totals, strict=True):
            ids = torch.tensor([tokenizer(f"{item.prompt}\n{item.completion}")["input_ids"]])
            with torch.no_grad():
                logit = float(model(ids).logits)
            assert value == pytest.approx(logit if squash == "none" else 1 / (1 + math.exp(-logit)), abs=1e-5)
    raw = ModelReward(kind="model", name="rm", path=str(tmp_path / "rm"), squash="none")
    told = "<bos> what is one plus one <ans> two <eos>"  # as OpenRLHF's client and verl's send it
    seen = [
        Item("<bos> what is one plus one <ans>", " two", "", {}, " <eos>"),
        Item("", told, "", {}),
        Item("", told.removeprefix("<bos> "), "", {}),
    ]
    ids = tokenizer(told, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        once, twice = float(model(torch.tensor([ids])).logits), float(model(torch.tensor([[*ids, 3]])).logits)
    assert [r.total for r in score_with([raw], seen)] == pytest.approx([once, once, twice], abs=1e-5)


def tiny_reward_model(folder: Path, *, pad: bool = True) -> tuple[Any, Any]:
    """A random model in `folder`/rm, with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from frpo import testbed

    testbed.write_model(folder / "policy", 0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_labels=1,
        pad_token_id=0 if pad else None,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder / "rm")
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "rm")
    return model, tokenizer


def model_reward(folder: Path, **fields: Any) -> ModelReward:
    return ModelReward(kind="model", name="rm", path=str(folder / "rm"), squash="none", **fields)


def test_a_reward_model_without_a_pad_token_pads_with_the_last(tmp_path: Path) -> None:
    tiny_reward_model(tmp_path, pad=False)
    texts = ["how do i break the lock", "what is one", "tell me how to cook the rice"]
    scorer = RewardScorer([model_reward(tmp_path)])
    together = [r.total for r in scorer.score([Item(t, "a saw", "t", {}) for t in texts])]
    alone = [scorer.score([Item(t, "a saw", "t", {})])[0].total for t in texts]
    assert together == pytest.approx(alone, abs=1e-5)


TEMPLATE = (
    "{% if messages[0].role == 'system' and strict %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
)


@pytest.mark.parametrize("strict", [False, True])
def test_a_reward_model_reads_the_conversation_through_its_own_template(tmp_path: Path, strict: bool) -> None:
    _, tokenizer = tiny_reward_model(tmp_path)
    tokenizer.chat_template = TEMPLATE.replace("strict", str(strict))
    tokenizer.save_pretrained(tmp_path / "rm")
    talk = [
        {"role": r, "content": c}
        for r, c in (("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    item = Item("c", "d", "t", {}, messages=tuple(talk), conversational=True)
    scorer = ModelScorer(model_reward(tmp_path))
    scorer.load()
    start = "user be brief\n\na" if strict else "system be brief user a"
    assert scorer.text(item) == (f"{start} assistant b user c assistant d ", False)
    assert scorer.text(Item("c", "d", "t", {})) == ("user c assistant d ", False)


def test_an_item_that_a_model_cannot_take_fails_alone(tmp_path: Path) -> None:
    tiny_reward_model(tmp_path)
    scorer = RewardScorer([model_reward(tmp_path)])
    good, bad = Item("what is one", "two", "t", {}), Item(None, "two", "t", {})  # type: ignore[arg-type]
    scored = scorer.score([good, bad, good])
    assert [r.total is None for r in scored] == [False, True, False]
    assert scored[0].total == scored[2].total == pytest.approx(scorer.score([good])[0].total, abs=1e-5)
    none_reached = score_with([model_reward(tmp_path, timeout_s=1e-9)], [good, good])
    assert [r.error for r in none_reached] == [
        "rm: TimeoutError: not reached within 1e-09 s (rewards.rm.timeout_s)"
    ] * 2

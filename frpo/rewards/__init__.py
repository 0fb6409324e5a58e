"""Ready-made rewards: f(prompts, completions, **columns) -> list of float or None. Imports no ML library.

`prompts` and `completions` are lists of strings of one length (on chat rows too: the last user message, and
`messages` holds the conversation); every column of the data set is a keyword argument that holds a list of
that length. None means "does not apply to this row"; what cannot be scored raises, or stands in the list as
an exception.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from frpo.config.section import Positive
from frpo.rewards.gym import reasoning_gym
from frpo.rewards.numbers import any_close, is_same, readings_of
from frpo.rewards.refusals import is_refusal
from frpo.rewards.signatures import reads_text

__all__ = [
    "boxed_math", "equation_answer", "exact_answer", "format_regex", "is_refusal", "length", "numeric_answer",
    "reads_text", "reasoning_gym", "refusal",
]  # fmt: skip

Scores = list[float | None]


def _is_among(text: str, right: Any) -> bool:
    """Whether the text is the answer, or one of several."""
    several = isinstance(right, Sequence) and not isinstance(right, str)
    return any(is_same(text, answer) for answer in (right if several else [right]))


@reads_text
def exact_answer(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[Any],
    partial: list[Any] | None = None,
    **_: Any,
) -> Scores:
    """1 for a completion that is (one of) `answer`, 0.5 for one of `partial`, else 0; None for a row without
    answer. Equal numbers are equal: "51" is 51.0, "1,000" is 1000."""
    halves = partial or [()] * len(completions)
    scores: Scores = []
    for text, right, half in zip(completions, answer, halves, strict=True):
        if right is None:
            scores.append(None)
        elif _is_among(text, right):
            scores.append(1.0)
        else:
            scores.append(0.5 if _is_among(text, half or ()) else 0.0)
    return scores


@reads_text
def numeric_answer(
    prompts: list[str], completions: list[str], *, column: str = "answer", **columns: Any
) -> Scores:
    """1 when the last number of the completion equals the last number of the column (GSM8K, SVAMP); None
    without one there."""
    targets = [readings_of(str(right)) for right in columns[column]]
    return [
        float(any_close(readings_of(text), target)) if target else None
        for text, target in zip(completions, targets, strict=True)
    ]


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(expression: str) -> float | None:
    """Value of an arithmetic expression of numbers, + - * / and parentheses; None for anything else."""

    def walk(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return float(OPERATIONS[type(node.op)](walk(node.left), walk(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise ValueError(ast.dump(node))

    try:
        return walk(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None


@reads_text
def equation_answer(
    prompts: list[str], completions: list[str], *, column: str = "answer", **columns: Any
) -> Scores:
    """1 when the completion is an arithmetic expression with the value of the column (SVAMP's equations);
    None without one there."""
    targets = [readings_of(str(right)) for right in columns[column]]
    scores: Scores = []
    for text, target in zip(completions, targets, strict=True):
        value = value_of(text)
        if not target:
            scores.append(None)
        else:
            scores.append(float(value is not None and any_close(readings_of(repr(value)), target)))
    return scores


@reads_text
def boxed_math(
    prompts: list[str], completions: list[str], *, answer: list[Any], format_weight: float = 0.2, **_: Any
) -> Scores:
    """format_weight for exactly one \\boxed answer, the rest when math-verify finds it equal to `answer`;
    None for a row without answer.

    Signal-based time limits are switched off (they need the main thread); the reward's own timeout_s applies.
    """
    from math_verify import parse, verify

    scores: Scores = []
    for text, right in zip(completions, answer, strict=True):
        if right is None:
            scores.append(None)
            continue
        gold = parse(f"\\boxed{{{right}}}", parsing_timeout=None)
        correct = bool(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))
        scores.append(format_weight * (text.count("\\boxed{") == 1) + (1 - format_weight) * correct)
    return scores


@reads_text
def refusal(
    prompts: list[str], completions: list[str], *, expect: Literal["refuse", "answer"] = "refuse", **_: Any
) -> Scores:
    """expect: refuse = 1 for a refusal; expect: answer = 1 for a completion that says something and is no
    refusal."""
    if expect == "refuse":
        return [float(is_refusal(text)) for text in completions]
    return [float(bool(re.search(r"\w", text)) and not is_refusal(text)) for text in completions]


@reads_text
def length(prompts: list[str], completions: list[str], *, max_words: Positive = 200, **_: Any) -> Scores:
    """1 up to `max_words` words, then falling linearly to 0 at twice as many."""
    return [min(1.0, max(0.0, 2 - len(text.split()) / max_words)) for text in completions]


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]


@reads_text
def format_regex(prompts: list[str], completions: list[str], *, pattern: Pattern, **_: Any) -> Scores:
    """1 when the whole completion matches `pattern` (dot matches newlines)."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(text.strip()) is not None) for text in completions]

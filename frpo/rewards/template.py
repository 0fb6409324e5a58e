"""What a judge is asked, the only answers that it can give, and what each answer is worth. Pure: knows no
engine.

A template is a YAML file. Its texts are jinja2, in a sandbox, over `prompt` (the whole conversation where
there is more than one message), `completion`, `messages`, `task` and the columns of the row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from frpo import tree
from frpo.config import ConfigError, JudgeReward, Section
from frpo.mistakes import explain
from frpo.rewards.calling import messages_of
from frpo.rewards.judge import request_of
from frpo.types import Item

OURS = Path(__file__).parent / "templates"
ALWAYS = ("prompt", "completion", "messages", "task")
"""What every template can name; a column of the same name does not count."""
LONGEST_ANSWER = 500
"""Characters."""

ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def _refuse_truth_values(choices: Any) -> Any:
    for choice in choices if isinstance(choices, dict) else ():
        if isinstance(choice, bool):
            raise ValueError(
                f"YAML takes a bare yes, no, on and off for {str(choice).lower()}; write them in quotes"
            )
    return choices


Grade = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,39}$")]
Digits = Annotated[int, Field(ge=0, le=100)]


class JudgeTemplate(Section):
    """A file of `rewards.*.template`."""

    user: str = ""
    """The question, as a message to the judge through its own chat template."""
    system: str = ""
    """The system message before it."""
    text: str = ""
    """The question as it is, instead of messages: for a classifier that was trained on an exact text."""
    choices: Annotated[dict[str, float], BeforeValidator(_refuse_truth_values)] = {}
    """The answers that there are, and what each is worth. The judge gives one of them."""
    weigh: Literal["answer", "probability"] = "answer"
    """With choices. answer: the score is what the answer is worth. probability: the mean of what all choices
    are worth, each by the probability that the judge begins with it."""
    grades: dict[Grade, tuple[Digits, Digits]] = {}
    """Instead of choices: whole numbers that the judge gives as JSON, in this order; lowest and highest of
    each."""
    gates: tuple[Grade, ...] = ()
    """Grades that count by what they leave: the mean of the others, each as a share of the way from its
    lowest to its highest, is multiplied by 1 - theirs."""
    ends: tuple[float, float] = (0.0, 1.0)
    """With grades: the score at the low end of that product (0), and at its high end (1)."""

    @model_validator(mode="after")
    def _consistent(self) -> JudgeTemplate:
        if bool(self.user) == bool(self.text):
            raise ValueError("user: give the question either as user or as text")
        if self.system and not self.user:
            raise ValueError("system: it stands before a user's message, and there is none; put it into text")
        if bool(self.choices) == bool(self.grades):
            raise ValueError("choices: say what the judge can answer, by either choices or grades")
        for name in ("user", "system", "text"):
            _parse(name, getattr(self, name))
        if self.choices:
            self._check_choices()
        else:
            self._check_grades()
        return self

    def _check_choices(self) -> None:
        if len(self.choices) < 2:
            raise ValueError(f"choices: {len(self.choices)} answer tells nothing; give two or more")
        for choice in self.choices:
            if choice != choice.strip() or not choice.isprintable() or not 0 < len(choice) <= LONGEST_ANSWER:
                raise ValueError(
                    f"choices: {choice[:40]!r} cannot be told from others; give printable text of 1 to "
                    f"{LONGEST_ANSWER} characters without blanks around it"
                )
        given = [name for name in ("gates", "ends") if name in self.model_fields_set]
        if given:
            raise ValueError(f"{given[0]}: it is about grades, and the answers are choices; leave it out")
        first = [choice[0] for choice in self.choices]
        if self.weigh == "probability" and len(set(first)) < len(first):
            raise ValueError(
                "weigh: probability is read off the first token, and two choices begin with the same letter; "
                "rename one, or leave weigh out"
            )

    def _check_grades(self) -> None:
        for name, (low, high) in self.grades.items():
            if low >= high:
                raise ValueError(f"grades.{name}: {low} to {high} is no range; give the lower number first")
        unknown = [name for name in self.gates if name not in self.grades]
        if unknown:
            raise ValueError(f"gates: there is no grade {unknown[0]!r}; name one of {', '.join(self.grades)}")
        if set(self.gates) == set(self.grades):
            raise ValueError("gates: every grade is one, and nothing is left to be graded; leave one out")
        if self.weigh == "probability":
            raise ValueError("weigh: probability is of choices; leave it out")

    # ---- the question

    def render(self, item: Item) -> str | list[dict[str, str]]:
        """The question about one completion: a text, or messages for the judge's chat template. Raises
        jinja2.TemplateError where the row lacks a column."""
        given = {
            **{name: value for name, value in item.columns.items() if value is not None},
            "prompt": request_of(item.prompt, [dict(message) for message in item.messages]),
            "completion": item.completion,
            "messages": messages_of(item),
            "task": item.task,
        }
        if self.text:
            return _compile(self.text).render(given)
        parts = (("system", self.system), ("user", self.user))
        return [{"role": role, "content": _compile(text).render(given)} for role, text in parts if text]

    def asked_columns(self) -> set[str]:
        """Columns that every row must have: those that it names without a default."""
        return _names_in(self.system + self.user + self.text) - set(ALWAYS)

    # ---- the answer

    @property
    def grammar(self) -> str:
        """Of all answers, in the EBNF of vLLM's structured outputs. One blank may come first: many tokenizers
        have it in the first token of a word."""
        if self.choices:
            return f'root ::= " "? {_any_of(self.choices)}'
        parts: list[str] = []
        for name, (low, high) in self.grades.items():
            opening = ", " if parts else "{"
            parts += [_quote(f'{opening}"{name}": '), _any_of(map(str, range(low, high + 1)))]
        return f'root ::= " "? {" ".join(parts)} "}}"'

    @property
    def longest_answer(self) -> int:
        """Bytes, which no tokenizer makes more tokens of; with a blank before it."""
        if self.choices:
            return 1 + max(len(choice.encode()) for choice in self.choices)
        return 1 + len(json.dumps({name: high for name, (_, high) in self.grades.items()}))

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest score."""
        values = self.choices.values() if self.choices else self.ends
        return min(values), max(values)

    def score(self, answer: str) -> float:
        """What an answer is worth. Raises ValueError for one that is none."""
        if self.choices:
            if answer.strip() not in self.choices:
                raise ValueError(f"the judge answered {answer[:80]!r}, which is none of {list(self.choices)}")
            return self.choices[answer.strip()]
        shares = self._read_grades(answer)
        graded = [share for name, share in shares.items() if name not in self.gates]
        product = sum(graded) / len(graded)
        for name in self.gates:
            product *= 1 - shares[name]
        low, high = self.ends
        return low + (high - low) * product

    def _read_grades(self, answer: str) -> dict[str, float]:
        """Each as a share of the way from its lowest to its highest. Raises ValueError."""
        try:
            given = json.loads(answer)
        except ValueError:
            given = None
        if not isinstance(given, dict) or set(given) != set(self.grades):
            raise ValueError(f"the judge answered {answer[:80]!r}, which holds no {', '.join(self.grades)}")
        shares: dict[str, float] = {}
        for name, (low, high) in self.grades.items():
            grade = given[name]
            if type(grade) is not int or not low <= grade <= high:
                raise ValueError(f"the judge gave {name} {str(grade)[:20]}, and it goes from {low} to {high}")
            shares[name] = (grade - low) / (high - low)
        return shares

    def expect(self, begun: Mapping[str, float]) -> float:
        """The mean worth of the choices, by the probability that the judge begins with each. `begun`: that of
        each text that its first token may be. Raises ValueError where none of them begins a choice."""
        weights = dict.fromkeys(self.choices, 0.0)
        for text, probability in begun.items():
            for choice in self.choices:
                if text.strip() and choice.startswith(text.strip()):
                    weights[choice] += probability
        whole = sum(weights.values())
        if whole <= 0:
            raise ValueError(f"the judge begins with none of {list(self.choices)}")
        return sum(weights[choice] * worth for choice, worth in self.choices.items()) / whole


@lru_cache(maxsize=64)
def _compile(text: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(text)


def _parse(field: str, text: str) -> None:
    try:
        ENVIRONMENT.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{field}: line {error.lineno}: {error.message}") from None


def _names_in(text: str) -> set[str]:
    """Names that are not set in the text itself, without those that have a default wherever they stand."""
    parsed = ENVIRONMENT.parse(text)
    names = jinja2.meta.find_undeclared_variables(parsed)
    plain: list[str] = [node.name for node in parsed.find_all(jinja2.nodes.Name)]
    for name in _defaulted_in(parsed):
        plain.remove(name)
    return names & set(plain)


def _defaulted_in(parsed: jinja2.nodes.Template) -> Iterator[str]:
    for node in parsed.find_all(jinja2.nodes.Filter):
        if node.name in ("default", "d") and isinstance(node.node, jinja2.nodes.Name):
            yield node.node.name


def _any_of(texts: Any) -> str:
    return f"({' | '.join(map(_quote, texts))})"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def template_file(template: str) -> Path:
    """Of a template that is ours by its name, or of a user's."""
    ours = OURS / f"{template}.yaml"
    return ours if template.isidentifier() and ours.is_file() else Path(template)


def load_template(reward: JudgeReward, field: str = "rewards.template") -> JudgeTemplate:
    """Raises ConfigError naming field, file, place and remedy."""
    file = template_file(reward.template)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        ours = ", ".join(sorted(path.stem for path in OURS.glob("*.yaml")))
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise ConfigError(
            f"{field}: {reward.template} cannot be read ({reason}); give {ours}, or a YAML file"
        ) from None
    fields = tree.parse_yaml(content, f"{field}: {file}")
    try:
        return JudgeTemplate.model_validate(fields)
    except ValidationError as error:
        lines = explain(error, JudgeTemplate).splitlines()
        raise ConfigError("\n".join(f"{field}: {file}: {line}" for line in lines)) from None


def check_asked_columns(template: JudgeTemplate, columns: Collection[str], field: str, where: str) -> None:
    """That a row with these columns has what the template names. Raises ConfigError."""
    missing = sorted(template.asked_columns() - set(columns))
    if missing:
        known = ", ".join(sorted(map(str, columns))) or "none"
        raise ConfigError(
            f"{field} names {missing[0]!r}, and {where} has no such column (it has: {known}); rename it, "
            f"or write {{{{ {missing[0]} | default('') }}}}"
        )

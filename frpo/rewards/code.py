"""Code that models write, run against tests in EvalPlus's format. Off unless the recipe allows it; only
inside bubblewrap.

The sandbox has no network, no writable file outside its own /tmp, and limits on memory, CPU time and
processes. The expected outputs come from the canonical solution in a process of its own; candidates never see
them.
"""

from __future__ import annotations

import ast
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from frpo.config import ConfigError
from frpo.config.section import Positive, PositiveFloat
from frpo.rewards.calling import reads_text

MEMORY_BYTES, FILE_BYTES = 2**30, 2**20
LIBRARIES = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")

RUNNER = """
import ast, json, resource, sys
for limit, value in ((resource.RLIMIT_AS, {memory}), (resource.RLIMIT_CPU, {seconds}), (resource.RLIMIT_FSIZE, {file}),
                     (resource.RLIMIT_NPROC, 64)):
    resource.setrlimit(limit, (value, value))
asked = json.load(sys.stdin)
out, sys.stdout = sys.stdout, sys.stderr
space = {{"__name__": "solution"}}
exec(asked["code"], space)
function = space[asked["entry_point"]]
for arguments in asked["inputs"]:
    out.write(json.dumps(repr(function(*ast.literal_eval(arguments)))) + "\\n")
"""


def code_of(text: str) -> str:
    """The last fenced block of Python, or of no named language; else everything."""
    pieces = text.split(
        "```"
    )  # those with odd numbers stand inside fences; the last is not closed where their number is even
    inside = [piece.partition("\n") for piece in pieces[1 : len(pieces) - 1 : 2]]
    blocks = [
        body
        for language, line_end, body in inside
        if line_end and language.strip().lower() in ("", "py", "python", "python3")
    ]
    return blocks[-1] if blocks else text


def outputs(code: str, entry_point: str, inputs: Sequence[str], *, timeout_s: float) -> list[str] | None:
    """`repr` of what the function returns for each list of arguments (Python literals); None when it raises,
    ends or takes too long. Sets keep one order (PYTHONHASHSEED). Raises RuntimeError when the sandbox itself
    does not work."""
    runner = RUNNER.format(memory=MEMORY_BYTES, seconds=math.ceil(timeout_s), file=FILE_BYTES)
    roots = [p for place in {sys.base_prefix, *LIBRARIES} for p in ("--ro-bind-try", place, place)]
    python: str = sys._base_executable  # type: ignore[attr-defined]
    alone = [
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--setenv",
        "PYTHONHASHSEED",
        "0",
    ]
    folders = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    command = ["bwrap", *alone, *roots, *folders, python, "-s", "-c", runner]
    asked = json.dumps({"code": code, "entry_point": entry_point, "inputs": list(inputs)})
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=timeout_s + 5, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return None
    if "bwrap: " in done.stderr:
        raise RuntimeError(f"bubblewrap does not work here: {done.stderr.strip()[:200]}")
    lines = done.stdout.splitlines()
    return (
        [json.loads(line) for line in lines] if done.returncode == 0 and len(lines) == len(inputs) else None
    )


@lru_cache(maxsize=4096)
def expected_outputs(code: str, entry_point: str, inputs: tuple[str, ...], timeout_s: float) -> list[str]:
    found = outputs(code, entry_point, inputs, timeout_s=timeout_s)
    if found is None:
        raise RuntimeError(f"the canonical solution of {entry_point} does not run")
    return found


def equal(found: str, right: str, atol: float) -> bool:
    """Whether two results, as `repr`, are the same; floats within atol (1e-6 where it is 0), as EvalPlus
    compares them."""
    if found == right:
        return True
    try:
        return _equal(ast.literal_eval(found), ast.literal_eval(right), atol or 1e-6)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _equal(a: Any, b: Any, atol: float) -> bool:
    if isinstance(b, float) and isinstance(a, int | float):
        return math.isclose(a, b, rel_tol=0.0, abs_tol=atol) or (math.isnan(a) and math.isnan(b))
    if isinstance(b, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(_equal(x, y, atol) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def check_evalplus(arguments: Mapping[str, Any]) -> None:
    """Called before a run starts. Raises ConfigError where code may not, or can't safely, be run."""
    if arguments.get("allow_code_execution") is not True:
        raise ConfigError(
            "arguments.allow_code_execution: this reward runs code that models write; set it to true to "
            "allow that"
        )
    if shutil.which("bwrap") is None:
        raise ConfigError(
            "function: code runs only inside bubblewrap, and there is no bwrap here; install the package "
            "bubblewrap"
        )


@reads_text
def evalplus(
    prompts: list[str],
    completions: list[str],
    *,
    entry_point: list[str],
    canonical_solution: list[str],
    base_input: list[Any],
    plus_input: list[Any],
    prompt: list[str] | None = None,
    atol: list[float] | None = None,
    allow_code_execution: bool = False,
    timeout_s: PositiveFloat = 5.0,
    concurrency: Positive = 2,
    **_: Any,
) -> list[float | None]:
    """1 when the completion's function gives what the canonical solution gives on every base and plus input
    (HumanEval+ and MBPP+ rows, arXiv 2305.01210), else 0. Raises RuntimeError where no sandbox works."""
    if not allow_code_execution:
        raise RuntimeError("allow_code_execution is off")

    def one(i: int) -> float:
        inputs = tuple(repr(tuple(a)) for a in (*base_input[i], *plus_input[i]))
        body = canonical_solution[i]
        reference = (
            body if f"def {entry_point[i]}" in body else f"{prompt[i] if prompt else prompts[i]}{body}"
        )
        right = expected_outputs(reference, entry_point[i], inputs, timeout_s)
        found = outputs(code_of(completions[i]), entry_point[i], inputs, timeout_s=timeout_s)
        tolerance = float(atol[i]) if atol else 0.0
        return float(
            found is not None and all(equal(f, r, tolerance) for f, r in zip(found, right, strict=True))
        )

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, range(len(completions))))


evalplus.check = check_evalplus  # type: ignore[attr-defined]

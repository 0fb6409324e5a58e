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
from frpo.rewards.signatures import reads_text

MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
LANGUAGES = ("", "py", "python", "python3")
LIBRARIES = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")

RUNNER = """
import ast, json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({file}, {file}))
resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
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
    # those with odd numbers stand inside fences; the last is not closed where their number is even
    pieces = text.split("```")
    code = text
    for piece in pieces[1 : len(pieces) - 1 : 2]:
        language, line_end, body = piece.partition("\n")
        if line_end and language.strip().lower() in LANGUAGES:
            code = body
    return code


def run_function(code: str, entry_point: str, inputs: Sequence[str], *, timeout_s: float) -> list[str] | None:
    """`repr` of what the function returns for each list of arguments (Python literals); None when it raises,
    ends or takes too long. Sets keep one order (PYTHONHASHSEED). Raises RuntimeError when the sandbox itself
    does not work."""
    asked = json.dumps({"code": code, "entry_point": entry_point, "inputs": list(inputs)})
    try:
        done = subprocess.run(
            _sandbox_command(timeout_s),
            input=asked,
            capture_output=True,
            text=True,
            timeout=timeout_s + 5,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return None
    if "bwrap: " in done.stderr:
        raise RuntimeError(f"bubblewrap does not work here: {done.stderr.strip()[:200]}")
    lines = done.stdout.splitlines()
    if done.returncode != 0 or len(lines) != len(inputs):
        return None
    return [json.loads(line) for line in lines]


def _sandbox_command(timeout_s: float) -> list[str]:
    """bubblewrap around the interpreter that runs RUNNER."""
    alone = ["--unshare-all", "--die-with-parent", "--new-session"]
    environment = ["--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    libraries = list[str]()
    for place in {sys.base_prefix, *LIBRARIES}:
        libraries += ["--ro-bind-try", place, place]
    folders = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    python: str = sys._base_executable  # type: ignore[attr-defined]
    runner = RUNNER.format(memory=MEMORY_BYTES, seconds=math.ceil(timeout_s), file=FILE_BYTES)
    return ["bwrap", *alone, *environment, *libraries, *folders, python, "-s", "-c", runner]


@lru_cache(maxsize=4096)
def expected_outputs(code: str, entry_point: str, inputs: tuple[str, ...], timeout_s: float) -> list[str]:
    """`run_function` of the canonical solution, once for all completions. Raises RuntimeError where it does
    not run."""
    results = run_function(code, entry_point, inputs, timeout_s=timeout_s)
    if results is None:
        raise RuntimeError(f"the canonical solution of {entry_point} does not run")
    return results


def is_equal(result: str, right: str, atol: float) -> bool:
    """Whether two results, as `repr`, are the same; floats within atol (1e-6 where it is 0), as EvalPlus
    compares them."""
    if result == right:
        return True
    try:
        return _are_close(ast.literal_eval(result), ast.literal_eval(right), atol or 1e-6)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _are_close(value: Any, right: Any, atol: float) -> bool:
    if isinstance(right, float) and isinstance(value, int | float):
        both_nan = math.isnan(value) and math.isnan(right)
        return both_nan or math.isclose(value, right, rel_tol=0.0, abs_tol=atol)
    if isinstance(right, list | tuple) and type(value) is type(right):
        if len(value) != len(right):
            return False
        return all(_are_close(one, other, atol) for one, other in zip(value, right, strict=True))
    return bool(value == right)


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

    def score(i: int) -> float:
        inputs = tuple(repr(tuple(arguments)) for arguments in (*base_input[i], *plus_input[i]))
        solution = canonical_solution[i]
        if f"def {entry_point[i]}" not in solution:  # the body alone: the prompt ends with its signature
            solution = (prompt or prompts)[i] + solution
        right = expected_outputs(solution, entry_point[i], inputs, timeout_s)
        results = run_function(code_of(completions[i]), entry_point[i], inputs, timeout_s=timeout_s)
        if results is None:
            return 0.0
        tolerance = float(atol[i]) if atol else 0.0
        pairs = zip(results, right, strict=True)
        return float(all(is_equal(result, expected, tolerance) for result, expected in pairs))

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(score, range(len(completions))))


evalplus.check = check_evalplus  # type: ignore[attr-defined]

"""Which changes of the code would no test notice? `make mutants`: mutmut makes them, forks of one process
test them.

The modules of `[tool.mutmut]` are written into mutants/, every function with all its mutants beside it, and
the tests with them. One pytest collects the tests and runs each once, to see which functions it reaches and
what it costs. Then every mutant has a fork of that process, which runs the tests that reach its function, the
cheapest first, until one fails. (`mutmut run` does the same, but starts pytest anew in each fork and knows no
order: ten times as long.)

    python tests/mutants.py                        # all
    python tests/mutants.py frpo/packing.py --tests tests/unit/test_packing.py
    python tests/mutants.py --again                # those that survived the last time, unexplained

Prints each survivor that tests/mutants.md doesn't explain, and a table; ends with 1 where there is one.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import itertools
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from mutmut.configuration import config
from mutmut.mutation.file_mutation import MutatedFile, mutate_file_contents
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

COPY = Path("mutants")
EXPLAINED = Path("tests/mutants.md")
SURVIVORS = COPY / "survivors.txt"
STRICT = re.compile(r", strict=\w+|, (?=\))")
"""zip's own assertion: that a test would miss it says nothing of a number."""
WALL_S = 600
"""A mutant that waits this long is killed, and counts as killed."""


@dataclass(frozen=True)
class Mutant:
    file: str
    name: str
    """As mutmut knows it: frpo.objective.x_tilt__mutmut_3."""
    change: str
    """As tests/mutants.md lists it: objective.measure_tilt: `old line` → `new line`."""

    @property
    def function(self) -> str:
        return self.name.partition("__mutmut_")[0]


def write_mutants(file: str) -> list[Mutant]:
    """Write a module with its mutants into the copy."""
    made = mutate_file_contents(file, Path(file).read_text())
    (COPY / file).write_text(made.code)
    module = file.removesuffix(".py").replace("/", ".")
    mutants = []
    for name in made.mutant_names:
        old, new = changed_lines(made, name)
        if STRICT.sub("", old) != STRICT.sub("", new):
            function = name.partition("__mutmut")[0][2:].replace("ǁ", ".")  # of x_tilt, or xǁTableǁof
            change = f"{Path(file).stem}.{function}: `{old}` → `{new}`"
            mutants.append(Mutant(file, f"{module}.{name}", change))
    return mutants


def changed_lines(made: MutatedFile, name: str) -> tuple[str, str]:
    """What a mutant has instead of the original, each in one line."""
    original = name.rpartition("_")[0] + "_orig"
    before, after = (source_of(made, each) for each in (original, name))
    lines = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    old, new = (" ".join(line[2:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return old, new.replace(", )", ")")


def source_of(made: MutatedFile, name: str) -> list[str]:
    span = made.line_span_by_function_name[name]
    return [line.replace(name, "f") for line in made.code.splitlines()[span.start - 1 : span.end]]


class Forks:
    """Instead of pytest's own loop over the tests: one fork for each mutant."""

    def __init__(self, mutants: Sequence[Mutant], jobs: int) -> None:
        self.mutants, self.jobs = mutants, jobs
        self.survivors: list[Mutant] = []
        self.done = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            pytest.exit("a file of tests can't be read", returncode=2)
        reached, seconds = watch(session.items)
        cheapest = sorted(session.items, key=lambda item: seconds[item.nodeid])
        running: dict[int, Mutant] = {}
        gc.freeze()  # else each fork would copy all memory as soon as it collects garbage
        gc.disable()
        for mutant in self.mutants:
            items = [item for item in cheapest if mutant.function in reached[item.nodeid]]
            limit_s = 10 + 10 * sum(seconds[item.nodeid] for item in items)
            running[start(mutant, items, limit_s)] = mutant
            if len(running) == self.jobs:
                self.await_one(running)
        while running:
            self.await_one(running)
        return True

    def await_one(self, running: dict[int, Mutant]) -> None:
        pid, status = os.wait()
        mutant = running.pop(pid)
        self.done += 1
        if status == 0:
            self.survivors.append(mutant)
            print(
                f"{self.done} of {len(self.mutants)}, survivor {len(self.survivors)}: {mutant.change}",
                flush=True,
            )


def watch(items: Sequence[pytest.Item]) -> tuple[dict[str, set[str]], dict[str, float]]:
    """Run each test once: the functions that it reaches, and its CPU seconds."""
    set_mutant_under_test("stats")
    os.environ["MUTMUT_DEPENDENCY_DEPTH"] = "-1"
    reached, seconds = dict[str, set[str]](), dict[str, float]()
    for item in items:
        state()._stats.clear()
        began = time.process_time()
        if not passes(item):
            pytest.exit(f"{item.nodeid} fails without any mutant", returncode=2)
        reached[item.nodeid], seconds[item.nodeid] = set(state()._stats), time.process_time() - began
    return reached, seconds


def passes(item: pytest.Item) -> bool:
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def start(mutant: Mutant, items: Sequence[pytest.Item], limit_s: float) -> int:
    """Test one mutant in a fork, which ends with 0 where all tests pass; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 1))
        signal.alarm(WALL_S)
        set_mutant_under_test(mutant.name)
        os._exit(0 if all(passes(item) for item in items) else 1)
    except BaseException:
        os._exit(1)


def explained() -> set[str]:
    return {line[2:] for line in EXPLAINED.read_text().splitlines() if line.startswith("- ")}


def table(mutants: Sequence[Mutant], survivors: Sequence[Mutant]) -> Iterator[str]:
    made, alive = (Counter(mutant.file for mutant in each) for each in (mutants, survivors))
    yield "| module | mutants | survive | share |"
    yield "| --- | --- | --- | --- |"
    rows = [*((file, made[file], alive[file]) for file in made), ("all", made.total(), alive.total())]
    for name, of, left in rows:
        yield f"| {name} | {of} | {left} | {left / of:.1%} |"


def copy_repository() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    for path in [*config().source_paths, *config().also_copy]:
        if path.is_dir():
            shutil.copytree(
                path, COPY / path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif path.exists():
            shutil.copy(path, COPY / path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=config().only_mutate)
    parser.add_argument("--tests", nargs="+", default=config().pytest_add_cli_args_test_selection)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--every", type=int, default=1, help="test one mutant in so many")
    parser.add_argument(
        "--again", action="store_true", help="only those that survived the last time unexplained"
    )
    chosen = parser.parse_args()
    known = explained()
    last = SURVIVORS.read_text().splitlines() if chosen.again else []

    copy_repository()
    written = [write_mutants(file) for file in chosen.files]
    mutants = list(itertools.chain.from_iterable(written))[:: chosen.every]
    if chosen.again:
        mutants = [mutant for mutant in mutants if mutant.name in last and mutant.change not in known]

    os.chdir(COPY)
    sys.path[0] = os.getcwd()
    forks = Forks(mutants, chosen.jobs)
    ending = pytest.main([*config().pytest_add_cli_args, *chosen.tests], plugins=[forks])
    os.chdir("..")
    if ending != 0:
        return int(ending)

    survivors = sorted(forks.survivors, key=mutants.index)
    SURVIVORS.write_text("".join(f"{mutant.name}\n" for mutant in survivors))
    unexplained = [mutant for mutant in survivors if mutant.change not in known]
    print("\n", *(f"- {mutant.change}" for mutant in unexplained), "", *table(mutants, survivors), sep="\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())

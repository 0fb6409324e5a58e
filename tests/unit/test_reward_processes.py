"""Reward functions in processes: what hangs, dies or breaks costs one completion its reward, and nothing of
it goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from frpo.config import FunctionReward
from frpo.rewards import pool
from frpo.rewards.scoring import RewardScorer
from frpo.types import Item, Reward

CODE = """
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent

def each(completions, bad):
    for c in completions:
        if "bad" in c:
            (HERE / f"{os.getpid()}.pid").touch()
            bad()
    return [float(len(c)) for c in completions]

def in_c(completions, **_):
    return each(completions, lambda: 9 ** (9 ** 8))  # holds the interpreter: no thread can end it
def sleeps(completions, **_): return each(completions, lambda: time.sleep(100))
def deaf(completions, **_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return each(completions, lambda: time.sleep(100))
def exits(completions, **_): return each(completions, lambda: os._exit(3))
def crashes(completions, **_): return each(completions, lambda: os.kill(os.getpid(), signal.SIGSEGV))
def raises(completions, **_): return each(completions, lambda: 1 / 0)
def leaves(completions, **_): return each(completions, lambda: sys.exit(3))
def recursive(completions, **_):
    def deeper(): return deeper()
    return each(completions, deeper)
def mute(completions, **_):
    class Mute(Exception):
        def __str__(self): raise ValueError
    def bad(): raise Mute
    return each(completions, bad)
def drops(completions, **_): return [1.0 for c in completions if "bad" not in c]
def constant(completions, **_): return [1.0]
def scalar(completions, **_): return 1.0

def starts(completions, **_):
    def bad():
        child = subprocess.Popen(["sleep", "100"])
        (HERE / f"{child.pid}.pid").touch()
        inner = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
        inner.start()
        (HERE / f"{inner.pid}.pid").touch()
        time.sleep(100)
    return each(completions, bad)

def detaches(completions, **_):
    def bad():
        child = subprocess.Popen(["sleep", "100"], start_new_session=True)
        (HERE / f"{child.pid}.pid").touch()
        child.wait()
    return each(completions, bad)

def torn(completions, **_):
    def bad(): raise ValueError(chr(0xD800))
    return each(completions, bad)

def imports(completions, **_):
    import slow_to_import
    return [slow_to_import.VALUE for _ in completions]

def environment(completions, **_): return [float(os.environ["REWARD_SETTING"])] * len(completions)

def pid(completions, **_): return [float(os.getpid())] * len(completions)

def named(completions, how): return globals()[how[0]](completions)
"""
T = 0.8


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Callable[..., RewardScorer]]:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\nVALUE = 0.5\n")
    made: list[RewardScorer] = []

    def make(name: str, **fields: Any) -> RewardScorer:
        asked = {"timeout_s": T, "function": f"{tmp_path / 'mine.py'}:{name}"} | fields
        made.append(RewardScorer([FunctionReward(kind="function", name="mine", **asked)]))
        return made[-1]

    yield make
    for each in made:
        each.close()


def items(*completions: str) -> list[Item]:
    return [Item("p", c, "t", {}) for c in completions]


def outcome(rewards: list[Reward]) -> list[tuple[float | None, str | None]]:
    return [(r.total, r.error) for r in rewards]


def gone(folder: Path, limit_s: float = 5.0) -> bool:
    """Whether all processes that left their number in the folder have ended. Waits: the kernel takes its
    time."""
    deadline = time.monotonic() + limit_s
    while any(alive(int(f.stem)) for f in folder.glob("*.pid")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LATE = f"mine: took longer than {T:g} s (rewards.mine.timeout_s)"


@pytest.fixture(scope="module")
def any_function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardScorer]:
    """Processes that call the function which the column `how` names."""
    file = tmp_path_factory.mktemp("functions") / "mine.py"
    file.write_text(CODE)
    reward = FunctionReward(kind="function", name="mine", function=f"{file}:named", timeout_s=T)
    rewards = RewardScorer([reward])
    rewards.load()
    yield rewards
    rewards.close()


def items_for(how: str, *completions: str) -> list[Item]:
    return [Item("p", c, "t", {"how": how}) for c in completions]


def score_in_time(rewards: RewardScorer, how: str) -> list[tuple[float | None, str | None]]:
    """Of four completions, the third of which is at fault."""
    began = time.monotonic()
    got = outcome(rewards.score(items_for(how, "a", "bb", "bad", "dddd")))
    assert time.monotonic() - began < 2 * T + 3
    return got


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("exits", "mine: its process ended (exit code 3)"),
        ("crashes", "mine: its process ended (SIGSEGV)"),
        ("raises", "mine: ZeroDivisionError: division by zero"),
        ("leaves", "mine: SystemExit: 3"),
        ("recursive", "mine: RecursionError: maximum recursion depth exceeded"),
        ("mute", "mine: Mute: "),
        (
            "torn",
            "mine: ValueError: \\ud800",
        ),  # half of a surrogate pair: no log and no answer of a service could hold it
        ("drops", "mine: gave 0 values for 1 completions"),
    ],
)
def test_the_completion_at_fault_alone_loses_its_reward(
    any_function: RewardScorer, name: str, why: str
) -> None:
    values = (1.0, 1.0, 1.0) if name == "drops" else (1.0, 2.0, 4.0)
    got = score_in_time(any_function, name)
    assert got == [(values[0], None), (values[1], None), (None, why), (values[2], None)]
    assert any_function.score(items_for(name, "aa"))[0].total == values[1]


def test_the_late_completion_alone_loses_its_reward_and_nothing_of_it_goes_on(
    scorer: Callable[..., RewardScorer], tmp_path: Path
) -> None:
    names = ("in_c", "sleeps", "starts", "detaches")
    late = [scorer(name) for name in names]
    with ThreadPoolExecutor(len(late)) as side_by_side:
        list(side_by_side.map(RewardScorer.load, late))
        got = list(side_by_side.map(score_in_time, late, names))
    assert got == [[(1.0, None), (2.0, None), (None, LATE), (4.0, None)]] * len(late)
    assert gone(tmp_path)
    assert [rewards.score(items("aa"))[0].total for rewards in late] == [2.0] * len(late)


@pytest.mark.long
def test_a_function_that_ignores_the_polite_signal_is_killed(
    scorer: Callable[..., RewardScorer], tmp_path: Path
) -> None:
    assert outcome(scorer("deaf").score(items("bad"))) == [(None, LATE)]
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("constant", "mine: gave 1 values for 3 completions"),
        ("scalar", "mine: TypeError: gave a float, not one value per completion"),
    ],
)
def test_values_that_are_not_those_of_completions_fail(
    any_function: RewardScorer, name: str, why: str
) -> None:
    assert outcome(any_function.score(items_for(name, "a", "b", "c"))) == [(None, why)] * 3


@pytest.mark.long
def test_a_whole_group_at_fault_takes_no_more_than_twice_the_limit(
    scorer: Callable[..., RewardScorer], tmp_path: Path
) -> None:
    rewards = scorer("in_c")
    rewards.load()
    began = time.monotonic()
    assert outcome(rewards.score(items(*["bad"] * 8))) == [(None, LATE)] * 8
    assert time.monotonic() - began < 2 * T + 3
    assert gone(tmp_path)


@pytest.mark.long
def test_others_are_scored_while_one_hangs(scorer: Callable[..., RewardScorer]) -> None:
    rewards = scorer("in_c", timeout_s=3.0)
    rewards.load()
    stuck = threading.Thread(target=rewards.score, args=(items("bad"),))
    stuck.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert [rewards.score(items("aa"))[0].total for _ in range(20)] == [2.0] * 20
    assert time.monotonic() - began < 1.5
    assert stuck.is_alive()
    stuck.join()


def test_a_process_that_dies_idle_is_replaced(scorer: Callable[..., RewardScorer]) -> None:
    rewards = scorer("pid", timeout_s=10.0)
    rewards.load()
    for _ in range(2):
        before = [int(rewards.score(items("x"))[0].total or 0) for _ in range(10)]
        os.kill(before[-1], signal.SIGKILL)
        (after,) = rewards.score(items("x"))
        assert after.error is None
        assert after.total != before[-1]


def test_a_call_that_reached_nobody_is_made_again_once(
    scorer: Callable[..., RewardScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that comes when a process has ended idle and the pool does not know yet."""
    reach, lost = pool.Functions._call, [1, 1, 1]

    def lose(self: Any, *asked: Any) -> Any:
        future = reach(self, *asked)
        if not lost:
            return future
        lost.pop()
        future.result()
        never: Any = Future()
        never.set_exception(BrokenProcessPool("All workers expired"))
        return never

    monkeypatch.setattr(pool.Functions, "_call", lose)
    rewards = scorer("pid", timeout_s=10.0)
    assert rewards.score(items("x"))[0].error == "mine: BrokenProcessPool: All workers expired"
    assert rewards.score(items("x"))[0].error is None
    assert lost == []


def test_what_a_function_imports_is_imported_before_its_first_call(
    scorer: Callable[..., RewardScorer],
) -> None:
    assert outcome(scorer("imports").score(items("a", "b"))) == [(0.5, None)] * 2


def test_processes_have_the_environment_of_their_actor(
    scorer: Callable[..., RewardScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (1.0, 2.0):
        monkeypatch.setenv("REWARD_SETTING", str(value))
        assert scorer("environment").score(items("a"))[0].total == value


@pytest.mark.long
def test_a_function_that_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\ndef f(completions): return []\n")
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(100)\ndef f(completions): return []\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.setattr(pool, "LOAD_LIMIT_S", 2.0)
    for name, message in (
        (
            "broken",
            "rewards.0.function: .*broken.py' cannot be imported: ModuleNotFoundError: No module named "
            "'no_such_module'",
        ),
        ("waits", "the rewards mine did not load within 2 s: what do their files wait for?"),
        ("dies", "a process ended while it loaded the rewards mine; see what it printed"),
    ):
        rewards = RewardScorer(
            [FunctionReward(kind="function", name="mine", function=f"{tmp_path / name}.py:f")]
        )
        with pytest.raises(RuntimeError, match=message.replace("?", r"\?")):
            rewards.load()
        rewards.close()


@pytest.mark.long
def test_boxed_math_on_a_tower_of_powers(scorer: Callable[..., RewardScorer]) -> None:
    rewards = scorer("", function="frpo.rewards:boxed_math", timeout_s=4.0)
    rewards.load()
    asked = [
        Item("p", c, "t", {"answer": "81"})
        for c in (r"\boxed{81}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9^2}", "none")
    ]
    assert [r.total for r in rewards.score(asked)] == [1.0, None, 1.0, 0.0]

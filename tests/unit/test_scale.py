"""The arithmetic of the simulated engines and clocks in benchmarks/scale_parts: finish times known by hand,
and that nothing is lost or drawn twice."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from queue import Empty

import pytest

from benchmarks.scale_parts.engines import Engine, Meter, Request, Span, Speed
from benchmarks.scale_parts.partners import Cards
from benchmarks.scale_parts.simulation import Lengths, Scenario, Simulation
from benchmarks.scale_parts.timeline import Later, Mailbox, Timeline
from frpo import clock

SPEED = Speed(slots=2, step_s=1.0, sequence_s=0.5)
"""One sequence takes 1.5 s a token, two take 2 s."""


class Played:
    """An engine that runs version 0, and when each of its requests was done."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.engine = Engine(self.timeline, SPEED)
        self.engine.load(0, 0.0, in_flight=True, on_done=lambda: None)
        self.timeline.run_next()
        self.done: dict[str, tuple[float, list[list[Span]]]] = {}

    def submit(self, name: str, *lengths: int) -> None:
        def finish(spans: list[list[Span]]) -> None:
            self.done[name] = self.timeline.now, spans

        self.engine.submit(Request(lengths, finish))

    def run(self) -> dict[str, float]:
        while self.timeline.events:
            self.timeline.run_next()
        return {name: when for name, (when, _) in self.done.items()}


def test_one_sequence_takes_a_step_a_token() -> None:
    played = Played()
    played.submit("a", 10)
    assert played.run() == pytest.approx({"a": 15.0})


def test_two_at_once_and_the_third_in_the_place_of_the_first() -> None:
    """a (2 tokens) and b (4) take 2 s a token: a ends at 4 s. c (3 tokens) follows it: b ends at 8 s with 2
    of c's tokens drawn, and the last of them takes 1.5 s."""
    played = Played()
    for name, length in (("a", 2), ("b", 4), ("c", 3)):
        played.submit(name, length)
    assert played.run() == pytest.approx({"a": 4.0, "b": 8.0, "c": 9.5})
    assert played.engine.read_meter() == Meter(
        any_s=pytest.approx(9.5),
        full_s=pytest.approx(8.0),
        place_s=pytest.approx(17.5),
        tokens=pytest.approx(9),
    )


def test_a_group_is_there_with_its_longest_completion() -> None:
    played = Played()
    played.submit("group", 1, 3)
    assert played.run() == pytest.approx({"group": 2.0 + 2 * 1.5})


def test_weights_in_flight_stop_the_engine_and_tokens_say_which_version_drew_them() -> None:
    """Three of ten tokens are drawn in 4.5 s, then 2 s go by with weights."""
    played = Played()
    played.submit("a", 10)
    played.timeline.call_at(4.5, lambda: played.engine.load(1, 2.0, in_flight=True, on_done=lambda: None))
    assert played.run() == pytest.approx({"a": 17.0})
    ((first, second),) = played.done["a"][1]
    assert (first.version, second.version) == (0, 1)
    assert (first.tokens, second.tokens) == pytest.approx((3.0, 7.0))


def test_drained_weights_wait_for_all_that_was_asked_for_and_what_comes_then_waits_for_them() -> None:
    """a and b end at 4 s, c at 5.5 s; the weights take 2 s; d was asked for at 1 s, when the weights had
    come."""
    played = Played()
    for name, length in (("a", 2), ("b", 2), ("c", 1)):
        played.submit(name, length)
    loaded: list[float] = []
    engine, timeline = played.engine, played.timeline
    timeline.call_at(
        1.0, lambda: engine.load(1, 2.0, in_flight=False, on_done=lambda: loaded.append(timeline.now))
    )
    timeline.call_at(1.0, lambda: played.submit("d", 1))
    assert played.run() == pytest.approx({"a": 4.0, "b": 4.0, "c": 5.5, "d": 9.0})
    assert loaded == pytest.approx([7.5])
    assert played.done["c"][1] == [[Span(0, pytest.approx(1.0))]]
    assert played.done["d"][1] == [[Span(1, pytest.approx(1.0))]]


def test_a_mailbox_lets_time_pass_up_to_its_limit() -> None:
    timeline = Timeline()
    mailbox: Mailbox[str] = Mailbox(timeline)
    timeline.call_at(3.0, lambda: mailbox.put("letter"))
    with pytest.raises(Empty):
        mailbox.get(timeout=2.0)
    assert timeline.now == 2.0
    assert mailbox.get(timeout=2.0) == "letter"
    assert timeline.now == 3.0
    with pytest.raises(RuntimeError, match=r"at 3\.0 s somebody waits"):
        mailbox.get()


def test_cards_do_one_piece_of_work_after_the_other() -> None:
    timeline = Timeline()
    cards = Cards(timeline)
    assert (cards.take(2.0), cards.take(3.0)) == (2.0, 5.0)
    Later(timeline, 4.0, None).result()
    assert cards.worked_s() == 4.0
    assert cards.slip_in(1.0) == 5.0
    assert cards.take(1.0) == 7.0


def test_lengths_have_the_mean_that_is_asked_for_after_the_cut() -> None:
    drawn = Lengths(mean=1500, sigma=1.0, limit=4096).draw(20_000, 8)
    assert drawn.mean() == pytest.approx(1500, rel=0.01)
    assert drawn.max() == 4096


SMALL = Scenario(
    engines=2,
    learners=2,
    prompts=8,
    k=2,
    lengths=Lengths(mean=100, sigma=0.5, limit=400),
    update_token_s=1e-3,
    speed=Speed(slots=8),
    warm_up=1,
    measured=4,
)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("in_flight", [True, False])
def test_the_loops_train_on_each_completion_once_and_the_clock_adds_up(
    staleness: int, in_flight: bool
) -> None:
    played = Simulation(replace(SMALL, staleness=staleness, in_flight=in_flight))
    figures = played.play()
    real = clock.time.perf_counter()
    numbers = sorted(chain.from_iterable(step.numbers for step in played.learner.trained))
    assert len(numbers) == len(set(numbers)) == 5 * 8 * 2
    drawn = played.ledger.lengths.reshape(-1)[numbers].sum()
    assert sum(step.tokens for step in played.learner.trained) == drawn
    phases = sum(figures[name] for name in ("generate_s", "score_s", "update_s", "publish_s"))
    assert figures["step_s"] == pytest.approx(phases)
    assert figures["max_staleness"] <= staleness
    assert 0 < figures["engine_use_places"] <= figures["engine_use_any"] <= 1
    assert real != played.timeline.now  # the driver's clock is the machine's again


def test_without_staleness_a_step_is_its_longest_completions_and_the_update() -> None:
    """One engine with places for all: the fewer are left, the faster are their tokens drawn."""
    scenario = replace(
        SMALL, engines=1, learners=1, speed=Speed(slots=64), reward_s=0.5, warm_up=1, measured=1
    )
    played = Simulation(scenario)
    figures = played.play()
    lengths = sorted(played.ledger.lengths[8:16].reshape(-1))
    seconds = 0.0
    before = 0
    for place, length in enumerate(lengths):
        seconds += (length - before) * scenario.speed.step_of(len(lengths) - place)
        before = length
    assert figures["generate_s"] == pytest.approx(seconds)
    assert figures["score_s"] == pytest.approx(0.5)
    assert figures["update_s"] == pytest.approx(sum(lengths) * 1e-3)
    assert figures["publish_s"] == pytest.approx(0.5)

"""THE LOOP, ahead of the learner: `rollout.staleness` of 1 or more. The engines draw on while the learner
updates, within the window of `frpo.window`; else a step is what it is in `frpo.driver`. One thread; where it
waits it says what it consumes, what it waits for and who unblocks it.

    prompts -> window -> engines -> rewards, reference -> batch -> learner -> publish -> window
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from frpo import driver, steering
from frpo.clock import Clock
from frpo.config import ArmConfig, Config
from frpo.driver import Partners, Start, Step
from frpo.roles import Running
from frpo.seeds import derive
from frpo.stats import StepMetrics
from frpo.stops import stop_if_update_is_broken
from frpo.types import Arrival, Ticket
from frpo.window import Window


class Stream:
    """Groups drawn within a window, each sent to be scored as soon as it is there."""

    def __init__(self, config: Config, arm: ArmConfig, partners: Partners, begun: Start) -> None:
        self.seed, self.partners, rollout = config.seed, partners, config.rollout
        size, num_steps = rollout.prompts_per_step, arm.learner.num_steps
        self.window = Window(size, rollout.staleness, num_steps, step=begun.step, flight=begun.flight)
        self.session = partners.rollouts.open(driver.sampling_of(config))
        groups = begun.flight.groups if begun.flight else ()
        self.asked = {group.index: driver.ask(partners, Arrival(group)) for group in groups}

    def refill(self) -> None:
        """Give the engines what may begin, as far as they have room."""
        while self.session.room and (number := self.window.begin_next()) is not None:
            seed = derive(self.seed, "rollout", *divmod(number, self.window.size))
            self.session.begin(Ticket(number, self.partners.prompts.at(number), seed), self.window.version)

    def advance(self, until: Running[object] | None = None) -> None:
        """Consumes groups. Waits for one, or for `until`. Unblocked by an engine, `until`, or a limit."""
        self.refill()
        arrivals = self.session.wait(until)
        for number in arrivals.lost:
            self.window.lose(number)
        for arrival in arrivals.arrived:
            self.window.arrive(arrival.group.index, arrival.group.policy_version)
            self.asked[arrival.group.index] = driver.ask(self.partners, arrival)

    def take(self) -> list[driver.Asked]:
        return [self.asked.pop(number) for number in self.window.take()]


def train_ahead(
    config: Config, arm: ArmConfig, partners: Partners, begun: Start, before_update: Callable[[], None]
) -> Iterator[Step]:
    """As `driver.train`; the engines draw on while a yielded step is looked at."""
    step, state = begun.step, begun.steering
    partners.publisher.publish(step)
    stream = Stream(config, arm, partners, begun)
    clock = Clock()
    try:
        while not steering.is_finished(state, arm.learner, step):
            clock.begin_step()
            with clock.phase("generate"):
                # consumes groups; waits for the last of a step; unblocked by the engines that draw them
                while not stream.window.ready:
                    stream.advance()
            asked = driver.ask_policy(arm, partners, stream.take())
            waiting = driver.count_waiting(asked)
            with clock.phase("score"):
                # consumes scores; waits for each group's; unblocked by rewards, reference and learner
                scored = [group.wait() for group in asked]
            with clock.phase("update"):
                batch, stats = driver.make_checked_batch(config, arm, scored, state, step)
                # consumes log-probs; waits for engines and learner, which both unblock between two tokens
                if driver.is_parity_due(config, step, begun):
                    driver.check_parity(config, partners, driver.sample_of(scored), step + 1)
                before_update()
                updating = partners.learner.update(batch)
                # consumes groups of later steps; waits for the learner; unblocked by it, or its limit of time
                while not updating.ready():
                    stream.advance(updating)
                update = updating.result()
                stop_if_update_is_broken(config, update, step + 1)
            step += 1
            with clock.phase("publish"):
                # consumes nothing; waits for the weights to be everywhere; unblocked by the slowest engine
                published = partners.publisher.publish(step)
            stream.window.publish(step)
            stream.refill()
            times = clock.times([group.arrival for group in asked])
            metrics = StepMetrics(step, step, stats, update, clock.phases(*waiting), times, published)
            state = driver.next_state(state, arm, stats, update, step)
            flight = stream.window.flight(asked.group for asked in stream.asked.values())
            last = steering.is_finished(state, arm.learner, step)
            yield Step(metrics, state, last, driver.first_of(scored), flight)
    finally:
        stream.session.close()

"""A folder that has run, and a recipe edited since: on the real engines, as a user does it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from frpo.disk import sha256_of_folder
from frpo.metrics import read_steps
from tests.support import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SETTINGS = (*runs.SHORT, *runs.ONE_ARM)


def digest(folder: Path) -> str:
    return sha256_of_folder(folder / "rlhf" / "frpo" / "policy")


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "twelve"
    runs.run(folder, *SETTINGS, "learner.num_steps=12")
    return digest(folder)


def test_six_more_steps_end_in_the_weights_of_twelve_also_after_a_kill(twelve: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.run(folder, *SETTINGS)
    six = digest(folder)
    assert "Finished already" in runs.run(
        folder, *SETTINGS, "rollout.kv_cache_gib=2", "learner.micro_batch_tokens=9000", "name=other"
    )
    assert six == digest(folder)

    longer = (*SETTINGS, "learner.num_steps=12")
    process = runs.start(folder, *longer)
    runs.wait_for(lambda: len(read_steps(folder, "rlhf/frpo")) >= 9, process)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    said = folder.with_suffix(".out").read_text()
    assert "rlhf/frpo goes on after step 6: arms.frpo.learner.num_steps: 6 -> 12." in said
    assert said.index("goes on after step 6: arms") < said.rindex("loading the libraries")
    runs.run(folder, *longer)
    assert digest(folder) == twelve
    assert [r.step for r in read_steps(folder, "rlhf/frpo")] == list(range(1, 13))
    (aside,) = (folder / "superseded").iterdir()
    assert digest(aside) == six
    assert len(read_steps(aside, "rlhf/frpo")) == 6


def test_what_counts_is_said_and_done_again_and_what_was_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.run(folder, *SETTINGS)
    before, base = digest(folder), (folder / "base" / "done.json").read_bytes()
    said = runs.run(folder, *SETTINGS, "learner.learning_rate=0.002")
    assert (
        "1 of 2 stages is done again from the start: rlhf/frpo. Changed since: "
        "arms.frpo.learner.learning_rate: 0.001 -> 0.002." in said
    )
    assert (folder / "base" / "done.json").read_bytes() == base
    (aside,) = (folder / "superseded").iterdir()
    assert digest(aside) == before != digest(folder)
    assert len(read_steps(aside, "rlhf/frpo")) == len(read_steps(folder, "rlhf/frpo")) == 6

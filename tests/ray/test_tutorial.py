"""docs/tutorial.md: each command and file of it, in order, in an empty folder, prints what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.hub_server import TOKEN, serve_hub
from tests.support.pages import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BESIDE = "in a second terminal"
VARIES = {"RAY_AUTH_MODE", "RAY_ADDRESS", "HF_HUB_OFFLINE", "FRPO_SERVICE_TOKEN"}
"""Variables of the tests that a reader has not."""


@dataclass(frozen=True)
class Reader:
    """Follows the page in a folder."""

    folder: Path
    env: dict[str, str]

    def follow(self, page: str) -> list[str]:
        """All that commands printed. Raises AssertionError at the first block that does not hold."""
        printed = [""]
        for language, title, text in BLOCK.findall(page):
            if language == "text":
                for line in text.splitlines():
                    assert line in printed[-1], (line, printed[-1])
            elif language == "diff":
                self.run(["git", "apply", "-"], text)
            elif language == "bash" and title == BESIDE:
                self.look(text)
            elif language == "bash":
                printed.append(self.run(["bash", "-euo", "pipefail", "-c", text]))
            else:
                assert title, text
                (self.folder / title).write_text(text)
        return printed

    def run(self, command: list[str], given: str = "") -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, input=given, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout

    def look(self, command: str) -> None:
        """At the page that a server shows until it is interrupted."""
        server = subprocess.Popen(
            command.split(), cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
            with urllib.request.urlopen(address, timeout=30) as answer:
                assert "mine" in answer.read().decode()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


def environment() -> dict[str, str]:
    """Of a reader who has installed this checkout."""
    env = {name: value for name, value in os.environ.items() if name not in VARIES}
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT)}


def test_a_reader_is_told_of_a_command_that_fails_and_of_words_that_are_not_printed(tmp_path: Path) -> None:
    reader = Reader(tmp_path, dict(os.environ))
    written = '```json title="a.txt"\nwhat stands there\n```\n```bash\ncat a.txt\n```\n'
    assert reader.follow(written) == ["", "what stands there\n"]
    with pytest.raises(AssertionError, match="what does not"):
        reader.follow(f"{written}```text\nwhat does not\n```\n")
    with pytest.raises(AssertionError, match="No such file"):
        reader.follow("```bash\ncat b.txt\ntrue\n```\n")


def test_no_block_of_the_page_is_left_out() -> None:
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) == len(re.findall(r"^```\w", PAGE, re.MULTILINE))
    commands = "".join(text for language, _, text in blocks if language == "bash")
    asked = ("init", "plan", "run", "watch", "certify", "audit", "push")
    assert [name for name in asked if f"frpo {name}" not in commands] == []


def test_a_reader_comes_to_a_recipe_of_his_own_that_lacks_nothing(tmp_path: Path) -> None:
    """What comes before the run starts no Ray."""
    before, run, _ = PAGE.partition("## 5. Run it")
    assert run
    printed = Reader(tmp_path, environment()).follow(before)
    assert len(printed) == 5
    assert "32 rows read, none wrong" in printed[-1]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_tutorial_goes_from_own_data_to_a_policy_on_the_hub(tmp_path: Path) -> None:
    with serve_hub() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}  # the hub of the test
        Reader(tmp_path, environment() | own).follow(PAGE)
        pushed = hub.repositories["your-name/workshop-assistant"]
    assert pushed.private
    assert pushed.files.keys() >= {"README.md", "config.yaml", "report.json", "model.safetensors"}
    policy = tmp_path / "runs" / "mine" / "rlhf" / "frpo" / "policy"
    assert pushed.files["model.safetensors"] == (policy / "model.safetensors").read_bytes()
    assert (tmp_path / "certificate" / "certificate.json").is_file()

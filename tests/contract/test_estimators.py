"""An estimator is one class, one section and its words: every kind has all three, and a fourth kind is added
here as a user adds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from frpo.config.estimators import ESTIMATORS, EstimatorSection, FrpoEstimator
from frpo.estimators import describe_estimator, make_estimator
from frpo.objective import Groups

ROOT = Path(__file__).parents[2]

ADDED = """\
--- a/frpo/objective.py
+++ b/frpo/objective.py
@@
+@dataclass(frozen=True)
+class MaxRl:
+    \"\"\"A_j = (r_j - mean) / mean of the group; 0 where the mean is not above `least`.\"\"\"
+
+    least: float = 1e-6
+
+    def advantages(self, groups: Groups) -> Tensor:
+        mean = groups.mean
+        return groups.only_pairs(torch.where(mean > self.least, (groups.values - mean) / mean, 0.0))
+
+
 @dataclass(frozen=True)
 class Rloo:
--- a/frpo/config/estimators.py
+++ b/frpo/config/estimators.py
@@
+class MaxRlEstimator(EstimatorSection):
+    kind: Literal["maxrl"] = "maxrl"
+    \"\"\"The reward less the mean of the group, over that mean.\"\"\"
+    least: PositiveFloat = 1e-6
+    \"\"\"Groups whose mean is not above this are left out.\"\"\"
+
+
 def kind_of(estimator: Any) -> str:
@@
-    | Annotated[RlooEstimator, Tag("rloo")],
+    | Annotated[RlooEstimator, Tag("rloo")]
+    | Annotated[MaxRlEstimator, Tag("maxrl")],
--- a/frpo/estimators.py
+++ b/frpo/estimators.py
@@
-from frpo.config import EstimatorConfig, FrpoEstimator, GrpoEstimator, RlooEstimator
+from frpo.config import EstimatorConfig, FrpoEstimator, GrpoEstimator, RlooEstimator
+from frpo.config.estimators import MaxRlEstimator
@@
-    from frpo.objective import Frpo, Grpo, Rloo  # imports torch, which a report does without
+    from frpo.objective import Frpo, Grpo, MaxRl, Rloo  # imports torch, which a report does without
@@
         case RlooEstimator():
             return Rloo()
+        case MaxRlEstimator():
+            return MaxRl(section.least)
@@
         case RlooEstimator():
             return "RLOO"
+        case MaxRlEstimator():
+            return f"MaxRL above {section.least:g}"
"""

USED = """
import sys
from pathlib import Path
import torch
from frpo.estimators import describe_estimator, make_estimator
from frpo.explain import explain_config
from frpo.objective import Groups
from frpo.recipe import load_recipe
from frpo.report.arms import settings_of

sets = ("arms=[{name: a, objective: {estimator: {kind: maxrl, least: 0.1}}}, {name: b}]",)
first, second = (arm.objective for arm in load_recipe(Path(sys.argv[1]), sets).arms)
groups = Groups.of(torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.1]]))
print(make_estimator(first.estimator, None).advantages(groups).tolist())
print(settings_of(first)[1])
print(second.estimator.kind)
print("kind: maxrl" in explain_config(load_recipe(Path(sys.argv[1]), sets)))
"""


def apply(patch: str, root: Path) -> None:
    """A patch whose pieces are found by their text, so that it stands whatever else changes in a file."""
    for part in patch.split("--- a/")[1:]:
        head, *pieces = part.split("@@\n")
        file = root / head.splitlines()[0]
        text = file.read_text()
        for piece in pieces:
            lines = piece.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(old) == 1, f"{file.name}: {old!r} stands there {text.count(old)} times"
            text = text.replace(old, new)
        file.write_text(text)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with one more estimator."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "frpo", root / "frpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    apply(ADDED, root)
    return root


@pytest.mark.long
def test_three_files_make_an_estimator_that_recipes_batches_and_reports_know(extended: Path) -> None:
    command = [sys.executable, "-c", USED, str(ROOT / "recipes" / "testbed.yaml")]
    env = {**os.environ, "PYTHONPATH": str(extended)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=extended)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[[-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]",
        "MaxRL above 0.1, reverse",
        "frpo",
        "True",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["MaxRl(section.least)", 'f"MaxRL above {section.least:g}"'])
def test_a_forgotten_part_fails_in_mypy(extended: Path, tmp_path: Path, forgotten: str) -> None:
    shutil.copytree(extended / "frpo", tmp_path / "frpo")
    shutil.copy(extended / "pyproject.toml", tmp_path)
    file = tmp_path / "frpo" / "estimators.py"
    text = file.read_text()
    file.write_text(text.replace(f"        case MaxRlEstimator():\n            return {forgotten}\n", ""))
    assert file.read_text() != text
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "frpo/estimators.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert 'Argument 1 to "assert_never" has incompatible type "MaxRlEstimator"' in done.stdout, done.stdout


@pytest.mark.parametrize("section", ESTIMATORS)
def test_every_kind_has_a_value_of_its_own_settings_and_words(section: type[EstimatorSection]) -> None:
    chosen = section()
    value = make_estimator(chosen, chosen.temperature)  # type: ignore[arg-type]
    settings = {field.name: getattr(value, field.name) for field in fields(value)}  # type: ignore[arg-type]
    assert settings == chosen.model_dump(exclude={"kind", "rho"})
    groups = Groups.of(torch.tensor([[0.0, 1.0, 0.25], [0.5, 0.5, 0.5]]))
    advantages = value.advantages(groups)
    assert advantages[0, 1] > 0 > advantages[0, 0]
    assert advantages[1].abs().max() < 1e-12
    assert describe_estimator(chosen).startswith(str(chosen.model_dump()["kind"]).upper())  # type: ignore[arg-type]


def test_a_radius_leaves_the_temperature_to_the_batch() -> None:
    assert (FrpoEstimator(rho=0.3).temperature, FrpoEstimator(rho=0.3).radius) == (None, 0.3)
    assert (FrpoEstimator(lam=0.5).temperature, FrpoEstimator(lam=0.5).radius) == (0.5, None)

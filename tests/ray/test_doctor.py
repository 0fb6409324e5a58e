"""What the doctor asks vLLM: it takes that long to import that the fast checks leave it out."""

from __future__ import annotations

import json
from pathlib import Path

from frpo import doctor, testbed
from frpo.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "testbed.yaml"


def test_a_model_that_vllm_serves(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    testbed.write_model(folder, 0)
    assert doctor.check_model(load_recipe(RECIPE, (f"model.path={folder}",))) == doctor.Finding(
        "model", f"{folder}: LlamaForCausalLM"
    )


def test_an_architecture_that_vllm_does_not_serve(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    testbed.write_model(folder, 0)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["NobodysForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    found = doctor.check_model(load_recipe(RECIPE, (f"model.path={folder}",)))
    assert "vLLM does not serve NobodysForCausalLM" in found.found
    assert found.remedy == "choose a model that transformers and vLLM both know"

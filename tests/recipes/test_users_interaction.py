"""A user's own interaction, as recipes/README.md writes it, trains, and scores where it is named."""

import json

import pytest

from tests.recipes.launch import TINY, assert_same_metrics, losses, run_script, summary
from tests.recipes.test_documentation import blocks


@pytest.fixture
def users_file(tmp_path):
    (text,) = [block for _, block in blocks("python") if "register_interaction" in block]
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_an_interaction_of_the_users_file_trains_and_is_evaluated(tmp_path, users_file, click_log):
    run = tmp_path / "run"
    flags = [f"--dataset_name={click_log}", *TINY, f"--output_dir={run}", "--ds_config=ds_configs/zero3.json"]
    model = ("--interactions", json.dumps(["linear", {"kind": "squares", "scale": 0.5}]))
    named = f"--interaction_files={users_file}"
    done = run_script("train.py", *flags, *model, named)
    assert done.status == 0, done.output
    output = tmp_path / "metrics.json"
    scored = (f"--model_name_or_path={run}", f"--output={output}")
    done = run_script("evaluate.py", *scored, named)
    assert done.status == 0, done.output
    assert_same_metrics(json.loads(output.read_text()), summary(run)["test"], 1e-6)
    done = run_script("evaluate.py", *scored)
    assert done.status != 0
    assert "--interaction_files" in done.output


def test_the_production_model_of_the_guide_trains_alike_under_stages_0_and_3(tmp_path, click_log):
    """Also with zero-initialized interactions, a quadratic layer beside them, and a head that reads all layers."""
    (text,) = [block for _, block in blocks("yaml") if "weights_mlp" in block]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{text}  - interactions: [multiplicative]\ninteraction_init: zero\nhead_inputs: all\n")
    found = []
    for stage in (0, 3):
        run = tmp_path / f"stage{stage}"
        flags = [f"--config={path}", f"--dataset_name={click_log}", f"--output_dir={run}", "--max_steps=8"]
        steps = ["--logging_steps=1", "--per_device_train_batch_size=32", f"--ds_config=ds_configs/zero{stage}.json"]
        done = run_script("train.py", *flags, *steps, ranks=2)
        assert done.status == 0, done.output
        found.append({step: float(loss) for step, loss in losses(run).items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(found[0]) == 8


@pytest.mark.parametrize(("text", "words"), [(None, "no such Python file"), ("import math\n", "registers no")])
def test_a_file_without_an_interaction_is_refused(tmp_path, text, words):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text)
    done = run_script("train.py", f"--interaction_files={path}", f"--output_dir={tmp_path / 'run'}")
    assert done.status != 0
    assert f"{path}: {words}" in done.output

"""--config-dir: a user's own options and recipes are composed and checked as mixtrain's are."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import run_train

from mixtrain.config import user_conf
from mixtrain.config.compose import compose
from mixtrain.config.jobs import plan_of
from mixtrain.errors import UserError
from mixtrain.launch.script import render

RECIPE = """# @package _global_
defaults:
  - override /model: mine
name: quick
trainer:
  max_steps: 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(
        "defaults: [mixtral_small]\nnum_layers: 2\n"
    )
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quick.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("flag", [["--config-dir={}"], ["--config-dir", "{}"], ["-cd", "{}"]])
def test_a_users_model_and_recipe_are_composed(own, flag):
    words = [word.format(own) for word in flag]
    (job,), problems = compose([*words, "+recipe=quick"])
    plan = plan_of(job, problems)
    assert (plan.config.model.num_layers, plan.config.trainer.max_steps) == (2, 3)
    assert plan.config.name == "quick" and plan.config.model.hidden_size == 192
    assert job.argv == [f"--config-dir={own}", "+recipe=quick"]
    (again,), _ = compose(job.argv)  # as another node does
    assert again.tree == job.tree


def test_a_folder_of_groups_needs_no_conf_in_it(own):
    (job,), problems = compose([f"--config-dir={own / 'conf'}", "model=mine"])
    assert problems == [] and job.tree.model.num_layers == 2


def problems_with(own, *overrides) -> list[str]:
    try:
        return compose([f"--config-dir={own}", *overrides])[1]
    except UserError as error:
        return error.problems


def test_unknown_keys_and_options_are_refused_as_before(own):
    (problem,) = problems_with(own, "model=mine", "model.num_layer=3")
    assert "did you mean model.num_layers?" in problem
    (problem,) = problems_with(own, "model=others")
    assert "the options of model are mine, mixtral_8x22b" in problem or "mine" in problem


def test_what_is_wrong_in_a_users_file_names_that_file(own):
    path = own / "conf" / "model" / "mine.yaml"
    path.write_text("num_layers: [\n")
    (problem,) = problems_with(own, "model=mine")
    assert problem.startswith(f"{path}, line 2")


@pytest.mark.parametrize(
    "folder, file, message",
    [
        ("conf/model", "mixtral_small.yaml", "mixtrain has model=mixtral_small; rename the file"),
        ("conf/modl", "a.yaml", "conf/modl is not a group of options; these are bench, checkpoint"),
    ],
)
def test_a_name_that_mixtrain_has_and_an_unknown_group_are_refused(own, folder, file, message):
    (own / folder).mkdir(exist_ok=True)
    (own / folder / file).write_text("{}\n")
    (problem,) = problems_with(own)
    assert message in problem


def test_a_folder_that_is_not_there_and_one_without_options_are_refused(tmp_path):
    (problem,) = problems_with(tmp_path / "none")
    assert problem == f"--config-dir: {tmp_path / 'none'} is not a folder"
    (tmp_path / "model").mkdir()
    (problem,) = problems_with(tmp_path)
    assert "has no options" in problem
    with pytest.raises(UserError, match="--config-dir needs a folder"):
        compose(["--config-dir"])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def iterdir(path):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    (tmp_path / "model").mkdir()
    monkeypatch.setattr(user_conf, "_user_options", lambda folder, groups: [*iterdir(folder)])
    (problem,) = problems_with(tmp_path)
    assert problem == f"--config-dir: {tmp_path}: Permission denied"


def test_a_job_has_the_folder_and_its_container_mounts_it(own):
    words = ["trainer=node8", "data=mock", "launcher.container_image=image.sqsh", "model=mine"]
    words += ["data.seq_length=128"]
    jobs, problems = compose([f"--config-dir={own}", *words])
    text = render(plan_of(jobs[0], problems), jobs[0].argv, Path("/submitted/from"))
    assert f"--config-dir={own}" in text and f"/submitted/from,{own}:{own}" in text


def test_the_command_plans_a_users_recipe_from_another_folder(own, tmp_path):
    result = run_train(f"--config-dir={own}", "+recipe=quick", "trainer.mode=plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "recipe                 quick, unchanged" in result.stdout
    assert "16 experts (2 layers x 8)" in result.stdout

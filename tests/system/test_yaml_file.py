"""An error in a recipe or an option is said in one line, with its place, and a small file cannot
become a large one.
"""

from __future__ import annotations

import pytest
from composing import problems_of
from omegaconf import OmegaConf
from test_compose import conf, recipe  # noqa: F401  (a fixture)

from mixtrain.config.compose import file_problems
from mixtrain.errors import UserError
from mixtrain.proof.bench import scenario
from mixtrain.system import yaml_file

HEAD = "# @package _global_\nname: mine\n"
LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10)
)
WRONG = {
    "line 3, column 8: mapping values are not allowed in this context": "seed: 1: 2\n",
    "line 4, column 1: the key seed occurs twice": "seed: 1\nseed: 2\n",
    "line 4, column 1: did not find expected ',' or ']', while parsing a flow sequence": "a: [1\n",
    "line 3, column 4: found undefined alias": "a: *b\n",
    "line 3, column 1: found a tab character that violates indentation": "\tseed: 1\n",
    "line 3, column 4: could not determine a constructor for the tag"
    " 'tag:yaml.org,2002:python/object:os.x'": ("a: !!python/object:os.x {}\n"),
    "line 3, column 8: *a is inside the value that it stands for": "a: &a [*a]\n",
    "line 8, column 58: larger than 4,194,304 bytes when its aliases are expanded": LAUGHS,
    "line 3, column 66: nested more than 64 deep": "a: " + "[" * 100_000,
    "the character 0x1b is not allowed": 'a: "\x1b"\n',
    "keys with values are expected, as in seed: 1": None,
    "larger than 1,048,576 bytes, the most that is read": "a: " + "x" * 2_000_000,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(message, tmp_path):
    text = WRONG[message]
    (tmp_path / "mine.yaml").write_text("- 1\n" if text is None else HEAD + text)
    with pytest.raises(UserError) as refused:
        yaml_file.read(tmp_path / "mine.yaml")
    (problem,) = refused.value.problems
    assert (
        problem.startswith(f"{tmp_path / 'mine.yaml'}")
        and message in problem
        and "\n" not in problem
    )


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(UserError, match="mine.yaml, line 2: not UTF-8"):
        yaml_file.read(tmp_path / "mine.yaml")


def test_an_alias_that_multiplies_nothing_is_read_as_ever(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: &a {x: 1}\nb: *a\nc: [*a, *a]\nd: '${a.x}'\n")
    assert yaml_file.read(tmp_path / "mine.yaml") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": [{"x": 1}] * 2,
        "d": 1,
    }


def test_a_broken_recipe_is_refused_before_hydra_prints_anything(conf, capfd):  # noqa: F811
    (problem,) = problems_of(recipe(conf, HEAD + "trainer: {max_steps: 5\n"), conf=conf)
    assert problem.startswith(f"{conf}/recipe/mine.yaml, line ") and capfd.readouterr() == ("", "")


def test_a_recipe_of_billion_laughs_is_refused_at_once(conf, capfd):  # noqa: F811
    (problem,) = problems_of(
        recipe(conf, HEAD + f"model:\n  extra:\n{LAUGHS.replace('a', '    a', 1)}"), conf=conf
    )
    assert "line" in problem and capfd.readouterr() == ("", "")


def test_every_file_that_is_composed_is_looked_at_and_no_other(conf):  # noqa: F811
    for name in (
        "config",
        "model/mixtral_8x7b",
        "router/sinkhorn",
        "router/none",
        "recipe/mixtral_8x22b_tp2_pp8_ep8",
    ):
        (conf / f"{name}.yaml").write_text("a: [\n")
    assert [problem.split(", line")[0] for problem in file_problems([], conf)] == [
        f"{conf}/config.yaml"
    ]
    found = " ".join(file_problems(["+recipe=mixtral_8x7b_ep8", "router=sinkhorn"], conf))
    assert "model/mixtral_8x7b.yaml" in found  # the recipe's own choice
    assert (
        "router/sinkhorn.yaml" in found and "router/none.yaml" not in found and "8x22b" not in found
    )
    assert "router/none.yaml" in " ".join(file_problems(["router=glob(*)"], conf))


def test_where_in_hydras_code_an_error_was_is_not_shown(conf, capfd):  # noqa: F811
    for text in ("defaults: 5\n", "defaults:\n  - {model: {a: b}}\n", "defaults:\n  - 5\n"):
        (problem,) = problems_of(recipe(conf, HEAD + text), conf=conf)
        shown = capfd.readouterr().err
        assert "Traceback" not in shown and 'File "' not in shown and shown.count("\n") < 10, text
        assert "Hydra could not compose" in problem


def test_interpolations_that_multiply_are_refused_before_they_are_resolved(conf, capfd):  # noqa: F811
    laughs = "".join(f"    a{at}: {f'${{model.extra.a{at + 1}}}' * 10}\n" for at in range(12))
    assert problems_of(
        recipe(conf, f"{HEAD}model:\n  extra:\n{laughs}    a12: lol\n"), conf=conf
    ) == ["model.extra.a0 becomes larger than 4,194,304 bytes when its interpolations are resolved"]
    assert capfd.readouterr().err == ""


def test_interpolations_of_sections_and_of_names_beside_them_are_counted():
    lines = {
        "a": {"b": "${.c}", "c": "${oc.select:d}"},
        "d": "${e}" * 1000,
        "e": "${f}" * 1000,
        "f": "${x}" * 1000,
    }
    assert yaml_file.expansion_problem(OmegaConf.create(lines)).startswith("a.b becomes larger")
    assert (
        yaml_file.expansion_problem(OmegaConf.create({"a": {"b": "${x}"}, "c": "${a}", "x": 1}))
        == ""
    )


def test_a_broken_scenario_of_a_benchmark_is_one_line_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("rows: [\n")
    with pytest.raises(UserError, match=r"mine.yaml, line 2, column 1: "):
        scenario.load(tmp_path / "mine.yaml", {})

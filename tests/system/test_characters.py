"""No control character comes into a configuration, and none that somebody else has written reaches
a terminal.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args, get_origin

import pytest
from composing import plan_of, problems_in, problems_of, quick_tree_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compose import conf, recipe  # noqa: F401  (a fixture)

from mixtrain.characters import CONTROL, escaped, problems
from mixtrain.config.compose import check_overrides
from mixtrain.config.sbatch_directive import directive
from mixtrain.config.schema import legal_keys
from mixtrain.errors import UserError, print_problems
from mixtrain.launch import script

LINE = "x\n#SBATCH --wrap=id"
FORBIDDEN = ["\n", "\r", "\t", "\0", "\x1b[31m", "\x7f", "\x9b", "\u2028", "\u202e", "\udcff"]


def texts() -> list[str]:
    """The keys that take a text, or several."""
    kinds = {key: {kind, *get_args(kind)} for key, kind in legal_keys().items()}
    return [
        key
        for key, kind in kinds.items()
        if str in kind and get_origin(legal_keys()[key]) is not dict
    ]


def test_a_word_with_a_control_character_is_refused_before_it_composes():
    kept, found = check_overrides([f"name='a{sign}b'" for sign in FORBIDDEN] + ["seed=1"])
    assert kept == ["seed=1"] and len(found) == len(FORBIDDEN)
    assert all(problem.endswith("has a control character; take it out") for problem in found)


def test_every_key_that_takes_text_refuses_every_control_character():
    chosen = {key: FORBIDDEN[number % len(FORBIDDEN)] for number, key in enumerate(2 * texts())}
    assert {"name", "run_dir", "launcher.env_file", "launcher.container_mounts"} <= set(chosen)
    found = problems_in(quick_tree_of(), {key: f"a{sign}" for key, sign in chosen.items()})
    for key, sign in chosen.items():
        assert (
            f"{key} = a{escaped(sign)} has the control character {escaped(sign[0])}; take it out"
            in found
        )
    for sign in FORBIDDEN:
        assert list(problems("name", f"a{sign}"))


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"launcher.sbatch_args": {"comment": LINE}},
            "launcher.sbatch_args.comment = x\\n#SBATCH --wrap=id has",
        ),
        (
            {"launcher.sbatch_args": {"a\nb": 1}},
            "the key launcher.sbatch_args.a\\nb has the control character \\n",
        ),
        (
            {"launcher.sbatch_args": {"mail_type": ["END", "a\x1b"]}},
            "launcher.sbatch_args.mail_type = a\\x1b has",
        ),
        (
            {"model.extra": {"a": {"b": [{"c": "\r"}]}}},
            "model.extra.a.b.c = \\r has the control character \\r",
        ),
        ({"launcher.container_mounts": ["/a", "/b\n"]}, "launcher.container_mounts = /b\\n has"),
        ({"na\x1bme": 1}, "the key na\\x1bme has the control character \\x1b"),
    ],
)
def test_what_a_free_mapping_or_a_list_holds_is_looked_at_too(values, message):
    (problem,) = problems_in(quick_tree_of(), values)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "text", ['name: "x\\n#SBATCH --wrap=id"', "name: |\n  x\n  y\n", 'run_dir: "a\\e[2Jb"']
)
def test_a_recipe_cannot_put_a_line_or_an_escape_code_into_a_name(conf, text):  # noqa: F811
    problem, *more = problems_of(recipe(conf, f"# @package _global_\n{text}\n"), conf=conf)
    assert "has the control character" in problem and not CONTROL.search(problem)
    assert all(line.startswith("run_dir = ") for line in more)  # which has the name in it


def test_an_environment_variable_cannot_put_a_line_into_a_name(monkeypatch):
    monkeypatch.setenv("SITE", LINE)
    problem, _ = problems_of("name='${oc.env:SITE}'")
    assert problem.startswith("name = x\\n#SBATCH --wrap=id has the control character")


# The job's directives


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.one_of(
        st.text(max_size=20),
        st.lists(st.text(max_size=5), max_size=3),
        st.integers(),
        st.just(LINE),
    )
)
def test_a_directive_is_read_back_as_it_was_given_or_refused(value):
    text = ",".join(value) if isinstance(value, list) else str(value)
    try:
        line = directive("comment", value, "launcher.sbatch_args.comment")
    except UserError:
        assert CONTROL.search(text) or '"' in text or "\\" in text
    else:
        assert line.startswith("#SBATCH ") and line.count("\n") == 1 and line.endswith("\n")
        assert shlex.split(line.removeprefix("#SBATCH "), comments=True) == [f"--comment={text}"]


@pytest.mark.parametrize("value", [{"a": 1}, [{"a": 1}], 'a"b', "a\\b", "a\nb"])
def test_what_no_directive_can_hold_is_refused_in_the_plan(value):
    (problem,) = problems_in(quick_tree_of(), {"launcher.sbatch_args": {"comment": value}})
    assert problem.startswith("launcher.sbatch_args.comment") and "take it out" in problem


def test_a_folder_whose_name_is_a_line_of_its_own_gives_no_script():
    with pytest.raises(
        UserError, match=r"^the folder and run_dir = /home/me\\n#SBATCH --wrap=id/runs/"
    ):
        script.render(plan_of(), [], Path("/home/me\n#SBATCH --wrap=id"))


def test_a_percent_sign_of_a_path_is_not_slurms_in_the_name_of_the_log():
    text = script.render(plan_of("run_dir='runs/50%j'"), [], Path("/home/me"))
    assert "#SBATCH --output=/home/me/runs/50%%j/logs/job_%j.log\n" in text


# The terminal


def test_a_problem_that_quotes_somebody_elses_text_cannot_move_the_cursor(capsys):
    print_problems(["a\x1b[2Jb\x9b is\tno\nname \u202e", "y" * 10_000])
    shown = capsys.readouterr().err
    assert "  - a\\x1b[2Jb\\x9b is\tno\nname \\u202e\n" in shown
    assert len(shown) < 2200 and shown.endswith("y ...\n")

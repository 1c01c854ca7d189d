"""A key for text gets the characters that were written, or the word or the line is refused with the
quotes it lacks.
"""

from __future__ import annotations

import shlex

import pytest
from composing import problems_of, quick_tree_of, tree_of
from test_characters import texts
from test_compose import conf, recipe  # noqa: F401  (a fixture)
from test_rules_edges import problems

from mixtrain.config.compose import check_overrides
from mixtrain.config.rules.paths import OUTPUT, PATHS
from mixtrain.config.schema import BLEND, legal_keys
from mixtrain.config.typed_config import from_hydra, is_text_key, to_yaml
from mixtrain.errors import UserError

NO_TEXTS = ["1.10", "3e1234", "true", "null", "1_000", "+5", "nan"]  # unquoted, on the command line
IN_FILES = ["1.10", "3e1234", "yes", "0123", "12:00:00", "0x1f", "+5", ".inf", "1e3", "1_000"]
EXACT = [
    "90",
    "0",
    "-5",
    "'1.10'",
    "'0123'",
    "12:00:00",
    "0123",
    "1-00",
    "2024-01-01",
    "off",
    "1.1.0",
]


@pytest.mark.parametrize("written", NO_TEXTS)
@pytest.mark.parametrize("key", ["name", "launcher.container_mounts"])
def test_a_text_that_reads_as_something_else_is_refused_and_the_quotes_it_names_are_accepted(
    key, written
):
    _, (problem,) = check_overrides([f"{key}={written}"])
    assert problem.startswith(f"{key} takes text, and {written} is read as ")
    (typed,) = shlex.split(problem.partition("; type ")[2])
    kept, none = check_overrides([typed])
    assert (kept, none) == ([typed], [])
    value = tree_of(typed)
    assert value[key] == written if key == "name" else value.launcher.container_mounts == written


@pytest.mark.parametrize("written", EXACT)
def test_a_word_that_is_read_as_its_characters_is_taken(written):
    config = from_hydra(tree_of(f"name={written}", f"launcher.container_mounts=[{written}]"))
    assert config.name == written.strip("'")
    assert config.launcher.container_mounts == [written.strip("'")]


@pytest.mark.parametrize(
    "word",
    [
        "launcher.container_mounts=[/a,1.10]",
        "trainer.recompute_modules=[moe,true]",
        "launcher.account=1.0",
        "launcher.container_mounts=[1_000]",
        "launcher.sbatch_args.mem=1.50",
        "launcher.sbatch_args={mem:1_000}",
        "launcher.sbatch_args.mail_type=[END,1.5]",
        "data.split=1e2",
    ],
)
def test_the_texts_of_lists_and_of_a_free_mapping_are_looked_at_too(word):
    _, (problem,) = check_overrides([word])
    assert problem.startswith(f"{word.split('=')[0]} takes text, and ") and "; type " in problem


def test_what_may_be_null_switched_or_a_weight_is_taken():
    overrides = [
        "launcher.account=null",
        "launcher.sbatch_args.exclusive=true",
        "launcher.sbatch_args.qos=null",
    ]
    overrides += ["data.data_path=[0.30,a,1_0,b]", "model.extra.qk_clip_alpha=1.10"]
    assert check_overrides(overrides)[1] == []
    assert (
        check_overrides(["name=a,1_0"], multirun=True)[1]
        and not check_overrides(["name=a,10"], multirun=True)[1]
    )


@pytest.mark.parametrize("written", IN_FILES)
def test_a_line_of_a_file_for_a_text_that_is_read_as_something_else_is_refused_with_its_place(
    conf,  # noqa: F811
    written,
):
    word = recipe(
        conf,
        f"# @package _global_\nlauncher:\n  time: {written}\n  container_mounts: [{written}]\n",
    )
    first, second = problems_of(word, conf=conf)
    path = conf / "recipe" / "mine.yaml"
    assert first.startswith(
        f"{path}, line 3, column 9: launcher.time takes text, and {written} is read as "
    )
    assert second.startswith(f"{path}, line 4, column 22: launcher.container_mounts takes text")
    quoted = first.partition("write it in quotes: ")[2]
    recipe(conf, f"# @package _global_\nname: {quoted}\n")
    assert from_hydra(tree_of(word, conf=conf)).name == written


@pytest.mark.parametrize("written", ["90", '"12:00:00"', "2024-01-01", "1-00", "08"])
def test_a_line_of_a_file_that_is_read_as_its_characters_is_taken(conf, written):  # noqa: F811
    (conf / "launcher" / "site.yaml").write_text(f"defaults: [auto]\ntime: {written}\n")
    assert from_hydra(tree_of("launcher=site", conf=conf)).launcher.time == written.strip('"')


def test_an_option_of_a_group_is_looked_at_under_its_groups_name(conf):  # noqa: F811
    (conf / "launcher" / "site.yaml").write_text(
        "defaults: [auto]\naccount: 0123\nmax_requeues: 0x3\n"
    )
    (problem,) = problems_of("launcher=site", conf=conf)
    assert (
        "site.yaml, line 2, column 10: launcher.account takes text, and 0123 is read as a number"
        in problem
    )


@pytest.mark.parametrize("value", [1.1, True, float("inf")])
def test_what_comes_from_elsewhere_as_another_type_is_refused(value):
    tree = quick_tree_of()
    tree.name = value
    with pytest.raises(UserError, match="name = .* must be text"):
        from_hydra(tree)


@pytest.mark.parametrize(
    "text", ["1.10", "0123", "12:00:00", "true", "null", "1e3", "~", "2024-01-01", "0x1f", "y"]
)
def test_a_text_that_looks_like_something_else_is_written_and_read_back(text, tmp_path):
    from omegaconf import OmegaConf

    config = from_hydra(tree_of(f"name='{text}'"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_hydra(OmegaConf.load(tmp_path / "config.yaml")).name == text


@pytest.mark.parametrize(
    "value", ["Übung", "日本語", "a=b", "a#b", "привет/x", 'a"b', "a$b=", "a{b"]
)
def test_a_word_that_wants_quotes_is_refused_with_the_words_to_type(value):
    _, (problem,) = check_overrides([f"name={value}"])
    assert problem.startswith(f"name={value} cannot be read without quotes (")
    (typed,) = shlex.split(problem.partition("; type ")[2])
    assert tree_of(typed).name == value


@pytest.mark.parametrize("word", ["model", "name=a'b=", "=Ü"])
def test_a_word_that_quotes_do_not_mend_is_not_said_to_want_them(word):
    problems_found = check_overrides([word])[1]
    assert problems_found and "; type " not in problems_found[0]


def test_a_home_that_no_shell_has_expanded_is_refused_in_words_and_in_quotes():
    _, (problem,) = check_overrides(["run_dir=~/runs"])
    assert problem.endswith("type run_dir=$HOME/runs")


# Empty texts, and paths


@pytest.mark.parametrize("empty", ["", " "])
def test_no_key_takes_an_empty_text(empty):
    for key in texts():
        section, _, name = key.rpartition(".")
        value = (
            [empty]
            if is_text_key(key) and "list" in str(legal_keys()[key]) or key == BLEND
            else empty
        )
        if section:
            found = problems("texts_are_not_empty", **{section: {name: value}})
            assert found[0].startswith(f"{key} is empty, which an unset shell variable"), key
    for key in ("name", "run_dir"):
        assert f"{key} is empty" in " ".join(problems_of(f"{key}='{empty}'"))


@pytest.mark.parametrize("key", [key for key in PATHS if "." in key])
def test_no_path_begins_with_a_home_that_is_not_expanded(key):
    section, name = key.split(".")
    for path, refused in (("~", True), ("~/a", True), ("a~", False), ("~a/b", False)):
        value = [path] if "list" in str(legal_keys()[key]) else path
        assert bool(problems("paths_are_unambiguous", **{section: {name: value}})) is refused


@pytest.mark.parametrize(
    "path, refused", [("/", True), ("//", True), ("/..", True), (".", False), ("/a", False)]
)
def test_no_run_and_no_cache_fills_the_root_of_a_file_system(path, refused):
    for key in OUTPUT:
        assert bool(problems("paths_are_unambiguous", f"{key}={path}")) is refused

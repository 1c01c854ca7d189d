"""A job's script is slurm/train.sbatch, with only the plan's directives and settings filled in."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from composing import ROOT, plan_of

from mixtrain.config.compose import compose
from mixtrain.config.typed_config import from_hydra
from mixtrain.launch import script, submit

WORDS = [
    "+recipe=mixtral_8x7b_ep8",
    "trainer.num_nodes=2",
    "data.split='98,1,1'",
    "name='two words'",
]
FOLDER = Path("/home/me/mixtrain")


def rendered(*overrides: str) -> str:
    return script.render(plan_of(*overrides), list(overrides), FOLDER)


def directives(text: str) -> dict[str, object]:
    return script.split_template(text)[1]


def test_everything_but_the_directives_and_the_settings_is_the_file_that_is_used_by_hand():
    head, ours, body = script.split_template(script.TEMPLATE.read_text())
    text = rendered(*WORDS)
    assert text.startswith("".join(head)) and text.endswith("".join(body))
    assert set(ours) <= set(directives(text))


def test_the_plan_and_the_keys_become_directives():
    text = rendered(
        *WORDS, "launcher.partition=gpu", "launcher.account=lab", "launcher.time=1-00:00:00"
    )
    found = directives(text)
    assert (found["nodes"], found["gpus-per-node"], found["partition"], found["account"]) == (
        "2",
        "8",
        "gpu",
        "lab",
    )
    assert (found["time"], found["job-name"]) == ("1-00:00:00", '"two words"')
    assert found["output"] == '"/home/me/mixtrain/runs/two words/logs/job_%j.log"'
    assert found["chdir"] == "/home/me/mixtrain"


def test_a_cpu_run_asks_for_no_gpus_and_what_is_typed_wins():
    shrunk = ["+recipe=mixtral_8x7b_ep8", "+shrink=laptop"]
    assert "gpus-per-node" not in directives(rendered(*shrunk))
    assert directives(rendered(*WORDS, "launcher.gpus_per_node=16"))["gpus-per-node"] == "16"


def test_any_flag_of_sbatch_is_added_replaced_or_taken_out():
    more = [
        "launcher.sbatch_args.array=1-4%1",
        "launcher.sbatch_args.signal=USR1@60",
        "launcher.sbatch_args.exclusive=false",
        "launcher.sbatch_args.mail_type=[END,FAIL]",
        "launcher.sbatch_args.comment='it is #1'",
        "launcher.sbatch_args.spread_job=true",
    ]
    found = directives(rendered(*WORDS, *more))
    assert (found["array"], found["signal"], found["mail-type"]) == ("1-4%1", "USR1@60", "END,FAIL")
    assert found["comment"] == '"it is #1"' and found["spread-job"] is True
    assert "exclusive" not in found


def test_the_words_come_back_from_the_shell_as_they_were_typed():
    text = rendered(*WORDS, "run_dir='runs/${name}-${seed}'")
    block = text[text.index("set -- ") :].split("\n\n")[0].replace("\\\n", " ")
    assert shlex.split(block)[2:] == [*WORDS, "run_dir='runs/${name}-${seed}'"]


def test_the_same_is_rendered_twice_alike_and_a_moment_is_pinned():
    assert rendered(*WORDS) == rendered(*WORDS)
    overrides = [*WORDS, "run_dir='runs/${now:%f}'"]
    plan = plan_of(*WORDS, "run_dir=runs/123")
    assert script.pin_values(overrides, plan.config) == [*WORDS, "run_dir='runs/123'"]
    assert (
        script.render(plan, overrides, FOLDER).count("runs/123") == 2
    )  # for Slurm's log, and pinned


def test_a_job_of_a_sweep_is_sent_with_words_that_it_composes_to_the_same_by_itself():
    """${hydra:job.num} is the sweep's number, and undefined in the job."""
    swept = [
        "seed=1,2",
        "name='it\\'s-${hydra:job.num}'",
        "run_dir='runs/${name}'",
        "data.data_path=['x-${now:%f}']",
    ]
    jobs, problems = compose(["-m", *swept])
    assert not problems
    for number, job in enumerate(jobs):
        config = from_hydra(job.tree)
        sent = script.pin_values(job.overrides, config)
        assert config.run_dir == f"runs/it's-{number}" and not any(
            "hydra:" in word or "now:" in word for word in sent
        )
        (again,), problems = compose(sent)
        assert not problems and from_hydra(again.tree) == config


def test_the_interpreter_and_the_checkout_are_those_that_submit():
    text = rendered(*WORDS)
    assert f"MIXTRAIN_PYTHON={sys.executable}\n" in text and f"MIXTRAIN_ROOT={ROOT}\n" in text
    assert f"MIXTRAIN_ENV_FILE={ROOT}/slurm/env.sh\n" in text
    assert "MIXTRAIN_ENV_FILE=/home/me/mixtrain/site.sh\n" in rendered(
        *WORDS, "launcher.env_file=site.sh"
    )


def test_a_container_has_the_checkout_the_folder_and_the_mounts_and_its_own_python():
    text = rendered(
        *WORDS,
        "launcher.container_image=/images/m.sqsh",
        "launcher.container_mounts=[/data,'/s:/scratch:ro']",
    )
    assert "MIXTRAIN_PYTHON=python\n" in text
    assert (
        "    --container-image=/images/m.sqsh\n" in text
        and "    --container-workdir=/home/me/mixtrain\n" in text
    )
    mounts = f"{ROOT}:{ROOT},/home/me/mixtrain:/home/me/mixtrain,/data:/data,/s:/scratch:ro"
    assert f"    --container-mounts={mounts}\n" in text


def test_variables_that_would_win_over_the_script_are_taken_from_sbatch(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "old")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")  # no key sets the account: the variable stays
    plan = plan_of(*WORDS, "launcher.partition=gpu", "launcher.time=60")
    assert submit.overriding_variables(plan, FOLDER) == ["SBATCH_PARTITION", "SBATCH_TIMELIMIT"]
    assert submit.command_line(plan, FOLDER).startswith(
        "env -u SBATCH_PARTITION -u SBATCH_TIMELIMIT sbatch --parsable"
    )


@pytest.mark.parametrize(
    "overrides, message, key",
    [
        (
            ["launcher.account=lab"],
            "Invalid account or account/partition combination",
            "launcher.account = lab",
        ),
        (
            ["launcher.sbatch_args.qos=high"],
            "Invalid qos specification",
            "launcher.sbatch_args.qos = high",
        ),
        (
            ["launcher.sbatch_args.dependency=afterok:1"],
            "Job dependency problem",
            "launcher.sbatch_args.dependency = ",
        ),
        ([], "Invalid account or account/partition combination", ""),
    ],
)
def test_what_slurm_refuses_is_said_with_the_key_where_there_is_one(overrides, message, key):
    found = submit.key_of(plan_of(*overrides), message)
    assert (key in found) if key else not found

"""Send a plan to Slurm, say what became of it, or show what would be sent. No torch.

Rule: what `--print` shows and what is sent come from the same call of script.render.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from mixtrain.config.plan import Plan
from mixtrain.errors import FINISHED, UserError
from mixtrain.launch import cluster, script

NAME = "job.sbatch"  # in run_dir: the script as it was sent
OTHERWISE = {"time": "TIMELIMIT"}  # a flag's variable is SBATCH_ and its name, but for these
COMMAND = ("sbatch", "--parsable")


def show(plan: Plan, words: list[str]) -> int:
    """Print the script to stdout, and the command that would send it to stderr."""
    folder = Path.cwd()
    print(script.render(plan, words, folder), end="", flush=True)
    print(f"would be sent by: {command_line(plan, folder)}", file=sys.stderr)
    return FINISHED


def submit(plan: Plan, words: list[str]) -> int:
    """Send the job; the exit code. UserError with what Slurm says if it does not take it, and nothing is written."""
    folder = Path.cwd()
    text = script.render(plan, words, folder)
    sbatch(plan, folder, "--test-only", stdin=text)
    run_dir = folder / plan.config.run_dir
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / NAME).write_text(text)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"run_dir = {plan.config.run_dir} cannot be made or written ({reason}); give another"
        ) from None
    # a federation adds ;cluster
    job = sbatch(plan, folder, *COMMAND[1:], str(run_dir / NAME)).split(";")[0]
    print("\n".join(said(plan, job)), flush=True)
    return FINISHED


def sbatch(plan: Plan, folder: Path, *arguments: str, stdin: str = "") -> str:
    """What sbatch prints. UserError with its reason, and the key that it is about, if it refuses."""
    hidden = overruled(plan, folder)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    answer = cluster.ask("sbatch", *arguments, stdin=stdin, environment=environment)
    if answer.returncode:
        raise UserError(
            f"sbatch refuses the job: {cluster.reason(answer)}{key_of(plan, answer.stderr)}"
        )
    return answer.stdout.strip()


def command_line(plan: Plan, folder: Path) -> str:
    """The command as it can be typed, once the script is there."""
    unset = [word for name in overruled(plan, folder) for word in ("-u", name)]
    return shlex.join(
        [*(["env", *unset] if unset else []), *COMMAND, str(folder / plan.config.run_dir / NAME)]
    )


def overruled(plan: Plan, folder: Path) -> list[str]:
    """Variables of this shell that sbatch would put above what the script says."""
    flags = [*script.split(script.TEMPLATE.read_text())[1], *script.directives_of(plan, folder)]
    flags += [script.dashed(flag) for flag in plan.config.launcher.sbatch_args]
    given = {
        flag for flag in flags if script.directives_of(plan, folder).get(flag, True) is not None
    }
    names = [
        f"SBATCH_{OTHERWISE.get(flag, flag.upper().replace('-', '_'))}" for flag in sorted(given)
    ]
    return [name for name in names if name in os.environ]


# What Slurm's refusals are about, where it is a key of ours. Its words are those of 22.05 to 25.05.
KEYS = {
    "account": "launcher.account",
    "partition": "launcher.partition",
    "time limit": "launcher.time",
    "dependency": "launcher.sbatch_args.dependency",
    "qos": "launcher.sbatch_args.qos",
    "feature": "launcher.sbatch_args.constraint",
    "array": "launcher.sbatch_args.array",
}


def key_of(plan: Plan, words: str) -> str:
    """` (KEY = VALUE)` for the key that a refusal of Slurm's is about, or nothing."""
    launcher = plan.config.launcher
    values = {f"launcher.sbatch_args.{name}": value for name, value in launcher.sbatch_args.items()}
    values |= {
        f"launcher.{name}": getattr(launcher, name) for name in ("account", "partition", "time")
    }
    found = [
        key for sign, key in KEYS.items() if sign in words.lower() and values.get(key) is not None
    ]
    return f" ({found[0]} = {values[found[0]]})" if found else ""


def said(plan: Plan, job: str) -> list[str]:
    """What the terminal is told of a job that was taken."""
    config = plan.config
    logs = f"{config.run_dir}/logs/job_{job}"
    array = "array" in config.launcher.sbatch_args
    lines = [
        (
            "submitted",
            f"job {job}: {config.trainer.num_nodes} nodes of {config.trainer.devices} ranks",
        ),
        ("  script", f"{config.run_dir}/{NAME}"),
        ("  log", f"{logs}.log"),
        ("  ranks' logs", f"{logs}/rank_N.log, and {logs}/index.txt: which rank is where"),
        ("  follow", f"tail -F {logs}/rank_0.log"),
        ("  state", f"squeue --job {job}; cat {config.run_dir}/status.json"),
        ("  save and return", f"scancel --signal=USR1 {job}"),
        ("  save and end", f"scancel {job}"),
    ]
    if array:
        lines[2:5] = [
            (
                "  logs",
                f"{config.run_dir}/logs/job_N.log, one a task; squeue --job {job} --array names"
                " them",
            )
        ]
    return [f"{name:<21}  {value}" for name, value in lines]

"""Submit a plan to Slurm and print the result, or show what would be submitted. No torch.

Rule: what `--print` shows and what is submitted come from the same call of script.render.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from mixtrain.config.plan import Plan
from mixtrain.errors import FINISHED, UserError
from mixtrain.launch import cluster, script

NAME = "job.sbatch"  # in run_dir: the script as submitted
# sbatch reads SBATCH_<FLAG> from the environment; these flags have another name there
OTHER_VARIABLES = {"time": "TIMELIMIT"}
COMMAND = ("sbatch", "--parsable")


def show(plan: Plan, overrides: list[str]) -> int:
    """Print the script to stdout, and the command that would submit it to stderr."""
    folder = Path.cwd()
    print(script.render(plan, overrides, folder), end="", flush=True)
    print(f"would be sent by: {command_line(plan, folder)}", file=sys.stderr)
    return FINISHED


def submit(plan: Plan, overrides: list[str]) -> int:
    """Submit the job; return the exit code. UserError, and nothing written, if Slurm refuses it."""
    folder = Path.cwd()
    text = script.render(plan, overrides, folder)
    run_sbatch(plan, folder, "--test-only", stdin=text)
    run_dir = folder / plan.config.run_dir
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / NAME).write_text(text)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"run_dir = {plan.config.run_dir} cannot be made or written ({reason}); give another"
        ) from None
    # in a federation, `;CLUSTER` follows the number
    job = run_sbatch(plan, folder, *COMMAND[1:], str(run_dir / NAME)).split(";")[0]
    print("\n".join(summary(plan, job)), flush=True)
    return FINISHED


def run_sbatch(plan: Plan, folder: Path, *arguments: str, stdin: str = "") -> str:
    """Return sbatch's output. UserError with its reason and the key concerned if it refuses."""
    removed = overriding_variables(plan, folder)
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    result = cluster.run_command("sbatch", *arguments, stdin=stdin, environment=environment)
    if result.returncode:
        reason = cluster.failure_reason(result)
        raise UserError(f"sbatch refuses the job: {reason}{key_of(plan, result.stderr)}")
    return result.stdout.strip()


def command_line(plan: Plan, folder: Path) -> str:
    """Return the command to type, once the script exists."""
    unset = [argument for name in overriding_variables(plan, folder) for argument in ("-u", name)]
    return shlex.join(
        [*(["env", *unset] if unset else []), *COMMAND, str(folder / plan.config.run_dir / NAME)]
    )


def overriding_variables(plan: Plan, folder: Path) -> list[str]:
    """Return variables of this shell that would override the script's directives in sbatch."""
    directives = script.directives_of(plan, folder)
    flags = [*script.split_template(script.TEMPLATE.read_text())[1], *directives]
    flags += [script.flag_name(flag) for flag in plan.config.launcher.sbatch_args]
    given = {flag for flag in flags if directives.get(flag, True) is not None}
    names = [
        f"SBATCH_{OTHER_VARIABLES.get(flag, flag.upper().replace('-', '_'))}"
        for flag in sorted(given)
    ]
    return [name for name in names if name in os.environ]


# text in Slurm's refusal (22.05 to 25.05) -> the key concerned
KEYS = {
    "account": "launcher.account",
    "partition": "launcher.partition",
    "time limit": "launcher.time",
    "dependency": "launcher.sbatch_args.dependency",
    "qos": "launcher.sbatch_args.qos",
    "feature": "launcher.sbatch_args.constraint",
    "array": "launcher.sbatch_args.array",
}


def key_of(plan: Plan, message: str) -> str:
    """Return ` (KEY = VALUE)` for the key that Slurm's refusal concerns, or ""."""
    launcher = plan.config.launcher
    values = {f"launcher.sbatch_args.{name}": value for name, value in launcher.sbatch_args.items()}
    values |= {
        f"launcher.{name}": getattr(launcher, name) for name in ("account", "partition", "time")
    }
    for text, key in KEYS.items():
        if text in message.lower() and values.get(key) is not None:
            return f" ({key} = {values[key]})"
    return ""


def summary(plan: Plan, job: str) -> list[str]:
    """Return the lines to print for a submitted job."""
    config = plan.config
    logs = f"{config.run_dir}/logs/job_{job}"
    size = f"{config.trainer.num_nodes} nodes of {config.trainer.devices} ranks"
    log_lines = [
        ("  log", f"{logs}.log"),
        ("  ranks' logs", f"{logs}/rank_N.log, and {logs}/index.txt: which rank is where"),
        ("  follow", f"tail -F {logs}/rank_0.log"),
    ]
    if "array" in config.launcher.sbatch_args:
        where = f"{config.run_dir}/logs/job_N.log"
        log_lines = [
            ("  logs", f"{where}, one a task; squeue --job {job} --array names them"),
        ]
    lines = [
        ("submitted", f"job {job}: {size}"),
        ("  script", f"{config.run_dir}/{NAME}"),
        *log_lines,
        ("  state", f"squeue --job {job}; cat {config.run_dir}/status.json"),
        ("  save and return", f"scancel --signal=USR1 {job}"),
        ("  save and end", f"scancel {job}"),
    ]
    return [f"{name:<21}  {value}" for name, value in lines]

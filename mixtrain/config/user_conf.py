"""A user's own options and recipes beside mixtrain's: --config-dir DIR. No torch.

Rule: both are composed as one folder, so an option of the user is checked as one of mixtrain's is.
A name that mixtrain has already is refused, because it would change what the name means.
"""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path

from mixtrain.errors import UserError
from mixtrain.system import scratch

FLAGS = ("--config-dir", "-cd")
RECIPES = {"recipe": "recipes"}  # group -> its folder beside DIR/conf


def split_flag(argv: list[str]) -> tuple[list[str], Path | None]:
    """Return (argv without --config-dir, the absolute path it names or None)."""
    rest = []
    folder = None
    arguments = iter(argv)
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        if flag not in FLAGS:
            rest.append(argument)
            continue
        value = value if has_value else next(arguments, "")
        if not value:
            raise UserError(f"{flag} needs a folder, as in {flag}=my/conf")
        folder = Path(value).absolute()
    return rest, folder


@cache
def merged(folder: Path, conf: Path) -> Path:
    """Return a folder with the files of `conf` and the user's options; it lasts for the process.

    `folder` holds folders of options (model/, router/, recipe/, ...) or conf/ and recipes/.
    UserError for an unknown group and for an option that mixtrain has too.
    """
    groups = sorted(path.name for path in conf.iterdir() if path.is_dir())
    try:
        options = _user_options(folder, groups)
    except OSError as error:
        raise UserError(f"--config-dir: {error.filename}: {error.strerror}") from None
    taken = [path for path in options if (conf / options[path] / path.name).exists()]
    if taken:
        raise UserError(
            *[
                f"{path}: mixtrain has {options[path]}={path.stem}; rename the file"
                for path in taken
            ]
        )
    path, owner = scratch.make("conf-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    target = Path(path)
    (target / "config.yaml").symlink_to(conf / "config.yaml")
    for group in groups:
        (target / group).mkdir()
        for option in (conf / group).glob("*.yaml"):
            (target / group / option.name).symlink_to(option)
    for option, group in options.items():
        (target / group / option.name).symlink_to(option)
    return target


def _user_options(folder: Path, groups: list[str]) -> dict[Path, str]:
    """Return {file: group} of the user's options."""
    if not folder.is_dir():
        raise UserError(f"--config-dir: {folder} is not a folder")
    conf = folder / "conf" if (folder / "conf").is_dir() else folder
    folders = {path: path.name for path in sorted(conf.iterdir()) if path.is_dir()}
    for group, name in RECIPES.items():
        folders |= {home / name: group for home in {folder, conf} if (home / name).is_dir()}
    folders = {path: group for path, group in folders.items() if not path.name.startswith(".")}
    if unknown := [path for path, group in folders.items() if group not in groups]:
        raise UserError(f"{unknown[0]} is not a group of options; these are {', '.join(groups)}")
    options = {file: group for path, group in folders.items() for file in path.glob("*.yaml")}
    if not options:
        raise UserError(
            f"--config-dir: {folder} has no options; one is {folder}/model/NAME.yaml, for example"
        )
    return options


def with_own_paths(problems: list[str], conf: Path) -> list[str]:
    """Name the user's files in problems instead of the links in a merged folder."""
    links = {str(path): str(path.resolve()) for path in conf.glob("*/*.yaml") if path.is_symlink()}
    for link, path in links.items():
        problems = [problem.replace(link, path) for problem in problems]
    return problems

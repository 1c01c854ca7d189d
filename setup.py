"""Build a wheel with the files beside the package (conf/, recipes/, ...) in mixtrain/share/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHARED = ("conf", "recipes", "slurm", "tools", "train.py")
CACHES = shutil.ignore_patterns("__pycache__", "mutants.py", "mutations.py", "watching.py")


class BuildWithShare(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the checkout's own files are used
        share = Path(self.build_lib) / "mixtrain" / "share"
        shutil.rmtree(share, ignore_errors=True)
        share.mkdir(parents=True)
        for name in SHARED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, share / name, ignore=CACHES)  # conf/recipe: a link's files
            else:
                shutil.copy2(source, share / name)


setup(cmdclass={"build_py": BuildWithShare})

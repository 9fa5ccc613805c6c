"""What pyproject.toml cannot say: wheels carry the zoo's tasks and the search spaces of the top-level folders."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKED = ("evals", "search_spaces")  # which evomerge.zoo.shared finds again


class BuildWithSearches(build_py):
    """Adds the folders to what is built; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in PACKED:
            target = Path(self.build_lib, "evomerge", "zoo", "shared", folder)
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build has left
            shutil.copytree(folder, target)


setup(cmdclass={"build_py": BuildWithSearches})

"""Print what the image installs before the code: the dependencies in pyproject.toml.

TensorFlow's package for Linux on x86 holds the support for GPUs, which is most of its size;
tensorflow-cpu is the same without it. Elsewhere there is no such package, and no GPU in the other.
"""

import platform
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["cluster"]]:
    if requirement.startswith("tensorflow>") and platform.machine() == "x86_64":
        requirement = requirement.replace("tensorflow", "tensorflow-cpu", 1)
    print(requirement)

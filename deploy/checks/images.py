"""The base images' stand-ins, and the image of the Dockerfile."""

import shutil
import sys
import tempfile
from pathlib import Path

from checks.podman import call, privately, succeeds

CHECKS = Path(__file__).resolve().parent
DEPLOY = CHECKS.parent
IMAGE = "search:0.1.0"
BASES = {  # the stand-in, the name that the files in deploy/ give it, Debian's packages in it
    "python": ("python:3.11.9-slim-bookworm", "python3,python3-venv,python3-pip,ca-certificates"),
    "postgres": ("postgres:16.4-bookworm", "postgresql-15"),
}


def build_base(folder: Path, name: str) -> None:
    """Make a stand-in for a base image from Debian's packages, unless it is there."""
    tag, packages = BASES[name]
    tag = f"docker.io/library/{tag}"
    if succeeds("image", "exists", tag):
        return
    with tempfile.TemporaryDirectory() as context:
        shutil.copytree(CHECKS / "stand-ins", context, dirs_exist_ok=True)
        options = ["--variant=minbase", f"--include={packages}"]
        call("mmdebstrap", *options, "bookworm", f"{context}/base.tar")
        _build(Path(context, f"{name}.Dockerfile"), Path(context), tag)


def build_image(folder: Path) -> None:
    """Build the image as the Dockerfile says, with this machine's settings of pip."""
    settings, mounts = _pip_settings()
    (folder / "pip.conf").write_text(settings)
    volumes = [f"--volume={path}:{path}:ro" for path in sorted(mounts)]
    pip = f"--volume={folder}/pip.conf:/etc/pip.conf:ro"
    _build(DEPLOY / "Dockerfile", DEPLOY.parent, IMAGE, pip, *volumes)


def _build(dockerfile: Path, context: Path, tag: str, *options: str) -> None:
    """Build an image, with the network of this machine."""
    command = ["podman", "build", "--isolation=chroot", "--network=host", *options]
    call(*privately([*command, f"--file={dockerfile}", f"--tag={tag}", str(context)]))


def _pip_settings() -> tuple[str, set[str]]:
    """This machine's settings of pip as a file, and the files and folders that they name."""
    settings: dict[str, str] = {}
    mounts = set()
    for line in call(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        words = value.strip("'\"").replace("\\n", " ").split()
        settings[name.rpartition(".")[2]] = " ".join(words)
        for word in words:
            if word.startswith("file://"):  # an index, whose files are often beside its pages
                word = str(Path(word.removeprefix("file://")).parent)
            if word.startswith("/") and word != "/" and Path(word).exists():
                mounts.add(word)
    lines = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
    return "\n".join(lines) + "\n", mounts

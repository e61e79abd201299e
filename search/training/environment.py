"""The environment of a training, which its digits depend on: package versions and hardware."""

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("tensorflow", "keras", "numpy", "optuna", "optuna-integration", "mlflow")


def names(package: str) -> tuple[str, ...]:
    """What a package may be called, the name by which it is installed here first.

    TensorFlow without support for GPUs is a package of another name.
    """
    if package != "tensorflow":
        return (package,)
    return tuple(sorted(("tensorflow", "tensorflow-cpu"), key=lambda name: not _is_installed(name)))


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def version(package: str) -> str:
    """The version of an installed package. Raises PackageNotFoundError."""
    return importlib.metadata.version(names(package)[0])


@functools.cache
def here() -> dict[str, str]:
    """The environment of this process: the versions of Python and packages, and the hardware."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "search": importlib.metadata.version("search"),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
        **({} if (name := _gpu()) is None else {"gpu": name}),
    }


def gpu_device() -> str | None:
    """The device file of an NVIDIA or AMD GPU; None if there is none."""
    return next(filter(os.path.exists, ("/dev/nvidia0", "/dev/kfd")), None)


def _gpu() -> str | None:
    if gpu_device() is None:
        return None
    from search.training.train import gpu_name  # imports TensorFlow, so only with a GPU

    return gpu_name()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())

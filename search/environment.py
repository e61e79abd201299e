"""What the digits of a training depend on beside its seed: the machine's kind and the packages."""

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

from search import __version__

PACKAGES = ("tensorflow", "keras", "numpy", "optuna", "optuna-integration", "mlflow")


@functools.cache
def here() -> dict[str, str]:
    """This process's: the versions of Python and the packages, and the machine's kind."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "search": __version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
        **({} if (name := gpu()) is None else {"gpu": name}),
    }


def gpu_device() -> str | None:
    """The file of a GPU of NVIDIA's or AMD's, None where there is none: whether to look closer."""
    return next(filter(os.path.exists, ("/dev/nvidia0", "/dev/kfd")), None)


def gpu() -> str | None:
    """The name of the GPU that TensorFlow trains on in this process, None where it sees none.

    TensorFlow is imported only where there is a device.
    """
    if gpu_device() is None:
        return None
    from search.imports import silent_stderr

    with silent_stderr():
        import tensorflow as tf

        found = tf.config.list_physical_devices("GPU")
        if not found:
            return None
        details = tf.config.experimental.get_device_details(found[0])
    return str(details.get("device_name", found[0].name))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def commit() -> str | None:
    """The commit of the checkout that this package's source lies in, if it is one."""
    from mlflow.utils.git_utils import get_git_commit

    found: str | None = get_git_commit(str(Path(__file__).parent))
    return found

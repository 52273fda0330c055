"""The versions of the libraries that a run uses."""

import contextlib
import importlib.metadata
import platform

import torch


def library_versions():
    """Return the versions of Python, torch and, if it is installed, torchvision, by name."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # importing torchvision takes a second
        versions["torchvision"] = importlib.metadata.version("torchvision")
    return versions

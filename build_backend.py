"""setuptools' build backend, with NVIDIA's compiler among the build requirements where the CUDA
backend is to be built and there is none."""

import build_python

build_python.check()  # before anything that an older Python cannot read

import os  # noqa: E402
from typing import Any  # noqa: E402

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403

import build_cuda  # noqa: E402

Config = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Config = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings: Config = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler()


def _compiler() -> list[str]:
    return build_cuda.required_wheels(os.environ, build_cuda.probe())

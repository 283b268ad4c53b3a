"""Whether the CUDA backend is built, for which GPUs, and with which nvcc.

Runs before anything is installed, so with the standard library alone: torch is not asked.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Environment = Mapping[str, str]

RELEASE = (80, 86, 89, 90, 100, 120)
OLDEST = 80  # the first with cp.async, and with bfloat16 in its tensor cores
OLDEST_NVCC = (12, 0)
WHEELS_CUDA = 13
WHEELS = tuple(
    f"nvidia-{name}=={WHEELS_CUDA}.0.*"
    for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
)
DOWNLOADS = "https://developer.nvidia.com/cuda-downloads"
USUAL_TOOLKIT = "/usr/local/cuda"
DRIVER_LIBRARIES = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1")


class Unavailable(Exception):
    """The CUDA backend cannot be built; the message says why, and what helps."""


@dataclass(frozen=True)
class Machine:
    """What the NVIDIA driver says."""

    driver: int = 0
    """The newest CUDA that it runs, 13000 for 13.0; 0 without a driver."""
    gpus: tuple[int, ...] = ()
    """Compute capabilities of the visible GPUs, 90 for 9.0."""


@dataclass(frozen=True)
class Toolkit:
    """A compiler that can be used."""

    nvcc: Path
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"nvcc {_dotted(self.version)} ({self.nvcc})"

    @property
    def library_path(self) -> str | None:
        """Where cudart is in NVIDIA's wheels, whose nvcc looks for it in a lib64 that they lack."""
        folder = self.nvcc.resolve().parent.parent / "lib"
        return str(folder) if (folder / "libcudart_static.a").exists() else None


@dataclass(frozen=True)
class Choice:
    """What is built beside the CPU backend, and why."""

    reason: str
    architectures: tuple[int, ...] = ()
    """None: nothing."""
    toolkit: Toolkit | None = None

    def __str__(self) -> str:
        if not self.toolkit:
            return f"no CUDA backend: {self.reason}"
        names = ", ".join(f"sm_{a}" for a in self.architectures)
        return (
            f"the CUDA backend for {names} and, as PTX, for newer GPUs: {self.reason}; "
            f"compiled by {self.toolkit}"
        )


def choose(env: Environment, machine: Machine) -> Choice:
    """What HOGWILD_CUDA and HOGWILD_CUDA_ARCHS ask for on this machine.

    Raises ValueError for a bad value, and Unavailable if CUDA was asked for and cannot be built.
    """
    wanted = wanted_architectures(env, machine)
    if not wanted.architectures:
        return wanted
    try:
        toolkit = find_toolkit(env, machine.driver, wanted.architectures)
        check_host_compiler(toolkit, env)
    except Unavailable as error:
        if is_forced(env):
            raise
        return Choice(f"{wanted.reason}, but {error}")
    return Choice(wanted.reason, wanted.architectures, toolkit)


def required_wheels(env: Environment, machine: Machine) -> list[str]:
    """NVIDIA's compiler from PyPI, if CUDA is to be built and no toolkit here can do it."""
    try:
        wanted = wanted_architectures(env, machine)
    except ValueError:
        return []  # the build will say so, and better
    if not wanted.architectures or not sys.platform.startswith("linux"):
        return []
    if machine.driver and machine.driver // 1000 < WHEELS_CUDA:
        return []
    try:
        find_toolkit(env, machine.driver, wanted.architectures)
    except Unavailable:
        return [] if env.get("CUDACXX") else list(WHEELS)
    return []


# ---- which GPUs ----------------------------------------------------------------------------------


def is_forced(env: Environment) -> bool:
    """Whether CUDA was asked for: by HOGWILD_CUDA=1, or by naming architectures."""
    wanted = env.get("HOGWILD_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"HOGWILD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    return wanted == "1" or (wanted == "auto" and bool(env.get("HOGWILD_CUDA_ARCHS")))


def wanted_architectures(env: Environment, machine: Machine) -> Choice:
    """Architectures and the reason, without a toolkit. Raises ValueError for a bad value."""
    named = parse_architectures(env.get("HOGWILD_CUDA_ARCHS", ""))
    forced = is_forced(env)
    if env.get("HOGWILD_CUDA") == "0":
        return Choice("HOGWILD_CUDA=0")
    if named:
        return Choice("HOGWILD_CUDA_ARCHS names them", named)
    visible = tuple(sorted({gpu for gpu in machine.gpus if gpu >= OLDEST}))
    if visible:
        return Choice(
            f"an NVIDIA GPU is visible (compute capability {_capabilities(visible)})", visible
        )
    if machine.gpus:
        reason = (
            f"the GPU has compute capability {_capabilities(machine.gpus)} and the kernels need "
            f"{_capabilities((OLDEST,))} (Ampere) or newer"
        )
    else:
        reason = "no NVIDIA GPU is visible"
        if Path("/proc/driver/nvidia").exists():
            reason += ", though the driver is loaded: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    if forced:
        return Choice(f"HOGWILD_CUDA=1, and {reason}", RELEASE)
    return Choice(reason)


def parse_architectures(text: str) -> tuple[int, ...]:
    """'all', or a list such as '80;90', '8.0 9.0' or 'sm_80,sm_90'; empty if there is none."""
    if text.strip() == "all":
        return RELEASE
    found = set()
    for word in re.split(r"[;,\s]+", text.strip()) if text.strip() else []:
        match = re.fullmatch(r"(?:sm_)?(\d{1,2})\.?(\d)", word)
        if not match:
            raise ValueError(
                "HOGWILD_CUDA_ARCHS: expected all, or architectures such as 80;90 or 8.0, "
                f"got {text!r}"
            )
        number = 10 * int(match[1]) + int(match[2])
        if number < OLDEST:
            raise ValueError(
                f"HOGWILD_CUDA_ARCHS: expected architectures from {OLDEST} on, got {text!r}"
            )
        found.add(number)
    return tuple(sorted(found))


def probe() -> Machine:
    """Asks the driver's library. What CUDA_VISIBLE_DEVICES hides is not visible."""
    for name in DRIVER_LIBRARIES:
        try:
            cuda = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return Machine()

    def ask(function: str, *arguments: int) -> int:
        number = ctypes.c_int()
        failed = getattr(cuda, function)(ctypes.byref(number), *arguments)
        return 0 if failed else number.value

    driver = ask("cuDriverGetVersion")
    if cuda.cuInit(0):
        return Machine(driver)
    gpus = []
    for i in range(ask("cuDeviceGetCount")):
        device = ask("cuDeviceGet", i)
        major = ask("cuDeviceGetAttribute", 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_
        minor = ask("cuDeviceGetAttribute", 76, device)  # MAJOR and MINOR
        gpus.append(10 * major + minor)
    return Machine(driver, tuple(gpus))


# ---- which compiler ------------------------------------------------------------------------------


def find_toolkit(env: Environment, driver: int, architectures: tuple[int, ...]) -> Toolkit:
    """The first that compiles for all architectures, and whose code the driver runs.

    An installed toolkit comes before NVIDIA's wheels, and $CUDACXX is never passed over.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable("CUDA is supported on Linux only")
    passed_over = []
    for nvcc in _places(env):
        toolkit, problem = _examine(nvcc, architectures)
        if toolkit and not problem and not env.get("CUDACXX"):
            problem = _too_new(toolkit, driver)
        if toolkit and not problem:
            return toolkit
        passed_over.append(problem)
    if passed_over:
        raise Unavailable("; ".join(dict.fromkeys(passed_over)))
    remedy = f"install CUDA {_dotted(OLDEST_NVCC)} or newer ({DOWNLOADS})"
    if driver and driver // 1000 < WHEELS_CUDA:
        remedy = f"update the driver, or install CUDA {driver // 1000} ({DOWNLOADS})"
    else:
        remedy += ", or type pip install " + " ".join(f"'{wheel}'" for wheel in WHEELS)
    raise Unavailable(
        "nvcc was not found at $CUDACXX, on PATH, in $CUDA_HOME, "
        f"{USUAL_TOOLKIT} and this Python's packages: {remedy}"
    )


def _places(env: Environment) -> Iterator[Path]:
    """Where nvcc may be."""
    if env.get("CUDACXX"):
        yield Path(shutil.which(env["CUDACXX"], path=env.get("PATH")) or env["CUDACXX"])
        return
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    homes = [env.get("CUDA_HOME"), env.get("CUDA_PATH"), USUAL_TOOLKIT]
    wheels = (nvcc for entry in sys.path for nvcc in Path(entry).glob("nvidia/cu*/bin/nvcc"))
    for place in (on_path, *(Path(home, "bin/nvcc") for home in homes if home), *wheels):
        if place and os.access(place, os.X_OK):
            yield Path(place)


def _examine(nvcc: Path, architectures: tuple[int, ...]) -> tuple[Toolkit | None, str]:
    """The toolkit if nvcc runs, and what is wrong with it."""
    try:
        version = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
        known = re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
    except OSError as error:
        return None, f"{nvcc} does not run ({error.strerror})"
    if not version:
        return None, f"{nvcc} does not tell its version"
    toolkit = Toolkit(nvcc, (int(version[1]), int(version[2])))
    if toolkit.version < OLDEST_NVCC:
        return toolkit, (
            f"{toolkit} is too old: install CUDA {_dotted(OLDEST_NVCC)} or newer ({DOWNLOADS}), "
            "or name its nvcc with CUDACXX"
        )
    unknown = ", ".join(f"sm_{a}" for a in architectures if str(a) not in known)
    if unknown:
        return toolkit, (
            f"{toolkit} does not compile for {unknown}: install a newer CUDA (sm_100 and sm_120 "
            "need 12.8), or name older architectures in HOGWILD_CUDA_ARCHS; newer GPUs run their "
            "PTX"
        )
    return toolkit, ""


def _too_new(toolkit: Toolkit, driver: int) -> str:
    """Why the driver does not run what this toolkit compiles, if so."""
    if not driver or toolkit.version[0] <= driver // 1000:  # minor versions do not matter
        return ""
    runs = _dotted((driver // 1000, driver % 1000 // 10))
    return (
        f"{toolkit} needs a newer NVIDIA driver than this one, which runs CUDA {runs} at most: "
        f"update the driver, or install CUDA {driver // 1000} and name its nvcc with CUDACXX"
    )


def check_host_compiler(toolkit: Toolkit, env: Environment) -> None:
    """Raises Unavailable if nvcc does not take the C++ compiler that it would get."""
    host = host_compiler(env)
    command = ["-E", "-x", "cu", os.devnull, "-o", os.devnull, *(["-ccbin", host] if host else [])]
    done = subprocess.run([str(toolkit.nvcc), *command], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        error = re.search(r"#error\s*(?:-- )?(.*?!.*?!)", said)
        raise Unavailable(
            f"{toolkit} refuses the C++ compiler {host or 'g++'}: "
            f"{error[1] if error else ' '.join(said.split())}; "
            "name one that it takes, as in CUDAHOSTCXX=g++-12"
        )


def host_compiler(env: Environment) -> str | None:
    """The C++ compiler for nvcc, if one is named."""
    host = env.get("CUDAHOSTCXX") or env.get("CXX") or ""
    return host if host and not re.search(r"\s", host) else None


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _capabilities(architectures: tuple[int, ...]) -> str:
    return ", ".join(_dotted(divmod(a, 10)) for a in architectures)

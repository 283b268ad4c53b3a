"""How the build decides about the CUDA backend, on machines that are made up."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "build_cuda.py").exists():
    pytest.skip("the tests do not lie in a source tree", allow_module_level=True)

# Not by sys.path: the package of the source tree has no compiled module.
_spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "build_cuda.py")
assert _spec and _spec.loader
build_cuda = importlib.util.module_from_spec(_spec)
sys.modules["build_cuda"] = build_cuda
_spec.loader.exec_module(build_cuda)

Machine, Unavailable = build_cuda.Machine, build_cuda.Unavailable
KNOWN = (75, 80, 86, 87, 89, 90, 100, 120)
NvccMaker = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No toolkit but those that a test makes."""
    monkeypatch.setattr(build_cuda, "USUAL_TOOLKIT", str(tmp_path / "usual"))
    bare = [entry for entry in sys.path if not [*Path(entry).glob("nvidia/cu*/bin/nvcc")]]
    monkeypatch.setattr(sys, "path", bare)
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.fixture
def make_nvcc(tmp_path: Path) -> NvccMaker:
    """Makes an nvcc that says of itself what it is told to; returns its toolkit's folder."""

    def make(name: str, version: str, known: tuple[int, ...] = KNOWN, error: str = "") -> Path:
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        architectures = "\n".join(f"compute_{a}" for a in known)
        nvcc.write_text(
            "#!/bin/sh\n"
            'case "$1" in\n'
            f"  --version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;\n"
            f"  --list-gpu-arch) echo '{architectures}' ;;\n"
            f"  -E) echo '{error}' >&2; exit {int(bool(error))} ;;\n"
            "esac\n"
        )
        nvcc.chmod(0o755)
        return nvcc.parent.parent

    return make


def environment(**variables: Any) -> dict[str, str]:
    return {"PATH": "", **{name: str(value) for name, value in variables.items()}}


# ---- which GPUs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "gpus", "architectures", "reason"),
    [
        ({}, (), (), "no NVIDIA GPU is visible"),
        ({}, (90,), (90,), "an NVIDIA GPU is visible (compute capability 9.0)"),
        ({}, (90, 86, 90, 75), (86, 90), "(compute capability 8.6, 9.0)"),
        ({}, (75,), (), "compute capability 7.5 and the kernels need 8.0"),
        ({"HOGWILD_CUDA": ""}, (80,), (80,), "visible"),
        ({"HOGWILD_CUDA": "0"}, (90,), (), "HOGWILD_CUDA=0"),
        ({"HOGWILD_CUDA": "0", "HOGWILD_CUDA_ARCHS": "90"}, (90,), (), "HOGWILD_CUDA=0"),
        ({"HOGWILD_CUDA": "1"}, (90,), (90,), "visible"),
        ({"HOGWILD_CUDA": "1"}, (), (80, 86, 89, 90, 100, 120), "no NVIDIA GPU is visible"),
        ({"HOGWILD_CUDA": "1"}, (75,), (80, 86, 89, 90, 100, 120), "compute capability 7.5"),
        ({"HOGWILD_CUDA": "1", "HOGWILD_CUDA_ARCHS": "80"}, (90,), (80,), "names them"),
        ({"HOGWILD_CUDA_ARCHS": "all"}, (), (80, 86, 89, 90, 100, 120), "names them"),
        ({"HOGWILD_CUDA_ARCHS": "90;80"}, (), (80, 90), "names them"),
    ],
)
def test_for_which_gpus(
    variables: dict[str, str], gpus: tuple[int, ...], architectures: tuple[int, ...], reason: str
) -> None:
    choice = build_cuda.wanted_architectures(variables, Machine(13000, gpus))
    assert choice.architectures == architectures
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("80;90", (80, 90)),
        (" 90, 80 ", (80, 90)),
        ("8.0 12.0", (80, 120)),
        ("sm_100,sm_90", (90, 100)),
        ("90;90", (90,)),
        ("", ()),
        ("all", (80, 86, 89, 90, 100, 120)),
    ],
)
def test_lists_of_architectures(text: str, architectures: tuple[int, ...]) -> None:
    assert build_cuda.parse_architectures(text) == architectures


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HOGWILD_CUDA": "yes"}, "HOGWILD_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"HOGWILD_CUDA_ARCHS": "90a"}, "HOGWILD_CUDA_ARCHS: expected all, or .*, got '90a'"),
        ({"HOGWILD_CUDA_ARCHS": "8"}, "HOGWILD_CUDA_ARCHS: expected all, or .*, got '8'"),
        ({"HOGWILD_CUDA_ARCHS": "80;75"}, "expected architectures from 80 on, got '80;75'"),
        ({"HOGWILD_CUDA": "0", "HOGWILD_CUDA_ARCHS": "x"}, "HOGWILD_CUDA_ARCHS: .* got 'x'"),
    ],
)
def test_bad_values(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_cuda.choose(variables, Machine())
    assert build_cuda.required_wheels(variables, Machine()) == []  # the build says it


FAKE_DRIVER = """
extern "C" int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
extern "C" int cuInit(unsigned) { return STATUS; }
extern "C" int cuDeviceGetCount(int* count) { *count = 2; return 0; }
extern "C" int cuDeviceGet(int* device, int i) { *device = 70 + i; return 0; }
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute != 75 && attribute != 76) return 1;
  const int capabilities[2][2] = {{8, 6}, {12, 0}};
  *value = capabilities[device - 70][attribute - 75];
  return 0;
}
"""


@pytest.mark.parametrize(("status", "gpus"), [(0, (86, 120)), (100, ())])
def test_the_driver_is_asked(
    status: int, gpus: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler for the driver's stand-in")
    source, library = tmp_path / "driver.cpp", tmp_path / f"driver{status}.so"
    source.write_text(FAKE_DRIVER)
    flags = ["-shared", "-fPIC", f"-DSTATUS={status}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(build_cuda, "DRIVER_LIBRARIES", ("no-such-library.so", str(library)))
    assert build_cuda.probe() == Machine(12040, gpus)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cuda, "DRIVER_LIBRARIES", ("no-such-library.so",))
    assert build_cuda.probe() == Machine()


# ---- which compiler ------------------------------------------------------------------------------


def test_where_nvcc_is_looked_for(
    make_nvcc: NvccMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = make_nvcc("site/nvidia/cu13", "13.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    usual, home = make_nvcc("usual", "13.1"), make_nvcc("home", "13.2")
    on_path, named = make_nvcc("path", "13.3"), make_nvcc("named", "13.4")
    variables: dict[str, Any] = {
        "CUDACXX": named / "bin/nvcc", "PATH": on_path / "bin", "CUDA_HOME": home,
    }  # fmt: skip
    found = []
    for gone in (*variables, "usual", None):
        found.append(build_cuda.find_toolkit(environment(**variables), 0, (90,)).nvcc)
        variables.pop(gone, None)
        if gone == "usual":
            shutil.rmtree(usual)
    assert found == [folder / "bin/nvcc" for folder in (named, on_path, home, usual, wheels)]


@pytest.mark.parametrize(
    ("version", "known", "driver", "message"),
    [
        ("11.8", KNOWN, 0, r"nvcc 11.8 \(.*nvcc\) is too old: install CUDA 12.0 or newer"),
        ("13.0", KNOWN, 12080, "needs a newer NVIDIA driver than .*, which runs CUDA 12.8 at most"),
        ("12.4", (80, 90), 13000, "nvcc 12.4 .* does not compile for sm_120: install a newer CUDA"),
    ],
)
def test_a_toolkit_is_passed_over(
    make_nvcc: NvccMaker, version: str, known: tuple[int, ...], driver: int, message: str
) -> None:
    bad = make_nvcc("bad", version, known)
    variables = environment(PATH=bad / "bin")
    with pytest.raises(Unavailable, match=message) as raised:
        build_cuda.find_toolkit(variables, driver, (90, 120))
    assert str(raised.value).count("\n") == 0
    good = make_nvcc("good", "12.9")
    variables["CUDA_HOME"] = str(good)
    assert build_cuda.find_toolkit(variables, driver, (90, 120)).version == (12, 9)


def test_the_named_compiler_is_not_passed_over(make_nvcc: NvccMaker) -> None:
    good, newer, old = (make_nvcc(v, v) for v in ("12.8", "13.0", "11.0"))

    def find(nvcc: Path) -> Any:
        variables = environment(PATH=good / "bin", CUDACXX=nvcc)
        return build_cuda.find_toolkit(variables, 12080, (90,))

    assert find(newer / "bin/nvcc").version == (13, 0)  # for another machine's driver
    for nvcc, message in ((old / "bin/nvcc", "too old"), (Path("/nowhere/nvcc"), "does not run")):
        with pytest.raises(Unavailable, match=message):
            find(nvcc)


def test_auto_never_fails_and_1_never_falls_back(make_nvcc: NvccMaker) -> None:
    machine = Machine(13000, (90,))
    choice = build_cuda.choose(environment(), machine)
    assert not choice.architectures and not choice.toolkit
    assert str(choice).startswith(
        "no CUDA backend: an NVIDIA GPU is visible (compute capability 9.0), but nvcc was not found"
    )
    with pytest.raises(Unavailable, match="nvcc was not found .* pip install 'nvidia-cuda-nvcc=="):
        build_cuda.choose(environment(HOGWILD_CUDA=1), machine)
    with pytest.raises(Unavailable, match="update the driver, or install CUDA 12"):
        build_cuda.choose(environment(HOGWILD_CUDA=1), Machine(12040, (90,)))

    home = make_nvcc("home", "13.0")
    choice = build_cuda.choose(environment(CUDA_HOME=home), machine)
    assert (choice.architectures, choice.toolkit.nvcc) == ((90,), home / "bin/nvcc")
    assert str(choice).startswith("the CUDA backend for sm_90 and, as PTX, for newer GPUs: ")
    assert f"nvcc 13.0 ({home}/bin/nvcc)" in str(choice)


def test_a_refused_host_compiler(make_nvcc: NvccMaker) -> None:
    error = "host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later "
    home = make_nvcc("home", "12.0", error=f"{error}than 12 are not supported! The nvcc flag")
    with pytest.raises(Unavailable) as raised:
        build_cuda.choose(
            environment(CUDA_HOME=home, HOGWILD_CUDA_ARCHS=90, CXX="g++-15"), Machine()
        )
    assert str(raised.value) == (
        f"nvcc 12.0 ({home}/bin/nvcc) refuses the C++ compiler g++-15: unsupported GNU version! "
        "gcc versions later than 12 are not supported!; name one that it takes, as in "
        "CUDAHOSTCXX=g++-12"
    )


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build_cuda.required_wheels(environment(HOGWILD_CUDA=1), Machine()) == []
    assert not build_cuda.choose(environment(), Machine()).architectures
    with pytest.raises(Unavailable, match="Linux only"):
        build_cuda.choose(environment(HOGWILD_CUDA=1), Machine())


# ---- what pip is asked for -----------------------------------------------------------------------


def test_the_wheels_are_asked_for_when_they_help(make_nvcc: NvccMaker) -> None:
    def wheels(machine: Any, **variables: Any) -> list[str]:
        return build_cuda.required_wheels(environment(**variables), machine)

    gpu = Machine(13000, (90,))
    assert wheels(gpu) == list(build_cuda.WHEELS)
    assert wheels(Machine(), HOGWILD_CUDA=1) == list(build_cuda.WHEELS)
    assert wheels(Machine()) == []
    assert wheels(gpu, HOGWILD_CUDA=0) == []
    assert wheels(Machine(13000, (75,))) == []
    assert wheels(Machine(12080, (90,))) == []  # this driver would not run what they compile
    assert wheels(gpu, CUDACXX="/nowhere/nvcc") == []
    assert wheels(gpu, CUDA_HOME=make_nvcc("good", "13.2")) == []
    assert wheels(gpu, CUDA_HOME=make_nvcc("old", "11.8")) == list(build_cuda.WHEELS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree, for what writes beside it."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed in this environment")
    skipped = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "build", "dist", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=skipped))


def run_in(source: Path, code: str) -> str:
    """What Python code prints last, with the build backend on the path."""
    code = f"import sys; sys.path.insert(0, '.'); import build_cuda, build_backend\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1]


def test_the_build_backend_passes_them_on(source: Path) -> None:
    hooks = ("get_requires_for_build_wheel", "get_requires_for_build_editable",
             "get_requires_for_build_sdist")  # fmt: skip
    calls = ", ".join(f"build_backend.{hook}()" for hook in hooks)
    code = f"build_cuda.required_wheels = lambda env, machine: ['nvcc']; print([{calls}])"
    assert run_in(source, code) == "[['nvcc'], ['nvcc'], []]"


@pytest.mark.parametrize("version", [(3, 6), (3, 7), (3, 9)])
def test_an_older_python_is_told_so_before_anything_else(
    source: Path, version: tuple[int, int]
) -> None:
    """As such a Python sees it: by the grammar that it knows, and before pip has a say."""
    for file in ("build_backend.py", "build_python.py"):
        ast.parse((source / file).read_text(), feature_version=version)
    for module in ("build_backend", "setup"):
        code = (
            "import sys\nsys.path.insert(0, '.')\n"
            f"sys.version_info = ({version[0]}, {version[1]}, 0, 'final', 0)\n"
            "sys.modules['setuptools'] = None  # whatever comes first, it is not reached\n"
            if module == "build_backend"
            else f"import sys, setuptools\nsys.path.insert(0, '.')\n"
            f"sys.version_info = ({version[0]}, {version[1]}, 0, 'final', 0)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", f"{code}import {module}"],
            cwd=source, capture_output=True, text=True,
        )  # fmt: skip
        needs = f"needs Python 3.10 or newer, and this is {version[0]}.{version[1]} ("
        assert done.returncode == 1 and needs in done.stderr
        assert "Traceback" not in done.stderr


def test_an_older_python_can_fetch_what_tells_it_so() -> None:
    """pip installs the build requirements first: without markers it would end there."""
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^requires = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert found
    requirements = [Requirement(each) for each in re.findall(r'^    "(.*)",$', found[1], re.M)]
    old = [
        r for r in requirements if r.marker is None or r.marker.evaluate({"python_version": "3.9"})
    ]
    new = [
        r for r in requirements if r.marker is None or r.marker.evaluate({"python_version": "3.10"})
    ]
    assert [str(r.specifier) for r in old] == [""] and old[0].name == "setuptools"
    assert {r.name for r in new} == {"setuptools", "pybind11", "cmake", "ninja"}


def test_the_sdist_has_all_sources(source: Path, tmp_path: Path) -> None:
    name = run_in(source, f"print(build_backend.build_sdist({str(tmp_path)!r}))")
    with tarfile.open(tmp_path / name) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    for folder, pattern in ((".", "*.py"), (".", "CMakeLists.txt"), ("csrc", "**/*"),
                            ("hogwild_ext", "**/*.py"), ("tests", "**/*")):  # fmt: skip
        needed = {
            str(p.relative_to(source)) for p in (source / folder).glob(pattern) if p.is_file()
        }
        assert needed and needed <= packed


# ---- with the real nvcc --------------------------------------------------------------------------


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.undo()
    try:
        return build_cuda.find_toolkit(os.environ, 0, build_cuda.RELEASE)
    except Unavailable as error:
        pytest.skip(str(error))


def test_nvcc_refuses_a_compiler_that_it_does_not_know(toolkit: Any, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    build_cuda.check_host_compiler(toolkit, {"CXX": "g++"})
    future = tmp_path / "g++-99"
    future.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    future.chmod(0o755)
    with pytest.raises(Unavailable, match=r"refuses .*g\+\+-99: unsupported GNU"):
        build_cuda.check_host_compiler(toolkit, {"CXX": str(future)})


def test_all_architectures_reach_nvcc(toolkit: Any, tmp_path: Path) -> None:
    """And the smallest of the CUDA sources compiles for them."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    import pybind11

    configure = [
        "cmake", str(ROOT), "-DHOGWILD_CUDA=ON", "-DHOGWILD_CUDA_ARCHS=80;120;90",
        f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    variables = {**os.environ, "LIBRARY_PATH": toolkit.library_path or ""}
    subprocess.run(configure, cwd=tmp_path, env=variables, check=True, capture_output=True)
    units = json.loads((tmp_path / "compile_commands.json").read_text())
    commands = {Path(unit["file"]).name: shlex.split(unit["command"]) for unit in units}
    kernels = {name: command for name, command in commands.items() if name.endswith(".cu")}
    assert set(kernels) == {path.name for path in (ROOT / "csrc/cuda").glob("*.cu")}
    for command in kernels.values():
        assert [word for word in command if word.startswith("arch=")] == [
            "arch=compute_80,code=sm_80", "arch=compute_120,code=sm_120",
            "arch=compute_90,code=sm_90", "arch=compute_120,code=compute_120",
        ]  # fmt: skip
    (tmp_path / "CMakeFiles/_C.dir/csrc/cuda").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(kernels["device.cu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr

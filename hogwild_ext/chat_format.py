"""The chat format of a model: where instructions and problem stand, and how a turn ends.

A chat template is a program of somebody else's. Some drop a system message without a word, some
take a message in parts only, some change what it says. So nothing is believed of a template: what
it makes is looked at, and what does not say all that it was given is not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Message = dict[str, Any]  # "role" and "content"

# Words that stand for others, to see what becomes of them. No template can know them.
_INSTRUCTIONS, _REQUEST, _ANSWER = (
    f"hogwild {part}" for part in ("instructions", "request", "answer")
)
_TURNS = ("the first thing asked", "the first answer", "what is asked then", "the last answer")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError for mistral-common's older tokenizers: with their control tokens they read
    nothing back but pieces of words."""
    if _is_mistral_common(tokenizer):
        text = tokenizer.decode(tokenizer.encode("a b\n", add_special_tokens=False))
        if text.strip(" ") != "a b\n":
            raise ValueError(
                "tokenizer: expected mistral-common's Tekken, got its SentencePiece, which reads "
                f"'a b\\n' back as {text!r}; load the model's tokenizer.json instead, as "
                "transformers.PreTrainedTokenizerFast does"
            )


def has_chat_format(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how the model's chats look."""
    return _is_mistral_common(tokenizer) or _template(tokenizer) is not None


def in_chat_format(tokenizer: Any, instructions: str, request: str, think: str) -> str:
    """Instructions and request, up to where the answer begins, or the thinking before it.

    A tokenizer without a chat format gets plain paragraphs, behind the token that it begins every
    text with, if it has one. `think` opens the thinking of a model that may think or not.

    Raises ValueError for a template that does not write both, whole, once and in this order; it
    says what is missing.
    """
    if not has_chat_format(tokenizer):
        first = getattr(tokenizer, "bos_token", None)
        begins = first if first and tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else ""
        return begins + "".join(f"{part}\n\n" for part in (instructions, request) if part)
    template = str(_template(tokenizer))
    options = {"enable_thinking": True, "thinking": True} if think else {}
    stand_in = _INSTRUCTIONS if instructions else ""
    faults = []
    for messages, sample in zip(
        _ways(instructions, request), _ways(stand_in, _REQUEST), strict=True
    ):
        try:
            shape = _rendered(tokenizer, sample, **options)
            text = _rendered(tokenizer, messages, **options)
        except ImportError:
            raise
        except Exception as error:  # whatever a template makes of what it does not expect
            faults.append(f"raises {type(error).__name__}: {error}")
            continue
        fault = _fault(shape, (stand_in, _REQUEST), once=True)
        if fault := fault or _fault(text, (instructions, request)):
            faults.append(fault)
            continue
        text += _unopened(tokenizer, sample, shape, options)
        # Templates of models that always think open it themselves (QwQ, DeepSeek-R1); where it is
        # a choice, the model would (Qwen3).
        is_open = bool(think) and text.rstrip().endswith(think.rstrip())
        return text if is_open or "enable_thinking" not in template else text + think
    raise ValueError(
        "tokenizer: expected a chat template that writes the instructions and the problem, whole, "
        f"once and in this order, got one that {faults[0]}"
        + (f"; with both in the user's message it {faults[2]}" if faults[2:] else "")
        + ". Give the tokenizer another chat_template, or None for plain paragraphs"
    )


def turn_end(tokenizer: Any) -> int | None:
    """The token that the chat template writes directly behind an answer. None if there is none, or
    if it might as well be the beginning of what comes next."""
    if not has_chat_format(tokenizer):
        return None
    added = added_tokens(tokenizer)
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": said} for role, said in zip(roles, _TURNS, strict=True)]
    for messages in (turns, _in_parts(turns)):
        try:
            text = _rendered(tokenizer, messages, opens_answer=False)
        except Exception:  # some refuse to end with an answer
            continue
        between = re.split("|".join(map(re.escape, _TURNS)), text)
        if re.findall("|".join(map(re.escape, _TURNS)), text) != list(_TURNS):
            continue
        *others, last = between
        token = _first_token(last, added)
        if token is None or token == _first_token(text, added):
            return None
        is_usual = token == _first_token(between[2], added)
        is_only_there = not any(added[token] in other for other in others)
        return token if is_usual or is_only_there else None
    return None


def special_tokens(tokenizer: Any) -> set[int]:
    """Tokens that mean something to a chat template: no worker writes them."""
    return {*_special(tokenizer), *getattr(tokenizer, "all_special_ids", ())}


def added_tokens(tokenizer: Any) -> dict[int, str]:
    """All tokens that are not made of letters, and their texts: the special ones and others."""
    added = {token: str(content) for token, content in _added(tokenizer).items()}
    return {**added, **_special(tokenizer)}


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, those of its control tokens among them; none are put in front."""
    if not _is_mistral_common(tokenizer):
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return tokens
    # To mistral-common, a text is words only.
    control = {content: token for token, content in _special(tokenizer).items()}
    longest_first = sorted(control, key=len, reverse=True)
    tokens = []
    for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, longest_first))})", text)):
        if i % 2:
            tokens.append(control[part])
        elif part:
            tokens += tokenizer.encode(part, add_special_tokens=False)
    return tokens


def _special(tokenizer: Any) -> dict[int, str]:
    special = {
        token: str(content)
        for token, content in _added(tokenizer).items()
        if getattr(content, "special", False)
    }
    ids, texts = (getattr(tokenizer, f"all_special_{what}", ()) for what in ("ids", "tokens"))
    return {**dict(zip(ids, texts, strict=False)), **special}


def _added(tokenizer: Any) -> Mapping[int, Any]:
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return added if isinstance(added, Mapping) else {}  # mistral-common has none


def _template(tokenizer: Any) -> str | None:
    """The template for chats without tools. Several have names."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, (list, tuple)):
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, Mapping):
        if "default" not in template and len(template) != 1:
            raise ValueError(
                "tokenizer: expected one chat template, or one that is called default, got "
                f"{', '.join(map(str, template)) or 'none'}; make one of them its chat_template"
            )
        template = template.get("default", next(iter(template.values())))
    return template


def _is_mistral_common(tokenizer: Any) -> bool:
    """Whether the tokenizer is mistral-common's: no template, and no control tokens in texts."""
    return any(kind.__name__.startswith("MistralCommon") for kind in type(tokenizer).__mro__)


def _ways(instructions: str, request: str) -> Iterator[list[Message]]:
    """The messages in which both can be said, the best first."""
    user = {"role": "user", "content": request}
    if instructions:
        messages = [{"role": "system", "content": instructions}, user]
        yield messages
        yield _in_parts(messages)
        user = {"role": "user", "content": f"{instructions}\n\n{request}"}
    yield [user]
    yield _in_parts([user])


def _in_parts(messages: list[Message]) -> list[Message]:
    """As templates of models that also see pictures want it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def _rendered(
    tokenizer: Any, messages: list[Message], opens_answer: bool = True, **options: Any
) -> str:
    if _is_mistral_common(tokenizer):
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        text: str = tokenizer.decode(tokens, skip_special_tokens=False)
        if encode(tokenizer, text) != list(tokens):
            raise ValueError(
                "its chat cannot be written as one text; are there control tokens among the words?"
            )
        return text
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=_template(tokenizer),
        tokenize=False,
        add_generation_prompt=opens_answer,
        **options,
    )
    return text


def _fault(text: str, parts: tuple[str, str], once: bool = False) -> str:
    """What is wrong with a rendered text that should have the parts in it, "" if nothing is.

    White space around a part may be gone: many templates strip it.
    """
    at = 0
    for name, part in zip(("the instructions", "the problem"), parts, strict=True):
        part = part.strip()
        found = text.find(part, at)
        if found < 0:
            if part in text:
                return "writes the problem in front of the instructions"
            kept = max(n for n in range(len(part)) if part[:n] in text)
            if once or kept == 0:
                return f"leaves out {name}"
            return f"changes {name}, or leaves them out, from {part[kept:][:40]!r} on"
        if once and part and text.count(part) > 1:
            return f"writes {name} {text.count(part)} times"
        at = found + len(part)
    return ""


def _unopened(tokenizer: Any, sample: list[Message], shape: str, options: dict[str, Any]) -> str:
    """What opens an answer, if the template does not write it when it is asked to.

    That is what it writes between what is asked and an answer that stands there.
    """
    asked = shape.rpartition(_REQUEST)[2]
    answer = {"role": "assistant", "content": _ANSWER}
    answer = _in_parts([answer])[0] if isinstance(sample[0]["content"], list) else answer
    try:
        if _rendered(tokenizer, sample, opens_answer=False, **options) != shape:
            return ""
        turn = _rendered(tokenizer, [*sample, answer], opens_answer=False, **options)
    except Exception:  # it cannot be seen then
        return ""
    opened, found, _ = turn.rpartition(_REQUEST)[2].partition(_ANSWER)
    if not found or not opened.startswith(asked) or opened.strip() == asked.strip():
        return ""
    return opened[len(asked) :]


def _first_token(text: str, added: Mapping[int, str]) -> int | None:
    """The added token that the text begins with, behind white space."""
    text = text.lstrip()
    fits = [token for token, content in added.items() if content and text.startswith(content)]
    return max(fits, key=lambda token: len(added[token]), default=None)

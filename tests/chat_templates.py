"""Chat templates of the shapes that models ship, in words of our own."""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Adds instructions of its own where there are none, and thinks unless it is told not to.
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
THINKS_IF_ASKED = (
    CHATML.removesuffix("{% endif %}")
    + "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
# Instructions stand in the first message of the user; roles have to take turns.
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set told = '' %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{{ (told + m.content if loop.first else m.content) | trim }}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'system' %}Today: {{ strftime_now('%d %b %Y') }}\n\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Knows no system message, and opens an answer behind every user whether it is asked to or not.
PHI_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('user and assistant only') }}{% endif %}{% endfor %}"
)
# Instructions stand in the last message of the user.
MISTRAL_3 = (
    "{% if messages[0].role == 'system' %}{% set told = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]"
    "{% if loop.last and told is defined %}{{ told + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_7 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Puts all instructions in front, and always thinks.
DEEPSEEK = (
    "{% set ns = namespace(told='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.told = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.told }}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Of a model that sees: a message is a list of parts.
IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same, and a message in words is refused. In parts, instructions are dropped.
IN_PARTS_ONLY = (
    "{% for m in messages if m.role != 'system' %}{{ '<' + m.content[0]['type'] + '>' }}"
    "{{ m.role }}: {{ m.content | map(attribute='text') | join }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<text>assistant: {% endif %}"
)
# A turn has a beginning only; what ends it is the next one's.
GLM_4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|SYSTEM_TOKEN|>' if m.role == 'system' else '<|USER_TOKEN|>' if m.role == 'user' "
    "else '<|CHATBOT_TOKEN|>' }}"
    "{{ m.content }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
    "<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
# Says something itself, and calls what it is told the developer's; the last answer ends otherwise.
HARMONY = (
    "<|start|>system<|message|>Knowledge: {{ strftime_now('%Y') }}<|end|>{% for m in messages %}"
    "<|start|>{{ 'developer' if m.role == 'system' else m.role }}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{% if m.role == 'system' %}# Instructions\n\n{% endif %}{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Roles are plain words; the only token is the end.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Never opens an answer.
NEVER_OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
# Every turn begins with the same token, and nothing ends it.
ONE_MARK = (
    "{% for m in messages %}<|mark|>{{ m.role }}\n{{ m.content }}{% endfor %}<|mark|>assistant\n"
)

# -> the token that ends an answer
ENDS: dict[str, tuple[str, str | None]] = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen": (QWEN, "<|im_end|>"),
    "llama 2": (LLAMA_2, "<eos>"),
    "llama 3": (LLAMA_3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "phi 3": (PHI_3, "<|end|>"),
    "mistral 1": (MISTRAL_1, "<eos>"),
    "mistral 3": (MISTRAL_3, "<eos>"),
    "mistral 7": (MISTRAL_7, "<eos>"),
    "deepseek": (DEEPSEEK, "<eos>"),
    "in parts": (IN_PARTS, "<|im_end|>"),
    "in parts only": (IN_PARTS_ONLY, "<|im_end|>"),
    "glm 4": (GLM_4, None),
    "command r": (COMMAND_R, "<|END_OF_TURN_TOKEN|>"),
    "granite": (GRANITE, "<|end_of_text|>"),
    "harmony": (HARMONY, "<|return|>"),
    "zephyr": (ZEPHYR, "<eos>"),
    "never opens": (NEVER_OPENS, "<|im_end|>"),
    "one mark": (ONE_MARK, None),
}
TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|end|>", "<|assistant|>", "<|User|>",
    "<|Assistant|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[gMASK]", "<sop>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|start|>",
    "<|message|>", "<|channel|>", "<|return|>", "<|mark|>", "<think>", "</think>",
]  # fmt: skip

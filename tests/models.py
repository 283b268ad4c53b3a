"""Tiny random models of every supported family, with weights that make attention matter.

transformers initialises weights so small that a random model attends to everything alike and a
wrong position would hardly show. Here every projection keeps the scale of its input, norms and
biases are random too, and logits come out with a standard deviation of about 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers

VOCABULARY = 211

# What each family needs beside the sizes that all have.
SPECIFIC: dict[str, dict[str, Any]] = {
    "gemma": {},
    "glm": {},
    "glm4": {},
    "granite": {
        "embedding_multiplier": 1.5,
        "logits_scaling": 1.25,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.23,
    },
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "seed_oss": {},
    "starcoder2": {"sliding_window": None},
}

# Their head_dim is the hidden size divided by the number of heads. Others may choose.
HEADS_FILL_HIDDEN = ("granite", "olmo2", "phi3", "qwen2", "qwen2_moe", "starcoder2")

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    },
}


def tiny_config(
    family: str,
    *,
    head_dim: int = 32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    num_layers: int = 2,
    rope: str = "default",
    **changes: Any,
) -> transformers.PretrainedConfig:
    """A config of `family` with two small layers; `changes` go into it as they are."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16 * num_heads,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family in HEADS_FILL_HIDDEN:
        sizes["hidden_size"] = num_heads * head_dim
        del sizes["head_dim"]
    rope_parameters = {"rope_theta": 10000.0, **ROPE[rope]}
    if family in ("glm", "glm4"):
        rope_parameters["partial_rotary_factor"] = 0.5
    settings = {**sizes, "rope_parameters": rope_parameters, **SPECIFIC[family], **changes}
    return transformers.AutoConfig.for_model(family, **settings)


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A float32 model of `tiny_config(family, **changes)` in eval mode, the same for each seed."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    randomise(model, seed)
    return model.eval()


def randomise(model: transformers.PreTrainedModel, seed: int) -> None:
    """Weights that carry a layer's scale from input to output; norms and biases are random too."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    gemma = model.config.model_type == "gemma"  # scales embeddings up; its norms are 1 + weight
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is embeddings:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]) if gemma else noise)
            elif parameter.dim() > 1:  # [..., out, in]
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            elif name.endswith("bias") or gemma:
                parameter.copy_(0.3 * noise)
            elif name.endswith("q_norm.weight"):
                parameter.copy_(0.8 + 0.3 * noise)
            else:
                parameter.copy_(1.0 + 0.3 * noise)


def random_tokens(count: int, seed: int) -> list[int]:
    """`count` token ids, none of them a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def plain_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The logits [n, vocab] of one ordinary forward pass over `tokens`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

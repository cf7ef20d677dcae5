"""Tiny random models of real families, with weights scaled so that a wrong state shows in every logit after it.

transformers' own initialisation hides errors: its weights are so small that logits hardly depend on a state.
"""

from typing import Any

import torch
import transformers

VOCABULARY = 128
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16}
MIXED = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]

# family: (name of the classes in transformers, settings)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("Bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1], **MAMBA}),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mamba", "mlp"],
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "num_experts_per_tok": 2,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "num_key_value_heads": 4,
        },
    ),
    "falcon_h1": ("FalconH1", {"num_hidden_layers": 2, "mamba_d_ssm": 128, **MAMBA}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "intermediate_size": 32,
            **MAMBA,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "num_hidden_layers": 4,
            "layer_types": MIXED,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            **DELTA,
        },
    ),
    "qwen3_5": ("Qwen3_5", {"num_hidden_layers": 4, "layer_types": MIXED, "head_dim": 16, **DELTA}),
    "olmo_hybrid": ("OlmoHybrid", {"num_hidden_layers": 4, "layer_types": MIXED, **DELTA}),
    "kimi_linear": (
        "KimiLinear",
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_key_value_heads": 4,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
    ),
    "lfm2": (
        "Lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16},
    ),
    # attention with a window, and without
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "head_dim": 16,
            "sliding_window": 24,
        },
    ),
    "llama": ("Llama", {"num_hidden_layers": 2}),
    # states alone
    "mamba2": (
        "Mamba2",
        {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    ),
    # refused
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "falcon_mamba": ("FalconMamba", {"num_hidden_layers": 2, "state_size": 8, "use_mambapy": False}),
    "minimax": (
        "MiniMax",
        {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    ),
}
HYBRIDS = tuple(SETTINGS)[:10]
EXPERTS = ("nemotron_h", "granitemoehybrid", "qwen3_next", "kimi_linear")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model in evaluation mode: matrices N(0, 1 / inputs), embeddings N(0, 1) unless
    they are the output matrix too, logits of about N(0, 1).
    """
    name, settings = SETTINGS[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**{**COMMON, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "A_log" in parameter_name:
                continue
            is_table = "embed_tokens" in parameter_name and not config.tie_word_embeddings
            fan_in = 1 if is_table else parameter.shape[-1]  # experts are stacked, and convolutions have one input
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    return model.to(dtype).eval()

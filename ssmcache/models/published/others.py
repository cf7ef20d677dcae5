"""Published hybrids of attention with delta rules, and one model of each pure kind for comparison."""

from ssmcache.models.published import Preset, pattern

_GATED_DELTA_NET: dict[str, object] = {
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}

DELTA_HYBRIDS = (
    Preset(
        "qwen3-next-80b-a3b",
        {
            **_GATED_DELTA_NET,
            "model_type": "qwen3_next",
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "num_experts": 512,
            "decoder_sparse_step": 1,
            "torch_dtype": "bfloat16",
        },
        "config.json of Qwen/Qwen3-Next-80B-A3B-Thinking, as kept in ai-dynamo/aiconfigurator",
        "published config",
        80,
        3,
    ),
    Preset(
        "qwen3.5-9b",
        {
            "model_type": "qwen3_5",
            "text_config": {
                **_GATED_DELTA_NET,
                "model_type": "qwen3_5_text",
                "num_hidden_layers": 32,
                "num_key_value_heads": 4,
                "mamba_ssm_dtype": "float32",
                "dtype": "bfloat16",
            },
        },
        "config.json of Qwen/Qwen3.5-9B, main branch as of 2026-09-05",
        "published config",
        9,
    ),
    Preset(
        "kimi-linear-48b-a3b",
        {
            "model_type": "kimi_linear",
            "num_hidden_layers": 27,
            "num_attention_heads": 32,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "num_experts": 256,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "linear_attn_config": {
                "kda_layers": (1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26),
                "full_attn_layers": (4, 8, 12, 16, 20, 24, 27),
                "num_heads": 32,
                "head_dim": 128,
                "short_conv_kernel_size": 4,
            },
            "dtype": "bfloat16",
        },
        "config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct",
        "published config",
        48,
        3,
    ),
    Preset(
        "olmo-hybrid-7b",
        {
            "model_type": "olmo_hybrid",
            "num_hidden_layers": 32,
            "layer_types": pattern(32, "linear_attention", "full_attention", tuple(range(3, 32, 4))),
            "hidden_size": 3840,
            "num_attention_heads": 30,
            "num_key_value_heads": 30,
            "linear_num_key_heads": 30,
            "linear_num_value_heads": 30,
            "linear_key_head_dim": 96,
            "linear_value_head_dim": 192,
            "linear_conv_kernel_dim": 4,
        },
        "defaults of OlmoHybridConfig in transformers 5.17, which names allenai/Olmo-Hybrid-7B as its checkpoint",
        "vendor code",
        7,
    ),
)

PURE_MODELS = (
    Preset(
        "llama-3.1-8b",
        {
            "model_type": "llama",
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "torch_dtype": "bfloat16",
        },
        "config.json of meta-llama/Llama-3.1-8B",
        "published config",
        8,
    ),
    Preset(
        "mamba2-2.7b",
        {"d_model": 2560, "n_layer": 64, "d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": ()},
        "config.json of state-spaces/mamba2-2.7b, which leaves the state to the defaults of Mamba2 in "
        "state-spaces/mamba",
        "vendor code",
        2.7,
    ),
)

"""Readers of hybrids of attention with delta rules: gated delta nets and Kimi's KDA."""

from ssmcache.models.families.blocks import delta_net, read_grouped_query, read_latent
from ssmcache.models.families.fields import Fields
from ssmcache.models.families.plain_transformers import expert_layers
from ssmcache.models.spec import FeedForward, LayerSpec, SsmSpec

_LAYER_TYPES = {"linear_attention": "ssm", "full_attention": "attention"}


def _kinds(fields: Fields) -> tuple[str, ...]:
    """`layer_types`, or else full attention as the last of every `full_attention_interval` layers."""
    if fields.has("layer_types"):
        return fields.layer_kinds("layer_types", known=_LAYER_TYPES)
    interval = fields.positive_int("full_attention_interval")
    num_layers = fields.num_layers()
    return tuple("ssm" if (index + 1) % interval else "attention" for index in range(num_layers))


def _gated_delta_net(fields: Fields) -> SsmSpec:
    return delta_net(
        "gated_delta_net",
        k_heads=fields.positive_int("linear_num_key_heads"),
        v_heads=fields.positive_int("linear_num_value_heads"),
        k_dim=fields.positive_int("linear_key_head_dim"),
        v_dim=fields.positive_int("linear_value_head_dim"),
        d_conv=fields.positive_int("linear_conv_kernel_dim"),
    )


def qwen3_next(fields: Fields) -> tuple[LayerSpec, ...]:
    """Qwen3-Next and Qwen3.5: gated delta nets with attention in every fourth layer; experts if the model has any."""
    attention, ssm = read_grouped_query(fields, head_dim_stated=True), _gated_delta_net(fields)
    return tuple(
        LayerSpec(attention, None, feed_forward) if kind == "attention" else LayerSpec(None, ssm, feed_forward)
        for kind, feed_forward in zip(_kinds(fields), expert_layers(fields), strict=True)
    )


def olmo_hybrid(fields: Fields) -> tuple[LayerSpec, ...]:
    """OLMo-Hybrid: gated delta nets with as many heads as attention has; a dense MLP in every layer."""
    layers = {
        "attention": LayerSpec(attention=read_grouped_query(fields), feed_forward="mlp"),
        "ssm": LayerSpec(ssm=_gated_delta_net(fields), feed_forward="mlp"),
    }
    return tuple(layers[kind] for kind in fields.layer_kinds("layer_types", known=_LAYER_TYPES))


def kimi_linear(fields: Fields) -> tuple[LayerSpec, ...]:
    """Kimi-Linear: KDA layers and MLA layers, in lists that count layers from 1; experts after the first layers.

    KDA has a short convolution each for queries, keys and values, all heads x head size wide, and a state of
    [heads, head_dim, head_dim]. MLA keeps one latent vector a token.
    """
    linear = fields.section("linear_attn_config")
    num_layers = fields.num_layers()
    kda_at, attention_at = linear.integers("kda_layers"), linear.integers("full_attn_layers")
    if sorted(kda_at + attention_at) != list(range(1, num_layers + 1)):
        expected = f"each layer of 1..{num_layers} once"
        raise linear.error("kda_layers and full_attn_layers", expected, sorted(kda_at + attention_at))
    heads, head_dim = linear.positive_int("num_heads"), linear.positive_int("head_dim")
    d_conv = linear.positive_int("short_conv_kernel_size")
    ssm = delta_net("kda", k_heads=heads, v_heads=heads, k_dim=head_dim, v_dim=head_dim, d_conv=d_conv)
    attention, is_attention = read_latent(fields), frozenset(attention_at)

    def feed_forward(index: int) -> FeedForward:
        first, every = fields.count("first_k_dense_replace"), fields.count("moe_layer_freq", 1) or 1
        is_sparse = fields.count("num_experts") > 0 and index >= first and index % every == 0
        return "moe" if is_sparse else "mlp"

    return tuple(
        LayerSpec(attention, None, feed_forward(index))
        if index + 1 in is_attention
        else LayerSpec(None, ssm, feed_forward(index))
        for index in range(num_layers)
    )

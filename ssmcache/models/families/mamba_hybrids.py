"""Readers of hybrids of attention with Mamba-1 and Mamba-2, and of pure Mamba-2."""

from ssmcache.models.families.blocks import (
    check_heads,
    grouped_query,
    mamba1,
    mamba2,
    read_grouped_query,
    read_mamba2,
)
from ssmcache.models.families.fields import Fields
from ssmcache.models.spec import FeedForward, LayerSpec

_LAYER_TYPES = {"mamba": "ssm", "linear_attention": "ssm", "attention": "attention", "full_attention": "attention"}
_NEMOTRON_PATTERN = {"M": "ssm", "*": "attention", "-": "mlp", "E": "moe"}
_ZAMBA2_BLOCKS = {"mamba": "ssm", "linear_attention": "ssm", "m": "ssm", "hybrid": "both", "g": "both"}


def nemotron_h(fields: Fields) -> tuple[LayerSpec, ...]:
    """Nemotron-H: every layer is one thing, by a pattern of letters or a list of names.

    Heads x head size need not be expand x hidden size (Nano 2: 10,240, not 8,960), and `head_dim` of attention is
    not hidden size / heads, so both are read and never computed.
    """
    if fields.has("layers_block_type"):
        known = {**_LAYER_TYPES, "mlp": "mlp", "moe": "moe"}
        kinds = fields.layer_kinds("layers_block_type", known=known)
    else:
        kinds = fields.layer_kinds("hybrid_override_pattern", known=_NEMOTRON_PATTERN)
    ssm = mamba2(
        num_heads=fields.positive_int("mamba_num_heads"),
        head_dim=fields.positive_int("mamba_head_dim"),
        d_state=fields.positive_int("ssm_state_size"),
        n_groups=fields.positive_int("n_groups", "mamba_n_groups"),
        d_conv=fields.positive_int("conv_kernel", "mamba_d_conv"),
    )
    layers = {
        "ssm": LayerSpec(ssm=ssm),
        "attention": LayerSpec(attention=read_grouped_query(fields, head_dim_stated=True)),
        "mlp": LayerSpec(feed_forward="mlp"),
        "moe": LayerSpec(feed_forward="moe"),
    }
    return tuple(layers[kind] for kind in kinds)


def bamba(fields: Fields) -> tuple[LayerSpec, ...]:
    """Bamba: Mamba-2 everywhere but at `attn_layer_indices`; a dense MLP in every layer."""
    num_layers = fields.num_layers()
    attention_at = frozenset(fields.integers("attn_layer_indices"))
    if any(not 0 <= index < num_layers for index in attention_at):
        raise fields.error("field 'attn_layer_indices'", f"layers in 0..{num_layers - 1}", sorted(attention_at))
    d_inner = fields.positive_int("mamba_expand") * fields.positive_int("hidden_size")
    attention = LayerSpec(attention=read_grouped_query(fields), feed_forward="mlp")
    ssm = LayerSpec(ssm=read_mamba2(fields, d_inner=d_inner), feed_forward="mlp")
    return tuple(attention if index in attention_at else ssm for index in range(num_layers))


def granite_moe_hybrid(fields: Fields) -> tuple[LayerSpec, ...]:
    """Granite 4.0-H: Mamba-2 or attention by `layer_types`; experts in every layer, or none if there are 0 of them."""
    kinds = fields.layer_kinds("layer_types", "layers_block_type", known=_LAYER_TYPES)
    d_inner = fields.positive_int("mamba_expand") * fields.positive_int("hidden_size")
    attention, ssm = read_grouped_query(fields), read_mamba2(fields, d_inner=d_inner)
    feed_forward: FeedForward = "moe" if fields.count("num_local_experts") else "mlp"
    layers = {"attention": LayerSpec(attention, None, feed_forward), "ssm": LayerSpec(None, ssm, feed_forward)}
    return tuple(layers[kind] for kind in kinds)


def jamba(fields: Fields) -> tuple[LayerSpec, ...]:
    """Jamba: Mamba-1 but for one attention layer every `attn_layer_period`; experts in every second layer or so."""
    period, offset = fields.positive_int("attn_layer_period"), fields.count("attn_layer_offset")
    if offset >= period:
        raise fields.error("field 'attn_layer_offset'", f"less than attn_layer_period = {period}", offset)
    attention = read_grouped_query(fields)
    ssm = mamba1(
        d_inner=fields.positive_int("mamba_expand") * fields.positive_int("hidden_size"),
        d_state=fields.positive_int("mamba_d_state"),
        d_conv=fields.positive_int("mamba_d_conv"),
    )
    has_experts = fields.count("num_experts", 1) > 1
    expert_period, expert_offset = fields.count("expert_layer_period", 1) or 1, fields.count("expert_layer_offset")

    def layer(index: int) -> LayerSpec:
        is_sparse = has_experts and index % expert_period == expert_offset
        feed_forward: FeedForward = "moe" if is_sparse else "mlp"
        is_attention = index % period == offset
        return LayerSpec(attention, None, feed_forward) if is_attention else LayerSpec(None, ssm, feed_forward)

    return tuple(layer(index) for index in range(fields.num_layers()))


def zamba2(fields: Fields) -> tuple[LayerSpec, ...]:
    """Zamba2: Mamba-2 in every layer, and a shared Transformer block before it in the `hybrid` ones.

    Sharing saves weights, not cache: each use of the block keeps KV of its own. Its attention is twice as wide as the
    model, because it reads the hidden state and the embedding side by side.
    """
    kinds = fields.layer_kinds("layers_block_type", known=_ZAMBA2_BLOCKS)
    hidden_size = fields.positive_int("hidden_size")
    num_heads = fields.positive_int("num_attention_heads")
    num_kv_heads = fields.positive_int("num_key_value_heads") if fields.has("num_key_value_heads") else num_heads
    stated = fields.has("attention_head_dim")
    head_dim = fields.positive_int("attention_head_dim") if stated else 2 * hidden_size // num_heads
    if not head_dim:
        raise fields.error("field 'num_attention_heads'", f"at most 2 x hidden_size = {2 * hidden_size}", num_heads)
    d_inner = fields.positive_int("mamba_expand", "expansion_factor") * hidden_size
    if fields.has("n_mamba_heads"):
        num_ssm_heads = fields.positive_int("n_mamba_heads")
    else:
        num_ssm_heads = d_inner // fields.positive_int("mamba_headdim")
    check_heads(fields, d_inner // max(num_ssm_heads, 1) * num_ssm_heads, d_inner)
    ssm = mamba2(
        num_heads=num_ssm_heads,
        head_dim=d_inner // num_ssm_heads,
        d_state=fields.positive_int("mamba_d_state", "state_size"),
        n_groups=fields.positive_int("mamba_ngroups", default=1),
        d_conv=fields.positive_int("mamba_d_conv", "conv_dimension"),
    )
    layers = {
        "ssm": LayerSpec(ssm=ssm),
        "both": LayerSpec(grouped_query(num_heads, num_kv_heads, head_dim), ssm, "mlp"),
    }
    return tuple(layers[kind] for kind in kinds)


def falcon_h1(fields: Fields) -> tuple[LayerSpec, ...]:
    """Falcon-H1: attention and Mamba-2 side by side in every layer.

    The inner width is `mamba_d_ssm` where that is stated, whatever expand x hidden size says.
    """
    if fields.has("mamba_d_ssm"):
        d_inner = fields.positive_int("mamba_d_ssm")
    else:
        d_inner = fields.positive_int("mamba_expand") * fields.positive_int("hidden_size")
    layer = LayerSpec(read_grouped_query(fields), read_mamba2(fields, d_inner=d_inner), "mlp")
    return (layer,) * fields.num_layers()


def pure_mamba2(fields: Fields) -> tuple[LayerSpec, ...]:
    """Mamba-2 as transformers writes it."""
    num_heads, head_dim = fields.positive_int("num_heads"), fields.positive_int("head_dim")
    check_heads(fields, num_heads * head_dim, fields.positive_int("expand") * fields.positive_int("hidden_size"))
    ssm = mamba2(
        num_heads=num_heads,
        head_dim=head_dim,
        d_state=fields.positive_int("state_size"),
        n_groups=fields.positive_int("n_groups"),
        d_conv=fields.positive_int("conv_kernel"),
    )
    return (LayerSpec(ssm=ssm),) * fields.num_layers()


def mamba_ssm(fields: Fields) -> tuple[LayerSpec, ...]:
    """Mamba-2 as the mamba_ssm package writes it: no `model_type`, and an `ssm_cfg` that states what is not default.

    The defaults are those of its `Mamba2` module: d_state 128, d_conv 4, expand 2, head size 64, 1 group.
    """
    cfg = fields.section("ssm_cfg")
    if cfg.values.get("layer") != "Mamba2":
        raise cfg.error("field 'layer'", "'Mamba2'", cfg.values.get("layer"))
    if fields.values.get("attn_layer_idx") or fields.count("d_intermediate"):
        # its attention layers have a convolution of their own, which no published description fixes
        raise fields.error("attn_layer_idx and d_intermediate", "none", fields.values.get("attn_layer_idx"))
    d_inner = cfg.positive_int("expand", default=2) * fields.positive_int("d_model")
    head_dim = cfg.positive_int("headdim", default=64)
    check_heads(fields, d_inner // head_dim * head_dim, d_inner)
    ssm = mamba2(
        num_heads=d_inner // head_dim,
        head_dim=head_dim,
        d_state=cfg.positive_int("d_state", default=128),
        n_groups=cfg.positive_int("ngroups", default=1),
        d_conv=cfg.positive_int("d_conv", default=4),
    )
    return (LayerSpec(ssm=ssm),) * fields.num_layers("n_layer")

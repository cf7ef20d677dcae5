"""Shapes of the building blocks that several families share, each with the source of its formula.

SSM shapes follow vLLM's `MambaStateShapeCalculator` (vllm/model_executor/layers/mamba/mamba_utils.py) for one device,
which keeps d_conv - 1 positions of the convolution; transformers 5 keeps d_conv, of which the oldest is never read.
"""

from ssmcache.models.families.fields import Fields
from ssmcache.models.spec import AttentionSpec, SsmSpec


def grouped_query(num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionSpec:
    """Keys and values of `num_kv_heads * head_dim` elements each, read by `num_heads` queries."""
    return AttentionSpec(
        num_key_elements=num_kv_heads * head_dim,
        num_value_elements=num_kv_heads * head_dim,
        num_query_elements=num_heads * head_dim,
        num_output_elements=num_heads * head_dim,
    )


def read_latent(fields: Fields) -> AttentionSpec:
    """MLA: the compressed vector and the shared rotary key, together one vector a token (DeepSeek-V2, 2405.04434).

    In a prefill each head expands it to a key of nope + rope elements and to a value of `v_head_dim`. A config
    without the heads is read all the same: they decide the work, not what is kept.
    """
    rope = fields.positive_int("qk_rope_head_dim")
    num_elements = fields.positive_int("kv_lora_rank") + rope
    if not all(map(fields.has, ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))):
        return AttentionSpec(num_latent_elements=num_elements)
    num_heads = fields.positive_int("num_attention_heads")
    return AttentionSpec(
        num_latent_elements=num_elements,
        num_query_elements=num_heads * (fields.count("qk_nope_head_dim") + rope),
        num_output_elements=num_heads * fields.positive_int("v_head_dim"),
    )


def mamba2(*, num_heads: int, head_dim: int, d_state: int, n_groups: int, d_conv: int) -> SsmSpec:
    """Mamba-2: the convolution runs over x and over B and C of every group."""
    channels = num_heads * head_dim + 2 * n_groups * d_state
    return SsmSpec("mamba2", (num_heads, head_dim, d_state), (channels, d_conv - 1))


def mamba1(*, d_inner: int, d_state: int, d_conv: int) -> SsmSpec:
    """Mamba-1: the convolution runs over x alone."""
    return SsmSpec("mamba1", (d_inner, d_state), (d_inner, d_conv - 1))


def delta_net(kind: str, *, k_heads: int, v_heads: int, k_dim: int, v_dim: int, d_conv: int) -> SsmSpec:
    """Delta rules (gated delta net, KDA): the convolution runs over queries, keys and values."""
    channels = 2 * k_heads * k_dim + v_heads * v_dim
    return SsmSpec(kind, (v_heads, v_dim, k_dim), (channels, d_conv - 1))


def read_grouped_query(fields: Fields, *, head_dim_stated: bool = False) -> AttentionSpec:
    """Attention of a usual config.

    `num_key_value_heads` is `num_attention_heads` if missing, `head_dim` is `hidden_size / num_attention_heads`, as in
    transformers; with `head_dim_stated` the family's head is not that wide, and the field must be there.
    A model with a sliding window keeps less than this says, so it is refused.

    Errors: ModelError for a missing field, a window, or heads that do not divide the hidden size.
    """
    if fields.has("sliding_window") and fields.values.get("use_sliding_window") is not False:
        raise fields.error("field 'sliding_window'", "null (windows are not read yet)", fields.values["sliding_window"])
    num_heads = fields.positive_int("num_attention_heads")
    num_kv_heads = fields.positive_int("num_key_value_heads") if fields.has("num_key_value_heads") else num_heads
    if head_dim_stated or fields.has("head_dim"):
        return grouped_query(num_heads, num_kv_heads, fields.positive_int("head_dim", "attention_head_dim"))
    hidden_size = fields.positive_int("hidden_size")
    if hidden_size % num_heads:
        raise fields.error("field 'hidden_size'", f"a multiple of num_attention_heads = {num_heads}", hidden_size)
    return grouped_query(num_heads, num_kv_heads, hidden_size // num_heads)


def read_mamba2(fields: Fields, *, d_inner: int) -> SsmSpec:
    """Mamba-2 of the configs that follow Bamba: `mamba_n_heads`, `mamba_d_head` (a number or "auto") and so on.

    Errors: ModelError for a missing field, or if heads x head size is not `d_inner`.
    """
    num_heads = fields.positive_int("mamba_n_heads")
    is_auto = fields.values.get("mamba_d_head") == "auto"
    head_dim = d_inner // num_heads if is_auto else fields.positive_int("mamba_d_head")
    check_heads(fields, num_heads * head_dim, d_inner)
    return mamba2(
        num_heads=num_heads,
        head_dim=head_dim,
        d_state=fields.positive_int("mamba_d_state"),
        n_groups=fields.positive_int("mamba_n_groups"),
        d_conv=fields.positive_int("mamba_d_conv"),
    )


def check_heads(fields: Fields, got: int, d_inner: int) -> None:
    """Mamba heads must tile the inner width. Errors: ModelError if they do not."""
    if got != d_inner:
        raise fields.error("Mamba heads x head size", f"the inner width {d_inner}", got)

"""Readers of plain Transformers, dense and with experts, for comparison with hybrids."""

from ssmcache.models.families.blocks import read_grouped_query
from ssmcache.models.families.fields import Fields
from ssmcache.models.spec import FeedForward, LayerSpec


def expert_layers(fields: Fields) -> tuple[FeedForward, ...]:
    """One entry a layer: experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers` (Qwen)."""
    num_layers = fields.num_layers()
    dense = frozenset(fields.integers("mlp_only_layers") if fields.has("mlp_only_layers") else ())
    step = fields.count("decoder_sparse_step", 1) or 1
    has_experts = fields.count("num_experts") > 0
    return tuple(
        "moe" if has_experts and index not in dense and (index + 1) % step == 0 else "mlp"
        for index in range(num_layers)
    )


def llama(fields: Fields) -> tuple[LayerSpec, ...]:
    """Llama, Mistral, Qwen2: grouped-query attention and a dense MLP in every layer."""
    return _transformer(fields, _everywhere(fields, "mlp"))


def mixtral(fields: Fields) -> tuple[LayerSpec, ...]:
    """Mixtral: as Llama, with experts in every layer."""
    return _transformer(fields, _everywhere(fields, "moe"))


def qwen3(fields: Fields) -> tuple[LayerSpec, ...]:
    """Qwen3, dense and with experts: the head size is a field of its own."""
    return _transformer(fields, expert_layers(fields), head_dim_stated=True)


def _everywhere(fields: Fields, feed_forward: FeedForward) -> tuple[FeedForward, ...]:
    return (feed_forward,) * fields.num_layers()


def _transformer(
    fields: Fields, feed_forwards: tuple[FeedForward, ...], *, head_dim_stated: bool = False
) -> tuple[LayerSpec, ...]:
    if fields.has("layer_types"):
        fields.layer_kinds("layer_types", known={"full_attention": "attention"})
    attention = read_grouped_query(fields, head_dim_stated=head_dim_stated)
    return tuple(LayerSpec(attention, None, feed_forward) for feed_forward in feed_forwards)

"""Records of published models: the fields of their config.json that decide what a cache holds."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """One published model; parameters in billions, as the vendor rounds them."""

    name: str
    config: Mapping[str, object]
    source: str
    confidence: str
    billion_parameters: float
    billion_active_parameters: float | None = None
    parameters_source: str = "model name"


def pattern(num_layers: int, every: str, other: str, other_at: tuple[int, ...]) -> tuple[str, ...]:
    """One name a layer: `other` at the layers in `other_at`, `every` at the rest."""
    return tuple(other if index in other_at else every for index in range(num_layers))

"""The `[lighthouse]` section of a job's TOML; named by `job.custom_config_module`."""

from dataclasses import dataclass, field

from torchtitan_ext.lighthouse import LighthouseConfig


@dataclass(frozen=True)
class Lighthouse(LighthouseConfig):
    enable: bool = False
    """Train the layers that aren't listed as dense with Lighthouse Attention"""

    dense_layers: list[int] | None = None
    """Layers that keep dense attention, counted from 0. None means the flavor's own list."""


@dataclass
class JobConfig:
    lighthouse: Lighthouse = field(default_factory=Lighthouse)

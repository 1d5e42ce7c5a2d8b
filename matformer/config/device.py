"""What a device and its cluster can do: the few numbers from which a step's time is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from matformer.config.load import read_yaml
from matformer.config.schema import Dtype, Fraction, Positive, Ratio, Section
from matformer.errors import ConfigError

Amount = Annotated[float, Field(gt=0.0)]


class DeviceConfig(Section):
    """One kind of device, `devices_a_node` of them in a node. Rates are those of one device."""

    name: str
    source: str = Field(description="where the numbers come from: measured how and when, or data sheet")
    peak_tflops: Amount = Field(description="dense products of matrices: bfloat16 on GPUs, float32 on CPUs")
    float32_tflops: Amount | None = Field(None, description="the same in float32 where that is another number, no TF32")
    achieved_share: Fraction = Field(description="of the peak in wide layers, everything between products included")
    half_width: Ratio = Field(description="width of a product that reaches half of that share")
    memory_gib: Amount
    usable_share: Fraction = Field(description="of the memory; the rest is the driver's, the libraries' and lost")
    memory_gb_s: Amount = Field(description="to and from its own memory")
    devices_a_node: Positive
    in_node_gb_s: Amount = Field(description="each way between devices of a node, achieved by a ring")
    between_nodes_gb_s: Amount = Field(description="each way of one device's share of its node's network, achieved")
    latency_us: Ratio = Field(description="of one collective")

    @property
    def usable_bytes(self) -> float:
        return self.memory_gib * 2**30 * self.usable_share

    def peak(self, dtype: Dtype) -> float:
        """FLOPs a second of dense products of matrices in this dtype."""
        own = self.float32_tflops if dtype == "float32" else None
        return (own or self.peak_tflops) * 1e12


def load_device(path: Path | str) -> DeviceConfig:
    """The file as a DeviceConfig. Raises ConfigError."""
    try:
        return DeviceConfig.model_validate(read_yaml(Path(path)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} must describe a device, got {first['msg'].lower()} at {key}; change {key}") from None

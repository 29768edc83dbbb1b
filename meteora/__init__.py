"""MeteoRA: one frozen language model, many LoRA adapters, and a gate in every linear layer that picks among them.

``MeteoraModel`` puts the adapters in, ``train_gates`` trains the gates, ``train_adapters`` makes adapters.
"""

from meteora.adapter_training import train_adapters
from meteora.adapters import AdapterError
from meteora.config import AdapterTrainingConfig, GateTrainingConfig, MeteoraConfig
from meteora.gating import Routing
from meteora.layer import MeteoraLinear
from meteora.model import MeteoraModel
from meteora.trace import Trace
from meteora.training import train_gates

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterTrainingConfig",
    "GateTrainingConfig",
    "MeteoraConfig",
    "MeteoraLinear",
    "MeteoraModel",
    "Routing",
    "Trace",
    "train_adapters",
    "train_gates",
]

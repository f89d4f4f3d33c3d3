"""Every kind of draft head, by the word in ``drafter_config.json``."""

from specstream_mlx.drafters.eagle import Eagle, Eagle3
from specstream_mlx.drafters.head import Head
from specstream_mlx.drafters.hydra import Hydra
from specstream_mlx.drafters.medusa import Medusa

HEADS: dict[str, type[Head]] = {kind.name: kind for kind in (Medusa, Hydra, Eagle, Eagle3)}

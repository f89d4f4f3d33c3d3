"""The legal words of options, and plain types of what a user may choose. Nothing here imports MLX.

Every list of legal words stands here once: the library checks a value against it (``typing.get_args``), and the
command line makes its choices from it.
"""

from dataclasses import dataclass
from typing import Any, Literal

DraftMode = Literal["auto", "tree", "chain", "off"]
DrafterName = Literal["streams", "two-model", "prompt-lookup", "none"]
Insertion = Literal["leaf", "deferred", "parallel"]
Mode = Literal["shared", "lossless"]
StreamPosition = Literal["anchor", "anchor_plus_j"]
Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]
QuantizationMode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class DraftOptions:
    """What a user may fix about drafting; None leaves the choice to the plan.

    Attributes:
        tree: ``chain:DEPTH``, ``cartesian:K1xK2x..`` (candidates per stream) or ``best-first:NODES`` (a new tree in
            every pass, of the likeliest paths under the streams' own probabilities).
        insertion: when the streams of a node are run: along with the tree, where the node is the end of its likeliest
            path (leaf) or whichever it is (parallel), or on their own, once the node is known (deferred).
        prune_threshold: early-exit pruning below this probability.
        calibration: measured costs and acceptance, a ``specstream_mlx.planning.calibration.Calibration``; "stored":
            what ``calibrate`` left on this machine, if anything.
    """

    tree: str | None = None
    insertion: Insertion | None = None
    prune_threshold: float | None = None
    calibration: Any = "stored"

    @property
    def way(self) -> str | None:
        """The only way to draft, as a drafter names its ways; None: the better one."""
        return self.insertion


@dataclass(frozen=True)
class DraftReport:
    """The plan as shown to users: ``nodes`` counts drafted nodes (the most per pass), the root not included.

    ``note`` says why a stored calibration was left aside; ``insertion`` is that of streams, None for other drafters.
    """

    mode: str
    gamma: int
    nodes: int
    insertion: str | None
    plan: str
    note: str | None = None
    drafter: str = "streams"

"""Every kind of head that is trained here, by its drafter's name."""

from __future__ import annotations

from .eagle import EagleKind
from .eagle3 import Eagle3Kind
from .hydra import HydraKind
from .kind import HeadKind
from .medusa import MedusaKind

KINDS: dict[str, HeadKind] = {kind.name: kind for kind in (MedusaKind(), HydraKind(), EagleKind(), Eagle3Kind())}

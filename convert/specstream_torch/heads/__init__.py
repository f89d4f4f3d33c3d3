"""Draft heads of other methods, trained on packed rows: Medusa, Hydra, EAGLE, EAGLE-3."""

from .kinds import KINDS
from .trainer import HeadConfig, train_head

__all__ = ["KINDS", "HeadConfig", "train_head"]

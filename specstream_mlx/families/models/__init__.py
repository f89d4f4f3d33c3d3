"""Models that mlx-lm lacks, written as mlx-lm writes its own; a family names its one as ``MODEL``."""

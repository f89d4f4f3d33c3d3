"""The command line of specstream-mlx: one module per command, ``app`` assembles them."""

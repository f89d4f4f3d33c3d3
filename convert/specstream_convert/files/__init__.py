"""Weight files: validated reading and reproducible writing of safetensors, shards, allowed pickles."""

"""A PyTorch implementation of Speculative Streaming on Hugging Face modules: trainer and parity oracle.

    streams.py     the stream tensors, their start value, specstream_config.json
    decoder.py     where a Hugging Face model keeps what the stream forward needs
    modeling.py    the forward pass: main rows, then stream rows, and the mask between them
    loss.py        batches, anchors and the training loss
    checkpoint.py  PEFT set-up, saving and loading (forms A and B)
    finetune.py    the recipe: ``python -m specstream_torch.finetune --help``
    self_targets.py  the base's own greedy answers, what lossless streams learn
    generate.py    reference logits at one anchor
    testing.py     tiny random checkpoints: ``python -m specstream_torch.testing --help``

Needs the ``torch`` extra. Nothing here imports MLX, and the runtime imports nothing from here.
"""

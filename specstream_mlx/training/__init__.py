"""Training streams on MLX: the counterpart of ``mlx_lm lora``, with the stream forward, mask and loss of our own.

forward.py      main rows, then the stream rows of many anchors
loss.py         the loss and its gradients, in pieces that bound the memory
batches.py      examples -> batches, in an order that depends on the seed alone
datasets.py     mlx-lm's data formats -> examples
distill.py      the model's own answers -> examples
settings.py     every setting of a run
trainable.py    what trains: streams and LoRA
start.py        the adapter that a training starts from
trainer.py      the loop
evaluation.py   acceptance by depth on a validation split
restart.py      restart points
log.py          the log and its plot
output.py       the adapter directory
export_peft.py  the same in PEFT's form
run.py          all of it, from a model's name to an adapter
"""

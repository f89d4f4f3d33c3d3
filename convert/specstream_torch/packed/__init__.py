"""A fine-tune of Llama models in shared mode that wastes little: packed rows, merged LoRA, a short head.

`packing` lays examples with a common beginning behind one copy of it, `llama` is the forward, `loss` the loss over
part of the vocabulary, `trainer` the loop with restart points and a budget of time.
"""

"""What a converted model needs to run.

These files (and the kernels they import) travel with every checkpoint, rewritten into one flat
folder, so they import torch, transformers and each other, nothing else; always as `from attnconvert.x.y import name`.
"""

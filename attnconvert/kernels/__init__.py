"""Attention operators: `<op>/{api,reference,triton}.py`. Torch only; importing transformers here is an error."""

"""Converted models in vLLM: an out-of-tree plug-in. vLLM calls `plugin.register`; `plan` and `pool` work without vLLM."""

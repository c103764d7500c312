"""Block-sparse attention: each token sees the blocks of keys that score best for it."""

"""Softmax attention in which every KV head has its own span: attention sinks and a window that grows with the query's position."""

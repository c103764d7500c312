"""Softmax attention in which each token uses some of the heads."""

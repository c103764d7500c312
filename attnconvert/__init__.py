"""attnconvert: swap a pretrained transformer's attention for a cheaper kind, give the quality back, save an ordinary checkpoint."""

__version__ = "0.1.0"

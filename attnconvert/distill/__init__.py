"""What trains a converted model: attention transfer, LoRA finetuning, losses, data, the training loop."""

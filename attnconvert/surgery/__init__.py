"""What changes a model: finding attention sites, planning types, the swap, the methods, and the runtime that travels with a checkpoint."""

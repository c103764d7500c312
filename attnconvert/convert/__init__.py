"""The life of one conversion: load, plan, run, save, evaluate."""

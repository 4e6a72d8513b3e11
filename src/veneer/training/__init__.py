"""Training: transformers' `Trainer` for adapters, whole runs, and what is done with a finished one (`run`)."""

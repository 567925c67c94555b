"""What a MOA holds and what a LoRA subject brings along: loaded, and put beside a MODEL."""

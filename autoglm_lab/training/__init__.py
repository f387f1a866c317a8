"""Fine-tuning inside a budget: the loop is transformers' Trainer, the adapters are peft's, the memory is ours."""

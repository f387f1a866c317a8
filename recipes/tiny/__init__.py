"""autoglm-tiny: procedural data, tokenizer, training and evaluation of the embedded model."""

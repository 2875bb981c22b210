"""Tasks whose prompt pairs are generated for the model's own tokenizer, one module each."""

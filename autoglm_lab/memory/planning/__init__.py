"""What a model will need, before it is loaded or asked."""

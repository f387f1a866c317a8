"""One turn of a conversation, wherever the model runs."""

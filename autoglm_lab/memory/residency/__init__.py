"""Where the weights of each module are, and moving them."""

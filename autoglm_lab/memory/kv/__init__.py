"""Keys and values in pages, and what is kept of them between turns."""

"""What measures and moves bytes. Knows torch; knows nothing of chat or widgets."""

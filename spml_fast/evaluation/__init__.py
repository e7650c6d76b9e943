"""Average precision and the other metrics, over splits and ranks."""

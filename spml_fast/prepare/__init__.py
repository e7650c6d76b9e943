"""From raw annotations and images to a Manifest."""

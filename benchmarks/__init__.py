"""What the figures of the documentation were made with. A package, so that no other one of that name is found."""

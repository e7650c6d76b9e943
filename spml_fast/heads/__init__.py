"""Heads: from the backbone's feature map to logits. One file each."""

"""Backbone, head and classifier."""

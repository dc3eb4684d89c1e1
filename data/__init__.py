"""Clips, made-up worlds, caches and settings: knows no model."""

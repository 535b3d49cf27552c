"""Serving: many tasks on one model."""

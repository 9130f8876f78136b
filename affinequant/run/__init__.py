"""Durable progress: stages on disk, the folder around them, and the one way to write."""

"""The cloud cluster: its launcher configuration and what guards it."""

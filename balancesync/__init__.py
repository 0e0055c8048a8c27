"""Copies users' balances from Redis to PostgreSQL, exactly, and proves it."""

__version__ = "0.1.0"

"""Bugs planted on purpose: tests that stay green beside one of them have lost something."""

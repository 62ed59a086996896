"""Bugs planted on purpose: a suite that stays green beside one of them has lost a test."""

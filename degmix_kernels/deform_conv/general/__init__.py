"""The general path: blocks of 16 channels or more share offsets and weights."""

"""A visit to a GPU machine: prepared and rehearsed without a GPU, then run in one command."""

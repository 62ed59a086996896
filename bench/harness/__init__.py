"""How something is measured: checked, timed, written to a file. Knows no op."""

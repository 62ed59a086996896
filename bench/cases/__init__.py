"""What is measured: every op and the model, at the shapes of :mod:`bench.cases.shapes`."""

"""Facts of the small data set that ``conftest.rooms`` writes."""

SIZE = (48, 64)
COUNT = 8
SETTINGS = {"seed": 3, "val_fraction": 0.25}
TASKS = ("semseg", "depth", "normals", "edge", "human_parts", "sal")

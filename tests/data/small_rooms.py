"""Facts of the small data set that ``conftest.rooms`` writes."""

SIZE = (48, 64)
COUNT = 6
TASKS = ("semseg", "depth", "normals", "edge", "human_parts", "sal")

"""Tasks of the literature, each a script with its data, its result and a baseline.

python -m model.tasks.text|sentiment|tags|translation|answers|sequences|maps
"""

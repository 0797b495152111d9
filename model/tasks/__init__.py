"""Tasks of the literature, each a script with its data, its figure and what that is compared with.

python -m model.tasks.text|sentiment|tags|translation|answers|sequences|maps
"""

"""The toy world: procedural pictures of people in scenes, from a description to pixels.

Imports numpy and Pillow; knows nobody. The small models that live in it have the shapes of `shape.py`.
"""
